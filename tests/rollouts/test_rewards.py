import json
import math
import re
import sys
import threading
import time
from decimal import Decimal

import pytest
import torch

from rewarm.rollouts.rewards import (
    LONGEST_NUMBER,
    RewardError,
    _tagged,
    exact_number,
    gsm8k,
    math_verify,
    reasoning_gym,
    score,
)


def judge(reward, completion, answer):
    (value,) = reward(["question"], [completion], answer=[answer])
    return value


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("42", "42"),
        ("The answer is 42.", "42"),
        ("First 41, then 42", 42),
        ("42.0", "42"),
        ("42", 42.0),
        ("0.1", 0.1),
        ("0.10", Decimal("0.1")),
        ("$1,234.50", "1234.5"),
        ("1234567", "1,234,567"),
        ("it costs \\$18.", "$18"),
        ("$$18$$", "$18$"),
        ("**18**", "18"),
        ("50%", "50"),
        ("50\\%", "50%"),
        ("x = -3", "-3"),
        ("x=-3", "-3"),
        ("(-3)", "-3"),
        ("\u22123", -3),
        ("-$5", "-5"),
        ("$-5", "-$5"),
        ("+7", "7"),
        ("10-3", "3"),
        ("a-3", "3"),
        ("7 - 3 = 4", "4"),
        (".5", "0.5"),
        ("0.75", "3/4"),
        ("3/4", "0.75"),
        ("6/8", "3/4"),
        ("-3/4", "-0.75"),
        ("1e3", "1000"),
        ("2.5e-3", "0.0025"),
        ("007", "7"),
        ("0", "-0"),
        ("1, 2, 3", "3"),
        ("12,34", "34"),
        ("1,2345", "2345"),
        ("7\n", "7"),
        ("9" * 6000, "9" * 6000),
    ],
)
def test_exact_number_accepts(completion, answer):
    assert judge(exact_number, completion, answer) == 1.0


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("", "42"),
        ("forty-two", "42"),
        ("42 and then 43", "42"),
        ("142", "42"),
        ("42.01", "42"),
        ("42.0000000000000000001", "42"),
        ("3", "-3"),
        ("-3", "3"),
        ("10 -3", "3"),
        ("1,234", "234"),
        ("1234", "1.234"),
        ("50%", "0.5"),
        ("3/0", "3"),
        ("3/4", "4"),
        ("1e999999999999", "1"),
        ("9" * 6000, "42"),
    ],
)
def test_exact_number_rejects(completion, answer):
    assert judge(exact_number, completion, answer) == 0.0


@pytest.mark.parametrize(
    "answer", ["", "forty", "18 dollars", "3/0", "#### 5", "1 2", True, float("nan"), math.inf]
)
def test_a_reference_that_is_no_number_is_an_error(answer):
    with pytest.raises(ValueError, match=r"column 'answer' holds .*, must be a number"):
        judge(exact_number, "5", answer)


SOLUTION = "He sold 48/2 = <<48/2=24>>24 clips.\nIn total 48+24 = <<48+24=72>>72.\n#### 72"


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        (SOLUTION, SOLUTION, 1.0),
        ("#### 72", SOLUTION, 1.0),
        ("####72", "72", 1.0),
        ("####\n $72.00 in total", "72", 1.0),
        ("#### 1,072.", "text\n#### 1,072", 1.0),
        ("#### -5", "#### -5", 1.0),
        ("#### 3\n#### 72", 72, 1.0),
        ("The answer is 72", "72", 0.0),
        ("#### 72\n####", "72", 0.0),
        ("#### 72\n#### 3", "72", 0.0),
        ("#### about 72", "72", 0.0),
        ("### 72", "72", 0.0),
        ("72", "72", 0.0),
        ("", "72", 0.0),
    ],
)
def test_gsm8k_reads_the_number_after_the_last_marker(completion, answer, value):
    assert judge(gsm8k, completion, answer) == value


