"""Copies of a module's trainable weights, and their average in the place of the weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rewarm.functional.averaging import ema_, merge
from rewarm.functional.shards import local, part_like, reshard


class AveragedWeights:
    """Rows of float32 copies of a module's trainable weights, each rank those of its shards.

    Tied weights are one. While an average is in place of the weights, what it displaced is kept aside.

    Args:
        device: Where the rows live; None is the parameters' device.

    Attributes:
        names: Names of the weights.
        parameters: The weights, in the order of their names.
        rows: The copies, oldest first; each a list in the order of the names.

    Example:
        >>> module, averages = nn.Linear(1, 1, bias=False), AveragedWeights()
        >>> averages.find(module)
        >>> for value in (1.0, 3.0):
        ...     _ = module.weight.data.fill_(value)
        ...     averages.take(decay=0.0, opens_row=True, max_rows=2)
        >>> averages.apply([0.5, 0.5])
        >>> module.weight.item()
        2.0
        >>> averages.restore(module)
        >>> module.weight.item()
        3.0
    """

    def __init__(self, device: str | None = None) -> None:
        self.device = device
        self.names: list[str] = []
        self.parameters: list[nn.Parameter] = []
        self.rows: list[list[Tensor]] = []
        self._live: list[tuple[nn.Parameter, Tensor]] = []

    @property
    def is_applied(self) -> bool:
        """Whether an average is in place of the weights."""
        return bool(self._live)

    def clear(self) -> None:
        """Begin anew, without names and rows."""
        self.names, self.rows = [], []

    def forget_live(self) -> None:
        """Forget what an average has displaced: the live weights are in the module again."""
        self._live = []

    def find(self, module: nn.Module) -> None:
        """Find the trainable weights of a module.

        Args:
            module: The module that is trained.

        Raises:
            ValueError: If it has none, or others than those that the rows are of.
        """
        reshard(module)
        # `torch.compile` of a layer adds a name, and may differ between the runs.
        found = {n.replace("_orig_mod.", ""): p for n, p in module.named_parameters() if p.requires_grad}
        if not found:
            raise ValueError(f"{type(module).__name__} has no trainable parameters to average")
        if self.names and self.names != list(found):
            difference = sorted(set(self.names) ^ set(found)) or "their order"
            raise ValueError(f"the averaged and the trainable parameters differ in {difference}")
        self.names, self.parameters = list(found), list(found.values())

    def settle(self) -> None:
        """Bring the rows to where the weights are; of whole rows each rank keeps its shards.

        Raises:
            ValueError: If one has another shape than its weight.
        """
        self.rows = [
            [self._settled(copy, parameter) for copy, parameter in zip(row, self.parameters, strict=True)]
            for row in self.rows
        ]

    def empty_row(self) -> list[Tensor]:
        """Return a row that holds anything."""
        return [
            torch.empty_like(local(p), dtype=torch.float32, device=self.device or p.device)
            for p in self.parameters
        ]

    @torch.no_grad()
    def take(self, decay: float, opens_row: bool, max_rows: int) -> None:
        """Take the present weights into the newest row: row <- decay * row + (1 - decay) * weights.

        Args:
            decay: How much of the row is left, in [0, 1).
            opens_row: Whether to begin a row; if there are the most already, the oldest one goes.
            max_rows: Most rows, >= 1.
        """
        if opens_row:
            self.rows.append(self.rows.pop(0) if len(self.rows) == max_rows else self.empty_row())
        ema_(self.rows[-1], [local(parameter) for parameter in self.parameters], decay)

    # In validation these are called in inference mode; tensors made there could not be updated in training.
    @torch.inference_mode(False)
    @torch.no_grad()
    def apply(self, shares: Sequence[float]) -> None:
        """Put an average in place of the weights, which must not be displaced already.

        Args:
            shares: How much of the average each row is.
        """
        self._live = [(p, local(p).to(self.device or p.device, copy=True)) for p in self.parameters]
        used = [pair for pair in zip(self.rows, shares, strict=True) if pair[1]]
        rows, weights = zip(*used, strict=True)
        for parameter, column in zip(self.parameters, zip(*rows, strict=True), strict=True):
            local(parameter).copy_(merge(([copy] for copy in column), weights)[0])

    @torch.inference_mode(False)
    @torch.no_grad()
    def restore(self, module: nn.Module) -> None:
        """Go back to the live weights, if an average is in place."""
        if not self._live:
            return
        reshard(module)
        for parameter, weight in self._live:
            local(parameter).copy_(weight)
        self._live = []

    @torch.inference_mode(False)
    @torch.no_grad()
    def exchange(self, module: nn.Module) -> None:
        """Let the average and the live weights change places; done twice, all is as before."""
        reshard(module)
        for parameter, weight in self._live:
            displaced = local(parameter).clone()
            local(parameter).copy_(weight)
            weight.copy_(displaced)

    def detached(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Copy what shares memory with the trainable weights; tied entries share their copy."""
        own = {local(parameter).data_ptr() for parameter in self.parameters}
        copies: dict[int, Any] = {}
        for name, value in state_dict.items():
            pointer = local(value).data_ptr() if isinstance(value, Tensor) else 0
            if pointer and pointer in own:
                if pointer not in copies:
                    copies[pointer] = value.clone()
                state_dict[name] = copies[pointer]
        return state_dict

    def free_device(self) -> None:
        """Move everything to main memory."""
        self.rows = [[copy.cpu() for copy in row] for row in self.rows]
        self._live = [(parameter, weight.cpu()) for parameter, weight in self._live]

    def _settled(self, copy: Tensor, parameter: nn.Parameter) -> Tensor:
        shape = local(parameter).shape
        if copy.shape != shape and copy.shape == parameter.shape:
            copy = local(part_like(copy, parameter))
        if copy.shape != shape:
            raise ValueError(
                f"an average has shape {tuple(copy.shape)}, its parameter {tuple(parameter.shape)}"
            )
        return copy.to(self.device or parameter.device)
