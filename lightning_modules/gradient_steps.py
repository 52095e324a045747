"""Clipping by the global norm on any strategy, and leaving out steps without a finite one."""

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from rewarm.functional.gradients import clip_gradients_, gradient_norm
from rewarm.lightning_modules.exact_steps import step_is_logged


class GradientSteps:
    """Clips gradients, whole or in shards, logs their norm, and leaves out steps whose norm is not finite.

    Lightning can't clip sharded gradients by their norm. A step that is left out changes neither the weights
    nor the optimizer's state. Two values are logged: `train/grad_norm`, the norm before clipping, and
    `train/skipped_steps`, the number of steps that were left out so far.

    Args:
        module: The module whose `configure_gradient_clipping` calls `clip`.

    Attributes:
        skipped: Number of optimizer steps so far that were left out; reading it waits for the device.

    Example:
        >>> class Regression(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net, self.gradient_steps = torch.nn.Linear(3, 1), GradientSteps(self)
        ...     def configure_gradient_clipping(self, optimizer, *clipping, **named):
        ...         self.gradient_steps.clip(optimizer, *clipping, **named)

    Source: ours.   Differs: nothing.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        self._skipped: int | Tensor = 0
        self._told = 0

    @property
    def skipped(self) -> int:
        """Number of optimizer steps so far that were left out; reading it waits for the device."""
        return int(self._skipped)

    @skipped.setter
    def skipped(self, count: int) -> None:
        self._skipped = self._told = count

    def clip(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> Tensor:
        """Clip the gradients of an optimizer's parameters, and see to it that broken ones are left out.

        A fused optimizer is told on the device to leave the step out, for which nothing waits. From any other
        optimizer the gradients are taken away.

        Args:
            optimizer: The optimizer that is about to step.
            gradient_clip_val: Bound of the norm, or of each value; None or 0 does not clip.
            gradient_clip_algorithm: `norm` or `value`; None is `norm`.

        Returns:
            The norm of all gradients before clipping. Shape ().
        """
        module = self._module
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        scaler = getattr(module.trainer.precision_plugin, "scaler", None)
        is_fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        if scaler is not None and is_fused:
            # Lightning leaves it to such an optimizer's step, which is too late for a norm.
            scaler.unscale_(optimizer)
        by_value = gradient_clip_algorithm == "value"
        bound = math.inf if by_value or not gradient_clip_val else gradient_clip_val
        norm = clip_gradients_(parameters, bound) if bound < math.inf else gradient_norm(parameters)
        if by_value and gradient_clip_val:
            nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        # A checkpoint brings the groups of the optimizer that it was made with.
        if scaler is None and is_fused and all(group.get("fused") for group in optimizer.param_groups):
            broken = ~norm.isfinite()
            optimizer.found_inf = broken.float()  # type: ignore[attr-defined]
            self._skipped = self._skipped + broken
        elif not norm.isfinite():
            self._skipped = self._skipped + 1
            for parameter in parameters:
                parameter.grad = None
        if step_is_logged(module.trainer):
            module.log("train/grad_norm", norm, batch_size=1)
            module.log("train/skipped_steps", float(self._skipped), batch_size=1)
            self.tell()
        return norm

    def tell(self) -> None:
        """Warn of steps that were left out since the last time."""
        new = self.skipped - self._told
        self._told += new
        if new:
            rank_zero_warn(
                f"step {self._module.global_step + 1}: {new} left out since the last log, for gradients"
                " without a finite norm"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return how many steps were left out so far."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the count of steps that were left out."""
        self.skipped = state["skipped"]
