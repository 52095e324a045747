"""Carries what training sees of each example back to the curriculum."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rewarm.callbacks import lightning_internals as internals
from rewarm.callbacks.ended_steps import EndedSteps
from rewarm.curriculum.curriculum import Curriculum
from rewarm.curriculum.gates import Band, Gate
from rewarm.curriculum.live_scores import LiveScores
from rewarm.rollouts.ranks import gather, place


class DifficultyFilter(Callback):
    """Trains on examples within a band of live difficulty, or on what another gate admits.

    The callback puts the gate on a curriculum, by default the data module's, and feeds it with scores.

    With `PromptData`, what is seen of a prompt is the mean reward of its group under the current policy: a
    group that brings its prompt's live score outside the band is refused, and the rollout is refilled with
    other prompts until it is full. A gate that looks at all examples together chooses when a pass begins, and
    refuses no group; a gate on the groups of a round is `PromptData(group_gate=...)`.

    With any module whose `training_step` returns `ids` and `scores` beside the loss (`CurriculumSFT` returns
    each example's loss, `DPO` each pair's margin), an example outside the band is passed over once, then
    tried again.

    Args:
        low: Smallest score that is admitted; None is 0.25.
        high: Largest score that is admitted, >= low; None is 0.75.
        curriculum: Curriculum to filter; None is `trainer.datamodule.curriculum`.
        gate: Gate in place of the band, such as `rewarm.TopShare(0.3)` or `rewarm.AtLeast(gate, 100)`.
        live: Kind of live score. None is what training saw last of an example; `rewarm.RunningScore` smooths
            that, `rewarm.ScoreChange` is how far it has fallen, and `rewarm.Ability` measures each example's
            given score against what the model is able to.
        reorder: Whether to sort the data by live scores when a pass begins, which `rewarm.SigmoidWindow`
            needs.

    Logs `data/refused`, the number of examples that the gate has passed over so far.

    Raises:
        ValueError: If there is no curriculum to filter, or low and high come with a gate.

    Example:
        >>> curriculum = Curriculum(4)
        >>> DifficultyFilter(low=0.2, high=0.8, curriculum=curriculum).setup(None, LightningModule(), "fit")
        >>> curriculum.gate
        Band(low=0.2, high=0.8)

    Source: balanced online difficulty filtering, arXiv:2504.03380, which samples until the batch is full.
    Differs: the paper's thresholds are not known to us; 0.25 and 0.75 are ours.
    """

    def __init__(
        self,
        low: float | None = None,
        high: float | None = None,
        curriculum: Curriculum | None = None,
        gate: Gate | None = None,
        live: LiveScores | None = None,
        reorder: bool = False,
    ) -> None:
        if gate is not None and (low, high) != (None, None):
            raise ValueError(f"low is {low} and high is {high}, but a gate is given: leave out one of them")
        self.gate = gate or Band(0.25 if low is None else low, 0.75 if high is None else high)
        self.live, self.reorder = live, reorder
        self._given, self._curriculum = curriculum, curriculum
        self._seen: list[tuple[list[int], torch.Tensor]] = []
        self._steps = EndedSteps()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the gate and the live scores on the curriculum."""
        if stage != "fit":
            return
        self._curriculum = self._given or getattr(trainer.datamodule, "curriculum", None)  # type: ignore[attr-defined]
        if self._curriculum is None:
            raise ValueError(
                "DifficultyFilter found no curriculum: use a data module with one (InstructionData,"
                " PreferenceData, PromptData), or give it as `curriculum`"
            )
        self._curriculum.gate = self.gate
        self._curriculum.reorder = self.reorder
        if self.live is not None:
            self._curriculum.live = copy.deepcopy(self.live)  # another fit begins anew

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember where the run begins."""
        self._steps.begin(trainer)
        self._seen = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Give the curriculum the scores of the optimizer step, once it is done, from all ranks."""
        assert self._curriculum is not None
        if isinstance(outputs, Mapping) and "scores" in outputs and "ids" in outputs:
            self._seen.append((outputs["ids"], outputs["scores"].detach()))
        if not self._steps.look(trainer):
            return
        if self._seen:
            # Only here does a number leave the device.
            ids = [example for some, _ in self._seen for example in some]
            scores = torch.cat([scores for _, scores in self._seen]).tolist()
            self._seen = []
            parts = gather((ids, scores), place(trainer))
            self._curriculum.observe(
                [example for part, _ in parts for example in part],
                [score for _, part in parts for score in part],
            )
        if internals.logs_now(trainer):
            pl_module.log("data/refused", float(self._curriculum.num_refused), batch_size=1)
