from pathlib import Path

import pytest

from rewarm.scoring.scorer import read_scorer


def of_name(path):
    """A score that a test can know."""
    return len(path.name)


def without_score(path):
    return "good"


def test_the_last_line_that_a_command_writes_is_the_score(tmp_path):
    path = tmp_path / "a folder; rm"
    path.mkdir()
    (path / "score.txt").write_text("0.25\n")
    assert read_scorer("echo loading; cat {}/score.txt; echo")(path) == 0.25
    assert read_scorer("cat {}/*.txt | sed s/0/1/")(path) == 1.25


def test_a_functions_dotted_name_is_a_scorer():
    assert read_scorer(f"{__name__}.of_name")(Path("x/abc")) == 3.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exit 3 # {}", r"command 'exit 3 # some/folder' failed with exit code 3"),
        (
            "echo done {}",
            "the last line that command 'echo done some/folder' wrote is 'done some/folder', but",
        ),
        ("true {}", "wrote is '', but a score is a finite number"),
        ("echo nan # {}", "is 'nan', but a score is a finite number"),
        (f"{__name__}.without_score", "without_score returned for some/folder is 'good', but"),
    ],
)
def test_what_gives_no_score_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        read_scorer(text)(Path("some/folder"))


@pytest.mark.parametrize("text", ["python score.py", "accuracy", "json.nothing", "no_such_module.score", ""])
def test_what_is_neither_command_nor_function_is_named(text):
    with pytest.raises(ValueError, match="neither a command with {} in it nor a function's dotted name"):
        read_scorer(text)
