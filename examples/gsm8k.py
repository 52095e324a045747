"""Prepares GSM8K and its published model solutions for configs/pipelines/gsm8k.yaml.

Both come from https://github.com/openai/grade-school-math: `train.jsonl` (question, answer) and
`example_model_solutions.jsonl` (the test questions with the solutions of several models, each marked right or
wrong).
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any


def read(path: str, columns: set[str]) -> list[dict[str, Any]]:
    """Read JSON lines that must have some columns."""
    rows = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            row = json.loads(line)
            if missing := columns - set(row):
                raise ValueError(f"{path}, line {number}: no column {sorted(missing)}")
            rows.append(row)
    return rows


def as_answer(solution: str) -> str:
    """End a model's solution as GSM8K's own answers end: `A: 18` becomes `#### 18`."""
    return re.sub(r"\n?A:\s*", "\n#### ", solution.strip())


def responses(row: dict[str, Any]) -> dict[str, Any]:
    """The solutions of all models to a question, with 1 for right and 0 for wrong."""
    models = [value for value in row.values() if isinstance(value, dict) and "is_correct" in value]
    given = {
        as_answer(model["solution"]): float(model["is_correct"])
        for model in models
        if model["solution"].strip()
    }
    given[as_answer(row["ground_truth"])] = 1.0
    return {"prompt": row["question"] + "\n", "responses": list(given), "rewards": list(given.values())}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def main() -> None:
    """Write sft.jsonl, responses.jsonl, prompts.jsonl, val.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True, help="train.jsonl of GSM8K")
    parser.add_argument("--solutions", required=True, help="example_model_solutions.jsonl of GSM8K")
    parser.add_argument("--output", required=True, help="folder to write to")
    parser.add_argument(
        "--held-out", type=int, default=200, help="test questions kept for validation, never trained on"
    )
    args = parser.parse_args()
    train = read(args.train, {"question", "answer"})
    solutions = read(args.solutions, {"question", "ground_truth"})
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    write(
        folder / "sft.jsonl",
        [{"prompt": row["question"] + "\n", "completion": row["answer"]} for row in train],
    )
    write(
        folder / "prompts.jsonl",
        [{"prompt": row["question"] + "\n", "answer": row["answer"]} for row in train],
    )
    write(folder / "responses.jsonl", [responses(row) for row in solutions[args.held_out :]])
    held_out = solutions[: args.held_out]
    write(
        folder / "val.jsonl",
        [
            {"prompt": row["question"] + "\n", "completion": as_answer(row["ground_truth"])}
            for row in held_out
        ],
    )
    write(
        folder / "val_prompts.jsonl",
        [{"prompt": row["question"] + "\n", "answer": as_answer(row["ground_truth"])} for row in held_out],
    )


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"gsm8k.py: error: {error}") from None
