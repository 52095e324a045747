"""Published learning-rate schedules: short functions that join the phases of `rewarm.schedules.phases`.

Each returns a `Schedule`: schedule(position, total) is a factor of the peak LR, and nothing but a function of
those two. Positions and whole-number lengths are optimizer steps, or tokens, as the caller counts.

Which for what: `linear` or `cosine` where the end is known; `wsd` to decide later, with `branch` for each
model to be shipped; `wsds` for several models along one run; `infinite` or `rewarmed` for data sets one after
the other; `power` where neither batch size nor number of tokens is settled. Where a name is not a paper's
whole recipe, the docstring says what differs, and "ours" is what no source gives.
"""

import math
from collections.abc import Sequence

from rewarm.schedules.phases import Phase, Schedule, whole


def _after_warmup(warmup: int | float, *phases: Phase) -> Schedule:
    if warmup == 0 and not isinstance(warmup, bool):
        return Schedule(phases, start=1.0)
    return Schedule((Phase("linear", warmup, 1.0), *phases), start=0.0)


def _part(period: int | float, share: float) -> int | float:
    """A share of a period in the period's own unit: whole steps stay whole."""
    return max(1, round(share * period)) if isinstance(period, int) else share * period


def _check_periods(periods: Sequence[int | float]) -> None:
    if not periods or len({isinstance(period, int) for period in periods}) != 1:
        raise ValueError(
            f"periods is {list(periods)}; there must be at least one, and all must be whole numbers of steps"
            " or tokens, or all fractions of the total"
        )


def _check_share(name: str, share: float) -> None:
    if not 0 < share < 1:
        raise ValueError(f"{name} is {share}; it is a share of each period, in (0, 1)")


def constant(warmup: int | float = 0) -> Schedule:
    """The peak LR throughout, after a linear warm-up.

    factor(n) = min(1, n / W)

    Args:
        warmup: W: a whole number of steps >= 0, or a fraction of the total in [0, 1].

    Returns:
        The schedule. If W is in steps it needs no finite total.

    Raises:
        ValueError: If the warm-up is out of range.

    Example:
        >>> [constant(warmup=4)(n, 100) for n in (1, 4, 100)]
        [0.25, 1.0, 1.0]

    Source: common practice. Differs: the first step has 1 / W, not 0.
    """
    return _after_warmup(warmup, Phase("constant"))


def linear(warmup: int | float = 0.01, end: float = 0.0) -> Schedule:
    """Linear warm-up to the peak, then a straight line down.

    factor(n) = 1 + (end - 1) * (n - W) / (T - W)  for n > W

    Args:
        warmup: W: a whole number of steps >= 0, or a fraction of the total in [0, 1).
        end: Factor at the last step, >= 0.

    Returns:
        The schedule.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> [linear(warmup=20)(n, 120) for n in (10, 20, 70, 120)]
        [0.5, 1.0, 0.5, 0.0]

    Source: Defazio et al. 2023, arXiv:2310.07831: a line to 0 is worst-case optimal for the last iterate.
    Differs: the first step has 1 / W, not 0. The default warm-up is ours.
    """
    return _after_warmup(warmup, Phase("linear", None, end))


def cosine(warmup: int | float = 0.01, end: float = 0.1) -> Schedule:
    """Linear warm-up to the peak, then half a cosine wave down.

    factor(n) = end + (1 - end) * (1 + cos(pi * (n - W) / (T - W))) / 2  for n > W

    Args:
        warmup: W: a whole number of steps >= 0, or a fraction of the total in [0, 1).
        end: Factor at the last step, >= 0.

    Returns:
        The schedule.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> [round(cosine(warmup=20)(n, 120), 3) for n in (10, 20, 70, 120)]
        [0.5, 1.0, 0.55, 0.1]

    Source: Loshchilov and Hutter 2017, arXiv:1608.03983, one cycle; the defaults are what Ibrahim et al.
    2024, arXiv:2403.08763, use after a change of data. Differs: the first step has 1 / W, not 0.
    """
    return _after_warmup(warmup, Phase("cosine", None, end))


