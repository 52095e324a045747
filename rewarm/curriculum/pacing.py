"""Pacing: which part of an ordered data set is visible at a step.

A *pacing* maps a step to a share c in (0, 1]: the first c of the order is visible. A *window pacing* maps it
to two shares (low, high): what lies between them is. `visible_ranks` turns either into ranks of the order.
Steps are what the caller counts, such as optimizer steps. Further windows are in
`rewarm.curriculum.pacing_windows`.
"""

import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rewarm.checks import at_least, in_range

Pacing = Callable[[int], float | tuple[float, float]]
"""Optimizer steps (or whatever the caller counts) -> what is visible of the ordered examples: a share in
(0, 1], or a window of two."""


def pacing_curve(pacing: Pacing, num_steps: int) -> list[tuple[float, float]]:
    """What a pacing shows at each step, for a plot or a table.

    Args:
        pacing: Any pacing or window pacing.
        num_steps: Steps 0 to num_steps - 1, >= 1.

    Returns:
        The window (low, high) of each step; low is 0 for a pacing of shares.

    Raises:
        ValueError: If num_steps is below 1.

    Example:
        >>> pacing_curve(SingleStepPacing(boundary=1, start=0.5), 2)
        [(0.0, 0.5), (0.0, 1.0)]

    Source: ours.
    """
    at_least(1, num_steps=num_steps)
    shown = (pacing(step) for step in range(num_steps))
    return [visible if isinstance(visible, tuple) else (0.0, visible) for visible in shown]


def visible_ranks(visible: float | tuple[float, float], num_examples: int) -> range:
    """Ranks of the order that a share, or a window of two shares, shows.

    from ceil(low * N) to ceil(high * N), at least one rank; a share c is the window (0, c)

    Windows that follow each other without a gap share no rank, unless one would be empty.

    Args:
        visible: Share, or two of them, ascending, in [0, 1].
        num_examples: N, >= 1.

    Returns:
        The ranks.

    Raises:
        ValueError: If a share is out of range or num_examples is below 1.

    Example:
        >>> visible_ranks(0.25, 10), visible_ranks((0.25, 0.5), 10)
        (range(0, 3), range(3, 5))

    Source: ours.   Differs: nothing.
    """
    low, high = visible if isinstance(visible, tuple) else (0.0, visible)
    at_least(1, num_examples=num_examples)
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(f"visible is {visible}; shares must ascend within [0, 1]")
    # The small number keeps shares like 0.1 * 3 from showing one more.
    start = min(math.ceil(low * num_examples - 1e-9), num_examples - 1)
    return range(start, max(start + 1, math.ceil(high * num_examples - 1e-9)))


@dataclass(frozen=True)
class RootPacing:
    """Visible share that grows like the p-th root of time.

    c(t) = min(1, (t * (1 - c0^p) / T + c0^p)^(1/p))

    Args:
        total_steps: Step T at which everything is visible, >= 1.
        start: Share c0 visible at step 0, in (0, 1]. The paper uses 0.01.
        power: Exponent p >= 1; 2 is the paper's "square root" competence, 1 is linear.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> pacing = RootPacing(total_steps=100, start=0.1)
        >>> round(pacing(0), 3), round(pacing(50), 3), pacing(100)
        (0.1, 0.711, 1.0)

    Source: Platanios et al. 2019, arXiv:1903.09848. Differs: nothing.
    """

    total_steps: int
    start: float = 0.01
    power: float = 2.0

    def __post_init__(self) -> None:
        in_range("(0, 1]", start=self.start)
        at_least(1, total_steps=self.total_steps)
        at_least(1, power=self.power)

    def __call__(self, step: int) -> float:
        """Return the visible share at a step >= 0, in (0, 1]."""
        if step >= self.total_steps:
            return 1.0
        base = self.start**self.power
        return min(1.0, (step * (1.0 - base) / self.total_steps + base) ** (1.0 / self.power))


@dataclass(frozen=True)
class LinearPacing:
    """Visible share that grows linearly: c(t) = min(1, t * (1 - c0) / T + c0).

    Args:
        total_steps: Step T at which everything is visible, >= 1.
        start: Share c0 visible at step 0, in (0, 1]. The paper uses 0.01.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> round(LinearPacing(total_steps=10, start=0.2)(5), 6)
        0.6

    Source: Platanios et al. 2019, arXiv:1903.09848. Differs: nothing.
    """

    total_steps: int
    start: float = 0.01

    def __post_init__(self) -> None:
        in_range("(0, 1]", start=self.start)
        at_least(1, total_steps=self.total_steps)

    def __call__(self, step: int) -> float:
        """Return the visible share at a step >= 0, in (0, 1]."""
        return 1.0 if step >= self.total_steps else step * (1.0 - self.start) / self.total_steps + self.start


