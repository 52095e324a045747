"""The loop over a user's scores, and what it remembers."""

import json
import sys

import pytest
import torch

from rewarm import cli
from rewarm.commands.mixture import search_mixtures
from rewarm.functional.mixture_search import draw_mixtures
from rewarm.scoring.scorer import read_scorer

TOKENS = {"web": 6e9, "code": 3e9, "[books]": 1e9}
BEST = {"web": 0.3, "code": 0.2, "[books]": 0.5}
SIZES = (8, 4, 2)


class Proxy:
    """A training whose score is known, and how often it was asked for."""

    def __init__(self, dies_at=None):
        self.seen, self.dies_at = [], dies_at

    def __call__(self, path):
        if len(self.seen) == self.dies_at:
            raise KeyboardInterrupt
        mixture = json.loads(path.read_text())
        self.seen.append((path.name, mixture))
        return -sum((mixture[name] - BEST[name]) ** 2 for name in BEST)


def rows(folder):
    return [json.loads(line) for line in (folder / "tried.jsonl").read_text().splitlines()]


def test_it_finds_the_best_mixture_of_a_known_landscape(tmp_path, capsys):
    found = search_mixtures(TOKENS, Proxy(), str(tmp_path), SIZES)
    assert found == pytest.approx(BEST, abs=0.03)
    assert json.loads((tmp_path / "best.json").read_text()) == found
    out = capsys.readouterr().out
    assert "[14/14]" in out
    assert "[books]" in out


def test_every_mixture_that_was_tried_is_on_record_with_its_score(tmp_path):
    proxy = Proxy()
    search_mixtures(TOKENS, proxy, str(tmp_path), SIZES)
    scored = [row for row in rows(tmp_path) if "score" in row]
    assert [row["mixture"] for row in scored] == [mixture for _, mixture in proxy.seen]
    assert [name for name, _ in proxy.seen] == [f"{n:03}.json" for n in range(1, 15)]
    assert all(sum(mixture.values()) == pytest.approx(1.0) for _, mixture in proxy.seen)
    assert [len(row["mixtures"]) for row in rows(tmp_path) if "mixtures" in row] == list(SIZES)