def test_a_gsm8k_solution_without_its_number_is_an_error():
    with pytest.raises(ValueError, match="column 'answer'"):
        judge(gsm8k, "#### 1", "1 + 1 = 2\n####")


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        ("so $x = \\frac{2}{4}$", "\\frac{1}{2}", 1.0),
        ("\\boxed{0.5}", "$\\frac12$", 1.0),
        ("thus \\boxed{x + 1}", "1 + x", 1.0),
        ("\\boxed{(x+1)^2}", "x^2 + 2x + 1", 1.0),
        ("the answer is 7", 7, 1.0),
        ("\\boxed{\\text{east}}", "\\text{east}", 1.0),
        ("\\boxed{3}", "We add: \\boxed{3}", 1.0),
        ("\\boxed{3}", "4", 0.0),
        ("no mathematics", "4", 0.0),
        ("", "4", 0.0),
    ],
)
def test_math_verify_compares_expressions(completion, answer, value):
    pytest.importorskip("math_verify")
    assert judge(math_verify, completion, answer) == value


def test_math_verify_works_outside_the_main_thread():
    pytest.importorskip("math_verify")
    values = []
    thread = threading.Thread(target=lambda: values.append(judge(math_verify, "\\boxed{2}", "2")))
    thread.start()
    thread.join()
    assert values == [1.0]


def test_math_verify_names_a_reference_that_it_cannot_parse():
    pytest.importorskip("math_verify")
    with pytest.raises(ValueError, match="column 'answer' holds ''"):
        judge(math_verify, "\\boxed{2}", "")


def test_reasoning_gym_scores_as_the_data_set_does():
    gym = pytest.importorskip("reasoning_gym")
    for name in ("chain_sum", "countdown"):
        data = gym.create_dataset(name, seed=3, size=3)
        for puzzle in data:
            entry = json.dumps(puzzle) if name == "chain_sum" else puzzle
            right = puzzle["metadata"].get("solution") or puzzle["answer"]
            texts = [
                right,
                f"Hm. <answer>1</answer> No: <answer>\n{right} </answer> done",
                "<answer>?</answer>",
            ]
            values = reasoning_gym([""] * 3, texts, dataset=[name] * 3, entry=[entry] * 3)
            assert values[:2] == [1.0, 1.0]
            assert values[2] == data.score_answer("?", puzzle) < 1


def test_an_unknown_reasoning_gym_data_set_lists_the_known_ones():
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match=r"'chain_sums', must be one of .*chain_sum,"):
        reasoning_gym([""], [""], dataset=["chain_sums"], entry=[{}])


@pytest.mark.parametrize(
    ("reward", "package", "columns", "extra"),
    [
        (math_verify, "math_verify", {"answer": ["1"]}, "math"),
        (reasoning_gym, "reasoning_gym", {"dataset": ["none such"], "entry": [{}]}, "puzzles"),
    ],
)
def test_a_missing_package_names_its_extra(reward, package, columns, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"pip install rewarm\[{extra}\]"):
        score(reward, ["q"], ["1"], columns)


@pytest.mark.parametrize("reward", [exact_number, gsm8k, math_verify])
def test_a_missing_reference_names_the_column(reward):
    pytest.importorskip("math_verify")
    with pytest.raises(ValueError, match="column 'answer' is missing"):
        reward(["q"], ["1"])
    with pytest.raises(ValueError, match="column 'answer' is None in row 1"):
        reward(["q", "q"], ["1", "1"], answer=["1", None])
    with pytest.raises(ValueError, match="column 'answer' is missing"):
        score(reward, ["q"], ["1"], {})


@pytest.mark.parametrize(("column", "other"), [("dataset", "entry"), ("entry", "dataset")])
def test_a_missing_puzzle_names_the_column(column, other):
    with pytest.raises(ValueError, match=f"column '{column}' is missing"):
        reasoning_gym(["q"], ["1"], **{other: ["chain_sum"]})


def length(prompts, completions, **columns):
    return [len(text) for text in completions]


def test_score_sums_the_weighted_rewards():
    columns = {"answer": ["42", "1"], "level": [1, 2]}
    assert score(length, ["a", "b"], ["x42", "y"], columns) == [3.0, 1.0]
    assert score([exact_number, length], ["a", "b"], ["x42", "y"], columns) == [4.0, 1.0]
    assert score([exact_number, length], ["a", "b"], ["x42", "y"], columns, [2.0, -0.5]) == [0.5, -0.5]
    assert score(length, [], [], {}) == []


def test_a_reward_sees_prompts_completions_and_columns_by_name():
    def reward(*, completions, prompts, level, **columns):
        assert columns == {"answer": ["x", "y"]}
        return [f"{p}{c}{v}" == "pc1" for p, c, v in zip(prompts, completions, level, strict=True)]

    assert score(reward, ["p", "p"], ["c", "d"], {"level": [1, 2], "answer": ["x", "y"]}) == [1.0, 0.0]


