"""What is done to a run.

Each fault returns an outcome, or None if its moment came when there was nothing to break.
"""

import contextlib
import itertools
import json
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rewarm.checkpoints.whole import newest_first, newest_whole
from tests.faults import runs
from tests.faults.comparison import differences, steps_done_twice
from tests.faults.processes import Ended, Moment, Process

RUN_SECONDS = 240.0  # no run takes as long, not even on a busy machine
SURVIVOR_SECONDS = 60.0  # within which the other rank has to end when one was killed


@dataclass
class Outcome:
    """What was done to a run, and in what it differs from the one that was left alone.

    Attributes:
        ends: How each attempt ended, the last one by itself.
        others: The same of the other rank, where there are two.
        messages: What the search for a whole checkpoint said about damaged ones.
        partial: After how many ends there was a checkpoint half written.
        differences: Empty if the run ended equal.
        seconds: From the first start to the last end.
        survivor_seconds: The longest that the other rank went on after one was killed.
    """

    ends: list[Ended] = field(default_factory=list)
    others: list[Ended] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    partial: int = 0
    differences: list[str] = field(default_factory=list)
    seconds: float = 0.0
    survivor_seconds: float = 0.0

    @property
    def phases(self) -> list[str]:
        """Where the run was when it was interrupted."""
        return [ended.phase for ended in self.ends if ended.exit_code]


