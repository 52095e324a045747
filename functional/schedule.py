"""Learning-rate schedules as pure functions: `schedule(position, total)` is a factor of the peak LR.

A `Schedule` is a chain of `Phase`s, each from the factor where the one before it ended. Nothing is remembered
between calls, so a run that is stopped and resumed, or plotted beforehand, has the same curve. `constant`,
`linear`, `cosine`, `wsd` and `infinite` build published ones; others are written as phases:

>>> two_cycles = Schedule(
...     [
...         Phase("linear", 10, 1.0),
...         Phase("constant", 60),
...         Phase("harmonic", 30, 0.1),
...         Phase("jump", 0, 1.0),
...         Phase("constant"),
...         Phase("harmonic", 30, 0.1),
...     ],
...     start=0.0,
... )
>>> [round(two_cycles(n, 200), 3) for n in (1, 10, 70, 85, 100, 101, 170, 200)]
[0.1, 1.0, 1.0, 0.182, 0.1, 1.0, 1.0, 0.1]

Where positions stand for optimizer steps they count from 1: the n-th step uses `schedule(n, total)`, so that
the first step is not wasted at LR 0 and the last one has the end value. Any other unit will do (tokens, say)
if the position, the total and the whole-number lengths share it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Fractions of a total sum to whole steps only up to rounding; a position this near a boundary is on it.
_TOLERANCE_STEPS = 1e-6


def _moves(way: Callable[..., float]) -> Callable[..., float]:
    """Shape that has covered `way(progress)` of the distance between its two ends."""
    return lambda start, end, *args: start + (end - start) * way(*args)


def _inverse_sqrt(progress: float, timescale: float) -> float:
    return (1 / math.sqrt(1 + timescale * progress) - 1) / (1 / math.sqrt(1 + timescale) - 1)


def _uba(progress: float, phi: float) -> float:
    c = 1 + math.cos(math.pi * progress)
    return 1 - 2 * c / (2 * phi + (2 - phi) * c)


def _cosine_power(progress: float, k: float) -> float:
    c = (1 + math.cos(math.pi * progress)) / 2
    return 1 - (c if k == 1 else math.expm1(c * math.log(k)) / (k - 1))


SHAPES: dict[str, Callable[..., float]] = {
    "constant": lambda start, end, progress: start,
    "jump": lambda start, end, progress: end,
    "linear": _moves(lambda progress: progress),
    "cosine": _moves(lambda progress: (1 - math.cos(math.pi * progress)) / 2),
    "sqrt": _moves(math.sqrt),
    "exponential": lambda start, end, progress: start * (end / start) ** progress,
    "harmonic": lambda start, end, progress: 1 / ((1 - progress) / start + progress / end),
    "inv-sqrt": _moves(_inverse_sqrt),
    "rex": _moves(lambda progress, beta: 1 - (1 - progress) / (beta + (1 - beta) * (1 - progress))),
    "uba": _moves(_uba),
    "cospow": _moves(_cosine_power),
}
"""Name to shape: a pure function of start, end, progress in (0, 1) and, where there is one, the knob."""

_DEFAULT_KNOB = {"inv-sqrt": 1.0, "rex": 0.5, "uba": 0.5, "cospow": 10.0}


@dataclass(frozen=True)
class Phase:
    """One stretch of a schedule: how long it lasts, where it ends, and along which curve it gets there.

    The factor at progress p (0 where the phase starts, 1 where it ends), from start s to end e with knob k:

    | shape | factor |
    |---|---|
    | constant | s |
    | jump | e at once: the one way for a schedule to be discontinuous |
    | linear | s + (e - s) * p |
    | cosine | s + (e - s) * (1 - cos(pi * p)) / 2 |
    | sqrt | s + (e - s) * sqrt(p), known as the "1-sqrt" decay |
    | exponential | s * (e / s) ** p |
    | harmonic | 1 / ((1 - p) / s + p / e) |
    | inv-sqrt | s + (e - s) * g(p) / g(1),  g(p) = 1 / sqrt(1 + k * p) - 1 |
    | rex | e + (s - e) * (1 - p) / (k + (1 - k) * (1 - p)) |
    | uba | e + (s - e) * 2 * c / (2 * k + (2 - k) * c),  c = 1 + cos(pi * p) |
    | cospow | e + (s - e) * (k ** c - 1) / (k - 1),  c = (1 + cos(pi * p)) / 2 |

    Args:
        shape: One of the names above.
        length: A whole number of steps (>= 1), a fraction of the total as a float in (0, 1], or None for what
            the other phases leave, which one phase of a schedule may have. A jump has length 0.
        end: Factor of the peak LR where it ends, >= 0 (exponential, harmonic: > 0). None for constant.
        knob: The parameter of the last four shapes, > 0 (cospow: >= 1). None: 1 for inv-sqrt (its timescale),
            0.5 for rex (its beta), 0.5 for uba (its phi; 2 is cosine), 10 for cospow (its k; 1 is cosine).

    Raises:
        ValueError: If an argument is outside what is allowed.

    Example:
        >>> Phase("cosine", 0.5, end=0.1).factor(progress=0.5, start=1.0)
        0.55

    Source: exponential: Hu et al. 2024, arXiv:2404.06395. sqrt: Haegele et al. 2024, arXiv:2405.18392.
    harmonic: Wen et al. 2024, arXiv:2410.05192. inv-sqrt: Ibrahim et al. 2024, arXiv:2403.08763. rex: Chen et
    al. 2021, arXiv:2107.04197. uba: arXiv:2505.24452. cospow: Hundt et al. 2019 (sharpDARTS).
    Differs: the exponential is given by its end; a half-life of h steps over a length of n is
    end = start * 0.5 ** (n / h). The default knobs of inv-sqrt and cospow are from code; that of uba is ours.
    """

    shape: str
    length: int | float | None = None
    end: float | None = None
    knob: float | None = None

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape is {self.shape!r}; known shapes: {', '.join(SHAPES)}")
        _check_length(self.length, self.shape)
        if self.shape == "constant" and self.end is not None:
            raise ValueError(
                f"end is {self.end}; a constant phase keeps the factor it starts with, leave end out"
            )
        if self.shape != "constant" and (self.end is None or not 0 <= self.end < math.inf):
            raise ValueError(f"end is {self.end}; a {self.shape} phase needs a finite factor >= 0 to end at")
        if self.knob is not None:
            _check_knob(self.knob, self.shape)

    def factor(self, progress: float, start: float) -> float:
        """Factor of the peak LR at a point of this phase.

        Args:
            progress: Share of the phase's length that has passed, in [0, 1].
            start: Factor where the phase starts, >= 0.

        Returns:
            The factor; exactly `start` at 0 and exactly `end` at 1.

        Example:
            >>> Phase("sqrt", 100, end=0.0).factor(progress=0.25, start=1.0)
            0.5

        Source: see the class. Differs: nothing.
        """
        end = start if self.end is None else self.end
        # The formulas meet their ends only to rounding, and a decay to 0 should end at 0.
        if progress <= 0 or progress >= 1:
            return start if progress <= 0 else end
        if self.shape not in _DEFAULT_KNOB:
            return SHAPES[self.shape](start, end, progress)
        knob = _DEFAULT_KNOB[self.shape] if self.knob is None else self.knob
        return SHAPES[self.shape](start, end, progress, knob)


def _check_length(length: int | float | None, shape: str) -> None:
    if shape == "jump":
        if isinstance(length, bool) or length != 0:
            raise ValueError(f"length is {length}; a jump has length 0")
    elif isinstance(length, bool) or (isinstance(length, int) and length < 1):
        raise ValueError(f"length is {length}; a number of steps must be a whole number >= 1")
    elif isinstance(length, float) and not 0 < length <= 1:
        raise ValueError(
            f"length is {length}; a float is a fraction of the total, in (0, 1]; write steps as an int"
        )


def _check_knob(knob: float, shape: str) -> None:
    if shape not in _DEFAULT_KNOB:
        raise ValueError(f"knob is {knob}; {shape} has none, only {', '.join(_DEFAULT_KNOB)} do")
    if not 0 < knob < math.inf or (shape == "cospow" and knob < 1):
        raise ValueError(
            f"knob is {knob}; for {shape} it must be finite and {'>= 1' if shape == 'cospow' else '> 0'}"
        )


class Schedule:
    """A factor of the peak LR for every position: phases in a row, each from where the one before it ended.

    factor(n) = shape_i((n - b_i) / L_i)  for b_i < n <= b_i + L_i,  b_i = L_1 + ... + L_(i-1)

    It holds no state and is never changed, so one object can serve many runs.

    Args:
        phases: The stretches in order, at least one. One may have no length, and takes what is left.
        start: Factor before the first phase, >= 0: 0 where that is a warm-up, else usually 1.

    Raises:
        ValueError: If the phases cannot be joined, or their fractions sum to more than 1.

    Example:
        >>> schedule = Schedule([Phase("linear", 10, 1.0), Phase("cosine", None, 0.1)], start=0.0)
        >>> [round(schedule(n, 110), 3) for n in (1, 10, 60, 110, 500)]
        [0.1, 1.0, 0.55, 0.1, 0.1]

    Source: a list of stages is the form of OLMo-core's `ComposableScheduler`.
    Differs: boundaries are real numbers, not rounded to steps, so fractions give one curve at every total.
    """

    # Not a dataclass: for those, jsonargparse would not take the functions below as class_path.
    def __init__(self, phases: Sequence[Phase], start: float) -> None:
        self.phases = tuple(phases)
        self.start = start
        lengths = [phase.length for phase in self.phases]
        fractions = [length for length in lengths if isinstance(length, float)]
        if not lengths:
            raise ValueError("phases is empty; a schedule needs at least one")
        if not 0 <= start < math.inf:
            raise ValueError(f"start is {start}; it must be a finite factor >= 0")
        if lengths.count(None) > 1:
            raise ValueError(f"phases have the lengths {lengths}; only one can be None and take the rest")
        if math.fsum(fractions) > 1 + 1e-9:
            raise ValueError(
                f"phases have the lengths {lengths}; the fractions sum to {math.fsum(fractions):g} > 1"
            )
        for phase in self.phases:
            if phase.shape in ("exponential", "harmonic") and (start == 0 or phase.end == 0):
                raise ValueError(
                    f"phases: {phase.shape} goes from {start} to {phase.end}, but neither may be 0"
                )
            start = start if phase.end is None else phase.end

    def __repr__(self) -> str:
        return f"Schedule({list(self.phases)}, start={self.start})"

    def __call__(self, position: float, total: float) -> float:
        """Factor of the peak LR at a position.

        Args:
            position: The point asked for, >= 0: n for the n-th optimizer step. Beyond the total the last
                value holds.
            total: Where the schedule ends, > 0, in the same unit. It may be infinite if no length is a
                fraction and the last phase is an open constant.

        Returns:
            The factor, >= 0.

        Raises:
            ValueError: If the position is negative, or the phases do not fill the total exactly.

        Example:
            >>> linear(warmup=4)(2, 100)
            0.5

        Source: see the class. Differs: nothing.
        """
        if not 0 <= position < math.inf:
            raise ValueError(f"position is {position}; it must be finite and >= 0")
        factor, begin = self.start, 0.0
        for phase, length in zip(self.phases, self._lengths(total), strict=True):
            left = begin + length - position
            if length > 0 and left >= -_TOLERANCE_STEPS:
                return phase.factor(1.0 if left <= _TOLERANCE_STEPS else (position - begin) / length, factor)
            begin += length
            factor = factor if phase.end is None else phase.end
        return factor

    def _lengths(self, total: float) -> list[float]:
        """Lengths of the phases in steps."""
        given = [phase.length for phase in self.phases]
        if not total > 0:
            raise ValueError(f"total is {total}; it must be > 0")
        if total == math.inf:
            if any(isinstance(x, float) for x in given) or self.phases[-1] != Phase("constant"):
                raise ValueError(
                    f"total is inf; without a known end the phases' lengths {given} must be whole steps,"
                    " and the last one None and constant"
                )
            return [float(x) for x in given if x is not None] + [math.inf]
        lengths = [x * total if isinstance(x, float) else float(x or 0) for x in given]
        rest = total - math.fsum(lengths)
        if rest < -_TOLERANCE_STEPS:
            raise ValueError(f"total is {total}; the phases' lengths {given} need {math.fsum(lengths):g}")
        if None not in given:
            if rest > _TOLERANCE_STEPS:
                raise ValueError(
                    f"total is {total}; the phases' lengths {given} fill only {math.fsum(lengths):g}:"
                    " leave out the length of the phase that is to take the rest"
                )
            return lengths
        opened = given.index(None)
        if rest <= _TOLERANCE_STEPS and self.phases[opened].shape != "constant":
            raise ValueError(
                f"total is {total}; the phases' lengths {given} leave nothing for {self.phases[opened].shape}"
            )
        lengths[opened] = max(rest, 0.0)
        return lengths


def _after_warmup(warmup: int | float, *phases: Phase) -> Schedule:
    if warmup == 0 and not isinstance(warmup, bool):
        return Schedule(phases, start=1.0)
    return Schedule((Phase("linear", warmup, 1.0), *phases), start=0.0)


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


def wsd(
    warmup: int | float = 0.01, decay: int | float = 0.1, end: float = 0.0, shape: str = "sqrt"
) -> Schedule:
    """Warm-up, stable, decay: the peak LR is held, and only the last stretch goes down.

    factor(n) = min(1, n / W)  for n <= T - D, then along `shape` from 1 to `end`

    Args:
        warmup: W: a whole number of steps >= 0, or a fraction of the total in [0, 1).
        decay: D: a whole number of steps >= 1, or a fraction of the total in (0, 1].
        end: Factor at the last step, >= 0 (exponential and harmonic: > 0).
        shape: Curve of the decay, one of those of `Phase`.

    Returns:
        The schedule.

    Raises:
        ValueError: If an argument is out of range or the shape is unknown.

    Example:
        >>> [wsd(warmup=20, decay=100)(n, 220) for n in (10, 20, 120, 145, 220)]
        [0.5, 1.0, 1.0, 0.5, 0.0]

    Source: Hu et al. 2024 (MiniCPM), arXiv:2404.06395, with an exponential decay over 10 % of the tokens; the
    sqrt shape is from Haegele et al. 2024, arXiv:2405.18392. Differs: pairing them, and ending at 0, is ours.
    """
    return _after_warmup(warmup, Phase("constant"), Phase(shape, decay, end))


def infinite(
    warmup: int | float = 0.01,
    cooldown: int | float = 0.6,
    constant: int | float | None = None,
    constant_factor: float = 0.55,
    end: float | None = None,
) -> Schedule:
    """Warm-up, cosine cool-down to a constant LR at which new data can join, and an anneal if wanted.

    factor(n) = n / W, then cosine from 1 to c, then c, then c * (end / c) ** v  (v from 0 to 1 over the rest)

    Args:
        warmup: W: a whole number of steps >= 0, or a fraction of the total in [0, 1).
        cooldown: Length of the cool-down: a whole number of steps >= 1, or a fraction of the total in (0, 1].
            Use steps for a run that will be prolonged, since a fraction moves with the total.
        constant: Length of the stretch at c, likewise. None: it is all the rest, and there is no anneal.
        constant_factor: c: factor on that stretch, >= 0 (with an anneal: > 0).
        end: Factor at the last step, > 0; given if and only if `constant` is.

    Returns:
        The schedule. If no length is a fraction and there is no anneal it needs no finite total.

    Raises:
        ValueError: If an argument is out of range, or only one of `constant` and `end` is given.

    Example:
        >>> schedule = infinite(warmup=0.01, cooldown=0.6, constant=0.1, constant_factor=0.55, end=0.1)
        >>> [round(schedule(n, 1000), 4) for n in (5, 10, 310, 610, 710, 855, 1000)]
        [0.5, 1.0, 0.775, 0.55, 0.55, 0.2345, 0.1]

    Source: Ibrahim et al. 2024, arXiv:2403.08763, section 7, with LRs of 3e-4, 1.65e-4 and 3e-5.
    Differs: nothing; for their inverse-square-root cool-down write the phases out, with "inv-sqrt".
    """
    if (constant is None) != (end is None):
        raise ValueError(
            f"constant is {constant} and end is {end}; an anneal needs both, a run without one neither"
        )
    cool = Phase("cosine", cooldown, constant_factor)
    if constant is None:
        return _after_warmup(warmup, cool, Phase("constant"))
    return _after_warmup(warmup, cool, Phase("constant", constant), Phase("exponential", None, end))