def rex(warmup: int | float = 0.01, end: float = 0.0, beta: float = 0.5) -> Schedule:
    """Linear warm-up, then a decay that stays high for long and falls steeply at the end.

    factor = end + (1 - end) * (1 - p) / (beta + (1 - beta) * (1 - p)),  p from 0 to 1 after the warm-up

    Args:
        warmup: W: a whole number of steps >= 0, or a fraction of the total in [0, 1).
        end: Factor at the last step, >= 0.
        beta: Above 0; 1 is `linear`, less stays high for longer. Some ports have 0.1.

    Returns:
        The schedule.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> [round(rex(warmup=0)(n, 100), 3) for n in (25, 50, 75, 90)]
        [0.857, 0.667, 0.4, 0.182]

    Source: Chen et al. 2021, arXiv:2107.04197, with beta 0.5. Differs: the warm-up and `end` are ours.
    """
    return _after_warmup(warmup, Phase("rex", None, end, beta))


def uba(warmup: int | float = 0.01, end: float = 0.0, phi: float = 0.5) -> Schedule:
    """Linear warm-up, then the unified budget-aware decay.

    factor = end + (1 - end) * 2 * c / (2 * phi + (2 - phi) * c),  c = 1 + cos(pi * p)

    Args:
        warmup: W: a whole number of steps >= 0, or a fraction of the total in [0, 1).
        end: Factor at the last step, >= 0.
        phi: Above 0; 2 is `cosine`, less holds on for longer, more decays early.

    Returns:
        The schedule.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> [round(uba(warmup=0, phi=5.0)(n, 100), 3) for n in (25, 50, 75)]
        [0.7, 0.286, 0.064]

    Source: Tang et al. 2025, arXiv:2505.24452; the formula is from a third party's code. Differs: one round
    only; the default phi, the warm-up and `end` are ours.
    """
    return _after_warmup(warmup, Phase("uba", None, end, phi))


def cosine_power(warmup: int | float = 0.01, end: float = 0.0, k: float = 10.0) -> Schedule:
    """Linear warm-up, then half a cosine wave bent down by a power.

    factor = end + (1 - end) * (k ** c - 1) / (k - 1),  c = (1 + cos(pi * p)) / 2

    Args:
        warmup: W: a whole number of steps >= 0, or a fraction of the total in [0, 1).
        end: Factor at the last step, >= 0.
        k: At least 1; 1 is `cosine`, more falls earlier.

    Returns:
        The schedule.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> [round(cosine_power(warmup=0)(n, 100), 3) for n in (25, 50, 75)]
        [0.682, 0.24, 0.045]

    Source: Hundt et al. 2019 (sharpDARTS), whose function has k = 10 and whose training k = 2.
    Differs: in steps, not epochs.
    """
    return _after_warmup(warmup, Phase("cospow", None, end, k))


def wsd(
    warmup: int | float = 0.01,
    decay: int | float = 0.1,
    end: float | None = 0.0,
    shape: str = "sqrt",
    knob: float | None = None,
) -> Schedule:
    """Warm-up, stable, decay: the peak LR is held, and only the last stretch goes down.

    factor(n) = min(1, n / W)  for n <= T - D, then along `shape` from 1 to `end`

    Args:
        warmup: W: a whole number of steps >= 0, or a fraction of the total in [0, 1).
        decay: D: a whole number of steps >= 1, or a fraction of the total in (0, 1].
        end: Factor at the last step, >= 0 (exponential and harmonic: > 0; half-life: None).
        shape: Curve of the decay, one of those of `Phase`.
        knob: The shape's parameter, if it has one; that of "half-life" is in the unit of `decay`.

    Returns:
        The schedule.

    Raises:
        ValueError: If an argument is out of range or the shape is unknown.

    Example:
        >>> [wsd(warmup=20, decay=100)(n, 220) for n in (10, 20, 120, 145, 220)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
        >>> [wsd(20, 100, end=None, shape="half-life", knob=50)(n, 220) for n in (120, 170, 220)]
        [1.0, 0.5, 0.25]

    Source: Hu et al. 2024 (MiniCPM), arXiv:2404.06395, with a half-life of 5000 steps and 10 % of the tokens;
    the sqrt shape is from Haegele et al. 2024, arXiv:2405.18392. Differs: pairing them, and ending at 0, is
    ours.
    """
    return _after_warmup(warmup, Phase("constant"), Phase(shape, decay, end, knob))