class Whole:
    """A run that is left alone, the folder of its data, and where it was when.

    Args:
        name: Of `runs.RUNS`.
        folder: Where everything goes; replaced if it is there.
        strategy: `one process`; or `ddp` or `fsdp2` on two ranks.
        without: Name of a callback that this run and those compared with it leave out.
    """

    def __init__(self, name: str, folder: Path, strategy: str = "one process", without: str = "") -> None:
        self.name, self.folder, self.strategy, self.without = name, folder / "whole", strategy, without
        shutil.rmtree(folder, ignore_errors=True)
        self._files = folder / "files"
        runs.fits.Files(self._files)
        for ended in [process.end(RUN_SECONDS) for process in self.start(self.folder, None, seed=0)]:
            if ended.exit_code:
                raise RuntimeError(f"{name} on {strategy}: exit code {ended.exit_code}\n{ended.output}")
        past = json.loads((self.folder / "past0").read_text())
        self._stays = [
            _Stay(change, phase, since - past[0][1], until - since)
            for change, ((phase, since), (_, until)) in enumerate(itertools.pairwise(past), 1)
        ]
        self.seconds = past[-1][1] - past[0][1]
        self.phases = list(dict.fromkeys(stay.phase for stay in self._stays))

    def start(self, folder: Path, checkpoint: Path | None, seed: int) -> list[Process]:
        """Start the process of a run, or those of its ranks."""
        arguments = (self.name, self._files, folder, checkpoint, seed, self.strategy, self.without)
        if self.strategy == "one process":
            return [Process(folder, runs.train, *arguments)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
        return [
            Process(
                folder, runs.train, *arguments, rank=rank, environment={**common, "LOCAL_RANK": str(rank)}
            )
            for rank in range(2)
        ]

    def moment(self, rng: random.Random, *phases: str, low: float = 0.0, high: float = 1.0) -> Moment:
        """Return a moment of the run, each as likely as any other.

        Args:
            rng: Chooses.
            phases: Choose from these; none are all.
            low: Not before this share of the run, in [0, 1).
            high: Not after this one.
        """
        stays = [
            stay
            for stay in self._stays
            if low <= stay.since / self.seconds <= high and stay.phase in (phases or self.phases)
        ]
        (chosen,) = rng.choices(stays, [stay.seconds for stay in stays])
        # By progress, not by the clock: the machine may be faster now.
        return Moment(chosen.change, rng.uniform(0.0, chosen.seconds))


class _Stay(NamedTuple):
    change: int
    phase: str
    since: float
    seconds: float


def killed_once(whole: Whole, folder: Path, rng: random.Random, number: int) -> Outcome | None:
    """SIGKILL: one time in three at any moment, else in one of the phases by turns, restoring included."""
    targets = [*whole.phases, "restoring"]
    target = targets[(number - number // 3) % len(targets)]
    if number % 3 == 0:
        return interrupted(whole, folder, [whole.moment(rng)])
    if target != "restoring":
        return interrupted(whole, folder, [whole.moment(rng, target)])
    return interrupted(whole, folder, [whole.moment(rng, low=0.5), whole.moment(rng, "starting")])


def killed_often(whole: Whole, folder: Path, rng: random.Random, number: int) -> Outcome | None:
    """SIGKILL after SIGKILL, up to ten."""
    return interrupted(whole, folder, (whole.moment(rng, high=0.5) for _ in range(10)))


def terminated(whole: Whole, folder: Path, rng: random.Random, number: int) -> Outcome | None:
    """SIGTERM, up to three times; no step is done twice if each was answered."""
    moments = [whole.moment(rng, high=0.7) for _ in range(3)]
    outcome = interrupted(whole, folder, moments, signal.SIGTERM)
    if outcome is None:
        return None
    answered = [ended.exit_code in (0, 128 + signal.SIGTERM) for ended in outcome.ends]
    for ended, was_answered in zip(outcome.ends, answered, strict=True):
        # Before and after the training nobody has taken the signal over.
        if not was_answered and ended.phase not in ("starting", "restoring", "ending"):
            outcome.differences.append(f"exit code {ended.exit_code} in {ended.phase}: {ended.output}")
    if all(answered) and steps_done_twice(folder):
        outcome.differences.append(f"{steps_done_twice(folder)} steps were done twice")
    return outcome


def truncated(whole: Whole, folder: Path, rng: random.Random, number: int) -> Outcome | None:
    """The newest checkpoint, or one of its files, has lost its end, which has to be found."""

    def damage(file: Path) -> None:
        content = file.read_bytes()
        file.write_bytes(content[: rng.randrange(len(content))])

    outcome = _damaged(whole, folder, rng, damage)
    if outcome is not None and not outcome.messages:
        outcome.differences.append("nothing was said about the damage")
    return outcome


def flipped(whole: Whole, folder: Path, rng: random.Random, number: int) -> Outcome | None:
    """One bit of the newest checkpoint has changed; unless it was found, it must not matter (padding)."""

    def damage(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)

    return _damaged(whole, folder, rng, damage)


def disk_full(whole: Whole, folder: Path, rng: random.Random, number: int) -> Outcome | None:
    """The disk of the checkpoints fills up at some moment; there is room again before the run is resumed.

    Raises:
        PermissionError: If this process may not mount a disk.
    """
    checkpoints, kept = folder / "checkpoints", []

    def fill(process: Process) -> None:
        if process.reaches(whole.moment(rng, low=0.2, high=0.8)):
            with contextlib.suppress(OSError), (checkpoints / "ballast").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

    def make_room(newest: list[Path]) -> None:
        kept.extend(newest)
        (checkpoints / "ballast").unlink()

    checkpoints.mkdir(parents=True, exist_ok=True)
    with small_disk(checkpoints):
        outcome = interrupted(whole, folder, [fill], before_resuming=make_room)
    if outcome is not None:
        last_good = f"the last good one is {kept[0]}" if kept else "there is none before it"
        said = [line for line in outcome.ends[0].output.splitlines() if line.startswith("OSError")]
        if not (said and "No space left on device" in said[-1] and said[-1].endswith(last_good)):
            outcome.differences.append(f"not said: {last_good}\n{outcome.ends[0].output}")
    return outcome


def rank_killed(whole: Whole, folder: Path, rng: random.Random, number: int) -> Outcome | None:
    """One of two ranks gets SIGKILL; the other one has to end by itself, then both are resumed."""
    moment = whole.moment(rng, *(set(whole.phases) - {"starting", "ending"}))
    outcome = interrupted(whole, folder, [moment], rank=number % 2)
    if outcome is not None and not (outcome.others[0].exit_code and "Error" in outcome.others[0].output):
        outcome.differences.append(f"the other rank said nothing:\n{outcome.others[0].output}")
    return outcome


def interrupted(
    whole: Whole,
    folder: Path,
    moments: Iterable[Moment | Callable[[Process], None]],
    number: signal.Signals = signal.SIGKILL,
    rank: int = 0,
    before_resuming: Callable[[list[Path]], None] = lambda newest: None,
) -> Outcome | None:
    """Interrupt a run once in each attempt, resume it each time, then let it end and compare.

    Args:
        whole: What to run and compare with.
        folder: Where everything goes; it must be new.
        moments: When to send the signal, or what to do instead.
        number: The signal.
        rank: Which of two ranks gets it.
        before_resuming: Called with the checkpoints, newest first, after the first attempt.

    Returns:
        The outcome; None if the run ended before the first moment.
    """
    began, outcome, left = time.monotonic(), Outcome(), iter(moments)
    while not outcome.ends or outcome.ends[-1].exit_code:
        checkpoint = newest_whole(folder / "checkpoints", outcome.messages.append)
        processes = whole.start(folder, checkpoint, seed=len(outcome.ends) if checkpoint else 0)
        moment = next(left, None)
        if isinstance(moment, Moment):
            processes[rank].interrupt(moment, number)
        elif moment is not None:
            moment(processes[rank])
        ended = processes.pop(rank).end(RUN_SECONDS)
        outcome.ends.append(ended)
        since = time.monotonic()
        outcome.others += [other.end(SURVIVOR_SECONDS) for other in processes]
        if ended.exit_code:
            outcome.survivor_seconds = max(outcome.survivor_seconds, time.monotonic() - since)
        outcome.partial += any((folder / "checkpoints").glob(".*"))
        if (
            ended.is_late
            or any(other.is_late for other in outcome.others)
            or (moment is None and ended.exit_code)
        ):
            outcome.differences = [f"{end.exit_code}, {end.output}" for end in (ended, *outcome.others[-1:])]
            return outcome
        if len(outcome.ends) == 1 and ended.exit_code:
            before_resuming(newest_first(folder / "checkpoints"))
    if not outcome.phases:
        return None
    outcome.differences = differences(whole.folder, folder)
    outcome.seconds = time.monotonic() - began
    return outcome


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of 8 MB, in memory.

    Raises:
        PermissionError: If this process may not mount one.
    """
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        raise PermissionError("mounting a small disk is not permitted; it is under `unshare -rm`")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _damaged(
    whole: Whole, folder: Path, rng: random.Random, damage: Callable[[Path], None]
) -> Outcome | None:
    damaged: list[str] = []

    def damage_newest(newest: list[Path]) -> None:
        if len(newest) > 1:
            files = [file for file in sorted(newest[0].rglob("*")) if file.is_file()]
            damage(rng.choice(files) if files else newest[0])
            damaged.append(str(newest[0]))

    outcome = interrupted(whole, folder, [whole.moment(rng, low=0.5)], before_resuming=damage_newest)
    if outcome is None or not damaged:
        return None
    if any(damaged[0] not in message for message in outcome.messages):
        outcome.differences.append(f"{damaged[0]} was damaged, but {outcome.messages}")
    return outcome