def test_the_first_mixtures_lie_around_the_sizes_of_the_sources(tmp_path):
    search_mixtures(TOKENS, Proxy(), str(tmp_path), (200,), seed=3)
    drawn = torch.tensor([list(mixture.values()) for mixture in rows(tmp_path)[0]["mixtures"]])
    torch.testing.assert_close(drawn.mean(0), torch.tensor([0.6, 0.3, 0.1]), atol=0.05, rtol=0)
    torch.testing.assert_close(drawn.double(), draw_mixtures([1.8, 0.9, 0.3], 200, 3000), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dies_at", [0, 3, 8, 13])
def test_an_interrupted_search_ends_as_an_uninterrupted_one(tmp_path, dies_at):
    whole = search_mixtures(TOKENS, Proxy(), str(tmp_path / "whole"), SIZES)
    first, second = Proxy(dies_at), Proxy()
    with pytest.raises(KeyboardInterrupt):
        search_mixtures(TOKENS, first, str(tmp_path / "torn"), SIZES)
    assert search_mixtures(TOKENS, second, str(tmp_path / "torn"), SIZES) == whole
    assert len(first.seen) + len(second.seen) == sum(SIZES)
    assert rows(tmp_path / "torn") == rows(tmp_path / "whole")


@pytest.mark.parametrize("kept", [0.01, 0.3, 0.6, 0.99])
def test_a_line_that_a_kill_tore_is_written_again(tmp_path, kept):
    search_mixtures(TOKENS, Proxy(), str(tmp_path), SIZES)
    before = (tmp_path / "tried.jsonl").read_text()
    (tmp_path / "tried.jsonl").write_text(before[: int(kept * len(before))])
    search_mixtures(TOKENS, Proxy(), str(tmp_path), SIZES)
    assert (tmp_path / "tried.jsonl").read_text() == before


def test_a_finished_search_trains_nothing_and_may_be_prolonged(tmp_path):
    found = search_mixtures(TOKENS, Proxy(), str(tmp_path), SIZES)
    again = Proxy()
    assert search_mixtures(TOKENS, again, str(tmp_path), SIZES) == found
    assert again.seen == []
    search_mixtures(TOKENS, again, str(tmp_path), (*SIZES, 3))
    assert len(again.seen) == 3


class Weights:
    def fit(self, x, y):
        assert x.shape == (len(y), 2)
        self.best = x[y.argmax()]

    def predict(self, x):
        return -((x - self.best) ** 2).sum(1)


@pytest.mark.parametrize("by", [Weights, lambda: f"{__name__}.Weights"], ids=["object", "name"])
def test_a_command_trains_and_any_regressor_predicts(tmp_path, by):
    script = tmp_path / "train.py"
    script.write_text(
        "import json, sys\nw = json.load(open(sys.argv[1]))\nprint('training')\nprint(w['a'] - w['b'])\n"
    )

    score = read_scorer(f"{sys.executable} {script} {{}}")
    found = search_mixtures({"a": 1, "b": 1}, score, str(tmp_path / "search"), (4, 2), predictor=by())
    tried = [row for row in rows(tmp_path / "search") if "score" in row]
    assert all(row["score"] == pytest.approx(row["mixture"]["a"] - row["mixture"]["b"]) for row in tried)
    assert found == max(tried, key=lambda row: row["score"])["mixture"]


def test_the_command_searches_and_writes_the_best_mixture(tmp_path, capsys):
    script = tmp_path / "train.py"
    script.write_text("import json, sys\nprint(-(json.load(open(sys.argv[1]))['a'] - 0.8) ** 2)\n")
    where = ["--score", f"{sys.executable} {script} {{}}", "--output", str(tmp_path / "search")]
    options = ["--sizes", "6", "3", "--candidates", "500", "--top", "20", "--seed", "4"]
    cli.main(["mixture", "a=2e9", "b=6e9", *where, *options])
    found = json.loads((tmp_path / "search" / "best.json").read_text())
    assert found["a"] == pytest.approx(0.8, abs=0.03)
    drawn = draw_mixtures([0.5, 1.5], 6, 4000)[:, 0].tolist()
    assert [mixture["a"] for mixture in rows(tmp_path / "search")[0]["mixtures"]] == pytest.approx(drawn)
    assert "[9/9]" in capsys.readouterr().out


# --- errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a=1", "b"], "sources is 'b'; it must be NAME=NUMBER, each name once"),
        (["a=1", "=2"], "sources is '=2'; it must be NAME=NUMBER"),
        (["a=1", "b=many"], "sources is 'b=many'; it must be NAME=NUMBER"),
        (["a=1", "b=0"], "tokens is {'a': 1.0, 'b': 0.0}; there must be two or more sources, each above 0"),
        (["a=1", "a=2"], "sources is 'a=2'; it must be NAME=NUMBER, each name once"),
        (["a=1"], "two or more"),
        (["a=1", "b=1", "--top", "5"], "top is 5; it must be from 32 (of sizes)"),
    ],
)
def test_what_the_command_cannot_search_it_says_in_one_line(tmp_path, arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["mixture", *arguments, "--score", "echo 1 {}", "--output", str(tmp_path / "search")])
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip()
    assert said in message
    assert "\n" not in message
    assert not (tmp_path / "search").exists()


def test_a_failed_training_stops_the_search_and_loses_nothing(tmp_path):
    proxy = Proxy()
    with pytest.raises(ValueError, match=r"the score of .*003\.json is nan"):
        search_mixtures(
            TOKENS, lambda path: proxy(path) if len(proxy.seen) < 2 else float("nan"), str(tmp_path)
        )
    assert sum("score" in row for row in rows(tmp_path)) == 2


def test_a_folder_of_another_search_is_left_alone(tmp_path):
    search_mixtures(TOKENS, Proxy(), str(tmp_path), SIZES)
    before = (tmp_path / "tried.jsonl").read_text()
    with pytest.raises(ValueError, match=r"is a search over .*'web', 'code', .*not over \['a', 'b'\]"):
        search_mixtures({"a": 1, "b": 1}, Proxy(), str(tmp_path), SIZES)
    with pytest.raises(ValueError, match=r"sizes is \[8, 5\], but .* has 4 mixtures in iteration 2"):
        search_mixtures(TOKENS, Proxy(), str(tmp_path), (8, 5))
    assert (tmp_path / "tried.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": {"a": 1.0}}, "tokens is .*two or more"),
        ({"tokens": {"a": 1.0, "b": 0.0}}, "each above 0"),
        ({"sizes": ()}, r"sizes is \[\]"),
        ({"sizes": (4, 0)}, "at least 1"),
        ({"sizes": (1, 4)}, "the first at least 2"),
        ({"sizes": (4, 3), "top": 2}, r"top is 2; it must be from 3 \(of sizes\)"),
        ({"candidates": 100}, "to candidates=100"),
        ({"predictor": "no_such.Regressor"}, "predictor is 'no_such.Regressor', which cannot be imported"),
    ],
)
def test_arguments_out_of_range_are_named(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        search_mixtures(
            **{"tokens": TOKENS, "score": Proxy(), "output": str(tmp_path), "sizes": SIZES} | arguments
        )
