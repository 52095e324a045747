"""The task of the demo: sums of growing length, with worked steps, whose answers anyone can verify.

A prompt is `6+20+5=`, a completion `26+5=31#31`: each `=` carries out the leftmost operation, and the answer
follows `#`. Everything is generated, deterministic by seed, and a tenth of all prompts is held out: no
training text shows them, not even as a step on the way.

    python -m rewarm.sums --output FOLDER [--seed 0]
"""

import argparse
import json
import random
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

LEVELS = {1: (2, 20), 2: (2, 30), 3: (3, 10), 4: (3, 20), 5: (3, 30), 6: (4, 20)}
"""Difficulty: number of terms, and the largest."""

LARGEST_TOTAL = 50
LARGEST_TERM = 30
_TRIES = 500


def held_out(prompt: str) -> bool:
    """Return whether a prompt belongs to the tenth that training never shows.

    Example:
        >>> sum(held_out(f"{a}+{b}=") for a in range(50) for b in range(50))
        285
    """
    return zlib.crc32(prompt.encode()) % 10 == 0


def solve(terms: Sequence[int]) -> tuple[str, str, int]:
    """Return prompt, worked steps and answer of a sum of signed terms.

    Example:
        >>> solve([12, 20, -3])
        ('12+20-3=', '32-3=29', 29)
    """
    totals = [sum(terms[:count]) for count in range(1, len(terms) + 1)]
    texts = [
        "".join([str(total), *(f"{term:+d}" for term in terms[place + 1 :])])
        for place, total in enumerate(totals)
    ]
    return f"{texts[0]}=", "=".join(texts[1:]), totals[-1]


