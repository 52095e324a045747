"""Hostile completions to every built-in reward: `python -m tests.trust`, or `make trust`."""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

from rewarm.rollouts import rewards
from tests.trust.completions import COSTLY, commands

PLAIN = ("exact_number", "gsm8k", "math_verify")


def check(reward: str, columns: dict, texts: dict[str, str], mark: Path) -> list[float]:
    """Score each text, and return how long each took; complain about any that ran or had no finite score."""
    seconds = []
    for name, text in texts.items():
        began = time.perf_counter()
        (value,) = rewards.score(
            getattr(rewards, reward), ["q"], [text], {k: [v] for k, v in columns.items()}
        )
        seconds.append(time.perf_counter() - began)
        if mark.exists():
            raise SystemExit(f"{reward} of {columns} ran the completion {name!r}")
        if not 0 <= value <= 1:
            raise SystemExit(f"{reward} of {columns} gives the completion {name!r} {value}")
    return seconds


def report(kind: str, seconds: dict[str, float], limit: float) -> None:
    """Print one line of the table; fail if one took longer than it may."""
    slowest = max(seconds, key=lambda name: seconds[name])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(  # noqa: T201
        f"{kind:28s} {len(seconds):4d} completions, {sum(seconds.values()):6.1f} s,"
        f" slowest {seconds[slowest]:5.2f} s ({slowest}), {peak} MiB",
        flush=True,
    )
    if seconds[slowest] > limit:
        raise SystemExit(f"{kind}: {slowest!r} took {seconds[slowest]:.1f} s, more than {limit:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.trust", description=__doc__)
    parser.add_argument("--limit", type=float, default=1.0, help="seconds of processor time per completion")
    parser.add_argument("--data-sets", nargs="*", help="of reasoning-gym; all if not given")
    arguments = parser.parse_args()
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    rewards.TIMEOUT_SECONDS = arguments.limit
    with tempfile.TemporaryDirectory() as folder:
        mark = Path(folder) / "ran"
        texts = COSTLY | commands(mark)
        rewards.score(rewards.math_verify, ["q"], ["1"], {"answer": ["1"]})  # starts the pool
        # A score is asked for twice if the first may have failed for what came before.
        limit = 3 * arguments.limit + 2
        for reward in PLAIN:
            taken = check(reward, {"answer": "42"}, texts, mark)
            report(reward, dict(zip(texts, taken, strict=True)), limit)
        for name in arguments.data_sets or sorted(set(DATASETS) - {"composite"}):
            puzzle = reasoning_gym.create_dataset(name, size=1, seed=1)[0]
            columns = {"dataset": name, "entry": json.dumps(puzzle, default=str)}
            rewards.score(rewards.reasoning_gym, ["q"], ["1"], {k: [v] for k, v in columns.items()})
            tagged = {
                name: text if "answer>" in text else f"<answer>{text}</answer>"
                for name, text in texts.items()
            }
            taken = check("reasoning_gym", columns, tagged, mark)
            report(f"reasoning_gym, {name}", dict(zip(texts, taken, strict=True)), limit)
    print("nothing ran")  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
