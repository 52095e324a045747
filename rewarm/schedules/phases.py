"""What learning-rate schedules are made of: phases along named curves, and the function that joins them.

A `Schedule` is a chain of `Phase`s, each from the factor where the one before it ended. Nothing is remembered
between calls, so a run that is stopped and resumed, or plotted beforehand, has the same curve. The published
schedules are in `rewarm.schedules.published`; others are written as phases:

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

Positions are optimizer steps or tokens, whichever the caller counts; the total and the whole-number lengths
are in the same unit. A position says how much is done once the step in question is: the n-th step uses
schedule(n, total), so that the first step is not wasted at LR 0 and the last one has the end value.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


def whole(length: int | float) -> int | float:
    """Return a number of steps or tokens above 1 as an int, which a command line or `1e9` may make a float.

    Args:
        length: Length of a phase; a fraction of the total, in (0, 1], stays one.

    Example:
        >>> whole(1e9), whole(0.5), whole(2.5)
        (1000000000, 0.5, 2.5)

    Source: ours.
    """
    return int(length) if isinstance(length, float) and length > 1 and length.is_integer() else length


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
    "jump": lambda start, end, progress: end,
    "linear": _moves(lambda progress: progress),
    "cosine": _moves(lambda progress: (1 - math.cos(math.pi * progress)) / 2),
    "mirror-cosine": _moves(lambda progress: 2 * progress - (1 - math.cos(math.pi * progress)) / 2),
    "sqrt": _moves(math.sqrt),
    "square": _moves(lambda progress: progress**2),
    "exponential": lambda start, end, progress: start * (end / start) ** progress,
    "harmonic": lambda start, end, progress: 1 / ((1 - progress) / start + progress / end),
    "inv-sqrt": _moves(_inverse_sqrt),
    "rex": _moves(lambda progress, beta: 1 - (1 - progress) / (beta + (1 - beta) * (1 - progress))),
    "uba": _moves(_uba),
    "cospow": _moves(_cosine_power),
}
"""Shapes to a given end: pure functions of start, end, progress in (0, 1) and the knob, if there is one."""

FREE_SHAPES = ("constant", "half-life", "power")
"""Shapes that end wherever they get to."""

_DEFAULT_KNOB = {"inv-sqrt": 1.0, "rex": 0.5, "uba": 0.5, "cospow": 10.0, "power": -0.51}
_KNOBS = (*_DEFAULT_KNOB, "half-life")


@dataclass(frozen=True)
class Phase:
    """One stretch of a schedule: how long it lasts, where it ends, and along which curve it gets there.

    The factor at progress p (0 where the phase starts, 1 where it ends), from start s to end e with knob k;
    n is the position itself, b that of the phase's beginning:

    | shape | factor |
    |---|---|
    | constant | s |
    | jump | e at once: the one way for a schedule to be discontinuous |
    | linear | s + (e - s) * p |
    | cosine | s + (e - s) * (1 - cos(pi * p)) / 2 |
    | mirror-cosine | s + (e - s) * (2 * p - (1 - cos(pi * p)) / 2) |
    | sqrt | s + (e - s) * sqrt(p), known as the "1-sqrt" decay |
    | square | s + (e - s) * p ** 2 |
    | exponential | s * (e / s) ** p |
    | half-life | s * 0.5 ** ((n - b) / k) |
    | harmonic | 1 / ((1 - p) / s + p / e) |
    | inv-sqrt | s + (e - s) * g(p) / g(1),  g(p) = 1 / sqrt(1 + k * p) - 1 |
    | rex | e + (s - e) * (1 - p) / (k + (1 - k) * (1 - p)) |
    | uba | e + (s - e) * 2 * c / (2 * k + (2 - k) * c),  c = 1 + cos(pi * p) |
    | cospow | e + (s - e) * (k ** c - 1) / (k - 1),  c = (1 + cos(pi * p)) / 2 |
    | power | s * (max(n, r) / r) ** k,  r = max(b, turn) |

    Args:
        shape: One of the names above.
        length: A whole number of steps or tokens (>= 1; above 1 also as a float, such as 1e9), a fraction of
            the total as a float in (0, 1], or None for what the other phases leave, which one phase of a
            schedule may have. A jump has length 0.
        end: Factor of the peak LR where it ends, >= 0 (exponential, harmonic: > 0). None for constant,
            half-life and power, which end wherever they get to.
        knob: The parameter of the shapes that have one. inv-sqrt: its timescale, > 0, by default 1. rex: its
            beta, > 0, by default 0.5. uba: its phi, > 0, by default 0.5; 2 is cosine. cospow: its k, >= 1, by
            default 10; 1 is cosine. power: its exponent, < 0, by default -0.51. half-life: the half-life,
            > 0, in the unit of the length: steps or tokens, or a fraction of the total; no default.
        turn: For power alone, which needs it: the position up to which its start holds, > 0.

    Raises:
        ValueError: If an argument is outside what is allowed.

    Example:
        >>> Phase("cosine", 0.5, end=0.1).factor(progress=0.5, start=1.0)
        0.55

    Source: exponential, half-life: Hu et al. 2024, arXiv:2404.06395. mirror-cosine, square, sqrt: Haegele et
    al. 2024, arXiv:2405.18392, and its code. harmonic: Wen et al. 2024, arXiv:2410.05192. inv-sqrt: Ibrahim
    et al. 2024, arXiv:2403.08763. rex: Chen et al. 2021, arXiv:2107.04197. uba: arXiv:2505.24452. cospow:
    Hundt et al. 2019 (sharpDARTS). power: Shen et al. 2024, arXiv:2408.13359.
    Differs: the default knobs of inv-sqrt and cospow are from code; that of uba is ours.
    """

    shape: str
    length: int | float | None = None
    end: float | None = None
    knob: float | None = None
    turn: float | None = None

    def __post_init__(self) -> None:
        if self.length is not None:
            object.__setattr__(self, "length", whole(self.length))
        if self.shape not in SHAPES and self.shape not in FREE_SHAPES:
            raise ValueError(f"shape is {self.shape!r}; known shapes: {', '.join((*FREE_SHAPES, *SHAPES))}")
        self._check_length()
        if self.shape in FREE_SHAPES:
            if self.end is not None:
                does = "keeps the factor it starts with" if self.shape == "constant" else "has no end to meet"
                raise ValueError(f"end is {self.end}; a {self.shape} phase {does}, leave end out")
        elif self.end is None or not 0 <= self.end < math.inf:
            raise ValueError(f"end is {self.end}; a {self.shape} phase needs a finite factor >= 0 to end at")
        if self.knob is not None or self.shape == "half-life":
            self._check_knob()
        if self.shape != "power" and self.turn is not None:
            raise ValueError(f"turn is {self.turn}; {self.shape} has none, only power does")
        if self.shape == "power" and (self.turn is None or not 0 < self.turn < math.inf):
            raise ValueError(f"turn is {self.turn}; power needs the finite position > 0 where it sets in")

    def _check_length(self) -> None:
        length = self.length
        if self.shape == "jump":
            if isinstance(length, bool) or length != 0:
                raise ValueError(f"length is {length}; a jump has length 0")
        elif isinstance(length, bool) or (isinstance(length, int) and length < 1):
            raise ValueError(f"length is {length}; a number of steps or tokens must be a whole number >= 1")
        elif isinstance(length, float) and not 0 < length <= 1:
            raise ValueError(
                f"length is {length}; a float is a fraction of the total, in (0, 1]; write steps or tokens as"
                " an int"
            )

    def _check_knob(self) -> None:
        if self.shape not in _KNOBS:
            raise ValueError(f"knob is {self.knob}; {self.shape} has none, only {', '.join(_KNOBS)} do")
        knob = math.nan if self.knob is None else self.knob
        if self.shape == "half-life" and self.length is None:
            raise ValueError("length is None; a half-life phase needs one, as its knob is in the same unit")
        if self.shape == "half-life" and isinstance(self.length, float) and knob > 1:
            raise ValueError(
                f"knob is {knob}; the length {self.length} is a fraction of the total, so the half-life must"
                " be one too, in (0, 1]"
            )
        least = 1.0 if self.shape == "cospow" else -math.inf if self.shape == "power" else math.ulp(0.0)
        most = -math.ulp(0.0) if self.shape == "power" else math.inf
        if not (least <= knob <= most and math.isfinite(knob)):
            allowed = {"cospow": ">= 1", "power": "< 0"}.get(self.shape, "> 0")
            raise ValueError(f"knob is {self.knob}; for {self.shape} it must be finite and {allowed}")

    def factor(self, progress: float, start: float, begin: float = 0.0, length: float = 1.0) -> float:
        """Factor of the peak LR at a point of this phase.

        Args:
            progress: Share of the phase's length that has passed, in [0, 1].
            start: Factor where the phase starts, >= 0.
            begin: Position where the phase starts, >= 0; power alone looks at it.
            length: Length of the phase in the unit of positions, > 0; power alone looks at it.

        Returns:
            The factor; exactly `start` at 0 and exactly `end`, where there is one, at 1.

        Example:
            >>> Phase("sqrt", 100, end=0.0).factor(progress=0.25, start=1.0)
            0.5

        Source: see the class. Differs: nothing.
        """
        knob = _DEFAULT_KNOB.get(self.shape) if self.knob is None else self.knob
        if progress <= 0 or self.shape == "constant":
            return start
        if self.shape == "half-life":
            assert self.length is not None
            assert knob is not None
            return start * 0.5 ** (min(progress, 1.0) * self.length / knob)
        if self.shape == "power":
            assert self.turn is not None
            assert knob is not None
            turn = max(begin, self.turn)
            return start * (max(begin + min(progress, 1.0) * length, turn) / turn) ** knob
        assert self.end is not None
        # The formulas meet their ends only to rounding, and a decay to 0 should end at 0.
        if progress >= 1:
            return self.end
        return SHAPES[self.shape](start, self.end, progress, *(() if knob is None else (knob,)))


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

    # Not a dataclass: for those, jsonargparse would not take functions that return one as class_path.
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
            position: The point asked for, >= 0: n for the n-th optimizer step, or the tokens seen by its end.
                Beyond the total the last value holds.
            total: Where the schedule ends, > 0, in the same unit. It may be infinite if no length is a
                fraction and the last phase is open and either constant or power.

        Returns:
            The factor, >= 0.

        Raises:
            ValueError: If the position is negative, or the phases do not fill the total exactly.

        Example:
            >>> Schedule([Phase("linear", 4, 1.0), Phase("constant")], start=0.0)(2, 100)
            0.5

        Source: see the class. Differs: nothing.
        """
        if not 0 <= position < math.inf:
            raise ValueError(f"position is {position}; it must be finite and >= 0")
        factor, begin, near = self.start, 0.0, _tolerance(total)
        for phase, length in zip(self.phases, self._lengths(total), strict=True):
            left = begin + length - position
            if length > 0 and left >= -near:
                if length == math.inf:  # a constant or a power law, which take any unit of length
                    return phase.factor(1.0, factor, begin, position - begin)
                progress = 1.0 if left <= near else (position - begin) / length
                return phase.factor(progress, factor, begin, length)
            if length > 0 or phase.shape == "jump":
                factor = phase.factor(1.0, factor, begin, length)
            begin += length
        return factor

    def _lengths(self, total: float) -> list[float]:
        """Lengths of the phases in the unit of the total."""
        given = [phase.length for phase in self.phases]
        if not total > 0:
            raise ValueError(f"total is {total}; it must be > 0")
        if total == math.inf:
            last = self.phases[-1]
            if (
                any(isinstance(x, float) for x in given)
                or last.length is not None
                or last.shape not in FREE_SHAPES
            ):
                raise ValueError(
                    f"total is inf; without a known end the phases' lengths {given} must be whole numbers,"
                    " and the last one None, of a constant or power phase"
                )
            return [float(x) for x in given if x is not None] + [math.inf]
        near = _tolerance(total)
        lengths = [x * total if isinstance(x, float) else float(x or 0) for x in given]
        rest = total - math.fsum(lengths)
        if rest < -near:
            raise ValueError(f"total is {total}; the phases' lengths {given} need {math.fsum(lengths):g}")
        if None not in given:
            if rest > near:
                raise ValueError(
                    f"total is {total}; the phases' lengths {given} fill only {math.fsum(lengths):g}:"
                    " leave out the length of the phase that is to take the rest"
                )
            return lengths
        opened = given.index(None)
        if rest <= near and self.phases[opened].shape not in FREE_SHAPES:
            raise ValueError(
                f"total is {total}; the phases' lengths {given} leave nothing for {self.phases[opened].shape}"
            )
        lengths[opened] = max(rest, 0.0)
        return lengths


def _tolerance(total: float) -> float:
    """How near a boundary counts as on it: fractions of a total sum to whole steps only up to rounding."""
    return 1e-6 if total == math.inf else max(1e-6, 1e-12 * total)