def wsds(
    periods: Sequence[int | float],
    warmup: int | float = 0,
    decay: float = 0.1,
    end: float = 0.1,
    shape: str = "harmonic",
) -> Schedule:
    """WSD-S: several models along one run, each after a decay from which the LR jumps back to the peak.

    Every period holds the peak and then decays from 1 to `end`; the next one goes on from the decayed
    weights, at the peak, without a warm-up. The run can be made longer by adding periods in steps.

    Args:
        periods: Lengths, all in whole steps or all fractions of the total; together they are the total.
        warmup: Part of the first period: a number like the periods, or 0.
        decay: Share of each period spent decaying, in (0, 1), rounded to whole steps.
        end: Factor at the end of each period, >= 0 (exponential and harmonic: > 0).
        shape: Curve of the decays, one of those of `Phase`.

    Returns:
        The schedule.

    Raises:
        ValueError: If an argument is out of range, or the first period is too short for the warm-up.

    Example:
        >>> schedule = wsds([100, 200], warmup=10, decay=0.2)
        >>> [round(schedule(n, 300), 3) for n in (5, 10, 80, 90, 100, 101, 260, 300)]
        [0.5, 1.0, 1.0, 0.182, 0.1, 1.0, 1.0, 0.1]

    Source: Wen et al. 2024 (river valley), arXiv:2410.05192, with harmonic decays over about 10 % of a
    period. Differs: end = 0.1 is from a third party's notes.
    """
    periods, warmup = [whole(period) for period in periods], whole(warmup)
    _check_periods(periods)
    _check_share("decay", decay)
    if warmup and isinstance(warmup, int) != isinstance(periods[0], int):
        raise ValueError(f"warmup is {warmup}; it must be in the unit of the periods, {list(periods)}")
    phases: list[Phase] = []
    for number, period in enumerate(periods):
        down = _part(period, decay)
        hold = period - down - (warmup if number == 0 else 0)
        if hold < 0:
            raise ValueError(f"periods begins with {period}; warmup {warmup} and decay {down} are more")
        phases += [Phase("jump", 0, 1.0)] if number else []
        phases += [Phase("constant", hold)] if hold else []
        phases.append(Phase(shape, down, end))
    return _after_warmup(warmup, *phases)


def wsdc(
    warmup: int | float = 0.01,
    decay: int | float = 0.1,
    constant: int | float = 0.1,
    constant_factor: float = 0.1,
    shape: str = "linear",
) -> Schedule:
    """Warm-up, stable, decay, constant: WSD whose low LR is then held for the best data.

    factor(n) = min(1, n / W), then along `shape` from 1 to c, then c

    Args:
        warmup: W: a whole number of steps >= 0, or a fraction of the total in [0, 1).
        decay: Length of the decay: a whole number of steps >= 1, or a fraction of the total in (0, 1).
        constant: Length of the last stretch, likewise.
        constant_factor: c: factor on it, >= 0 (exponential and harmonic: > 0).
        shape: Curve of the decay, one of those of `Phase`.

    Returns:
        The schedule.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> [round(wsdc(10, 20, 30)(n, 100), 3) for n in (5, 50, 60, 70, 100)]
        [0.5, 1.0, 0.55, 0.1, 0.1]

    Source: PLM, arXiv:2503.12167. Differs: all lengths, the floor and the shape are ours, as it gives none.
    """
    return _after_warmup(
        warmup, Phase("constant"), Phase(shape, decay, constant_factor), Phase("constant", constant)
    )


