"""Curricula: in which order examples come, how many are visible at a step, and which are let in.

A curriculum is an *order* (`rewarm.curriculum.ordering`), a *pacing* (`rewarm.curriculum.pacing`: which part
of the ordered examples is visible), and a *gate* (`rewarm.curriculum.gates`: which scores are admitted) on
*live scores* (`rewarm.curriculum.live_scores`). In place of a pacing, a *draw* (`GaussianWindow`) weighs the
ordered examples. `Curriculum` puts them together and owns what changes: the examples not yet drawn in this
pass, the live scores, the random state. It has four hooks, the same for every training method:

    ids = curriculum.propose(n, step)        # which examples next
    curriculum.observe(ids, scores)          # what training saw of them
    admitted = curriculum.admit(ids)         # which of them may train, by the live scores that this makes
    state = curriculum.state_dict()

Every rank holds the same curriculum and calls it with the same arguments, so no rank ever has to ask another.
"""

import math
import random
from collections.abc import Hashable, Sequence
from typing import Any, Literal

from rewarm.checks import at_least, one_of, replaced
from rewarm.curriculum.gates import Gate, JointGate
from rewarm.curriculum.live_scores import LiveScores, RunningScore
from rewarm.curriculum.ordering import shuffled_in_windows, sorted_order
from rewarm.curriculum.pacing import Pacing, visible_ranks
from rewarm.curriculum.pacing_windows import GaussianWindow, MovingCentre

# A live score may need some passes to let an example in again; more than so many without any is for ever.
_MOST_EMPTY_PASSES = 1000