@dataclass(frozen=True)
class GeometricPacing:
    """Visible share that grows by the same factor each step.

    c(t) = min(1, c0^(1 - t / T))

    Args:
        total_steps: Step T at which everything is visible, >= 1.
        start: Share c0 visible at step 0, in (0, 1].

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> [round(GeometricPacing(total_steps=2, start=0.01)(step), 6) for step in (0, 1, 2)]
        [0.01, 0.1, 1.0]

    Source: geometric progression of Penha and Hauff 2020, arXiv:1912.08555, written there as a power of 2.
    Differs: the default start is ours.
    """

    total_steps: int
    start: float = 0.01

    def __post_init__(self) -> None:
        in_range("(0, 1]", start=self.start)
        at_least(1, total_steps=self.total_steps)

    def __call__(self, step: int) -> float:
        """Return the visible share at a step >= 0, in (0, 1]."""
        return 1.0 if step >= self.total_steps else self.start ** (1.0 - step / self.total_steps)


@dataclass(frozen=True)
class ExponentialStepPacing:
    """Visible share that is multiplied by a factor every so many steps.

    c(t) = min(1, c0 * growth^floor(t / step_length))

    Args:
        step_length: Steps between two rises, >= 1.
        start: Share c0 visible at step 0, in (0, 1].
        growth: Factor, > 1. Published runs use 1.5 to 1.9.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> pacing = ExponentialStepPacing(step_length=100)
        >>> [round(pacing(step), 3) for step in (0, 99, 100, 700, 800)]
        [0.04, 0.04, 0.06, 0.683, 1.0]

    Source: Hacohen and Weinshall 2019, arXiv:1904.03626; the defaults are those of the repository of Kesgin
    and Amasyali (cyclical curriculum learning).   Differs: nothing.
    """

    step_length: int
    start: float = 0.04
    growth: float = 1.5

    def __post_init__(self) -> None:
        in_range("(0, 1]", start=self.start)
        at_least(1, step_length=self.step_length)
        in_range("(1, inf)", growth=self.growth)

    def __call__(self, step: int) -> float:
        """Return the visible share at a step >= 0, in (0, 1]."""
        rises = step // self.step_length
        # A power that is above 1 / start anyway may be too large for a float.
        if rises * math.log(self.growth) >= -math.log(self.start):
            return 1.0
        return min(1.0, self.start * self.growth**rises)


@dataclass(frozen=True)
class SingleStepPacing:
    """Visible share that jumps to everything once.

    c(t) = c0 for t < boundary, else 1

    Args:
        boundary: Step at which everything becomes visible, >= 1.
        start: Share c0 visible before, in (0, 1].

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> [SingleStepPacing(boundary=10, start=0.2)(step) for step in (0, 9, 10)]
        [0.2, 0.2, 1.0]

    Source: Hacohen and Weinshall 2019, arXiv:1904.03626. Differs: nothing.
    """

    boundary: int
    start: float

    def __post_init__(self) -> None:
        in_range("(0, 1]", start=self.start)
        at_least(1, boundary=self.boundary)

    def __call__(self, step: int) -> float:
        """Return the visible share at a step >= 0, in (0, 1]."""
        return self.start if step < self.boundary else 1.0


def cycle_sizes(start: float, end: float, factor: float, passes: float) -> list[float]:
    """Shares of the data that the episodes of a cyclical curriculum train on.

    Each share is the last one divided by `factor`, up to `end`, then multiplied by it, down to `start`, and
    so on, until together they are as much as `passes` over all data.

    Args:
        start: Smallest share, in (0, end].
        end: Largest share, in (0, 1].
        factor: Ratio of one share to the next larger one, in (0, 1).
        passes: Sum that the shares must reach, > 0.

    Returns:
        The shares.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> cycle_sizes(0.25, 1.0, 0.5, passes=4)
        [0.25, 0.5, 1.0, 0.5, 0.25, 0.5, 1.0]

    Source: Kesgin and Amasyali 2023, IEEE TNNLS (cyclical curriculum learning), `get_cycle_sizes` of its
    repository. Differs: nothing.
    """
    if not 0.0 < start <= end <= 1.0:
        raise ValueError(f"start is {start} and end is {end}; they must be 0 < start <= end <= 1")
    in_range("(0, 1)", factor=factor)
    in_range("(0, inf)", passes=passes)
    sizes, total = [], 0.0
    for share in itertools.cycle(_cycle(start, end, factor)):
        sizes.append(share)
        total += share
        if total >= passes:
            break
    return sizes


def _cycle(start: float, end: float, factor: float) -> list[float]:
    """The shares from the smallest up to the largest and down to before the smallest again."""
    up = [start]
    while up[-1] < end:
        up.append(min(up[-1] / factor, end))
    down = [end]
    while down[-1] > start:
        down.append(max(down[-1] * factor, start))
    return up + down[1:-1]


