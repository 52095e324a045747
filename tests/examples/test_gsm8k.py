import json
import runpy
import sys
from pathlib import Path

import pytest

from tests import tiny

EXAMPLE = Path(__file__).parents[2] / "examples" / "gsm8k.py"


def solution(text, right):
    return {"solution": text, "is_correct": right}


def run(tmp_path, monkeypatch, rows):
    train = tiny.write_jsonl(tmp_path / "train.jsonl", [{"question": "q", "answer": "a\n#### 1"}] * 3)
    solutions = tiny.write_jsonl(tmp_path / "solutions.jsonl", rows)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "x",
            "--train",
            train,
            "--solutions",
            solutions,
            "--output",
            str(tmp_path / "out"),
            "--held-out",
            "1",
        ],
    )
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    return {p.stem: [json.loads(x) for x in p.read_text().splitlines()] for p in (tmp_path / "out").iterdir()}


def test_solutions_become_responses_with_rewards_and_the_held_out_ones_stay_out(tmp_path, monkeypatch):
    rows = [
        {"question": "held", "ground_truth": "x\nA: 1", "m": solution("y\nA: 2", False)},
        {
            "question": "used",
            "ground_truth": "x\nA: 3",
            "m": solution("y\nA: 4", False),
            "n": solution("z\nA: 3", True),
        },
    ]
    made = run(tmp_path, monkeypatch, rows)
    assert made["responses"] == [
        {"prompt": "used\n", "responses": ["y\n#### 4", "z\n#### 3", "x\n#### 3"], "rewards": [0.0, 1.0, 1.0]}
    ]
    assert made["val"] == [{"prompt": "held\n", "completion": "x\n#### 1"}]
    assert made["val_prompts"] == [{"prompt": "held\n", "answer": "x\n#### 1"}]
    assert len(made["sft"]) == len(made["prompts"]) == 3


def test_a_missing_column_is_named(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"error: .*solutions.jsonl, line 1: no column \['ground_truth'\]"):
        run(tmp_path, monkeypatch, [{"question": "q"}])