def infinite(
    warmup: int | float = 0.01,
    cooldown: int | float = 0.6,
    constant: int | float | None = None,
    constant_factor: float = 0.55,
    end: float | None = None,
    shape: str = "cosine",
    timescale: float | None = None,
) -> Schedule:
    """Warm-up, cool-down to a constant LR at which new data can join, and an anneal if wanted.

    factor(n) = n / W, then along `shape` from 1 to c, then c, then c * (end / c) ** v  (v from 0 to 1)

    Args:
        warmup: W: a whole number of steps >= 0, or a fraction of the total in [0, 1).
        cooldown: Length of the cool-down: a whole number of steps >= 1, or a fraction of the total in (0, 1].
            Use steps for a run that will be prolonged, since a fraction moves with the total.
        constant: Length of the stretch at c, likewise. None: it is all the rest, and there is no anneal.
        constant_factor: c: factor on that stretch, >= 0 (with an anneal: > 0).
        end: Factor at the last step, > 0; given if and only if `constant` is.
        shape: Curve of the cool-down: "cosine" or "inv-sqrt", or another of those of `Phase`.
        timescale: Timescale of "inv-sqrt", > 0; by default 1.

    Returns:
        The schedule. If no length is a fraction and there is no anneal it needs no finite total.

    Raises:
        ValueError: If an argument is out of range, or only one of `constant` and `end` is given.

    Example:
        >>> schedule = infinite(warmup=0.01, cooldown=0.6, constant=0.1, constant_factor=0.55, end=0.1)
        >>> [round(schedule(n, 1000), 4) for n in (5, 10, 310, 610, 710, 855, 1000)]
        [0.5, 1.0, 0.775, 0.55, 0.55, 0.2345, 0.1]

    Source: Ibrahim et al. 2024, arXiv:2403.08763, section 7, with LRs of 3e-4, 1.65e-4 and 3e-5.
    Differs: nothing; the default timescale is that of GPT-NeoX's code, the paper's is not known to us.
    """
    if (constant is None) != (end is None):
        raise ValueError(
            f"constant is {constant} and end is {end}; an anneal needs both, a run without one neither"
        )
    cool = Phase(shape, cooldown, constant_factor, timescale)
    if constant is None:
        return _after_warmup(warmup, cool, Phase("constant"))
    return _after_warmup(warmup, cool, Phase("constant", constant), Phase("exponential", None, end))


def rewarmed(
    periods: Sequence[int | float] | None = None, warmup: float = 0.01, end: float = 0.1, start: float = 0.0
) -> Schedule:
    """Re-warming and re-decaying: for each data set a linear warm-up to the peak and a cosine down.

    In one period from s to 1 over a share W of it, then end + (1 - end) * (1 + cos(pi * p)) / 2; s is `start`
    in the first period and `end` in the others.

    Args:
        periods: Length of each data set, all in whole steps or all fractions of the total; together they are
            the total. None: one period, as for a run that goes on from a checkpoint.
        warmup: W, in (0, 1), rounded to whole steps.
        end: Factor at the end of each period, >= 0.
        start: Factor before the first step, >= 0. Where the checkpoint's LR was a tenth of this run's peak,
            0.1 makes the LR continuous.

    Returns:
        The schedule.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> schedule = rewarmed([100, 100], warmup=0.1)
        >>> [round(schedule(n, 200), 3) for n in (5, 10, 55, 100, 105, 110, 155, 200)]
        [0.5, 1.0, 0.55, 0.1, 0.55, 1.0, 0.55, 0.1]

    Source: Ibrahim et al. 2024, arXiv:2403.08763, and Gupta et al. 2023, arXiv:2308.04014: 1 % of the new
    steps, down to a tenth. Differs: `start`, and re-warming from `end` rather than from 0, are ours.
    """
    _check_share("warmup", warmup)
    if periods is None:
        return Schedule([Phase("linear", warmup, 1.0), Phase("cosine", None, end)], start)
    periods = [whole(period) for period in periods]
    _check_periods(periods)
    phases: list[Phase] = []
    for period in periods:
        up = _part(period, warmup)
        phases += [Phase("linear", up, 1.0), Phase("cosine", period - up, end)]
    return Schedule(phases, start)