@dataclass(frozen=True)
class CyclicalPacing:
    """Visible share that grows and shrinks in cycles.

    An episode of share s takes s * steps_per_pass steps: one pass over what it shows. The shares are those of
    `cycle_sizes`.

    Args:
        steps_per_pass: Steps of one pass over all data, >= 1.
        start: Smallest share, in (0, end].
        end: Largest share, in (0, 1].
        factor: Ratio of one share to the next larger one, in (0, 1).

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> pacing = CyclicalPacing(steps_per_pass=100)
        >>> [pacing(step) for step in (0, 24, 25, 75, 175, 225, 250)]
        [0.25, 0.25, 0.5, 1.0, 0.5, 0.25, 0.5]

    Source: Kesgin and Amasyali 2023, IEEE TNNLS (cyclical curriculum learning). Differs: the easiest examples
    are visible; theirs are drawn with probabilities in proportion to 1 / loss
    (`rewarm.curriculum.ordering.draw_weighted`).
    """

    steps_per_pass: int
    start: float = 0.25
    end: float = 1.0
    factor: float = 0.5

    def __post_init__(self) -> None:
        at_least(1, steps_per_pass=self.steps_per_pass)
        cycle_sizes(self.start, self.end, self.factor, passes=1.0)

    def __call__(self, step: int) -> float:
        """Return the visible share at a step >= 0, in (0, 1]."""
        cycle = _cycle(self.start, self.end, self.factor)
        # The small number keeps an episode from lasting a step longer by rounding.
        passed = math.fmod(step / self.steps_per_pass + 1e-9, math.fsum(cycle))
        for share in cycle[:-1]:
            if passed < share:
                return share
            passed -= share
        return cycle[-1]


@dataclass(frozen=True)
class StagedPacing:
    """Visible share that jumps at given steps ("baby steps": stages add up).

    Args:
        boundaries: Steps at which the next share begins, ascending, all > 0.
        shares: Visible shares, one more than boundaries, ascending, in (0, 1]. No two are equal.

    Raises:
        ValueError: If the lengths do not fit or the numbers do not ascend.

    Example:
        >>> pacing = StagedPacing(boundaries=[100, 200], shares=[0.25, 0.5, 1.0])
        >>> pacing(99), pacing(100), pacing(500)
        (0.25, 0.5, 1.0)

    Source: Bengio et al. 2009 (curriculum learning), in the cumulative form of Spitkovsky et al. 2010.
    Differs: the stages are given as steps.
    """

    boundaries: Sequence[int]
    shares: Sequence[float]

    def __post_init__(self) -> None:
        _check_stages(self.boundaries, self.shares)

    def __call__(self, step: int) -> float:
        """Return the visible share at a step >= 0, in (0, 1]."""
        return self.shares[bisect_right(self.boundaries, step)]


@dataclass(frozen=True)
class OnePassPacing:
    """Window that shows each stage of the order only while it lasts.

    The same stages as those of `StagedPacing`, but earlier ones don't come again.

    Args:
        boundaries: Steps at which the next stage begins, ascending, all > 0.
        shares: Share of the order at which each stage ends, one more than boundaries, ascending, in (0, 1].

    Raises:
        ValueError: If the lengths do not fit or the numbers do not ascend.

    Example:
        >>> pacing = OnePassPacing(boundaries=[100, 200], shares=[0.25, 0.5, 1.0])
        >>> pacing(99), pacing(100), pacing(500)
        ((0.0, 0.25), (0.25, 0.5), (0.5, 1.0))

    Source: the "one-pass" curriculum of Bengio et al. 2009. Differs: the stages are given as steps.
    """

    boundaries: Sequence[int]
    shares: Sequence[float]

    def __post_init__(self) -> None:
        _check_stages(self.boundaries, self.shares)

    def __call__(self, step: int) -> tuple[float, float]:
        """Return the visible window at a step >= 0."""
        stage = bisect_right(self.boundaries, step)
        return (self.shares[stage - 1] if stage else 0.0), self.shares[stage]


def _check_stages(boundaries: Sequence[int], shares: Sequence[float]) -> None:
    if len(shares) != len(boundaries) + 1:
        raise ValueError(f"shares has {len(shares)} entries; {len(boundaries)} boundaries need one more")
    if list(boundaries) != sorted(set(boundaries)) or any(b < 1 for b in boundaries):
        raise ValueError(f"boundaries is {list(boundaries)}; it must ascend and start above 0")
    if list(shares) != sorted(set(shares)) or not all(0.0 < s <= 1.0 for s in shares):
        raise ValueError(f"shares is {list(shares)}; it must ascend within (0, 1]")
