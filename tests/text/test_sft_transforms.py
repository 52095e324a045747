"""Data transforms against what the papers' rows look like, and counts of what they keep."""

import math
from collections.abc import Callable
from typing import Any

import jsonargparse
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewarm.functional.sft_losses import ditto_loss
from rewarm.text.sft_transforms import (
    EraseSystemPrompt,
    RTuning,
    Spectrum,
    answer_entropy,
    erase_system_prompt,
    knows,
    mix_generated,
    r_tuning_segments,
    refusal_segments,
    repeat_sentence,
    spectrum_learn,
    surer_half,
)

NAN = math.nan


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def text_of(segments):
    return "".join(text for text, _ in segments)


# --- R-Tuning -------------------------------------------------------------------------------------


def test_r_tuning_writes_the_papers_text_and_learns_answer_and_certainty():
    segments = r_tuning_segments("Question: Capital of France? Answer:", " Paris.", sure=True)
    assert text_of(segments) == (
        "Question: Capital of France? Answer: Paris. Are you sure you accurately answered the question"
        " based on your internal knowledge? I am sure."
    )
    assert [text for text, learnt in segments if learnt] == [" Paris.", " I am sure."]
    assert text_of(r_tuning_segments("Q", "A", sure=False)).endswith("? I am unsure.")


def test_a_refusal_takes_the_place_of_the_answer_only_where_it_was_unknown():
    known = refusal_segments("Q: ", "A.", known=True, refusal="No idea.")
    unknown = refusal_segments("Q: ", "A.", known=False, refusal="No idea.")
    assert (text_of(known), text_of(unknown)) == ("Q: A.", "Q: No idea.")
    assert [learnt for _, learnt in unknown] == [False, True]


def test_a_prediction_knows_what_it_contains():
    assert knows("Rome", "Of course, Rome!")
    assert not knows("Rome", "rome")


def test_answers_that_agree_are_surer():
    samples = [list("aaaaa"), list("aabcd"), list("abcde"), list("aaabb")]
    entropies = [answer_entropy(answers) for answers in samples]
    frequencies = [[5], [2, 1, 1, 1], [1] * 5, [3, 2]]
    expected = [-sum(f / 5 * math.log(f / 5) for f in counts) for counts in frequencies]
    assert entropies == pytest.approx(expected, abs=1e-12)
    assert surer_half(entropies) == [True, False, False, True]


@given(st.lists(st.floats(0, 3), max_size=20))
@settings(deadline=None)
def test_half_are_surer_and_none_of_them_less_so(entropies):
    sure = surer_half(entropies)
    assert sum(sure) == len(entropies) // 2
    inside = [e for e, s in zip(entropies, sure, strict=True) if s]
    outside = [e for e, s in zip(entropies, sure, strict=True) if not s]
    assert max(inside, default=0.0) <= min(outside, default=9.0)


# --- Spectrum tuning ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "learnt"),
    [
        ("DOOO", "-xxx"),
        ("OOO", "-xx"),
        ("DIOIO", "--x-x"),
        ("IOIO", "---x"),
        ("ODO", "--x"),
        ("D", "-"),
        ("", ""),
    ],
)
def test_outputs_are_learnt_but_not_a_first_one_without_description(row, learnt):
    kinds = [{"D": "description", "I": "input", "O": "output"}[letter] for letter in row]
    assert spectrum_learn(kinds) == [mark == "x" for mark in learnt]


# --- batch-scheduled sampling ---------------------------------------------------------------------


def test_only_replaceable_tokens_are_mixed_and_in_the_wanted_share():
    n = 20_000
    tokens, generated = torch.arange(n), -torch.arange(n) - 1
    replaceable = torch.rand(n, generator=rng()) < 0.5
    mixed = mix_generated(tokens, generated, replaceable, probability=0.3, generator=rng(1))
    replaced = mixed != tokens
    assert (mixed[replaced] == generated[replaced]).all()
    assert not (replaced & ~replaceable).any()
    count = int(replaceable.sum())
    assert abs(int(replaced.sum()) - 0.3 * count) < 4 * math.sqrt(count * 0.3 * 0.7)
    again = mix_generated(tokens, generated, replaceable, probability=0.3, generator=rng(1))
    assert torch.equal(mixed, again)


def test_probability_zero_is_plain_fine_tuning_and_one_replaces_all():
    tokens, generated, mask = (
        torch.tensor([1, 2, 3]),
        torch.tensor([7, 8, 9]),
        torch.tensor([False, True, True]),
    )
    options = {"generator": rng()}
    assert mix_generated(tokens, generated, mask, probability=0.0, **options).tolist() == [1, 2, 3]
    assert mix_generated(tokens, generated, mask, probability=1.0, **options).tolist() == [1, 8, 9]