def problems(count: int, seed: int, *, held: bool) -> list[dict[str, Any]]:
    """Generate problems, the levels in turn.

    Args:
        count: Most of them. A level that has run out of new problems is left out if they are held out, and
            repeats itself if not.
        seed: Seed of the draws.
        held: Problems that training never shows, each once; else problems that don't show those.

    Returns:
        Rows with `prompt`, `steps`, `answer` and `difficulty`.

    Example:
        >>> problems(1, 0, held=False)[0]
        {'prompt': '16-15=', 'steps': '1', 'answer': '1', 'difficulty': 1}
    """
    rng = random.Random(f"{seed}-{held}")
    seen: set[str] = set()
    rows: list[dict[str, Any]] = []
    levels = list(LEVELS)
    while levels and len(rows) < count:
        for level in list(levels):
            for attempt in range(_TRIES):
                prompt, steps, answer = solve(_terms(rng, *LEVELS[level]))
                shown = [f"{part}=" for part in f"{prompt}{steps}".split("=")[:-1]]
                fits = held_out(prompt) if held else not any(held_out(part) for part in shown)
                if fits and (prompt not in seen or (not held and attempt > _TRIES // 2)):
                    seen.add(prompt)
                    rows.append(
                        {"prompt": prompt, "steps": steps, "answer": str(answer), "difficulty": level}
                    )
                    break
            else:
                levels.remove(level)
    return rows[:count]


def _terms(rng: random.Random, count: int, largest: int) -> list[int]:
    terms = [rng.randint(1, largest)]
    while len(terms) < count:
        term = rng.randint(1, largest) * rng.choice((1, -1))
        if 0 <= sum(terms) + term <= LARGEST_TOTAL:
            terms.append(term)
    return terms


def solutions(count: int, seed: int, skip_steps: float = 0.4, say_twice: float = 0.4) -> list[dict[str, Any]]:
    """Generate training rows, all of them right, in mixed styles.

    The styles leave something to learn: that writing the steps pays (GRPO finds it out), and that the answer
    is said once (preferences tell).

    Args:
        count: Number of rows.
        seed: Seed of the draws.
        skip_steps: Share that gives the answer without its steps, in [0, 1].
        say_twice: Share that says the answer twice, in [0, 1].

    Example:
        >>> [row["completion"] for row in solutions(2, 0)]
        ['#1#1', '0#0#0']
    """
    rng = random.Random(f"{seed}-styles")
    rows = problems(count, seed, held=False)
    for row in rows:
        steps = "" if rng.random() < skip_steps else row["steps"]
        row["completion"] = steps + f"#{row['answer']}" * (2 if rng.random() < say_twice else 1)
    return rows


def counting(count: int, seed: int) -> Iterator[str]:
    """Generate the first domain of pretraining: counting by steps, runs of the alphabet, comparisons.

    Example:
        >>> list(counting(3, 0))
        ['26<78', 'abcd', '7,5,3,1']
    """
    rng = random.Random(f"{seed}-counting")
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    for _ in range(count):
        match rng.randrange(3):
            case 0:
                start, step = rng.randint(0, 99), rng.choice((1, 1, -1, 2, -2, 5, 10))
                yield ",".join(str(n) for n in range(start, start + 4 * step, step) if 0 <= n <= 99)
            case 1:
                start, length = rng.randrange(20), rng.randint(4, 7)
                run = alphabet[start : start + length]
                yield run if rng.random() < 0.5 else run[::-1]
            case _:
                a, b = rng.randint(0, 99), rng.randint(0, 99)
                yield f"{a}{'<' if a < b else '>' if a > b else '='}{b}"


def equations(count: int, seed: int) -> Iterator[str]:
    """Generate the second domain: equations of two terms, none of them held out.

    Example:
        >>> list(equations(3, 0))
        ['20-7=13', '39-25=14', '46-28=18']
    """
    rng = random.Random(f"{seed}-equations")
    while count:
        prompt, total, _ = solve(
            [rng.randint(0, LARGEST_TOTAL), rng.randint(1, LARGEST_TERM) * rng.choice((1, -1))]
        )
        if 0 <= int(total) <= LARGEST_TOTAL and not held_out(prompt):
            count -= 1
            yield f"{prompt}{total}"


def right(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[Any], **columns: Any
) -> list[float]:
    """Reward: 1 if what follows the last `#` is the answer.

    Example:
        >>> right(["1+1="] * 3, ["2#2", "#2#3", "2"], ["2"] * 3)
        [1.0, 0.0, 0.0]
    """
    return [
        float("#" in text and text.rsplit("#", 1)[1] == str(a))
        for text, a in zip(completions, answer, strict=True)
    ]


def said_once(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Reward: 1 if there is exactly one answer.

    Example:
        >>> said_once(["1+1="] * 3, ["2#2", "#2#2", "2"])
        [1.0, 0.0, 0.0]
    """
    return [float(text.count("#") == 1) for text in completions]


def form(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[Any], **columns: Any
) -> list[float]:
    """Reward of form: 1 for a right answer said once, 0 for a right one said twice, 0.5 for a wrong one.

    With `rewarm pairs --min-gap 1` only right answers are then compared.

    Example:
        >>> form(["1+1="] * 3, ["2#2", "#2#2", "#3"], ["2"] * 3)
        [1.0, 0.0, 0.5]
    """
    passed = right(prompts, completions, answer)
    return [once if ok else 0.5 for ok, once in zip(passed, said_once(prompts, completions), strict=True)]


def main(argv: Sequence[str] | None = None) -> None:
    """Write the data of the demo: texts of both domains, solutions, prompts to train on and to test with."""
    parser = argparse.ArgumentParser(description="Write the data of the demo.")
    parser.add_argument("--output", required=True, help="folder to write to")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of everything but the test data, which never changes"
    )
    args = parser.parse_args(argv)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    columns = ["prompt", "answer", "difficulty"]
    tables = {
        "sft": (solutions(24_000, args.seed), ["prompt", "completion", "answer", "difficulty"]),
        "prompts": (problems(6_000, args.seed + 1, held=False), columns),
        "test_prompts": (problems(1_000, 2026, held=True), columns),
    }
    texts = {"counting": (counting, 40_000, 400), "equations": (equations, 60_000, 400)}
    for name, (rows, kept) in tables.items():
        _write(
            folder / f"{name}.jsonl", [json.dumps({column: row[column] for column in kept}) for row in rows]
        )
    for name, (generate, train, test) in texts.items():
        _write(folder / f"{name}.txt", list(generate(train, args.seed)))
        _write(folder / f"{name}_test.txt", list(generate(test, 2026)))


def _write(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))
    print(f"{path}: {len(lines)} rows")  # noqa: T201


if __name__ == "__main__":
    main()
