"""Windows over an ordered data set that move with the step or with what training sees.

`SigmoidWindow` is a window pacing (see `rewarm.curriculum.pacing`) for an order that itself changes, by how
much each loss has fallen. `GaussianWindow` moves by pass rate and angle. A window that moves by the model's
ability is a gate on `rewarm.curriculum.live_scores.Ability`.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from rewarm.checks import at_least, in_range
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

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> [tuple(round(share, 4) for share in SigmoidWindow(10)(step)) for step in (0, 5, 10)]
        [(0.0054, 0.2054), (0.4, 0.6), (0.7946, 0.9946)]

    Source: the delta-loss selector of DataFlex, arXiv:2603.26164, in its repository. Differs: nothing.
    """

    total_steps: int
    width: float = 0.2
    steepness: float = 10.0

    def __post_init__(self) -> None:
        at_least(1, total_steps=self.total_steps)
        in_range("(0, 1]", width=self.width)
        in_range("(0, 1000]", steepness=self.steepness)

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
    within [0, largest_move]. `PromptData(draw=GaussianWindow(...))` and `Curriculum(draw=...)` draw with it;
    `MovingCentre` holds the centre, which is 0 at first.

    Args:
        sigma: Width in ranks, > 0.
        gain: Ranks that either of the two may move it, >= 0.
        steepness: a, > 0.
        target: Pass rate at which it neither drives nor holds the centre, in [0, 1].
        largest_move: Bound of the move after one round, in ranks, >= 0.

    Raises:
        ValueError: If an argument is out of range.

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
        in_range("(0, inf)", sigma=self.sigma, steepness=self.steepness)
        in_range("[0, inf)", gain=self.gain, largest_move=self.largest_move)
        in_range("[0, 1]", target=self.target)

    def move(self, centre: float, *, pass_rate: float, angle: float, num_examples: int) -> float:
        """Return where the centre goes after a round.

        Args:
            centre: Place of the centre before, in ranks.
            pass_rate: Mean pass rate of the round, in [0, 1].
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
            centre: Place of the centre, in ranks, in [0, N - 1].
            num_examples: N, >= 1.
            n: Number of ranks to draw, 0 to N.
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


class MovingCentre:
    """The centre of a `GaussianWindow`, which moves once per step by the means of what was seen before it.

    Args:
        window: The window that draws around the centre and says how it moves.
        num_examples: N, >= 1.

    Attributes:
        rank: Where the centre is, in ranks, in [0, N - 1].

    Example:
        >>> centre = MovingCentre(GaussianWindow(sigma=1.0, gain=2.0, largest_move=3.0), num_examples=10)
        >>> centre.move(0)
        >>> centre.see(pass_rate=1.0, angle=0.5)
        >>> centre.move(1)
        >>> round(centre.rank, 4)  # min(2 tanh(1) + 2 tanh(1), 3)
        3.0

    Source: GAIN-RL, arXiv:2506.02281, in its repository. Differs: see `GaussianWindow`.
    """

    def __init__(self, window: GaussianWindow, num_examples: int) -> None:
        self.window, self.num_examples, self.rank = window, num_examples, 0.0
        self._step: int | None = None
        self._seen, self._pass_rates, self._angles = 0, 0.0, 0.0

    def see(self, *, pass_rate: float, angle: float) -> None:
        """Take in what training saw of one example of the round.

        Args:
            pass_rate: Share of its samples that passed, in [0, 1].
            angle: Its angle concentration.
        """
        self._seen += 1
        self._pass_rates += pass_rate
        self._angles += angle

    def move(self, step: int) -> None:
        """Move on if a step begins, by the means over all that was seen since the last one began.

        Raises:
            ValueError: If the mean pass rate is out of range or the mean angle is NaN.
        """
        if self._step == step:
            return
        if self._seen:
            self.rank = self.window.move(
                self.rank,
                pass_rate=self._pass_rates / self._seen,
                angle=self._angles / self._seen,
                num_examples=self.num_examples,
            )
        self._step, self._seen, self._pass_rates, self._angles = step, 0, 0.0, 0.0

    def draw(self, n: int, seed: int) -> list[int]:
        """Draw n ranks around the centre, none twice, ascending."""
        generator = torch.Generator().manual_seed(seed)
        return self.window.draw(self.rank, num_examples=self.num_examples, n=n, generator=generator)

    def state_dict(self) -> dict[str, Any]:
        """Return the centre and what was seen since the step began."""
        return {
            "rank": self.rank,
            "step": self._step,
            "seen": self._seen,
            "pass_rates": self._pass_rates,
            "angles": self._angles,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.rank, self._step, self._seen = state["rank"], state["step"], state["seen"]
        self._pass_rates, self._angles = state["pass_rates"], state["angles"]
