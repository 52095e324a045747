"""Commands whose arguments are a function's signature and docstring."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pytest

from rewarm.arguments import call, flags_of

called = []


@pytest.fixture(autouse=True)
def forget():
    called.clear()


def bake(
    recipes: Sequence[str],
    *,
    oven: str,
    minutes: int = 45,
    heat: float | None = None,
    kind: Literal["bread", "cake"] = "bread",
    spices: Sequence[str] = (),
    flours: Mapping[str, float] | None = None,
    taste: str | Callable[[str], float] = "good",
    is_vegan: bool = False,
    smell: Callable[[], None] | None = None,
) -> None:
    """Bake after recipes.

    They may be several.

    Args:
        recipes: Recipes to follow.
        oven: Oven to bake in, from cold
            to hot.
        minutes: How long, in minutes, >= 1.
        heat: Heat in degrees.
        kind: What it is to become.
        spices: Spices to add.
        flours: Flours and their grams.
        taste: What it is to taste like, 100 % of it.
        is_vegan: Leave out the eggs.
        smell: Not for the command line.
    """
    called.append({name: value for name, value in locals().items() if value is not None})


def test_what_is_not_given_is_the_functions_default():
    call(bake, ["one", "--oven", "hot"], "bake")
    defaults = {"minutes": 45, "kind": "bread", "spices": (), "taste": "good", "is_vegan": False}
    assert called == [{"recipes": ["one"], "oven": "hot", **defaults}]


def test_values_have_the_types_of_the_signature():
    arguments = [
        "one",
        "two",
        "--oven",
        "7",
        "--minutes",
        "9",
        "--heat",
        "2e2",
        "--kind",
        "cake",
        "--is-vegan",
    ]
    call(bake, [*arguments, "--taste", "sweet"], "bake")
    (given,) = called
    assert given == {
        "recipes": ["one", "two"],
        "oven": "7",
        "minutes": 9,
        "heat": 200.0,
        "kind": "cake",
        "spices": (),
        "taste": "sweet",
        "is_vegan": True,
    }


def test_a_list_takes_several_values_and_may_be_repeated():
    call(bake, ["one", "--oven", "x", "--spices", "salt", "mint", "--spices", "dill"], "bake")
    assert called[0]["spices"] == ["salt", "mint", "dill"]


def test_a_mapping_is_written_as_name_and_value_one_at_a_time():
    call(bake, ["--oven", "x", "--flours", "rye=200", "--flours", "oat=50.5", "one"], "bake")
    assert called[0]["flours"] == {"rye": 200.0, "oat": 50.5}
    assert called[0]["recipes"] == ["one"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["one"], "missing --oven"),
        (["--oven", "x"], "missing recipes"),
        (["one", "--oven"], "--oven: expected one argument"),
        (["one", "--oven", "x", "--minute", "3"], "there is no --minute; did you mean --minutes?"),
        (["one", "--oven", "x", "--qqq=3"], "there is no --qqq; known are --oven, --minutes, --heat, "),
        (["one", "--oven", "x", "--minutes", "long"], "--minutes is 'long'; it must be a whole number"),
        (["one", "--oven", "x", "--minutes", "1.5"], "--minutes is '1.5'; it must be a whole number"),
        (["one", "--oven", "x", "--heat", "hot"], "--heat is 'hot'; it must be a number"),
        (["one", "--oven", "x", "--kind", "pie"], "--kind is 'pie'; it must be one of 'bread', 'cake'"),
        (
            ["one", "--oven", "x", "--flours", "rye"],
            "--flours is 'rye'; it must be NAME=NUMBER, each name once",
        ),
        (["one", "--oven", "x", "--flours", "rye=x"], "--flours is 'rye=x'; it must be NAME=NUMBER"),
        (["one", "--oven", "x", "--flours", "a=1", "--flours", "a=2"], "--flours is 'a=2'; it must be"),
        (["one", "--oven", "x", "--smell", "good"], "there is no --smell"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, said):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call(bake, arguments, "bake")
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)
    assert called == []


def test_help_is_the_docstring(capsys):
    with pytest.raises(SystemExit) as stop:
        call(bake, ["--help"], "bake")
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in (
        "usage: rewarm bake --oven OVEN [--minutes MINUTES]",
        "Bake after recipes. They may be several.",
        "--oven OVEN Oven to bake in, from cold to hot. (required, type: str)",
        "--minutes MINUTES How long, in minutes, >= 1. (default: 45) (type: int)",
        "--heat HEAT Heat in degrees. (type: float)",
        "--kind {bread,cake} What it is to become. (default: bread)",
        "--is-vegan Leave out the eggs.",
        "taste like, 100 % of it. (default: good)",
    ):
        assert text in shown
    assert "smell" not in shown


def score(data: str, *, by: str, **options: Any) -> None:
    """Score data.

    Args:
        data: What to score.
        by: How.
        **options: Options of the score.
    """
    called.append((data, by, options))


def by_length(data: str, *, part: str = "all") -> None:
    """Score by length.

    Args:
        data: What to score.
        part: Part of it.
    """


class Model:
    """A model.

    Args:
        path: Folder of the model.
    """

    def __init__(self, *, path: str) -> None: ...


def by_loss(data: str, *, part: str = "end", seed: int = 0) -> None:
    """Score by loss.

    Args:
        data: What to score.
        seed: Seed of it.
    """


OPTIONS = {"length": [by_length], "loss": [Model, by_loss]}


def test_the_options_of_a_command_are_those_of_its_functions():
    helps = {flag.name: flag.help for flag in flags_of(score, OPTIONS)}
    assert helps == {
        "data": "What to score.",
        "by": "How.",
        "part": "Part of it. (default: all)",
        "path": "loss: Folder of the model.",
        "seed": "loss: Seed of it. (default: 0)",
    }
    call(score, ["d", "--by", "loss", "--path", "p"], "score", OPTIONS)
    call(score, ["d", "--by", "loss", "--seed", "3"], "score", OPTIONS)
    assert called == [("d", "loss", {"path": "p"}), ("d", "loss", {"seed": 3})]
