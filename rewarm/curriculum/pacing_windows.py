"""Windows over an ordered data set that move with the step or with what training sees.

`SigmoidWindow` is a window pacing (see `rewarm.curriculum.pacing`) for an order that itself changes, by how
much each loss has fallen. `GaussianWindow` moves by pass rate and angle. A window that moves by the model's
ability is a gate on `rewarm.curriculum.live_scores.Ability`.
"""

import math
from dataclasses import dataclass

import torch

from rewarm.curriculum.ordering import draw_weighted


@dataclass(frozen=True)
class SigmoidWindow:
    """Window of fixed width that moves from the start of the order to its end, fastest in the middle.

    low(t) = sigmoid(k * (t / T - 1/2)) * (1 - width),  high(t) = low(t) + width,  t up to T

    The order is that of the loss change, largest fall first: descending by
    `rewarm.curriculum.live_scores.ScoreChange`, sorted again in each pass. The window doesn't quite reach
    either end: with k = 10 it begins at 0.0067 * (1 - width).

    Args:
        total_steps: Step T after which the window stands still, >= 1.
        width: Share of the order that is visible, in (0, 1].
        steepness: k, > 0.

    Example:
        >>> [tuple(round(share, 4) for share in SigmoidWindow(10)(step)) for step in (0, 5, 10)]
        [(0.0054, 0.2054), (0.4, 0.6), (0.7946, 0.9946)]

    Source: the delta-loss selector of DataFlex, arXiv:2603.26164, in its repository. Differs: nothing.
    """

    total_steps: int
    width: float = 0.2
    steepness: float = 10.0

    def __post_init__(self) -> None:
        if self.total_steps < 1:
            raise ValueError(f"total_steps is {self.total_steps}; it must be at least 1 step")
        if not 0.0 < self.width <= 1.0:
            raise ValueError(f"width is {self.width}; it must be in (0, 1]")
        if not 0.0 < self.steepness <= 1000.0:
            raise ValueError(f"steepness is {self.steepness}; it must be in (0, 1000]")

    def __call__(self, step: int) -> tuple[float, float]:
        """Return the visible window at a step >= 0."""
        progress = min(step / self.total_steps, 1.0)
        low = (1.0 - self.width) / (1.0 + math.exp(-self.steepness * (progress - 0.5)))
        return low, min(low + self.width, 1.0)


@dataclass(frozen=True)
class GaussianWindow:
    """Window without edges whose centre moves on as training gets better.

    An example of rank i has weight exp(-(i - centre)^2 / (2 sigma^2)) in the draw of a round. After it,
    centre <- min(N - 1, centre + d),  d = gain * tanh(a * (pass_rate - target)) + gain * tanh(a * angle),
    within [0, largest_move]. The centre, 0 at first, is the whole state.

    Args:
        sigma: Width in ranks, > 0.
        gain: Ranks that either of the two may move it, >= 0.
        steepness: a, > 0.
        target: Pass rate at which it neither drives nor holds the centre, in [0, 1].
        largest_move: Bound of the move after one round, in ranks, >= 0.

    Example:
        >>> window = GaussianWindow()
        >>> round(window.move(0.0, pass_rate=0.75, angle=0.1, num_examples=10_000), 1)
        329.7

    Source: GAIN-RL, arXiv:2506.02281, in its repository, where the order is by angle concentration, largest
    first. Differs: the pass rate goes from 0 to 1, where their reward goes to 2 and is halved; the centre
    stops at the last rank.
    """

    sigma: float = 1000.0
    gain: float = 500.0
    steepness: float = 2.0
    target: float = 0.5
    largest_move: float = 1000.0

    def __post_init__(self) -> None:
        for name in ("sigma", "steepness"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0 and finite")
        for name in ("gain", "largest_move"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0 and finite")
        if not 0.0 <= self.target <= 1.0:
            raise ValueError(f"target is {self.target}; it must be in [0, 1]")

    def move(self, centre: float, *, pass_rate: float, angle: float, num_examples: int) -> float:
        """Return where the centre goes after a round.

        Args:
            centre: Where it was, in ranks.
            pass_rate: Mean of the round, in [0, 1].
            angle: Mean angle concentration of the round.
            num_examples: N, >= 1.

        Raises:
            ValueError: If the pass rate is out of range or the angle is NaN.
        """
        if not 0.0 <= pass_rate <= 1.0 or math.isnan(angle):
            raise ValueError(
                f"pass_rate is {pass_rate} and angle is {angle}; they must be in [0, 1] and known"
            )
        drive = math.tanh(self.steepness * (pass_rate - self.target)) + math.tanh(self.steepness * angle)
        step = min(max(self.gain * drive, 0.0), self.largest_move)
        return min(centre + step, num_examples - 1.0)

    def draw(self, centre: float, *, num_examples: int, n: int, generator: torch.Generator) -> list[int]:
        """Draw the ranks of a round, none twice.

        Only ranks up to n + 10 sigma from the centre are looked at; the others' weights are below e^-50 of
        some n that are.

        Args:
            centre: In ranks, in [0, N - 1].
            num_examples: N, >= 1.
            n: How many, 0 to N.
            generator: Source of the randomness.

        Returns:
            Ranks, ascending.

        Raises:
            ValueError: If the centre or n is out of range.
        """
        if not 0.0 <= centre <= num_examples - 1:
            raise ValueError(f"centre is {centre}; it must be in 0 to {num_examples - 1}")
        if not 0 <= n <= num_examples:
            raise ValueError(f"n is {n}; it must be in 0 to {num_examples}")
        reach = math.ceil(n + 10 * self.sigma)
        start = max(0, math.floor(centre) - reach)
        ranks = torch.arange(start, min(num_examples, math.ceil(centre) + reach + 1))
        log_weights = -0.5 * ((ranks.double() - centre) / self.sigma).square()
        drawn = draw_weighted(log_weights, n, generator=generator)
        return sorted((drawn + start).tolist())
