import json

import pytest

from rewarm.rollouts.puzzle_scores import evaluate, parse_formula
from rewarm.rollouts.rewards import reasoning_gym

gym = pytest.importorskip("reasoning_gym")
sympy = pytest.importorskip("sympy")


@pytest.mark.parametrize(
    "text",
    [
        "1",
        "-1.5e3",
        "[1, [2, 'a'], (), {}, {1: 'b'}, {3}]",
        "None",
        "True",
        "(0x5 + 0x3) << 1",
        "~1 & 3 | 4 ^ 5",
        "7 // 2 + 7 % 2 - 7 / 2 * 2**3 >> 0 if 0 else 1"[:19],
        "'a' 'b'",
        "1 + 2j",
        " [1]\n",
    ],
)
def test_what_is_evaluated_has_the_value_that_python_gives_it(text):
    assert evaluate(text) == eval(text.strip())
    assert type(evaluate(text)) is type(eval(text.strip()))


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "f(1)",
        "[].append",
        "[1][0]",
        "[x for x in [1]]",
        "f'{1}'",
        "(lambda: 1)()",
        "[*[1]]",
        "1 < 2",
        "{**{}}",
        "[1] * 3",
        "'a' * 3",
        "'%s' % 1",
        "1 if 1 else 2",
        "(a := 1)",
        "1 and 2",
        "not 1",
    ],
)
def test_what_is_more_than_literals_and_arithmetic_is_not_evaluated(text):
    with pytest.raises(ValueError, match="must"):
        evaluate(text)


FORMULAS = [
    "2*x**2 + 3*x - 1/2",
    "exp(x)*sin(2*x) + C",
    "log(x) - sqrt(x) + Abs(y)",
    "-(3 + 4)*(5 - 6)/7",
    "3!",
    "factorial(4)",
    "1.5e3*pi + E + I",
    "asin(x) + atan2(x, y) + Rational(1, 3)",
    "x*(y + z)**3",
    "alpha + beta1",
    "gamma(x) + zeta(2)",
    "Max(x, 3)",
    "3*Integral(x**3*cos(3*x), x) + C",
]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_is_parsed_as_sympy_parses_it(text):
    assert parse_formula(text) == sympy.parse_expr(text)


@pytest.mark.parametrize(
    "text",
    [
        "x.__class__",
        "x.real",
        "'a'",
        "f'{x}'",
        "lambda x: x",
        "x if x else y",
        "a__b",
        "x; y",
        "x @ y",
        "[x][0] or 1",
        "sin.eval",
        "S('1')",
        "x: y",
        "`x`",
        "x y",
    ],
)
def test_what_is_no_formula_is_not_parsed(text):
    with pytest.raises((ValueError, SyntaxError)):
        parse_formula(text)


@pytest.mark.parametrize(
    "name", ["open", "eval", "exec", "lambdify", "sympify", "S", "preview", "print", "compile"]
)
def test_the_names_of_other_things_than_functions_are_symbols(name):
    assert parse_formula(name) == sympy.Symbol(name)


def answers(puzzle):
    right = str(puzzle["answer"])
    grid = [line.split() for line in right.split("\n")]
    yield from (right, f"{right} ", right[:-1], "", "3", "x", "[1, 2]", "x**2 + C", "(1+2)*8")
    yield from (json.dumps([right]), repr(grid), repr(list(right)), repr(right.split()))
    yield from (str(puzzle["metadata"].get(key)) for key in ("solution", "expression", "example_answer"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a data set leaves files open
def test_every_data_set_gives_the_scores_that_it_gives_outside_of_the_sandbox():
    from reasoning_gym.factory import DATASETS, get_score_answer_fn

    rows = [
        (text, name, puzzle)
        for name in sorted(set(DATASETS) - {"composite"})
        for puzzle in json.loads(json.dumps(list(gym.create_dataset(name, size=1, seed=5)), default=str))
        for text in sorted(set(answers(puzzle)))
    ]
    assert len(rows) > 105 * 8
    texts, names, puzzles = zip(*rows, strict=True)
    tagged = [f"<answer>{text}</answer>" for text in texts]
    scores = reasoning_gym([""] * len(rows), tagged, dataset=names, entry=puzzles)
    scorers = {name: get_score_answer_fn(name) for name in set(names)}
    right = set()
    for (text, name, puzzle), score in zip(rows, scores, strict=True):
        try:
            expected = scorers[name](text.strip(), puzzle)
        except Exception:
            expected = 0.0  # nonsense ended the training before
        assert score == expected, (name, text)
        right |= {name} if score > 0.9 else set()
    assert len(right) >= 95


def test_nonsense_scores_zero_and_a_broken_puzzle_is_an_error():
    puzzle = gym.create_dataset("prime_factorization", size=1, seed=1)[0]
    columns = {"dataset": ["prime_factorization"], "entry": [puzzle]}
    assert reasoning_gym([""], ["<answer>seven</answer>"], **columns) == [0.0]
    columns["entry"] = [{"question": "", "answer": "x", "metadata": {}}]
    with pytest.raises(
        ValueError,
        match="column 'entry' holds .*, must be a puzzle that prime_factorization can score: ValueError",
    ):
        reasoning_gym([""], ["<answer>seven</answer>"], **columns)