class Curriculum:
    """Draws example numbers 0..N-1 in an order, at a pace, through a gate, and remembers where it is.

    Without pacing and with an order, a pass goes through the examples in that order. Otherwise each draw is
    uniform over the visible examples that this pass has not drawn yet; examples that become visible join the
    running pass, those that a window leaves behind leave it.

    Args:
        num_examples: N, at least 1.
        scores: Difficulty per example, NaN where unknown (sorted last). They go with a sorted order.
        order: `shuffled`, `ascending` or `descending` by score; equal scores keep the order of the data. Or
            all example numbers in an order of your own, such as the functions of `rewarm.curriculum.ordering`
            return.
        window: In each pass, shuffle each stretch of so many examples of the order, >= 1. 1 keeps the order.
        pacing: What is visible of the order as a function of the step; None shows everything.
        gate: Admits live scores; None admits everything, and unknown scores are always admitted. A gate that
            looks at all candidates together does so when a pass begins and not again; any other does before
            each draw, and in `admit`. An example whose live score is refused is passed over once; its score
            is then forgotten, so that it gets another chance in the next pass.
        draw: Window that examples are drawn from in place of passes, none twice in a draw. It moves when
            examples are proposed for a new step, by the mean pass rate that was observed since the last one
            began and the mean score of these examples.
        groups: The group of each example, for gates that look at them.
        live: Makes live scores of what is observed; None is `RunningScore()`, what was observed last.
        reorder: Sort by live scores, where there are any, whenever a pass begins.
        seed: Seed of the draws.

    Example:
        >>> curriculum = Curriculum(4, scores=[3.0, 1.0, 2.0, 0.0], order="ascending")
        >>> curriculum.propose(3, step=0), curriculum.propose(3, step=0)
        ([3, 1, 2], [0, 3, 1])

    Raises:
        ValueError: For an empty curriculum, an unknown order, a sorted order without scores or scores without
            one, a pacing, window or draw without an order, or a wrong number of scores, groups or places.

    Source: ours; orders, pacings, gates and live scores have sources of their own.
    """

    @replaced(smoothing="live=RunningScore(smoothing)")
    def __init__(
        self,
        num_examples: int,
        *,
        scores: Sequence[float] | None = None,
        order: Literal["shuffled", "ascending", "descending"] | Sequence[int] = "shuffled",
        window: int = 1,
        pacing: Pacing | None = None,
        gate: Gate | None = None,
        draw: GaussianWindow | None = None,
        groups: Sequence[Hashable] | None = None,
        live: LiveScores | None = None,
        reorder: bool = False,
        seed: int = 0,
    ) -> None:
        at_least(1, num_examples=num_examples, window=window)
        if isinstance(order, str):
            one_of(("shuffled", "ascending", "descending"), order=order)
        if scores is None and order in ("ascending", "descending"):
            raise ValueError(f"order {order!r} needs scores")
        if order == "shuffled":
            _check_shuffled(scores, pacing, window, draw)
        for name, values in (("scores", scores), ("groups", groups)):
            if values is not None and len(values) != num_examples:
                raise ValueError(f"{name} has {len(values)} entries for {num_examples} examples")
        if pacing is not None and window > 1:
            raise ValueError(f"window is {window}, but with a pacing all draws are random: leave one out")
        if draw is not None and (scores is None or pacing is not None or window > 1):
            raise ValueError("draw is given: it needs scores, and has no pacing and no window beside it")
        self.num_examples = num_examples
        self.gate = gate
        self.live: LiveScores = RunningScore() if live is None else live
        self.reorder = reorder
        self._scores, self._groups = scores, groups
        self._pacing, self._window, self._order, self._seed = pacing, window, order, seed
        if isinstance(order, str):
            self._ranking = list(range(num_examples))
            if scores is not None:
                self._ranking = sorted_order(scores, descending=order == "descending")
        else:
            self._ranking = list(order)
            if sorted(self._ranking) != list(range(num_examples)):
                raise ValueError(f"order must hold each of the numbers 0 to {num_examples - 1} once")
        self._centre = None if draw is None else MovingCentre(draw, num_examples)
        self._ranks: list[int] = []  # of the examples; made when first needed
        self._random = random.Random(seed)
        self._deck: list[int] = []
        self._visible = range(0)
        self._num_passes = 0
        self._num_refused = 0

    @property
    def num_passes(self) -> int:
        """How many passes over the visible examples have begun."""
        return self._num_passes

    @property
    def num_refused(self) -> int:
        """How many times the gate has passed over an example."""
        return self._num_refused

    @property
    def is_paced(self) -> bool:
        """Whether what may be drawn changes with the step, so that an epoch is no pass over the data."""
        return self._pacing is not None or self._centre is not None

    def num_visible(self, step: int) -> int:
        """Return how many of the ordered examples may be drawn at a step."""
        return len(self._visible_at(step))

    def score(self, example: int) -> float:
        """Return the live score of an example, NaN before it was observed."""
        return self.live.score(example, math.nan if self._scores is None else self._scores[example])

    def propose(self, n: int, step: int) -> list[int]:
        """Draw the next n examples.

        Args:
            n: Number of examples to draw, >= 1. They may repeat only across passes.
            step: The step, as the pacing counts them, >= 0.

        Returns:
            n example numbers.

        Raises:
            ValueError: If the gate refuses every example for good.
        """
        if self._centre is not None:
            return self._draw_around(self._centre, n, step)
        visible = self._visible_at(step)
        drawn: list[int] = []
        num_empty = 0
        while len(drawn) < n:
            self._show(visible)
            if not self._deck:
                self._begin_pass(visible)
                num_empty += 1
                _check_empty(num_empty)
                continue
            if not self._sorted_pass:
                pick = self._random.randrange(len(self._deck))
                self._deck[pick], self._deck[-1] = self._deck[-1], self._deck[pick]
            example = self._deck.pop()
            if self._may_train(example):
                drawn.append(example)
                num_empty = 0
            else:
                self._refuse(example)
        return drawn

    def observe(self, ids: Sequence[int], scores: Sequence[float]) -> None:
        """Update the live scores of examples.

        Args:
            ids: Example numbers.
            scores: What training saw of each (a loss, a pass rate).
        """
        if len(ids) != len(scores):
            raise ValueError(f"{len(ids)} ids but {len(scores)} scores; there must be one per example")
        for example, seen in zip(ids, scores, strict=True):
            self.live.observe(example, seen)
            if self._centre is not None and self._scores is not None:
                self._centre.see(pass_rate=seen, angle=self._scores[example])

    def admit(self, ids: Sequence[int]) -> list[bool]:
        """Return for each of some proposed examples whether the gate lets it train by its live score.

        A gate that looks at all candidates together decided when they were proposed: it admits them here.

        Args:
            ids: Example numbers.
        """
        return [self._may_train(example) for example in ids]

    def groups_of(self, ids: Sequence[int]) -> list[Hashable] | None:
        """Return the group of each of some examples; None if there are no groups."""
        return None if self._groups is None else [self._groups[example] for example in ids]

    def state_dict(self) -> dict[str, Any]:
        """Return all that changes, as plain Python values."""
        state = {
            "num_examples": self.num_examples,
            "deck": list(self._deck),
            "visible": [self._visible.start, self._visible.stop],
            "num_passes": self._num_passes,
            "num_refused": self._num_refused,
            "live": self.live.state_dict(),
            "ranking": list(self._ranking) if self.reorder else None,
            "random": self._random.getstate(),
        }
        return state if self._centre is None else state | {"centre": self._centre.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: If the state belongs to another number of examples, or one of the two has a draw.
        """
        if state["num_examples"] != self.num_examples:
            raise ValueError(
                f"the checkpoint's curriculum has {state['num_examples']} examples, this {self.num_examples}"
            )
        if (self._centre is None) != ("centre" not in state):
            raise ValueError("one of the checkpoint's curriculum and this has a draw, the other none")
        if self._centre is not None:
            self._centre.load_state_dict(state["centre"])
        self._deck = list(state["deck"])
        self._visible = range(*state["visible"])
        self._num_passes, self._num_refused = state["num_passes"], state["num_refused"]
        self.live.load_state_dict(state["live"])
        if state["ranking"] is not None:
            self._ranking, self._ranks = list(state["ranking"]), []
        version, internal, gauss = state["random"]
        self._random.setstate((version, tuple(internal), gauss))

    @property
    def _sorted_pass(self) -> bool:
        return self._order != "shuffled" and self._pacing is None

    def _may_train(self, example: int) -> bool:
        if self.gate is None or isinstance(self.gate, JointGate):
            return True
        score = self.score(example)
        return math.isnan(score) or self.gate(score)

    def _visible_at(self, step: int) -> range:
        return visible_ranks(1.0 if self._pacing is None else self._pacing(step), self.num_examples)

    def _begin_pass(self, visible: range) -> None:
        self.live.begin_pass(self._scores)
        if self.reorder:
            self._sort_by_live_scores()
        self._visible = visible
        examples = self._ranking[visible.start : visible.stop]
        if self._window > 1:
            examples = shuffled_in_windows(
                examples, self._window, seed=self._seed, stream=(self._num_passes,)
            )
        self._num_passes += 1
        if isinstance(self.gate, JointGate):
            scores = [self.score(example) for example in examples]
            selected = self.gate.select(scores, self.groups_of(examples))
            for example, is_in in zip(examples, selected, strict=True):
                if not is_in:
                    self._refuse(example)
            examples = [example for example, is_in in zip(examples, selected, strict=True) if is_in]
        # Drawn from the end, so that a draw costs the same at any size.
        self._deck = examples[::-1]

    def _draw_around(self, centre: MovingCentre, n: int, step: int) -> list[int]:
        """Draw around a centre, and again for those whose live score is refused."""
        if self.reorder or isinstance(self.gate, JointGate):
            raise ValueError("draw is given: it goes with a gate on single scores only, and not with reorder")
        centre.move(step)
        drawn: list[int] = []
        num_empty = 0
        while len(drawn) < n:
            self.live.begin_pass(self._scores)
            self._num_passes += 1
            ranks = centre.draw(min(n - len(drawn), self.num_examples), self._random.getrandbits(62))
            examples = [self._ranking[rank] for rank in ranks]
            fitting = [example for example in examples if self._may_train(example)]
            for example in set(examples).difference(fitting):
                self._refuse(example)
            drawn += fitting
            num_empty = 0 if fitting else num_empty + 1
            _check_empty(num_empty)
        return drawn

    def _sort_by_live_scores(self) -> None:
        known = [self.score(example) for example in range(self.num_examples)]
        if self._scores is not None:
            known = [old if math.isnan(new) else new for new, old in zip(known, self._scores, strict=True)]
        self._ranking, self._ranks = sorted_order(known, descending=self._order == "descending"), []

    def _refuse(self, example: int) -> None:
        self.live.forget(example)
        self._num_refused += 1

    def _show(self, visible: range) -> None:
        """Let newly visible examples join the running pass, and those not visible any more leave it."""
        old = self._visible
        if not self._deck or visible == old:
            return
        self._visible = visible
        if visible.start > old.start or visible.stop < old.stop:
            if not self._ranks:
                self._ranks = [0] * self.num_examples
                for rank, example in enumerate(self._ranking):
                    self._ranks[example] = rank
            self._deck = [example for example in self._deck if self._ranks[example] in visible]
        self._deck += self._ranking[visible.start : min(visible.stop, old.start)]
        self._deck += self._ranking[max(visible.start, old.stop) : visible.stop]


def _check_empty(num_empty: int) -> None:
    if num_empty > _MOST_EMPTY_PASSES:
        raise ValueError("the gate refuses every visible example, whatever their live scores are")


def _check_shuffled(
    scores: Sequence[float] | None, pacing: Pacing | None, window: int, draw: GaussianWindow | None
) -> None:
    if scores is not None:
        raise ValueError(
            "scores are given, but order 'shuffled' ignores them: set it to 'ascending' or 'descending'"
        )
    if pacing is not None:
        raise ValueError("pacing shows the first share of an order: set order to 'ascending' or 'descending'")
    if window > 1:
        raise ValueError(f"window is {window}, but order 'shuffled' has none: set it to 'ascending' or so")
    if draw is not None:
        raise ValueError("draw draws from an order: set order to 'ascending' or 'descending'")