def branch(end: float = 0.0, shape: str = "sqrt", knob: float | None = None) -> Schedule:
    """The decay of a branch: from the LR of a stable checkpoint down, over the whole run.

    factor(n) = along `shape` from 1 to `end`

    It is for `LRSchedule(mode="branch")`, where the factor is one of the checkpoint's LR. Branches from one
    checkpoint, each with data and a length of its own, give several models for the price of one stable run.

    Args:
        end: Factor at the last step, >= 0 (exponential and harmonic: > 0).
        shape: Curve of the decay, one of those of `Phase`.
        knob: The shape's parameter, if it has one.

    Returns:
        The schedule.

    Raises:
        ValueError: If an argument is out of range or the shape is unknown.

    Example:
        >>> [branch(end=0.1, shape="cosine")(n, 100) for n in (0, 50, 100)]
        [1.0, 0.55, 0.1]

    Source: Hu et al. 2024 (MiniCPM), arXiv:2404.06395; OctoThinker, arXiv:2506.20512, with a cosine over a
    tenth of the stable run's tokens. Differs: the defaults are ours.
    """
    return Schedule([Phase(shape, None, end, knob)], start=1.0)


def power(
    batch_size: int,
    peak: float = 0.02,
    warmup: int = 1_000_000_000,
    decay: int | float = 0.1,
    a: float = 4.0,
    b: float = -0.51,
    end: float = 0.001,
    shape: str = "exponential",
) -> Schedule:
    """Power schedule: an LR that falls with the tokens seen, whatever their number and the batch size.

    peak * factor(n) = m(n) * n / W  for n <= W, then m(n) = min(peak, batch_size * a * n ** b),
    then along `shape` from m(T - D) to end * peak

    Args:
        batch_size: Sequences per optimizer step, over all ranks, >= 1.
        peak: Cap of the LR, > 0, which has to be the LR that the optimizer is given. The default supposes the
            maximal update parametrisation; without it take your own.
        warmup: W in tokens, a whole number >= 1.
        decay: D: a whole number of tokens >= 1, or a fraction of the total in (0, 1).
        a: Factor of the power law, > 0.
        b: Exponent of the power law, < 0.
        end: Factor of the peak at the last token, >= 0 (exponential and harmonic: > 0).
        shape: Curve of the decay, one of those of `Phase`.

    Returns:
        The schedule, in tokens: for `LRSchedule(unit="tokens")`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> schedule = power(batch_size=128)
        >>> [float(f"{0.02 * schedule(n, 1e12):.3e}") for n in (5e8, 1e9, 1e10, 9e11)]
        [0.00658, 0.01316, 0.004067, 0.0004098]

    Source: Shen et al. 2024, arXiv:2408.13359: a, b, cap and warm-up, and a last tenth that decays
    exponentially. Differs: it says "to 0", which an exponential never reaches; end = 0.001 is ours.
    """
    if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 1:
        raise ValueError(f"warmup is {warmup}; it must be a whole number of tokens >= 1")
    for name, value in {"batch_size": batch_size, "peak": peak, "a": a, "-b": -b}.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; it must be finite and > 0")
    turn = (peak / (batch_size * a)) ** (1 / b)  # where the power law comes down to the cap
    top = min(1.0, (warmup / turn) ** b)
    phases = [
        Phase("linear", warmup, top),
        Phase("power", None, None, b, turn),
        Phase(shape, decay, end),
    ]
    return Schedule(phases, start=0.0)