# --- pseudo-repetitions ---------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 15))
@settings(deadline=None)
def test_each_repeated_target_points_at_the_same_one_a_sentence_earlier(first, period, repeats):
    prefix, sentence = 100 + torch.arange(first), torch.arange(period)
    length = first + period + repeats
    row = repeat_sentence(prefix, sentence, length)
    expected = [*prefix.tolist(), *(i % period for i in range(length - first))]
    assert row.tokens.tolist() == expected
    assert row.learn.tolist() == [place >= first + period for place in range(length)]
    targets = row.tokens[1:]
    for position, before in enumerate(row.earlier.tolist()):
        if row.learn[position + 1]:
            assert before == position - period
            assert targets[before] == targets[position]
        else:
            assert before == -1


def test_a_repeated_row_is_what_the_loss_takes():
    row = repeat_sentence(torch.tensor([9]), torch.tensor([1, 2, 3]), length=12)
    logprobs = torch.rand(1, 11, generator=rng()).log()
    losses = ditto_loss(logprobs, row.earlier[None], decay=0.5)
    p = logprobs.exp()[0]
    penalised = row.learn[1:]
    expected = [-math.log(1 - abs(p[t] - 0.5 * p[t - 3])) for t in range(11) if penalised[t]]
    assert losses[0, penalised].tolist() == pytest.approx(expected, rel=1e-5)


# --- rows ------------------------------------------------------------------------------------------------


def test_a_system_prompt_is_replaced_added_or_taken_away():
    user, told = {"role": "user", "content": "2 + 2?"}, {"role": "system", "content": "Show all steps."}
    new = {"role": "system", "content": "Think."}
    assert erase_system_prompt([told, user], "Think.") == [new, user]
    assert erase_system_prompt([user], "Think.") == [new, user]
    assert erase_system_prompt([user, told], "") == [user]
    assert told["content"] == "Show all steps."


IDS, MASK = torch.tensor([1, 2]), torch.tensor([True, True])


def test_r_tuning_rewrites_rows_by_what_the_model_said():
    row = {"prompt": "2+2=", "completion": "4", "prediction": "it is 4.", "level": 1}
    assert RTuning(question=" Sure?")(row) == row | {
        "segments": [("2+2=", False), ("4", True), (" Sure?", False), (" I am sure.", True)]
    }
    wrong = row | {"prediction": "5"}
    assert RTuning()(wrong)["segments"][-1] == (" I am unsure.", True)
    refusal = RTuning(refusal="no idea")
    assert refusal(row)["segments"] == [("2+2=", False), ("4", True)]
    assert refusal(wrong)["segments"] == [("2+2=", False), ("no idea", True)]


def test_spectrum_rows_learn_outputs_with_their_ends():
    row = {"description": "a die", "examples": [{"output": "3"}, {"input": "again", "output": "6"}]}
    expected = [("a die;", False), ("3;", True), ("again;", False), ("6;", True)]
    assert Spectrum(separator=";")(row)["segments"] == expected
    bare = Spectrum(separator=";")({"examples": row["examples"]})["segments"]
    assert bare == [("3;", False), ("again;", False), ("6;", True)]


def test_rewriting_can_be_named_in_a_config():
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--transform", type=Callable[[dict[str, Any]], dict[str, Any]] | None)
    for made, config in (
        (RTuning(refusal="no"), {"class_path": "rewarm.RTuning", "init_args": {"refusal": "no"}}),
        (Spectrum(), {"class_path": "rewarm.Spectrum"}),
        (EraseSystemPrompt("x"), {"class_path": "rewarm.EraseSystemPrompt", "init_args": {"generic": "x"}}),
    ):
        parsed = parser.instantiate_classes(parser.parse_object({"transform": config}))
        assert parsed.transform == made


@pytest.mark.parametrize(
    ("act", "named"),
    [
        (
            lambda: RTuning()({"prompt": "a", "completion": "b"}),
            "column 'prediction': must be text, is NoneType",
        ),
        (lambda: Spectrum()({"examples": []}), "column 'examples': must be a list"),
        (lambda: Spectrum()({"examples": [{"input": "a"}]}), "column 'output': must be text"),
        (lambda: EraseSystemPrompt("x")({"text": "a"}), "column 'messages': must be a list"),
        (lambda: knows("", "anything"), "answer is empty"),
        (lambda: answer_entropy([]), "answers is empty"),
        (lambda: surer_half([0.0, NAN]), r"entropies\[1\] is nan"),
        (lambda: spectrum_learn(["output", "system"]), "kind is 'system'; known are 'description'"),
        (
            lambda: mix_generated(IDS, IDS[:1], MASK, probability=0.5, generator=rng()),
            r"generated \(1,\)",
        ),
        (lambda: mix_generated(IDS, IDS, MASK, probability=1.5, generator=rng()), "probability is 1.5"),
        (lambda: mix_generated(IDS, IDS, MASK, probability=NAN, generator=rng()), "probability is nan"),
        (lambda: repeat_sentence(IDS[:0], IDS, 9), "prefix has 0 tokens and sentence 2"),
        (lambda: repeat_sentence(IDS, IDS[:0], 9), "sentence 0"),
        (lambda: repeat_sentence(IDS, IDS, 4), "length is 4; it must be at least 5"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(act, named):
    with pytest.raises(ValueError, match=named):
        act()
