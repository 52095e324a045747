import json
from itertools import pairwise

from rewarm import sums


def test_every_solution_is_right_and_its_steps_follow():
    for row in sums.solutions(600, seed=0):
        (reward,) = sums.right([row["prompt"]], [row["completion"]], [row["answer"]])
        assert reward == 1.0
    for row in sums.problems(300, seed=1, held=False):
        chain = [part for part in f"{row['prompt']}{row['steps']}".split("=") if part]
        assert len({eval(part) for part in chain}) == 1, chain
        assert all(len(after) <= len(before) for before, after in pairwise(chain))
        assert chain[-1] == row["answer"]


def test_training_never_shows_a_held_out_prompt():
    tests = {row["prompt"] for row in sums.problems(1000, seed=2026, held=True)}
    assert all(sums.held_out(prompt) for prompt in tests)
    shown = set()
    for row in sums.problems(5000, seed=0, held=False):
        shown |= {f"{part}=" for part in f"{row['prompt']}{row['steps']}".split("=")[:-1]}
    shown |= {line.split("=")[0] + "=" for line in sums.equations(5000, seed=0)}
    assert not tests & shown


def test_held_out_problems_are_distinct_and_cover_all_levels():
    rows = sums.problems(1000, seed=2026, held=True)
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert {row["difficulty"] for row in rows} == set(sums.LEVELS)


def test_levels_grow_in_terms():
    for row in sums.problems(300, seed=3, held=False):
        terms, largest = sums.LEVELS[row["difficulty"]]
        numbers = [int(n) for n in row["prompt"].rstrip("=").replace("-", "+").split("+")]
        assert len(numbers) == terms
        assert max(numbers) <= largest


def test_styles_have_their_shares():
    rows = sums.solutions(4000, seed=0, skip_steps=0.4, say_twice=0.25)
    assert abs(sum(r["completion"].startswith("#") for r in rows) / 4000 - 0.4) < 0.03
    assert abs(sum(r["completion"].count("#") == 2 for r in rows) / 4000 - 0.25) < 0.03


def test_the_same_seed_writes_the_same_files(tmp_path, monkeypatch):
    monkeypatch.setattr(sums, "solutions", lambda count, seed: real(60, seed))
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        sums.main(["--output", str(tmp_path / name), "--seed", str(seed)])
    read = {name: (tmp_path / name / "sft.jsonl").read_text() for name in "abc"}
    assert read["a"] == read["b"] != read["c"]
    same = [(tmp_path / name / "test_prompts.jsonl").read_text() for name in "ac"]
    assert same[0] == same[1]
    assert set(json.loads(read["a"].splitlines()[0])) == {"prompt", "completion", "answer", "difficulty"}


real = sums.solutions


def test_domains_are_what_they_say():
    for line in sums.equations(500, seed=0):
        left, right = line.split("=")
        assert eval(left) == int(right)
    for line in sums.counting(500, seed=0):
        if "," in line:
            numbers = [int(n) for n in line.split(",")]
            assert len({b - a for a, b in pairwise(numbers)}) == 1
        elif line[0].isdigit():
            assert eval(line.replace("=", "=="))