def test_tensors_and_booleans_are_numbers():
    assert score(lambda **_: torch.tensor([0.5, 1.0]), ["p"] * 2, ["c"] * 2, {}) == [0.5, 1.0]
    assert score(lambda **_: [True, False], ["p"] * 2, ["c"] * 2, {}) == [1.0, 0.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "1", [1.0], torch.tensor(math.nan)])
def test_a_value_that_is_no_finite_number_shows_the_row(value):
    def broken(**columns):
        return [1.0, value]

    with pytest.raises(
        RewardError, match=r"reward broken failed on row 1 .*must be a finite number"
    ) as caught:
        score([length, broken], ["p0", "p1"], ["c0", "c1"], {"answer": ["a0", "a1"]})
    assert "(prompt 'p1', completion 'c1', answer 'a1')" in str(caught.value)


def test_an_exception_shows_the_row_in_one_short_line_and_stays_as_the_cause():
    def broken(prompts, completions, answer, **columns):
        return [1 / (int(value) - 2) for value in answer]

    prompts = ["p", "p", "start\n" + "x" * 500 + "end"]
    with pytest.raises(RewardError) as caught:
        score(broken, prompts, ["c0", "c1", "c2"], {"answer": ["0", "1", "2"]})
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    for part in ("reward broken", "row 2", "start\\n", "end'", "'c2'", "answer '2'", "ZeroDivisionError"):
        assert part in message
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_exception_of_no_single_row_is_told_as_that_of_the_batch():
    def pairwise(completions, **columns):
        raise (KeyError("pair") if len(completions) > 1 else IndexError("no pair"))

    with pytest.raises(RewardError, match="reward pairwise failed on the 2 rows: KeyError"):
        score(pairwise, ["p"] * 2, ["c"] * 2, {})


def test_a_callable_object_is_named_by_its_class():
    class Broken:
        def __call__(self, **columns):
            raise RuntimeError("no")

    with pytest.raises(RewardError, match="reward Broken failed on row 0"):
        score(Broken(), ["p"], ["c"], {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((lambda **_: [1.0], ["p"] * 2, ["c"] * 2, {}), "returned 1 values for 2 completions"),
        (([], ["p"], ["c"], {}), "rewards="),
        ((length, ["p"], ["c", "d"], {}), "completions has 2 rows, must have 1"),
        ((length, ["p"], ["c"], {"answer": []}), "answer has 0 rows, must have 1"),
        (([length, length], ["p"], ["c"], {}, [1.0]), r"weights=\[1.0\], must be 2 finite numbers"),
        ((length, ["p"], ["c"], {}, [math.nan]), r"weights=\[nan\]"),
    ],
)
def test_arguments_that_do_not_fit_are_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        score(*arguments)


@pytest.mark.parametrize(
    "piece",
    [
        "1,111",
        "1",
        "1 ",
        "1.",
        "1e",
        "1/",
        "-",
        "$",
        "9,",
        ",111",
        "1e9",
        "####",
        "<answer>",
        "</answer>",
        "\n",
        "x",
    ],
)
def test_plain_rewards_take_time_in_proportion_to_the_length(piece):
    def seconds(length):
        text = piece * (length // len(piece))
        began = time.process_time()
        for reward in (exact_number, gsm8k):
            judge(reward, text, "42")
        _tagged(text)
        return time.process_time() - began

    # A hundred thousand characters and ten times as many; with a quadratic search it would be a hundredfold.
    short = min(seconds(10**5) for _ in range(3))
    assert seconds(10**6) < 30 * short + 0.1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "<answer>b</answer>",
        "a<answer>b</answer>c<answer>d</answer>",
        "<answer>a<answer>b</answer>c</answer>",
        "</answer><answer>a",
        "<answer>a</answer><answer>b",
        "<answer></answer>",
        "<answer>\na\n</answer>",
    ],
)
def test_the_answer_is_in_the_last_pair_of_tags(text):
    found = re.findall("<answer>(.*?)</answer>", text, re.DOTALL)
    assert _tagged(text) == (found[-1] if found else text)


def test_a_number_longer_than_the_longest_equals_nothing():
    digits = "9" * LONGEST_NUMBER
    assert judge(exact_number, digits, digits) == 1.0
    assert judge(exact_number, digits + "9", "9") == 0.0
    with pytest.raises(ValueError, match="column 'answer' holds .*, must be a number"):
        judge(exact_number, "9", digits + "9")
