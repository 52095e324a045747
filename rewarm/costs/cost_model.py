"""What a training step costs in memory and time, from its operations on tensors without data.

The step itself is run, on shapes: every operation says what it would allocate, compute and move. Nothing is
assumed about the architecture, and nothing has to fit.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# They allocate or rename, and touch no element.
_FREE = {"empty", "new_empty", "empty_like", "new_empty_strided", "empty_strided", "_unsafe_view", "detach"}
# They read of their first tensor what they write, and not all of it.
_PICK = {"embedding", "index_select", "gather", "index"}
# What was there before the trace.
_OUTSIDE = "outside"


class Operation(NamedTuple):
    """What an operation does.

    Attributes:
        flops: Floating-point operations of matrix products and attention; 0 for all others.
        moved_bytes: Bytes read and written.

    Example:
        >>> Operation(flops=2.0, moved_bytes=8).moved_bytes
        8
    """

    flops: float
    moved_bytes: int


class CostTrace(TorchDispatchMode):
    """Follows the operations under it: what memory they hold, by part, and what they do.

    Each allocation belongs to a part: the one that `part` names when it is made, or the one that `assign`
    moves it to; what was there before counts if `assign` says so. The peak is that of the sum over parts of
    share * bytes. It works on tensors with and without data; temporary memory inside of kernels is not seen.

    Args:
        shares: Of the bytes of a part that count, >= 0, for example 1 / N for what N devices divide. 1 for
            parts that are not named.

    Attributes:
        part: Where new allocations belong, at first `working`.
        peak_bytes: Highest sum since the last `restart`.
        peak_parts: What the parts held then, shares applied.
        operations: Since the last `restart`.

    Example:
        >>> with CostTrace() as trace:
        ...     product = torch.ones(8, 4) @ torch.ones(4, 8)
        >>> trace.peak_bytes, sum(operation.flops for operation in trace.operations)
        (512.0, 512.0)

    Source: Korthikanti et al. 2022, arXiv:2205.05198, for what a layer keeps for backward. Differs: counted
    operation by operation, not by a formula for one architecture.
    """

    def __init__(self, shares: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.shares = {**(shares or {}), _OUTSIDE: 0.0}
        self.part = "working"
        self.peak_bytes = 0.0
        self.peak_parts: dict[str, float] = {}
        self.operations: list[Operation] = []
        self._parts: Counter[str] = Counter()
        self._total = 0.0
        self._storages: dict[int, tuple[weakref.ref[Any], str, int]] = {}

    def assign(self, tensors: Iterable[Tensor], part: str) -> None:
        """Move tensors that are `working`, or were not made under this trace, to a part."""
        for tensor in tensors:
            self._hold(tensor, part)
            self._keep(tensor.untyped_storage()._cdata, part)

    def keep(self, part: str) -> None:
        """Move all that is `working` to a part."""
        for key in list(self._storages):
            self._keep(key, part)

    def _keep(self, key: int, part: str) -> None:
        held = self._storages.get(key)  # None for an empty tensor
        if held is not None and held[1] == "working":
            self._add("working", -held[2])
            self._add(part, held[2])
            self._storages[key] = (held[0], part, held[2])

    def restart(self) -> None:
        """Forget the operations, and begin the peak anew at what is held now."""
        self.operations = []
        self.peak_bytes = 0.0
        self._note_peak()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count it."""
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in given:
            self._hold(tensor, _OUTSIDE)
        out = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in made:
            self._hold(tensor, self.part)
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in _FREE and not name.startswith("prim"):
            touched = [*made, *made] if name in _PICK else [*given, *made]
            if func._schema.is_mutable and not made:
                touched = [*given, *given]  # written back
            moved = sum(_bytes(tensor) for tensor in touched)
            self.operations.append(Operation(_flops(func, args, kwargs, out), moved))
        return out

    def _hold(self, tensor: Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages or not size:
            return

        def release(_: Any) -> None:
            _, last, size = self._storages.pop(key)
            self._add(last, -size)

        self._storages[key] = (weakref.ref(storage, release), part, size)
        self._add(part, size)
        if self._total > self.peak_bytes:
            self._note_peak()

    def _add(self, part: str, size: int) -> None:
        self._parts[part] += size
        self._total += self.shares.get(part, 1.0) * size

    def _note_peak(self) -> None:
        self.peak_bytes = self._total
        held = {name: self.shares.get(name, 1.0) * size for name, size in self._parts.items()}
        self.peak_parts = {name: size for name, size in held.items() if size}


def _bytes(tensor: Tensor) -> int:
    # An expanded tensor is read once.
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> float:
    name = func._overloadpacket.__name__
    if name.startswith("_scaled_dot_product_flash_attention_for_cpu"):
        backward = name.endswith("backward")
        query, key = args[backward], args[backward + 1]
        batch, heads, length, size = query.shape
        causal = kwargs.get("is_causal", args[7] if backward and len(args) > 7 else args[4:5] == (True,))
        products = (5 if backward else 2) * 2.0 * batch * heads * length * key.shape[-2] * size
        return products / 2 if causal else products
    formula = flop_registry.get(func._overloadpacket)
    return 0.0 if formula is None else float(formula(*args, **kwargs, out_val=out))


def without_data(module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Put tensors without data in place of a module's parameters and buffers: shapes that can be computed on.

    Args:
        module: For example one on the meta device. Tied parameters stay tied.
        dtype: Of the floating-point parameters; None keeps theirs.

    Example:
        >>> layer = nn.Linear(1000, 10**9, device="meta")
        >>> without_data(layer)
        >>> layer(torch.empty(4, 1000)).shape
        torch.Size([4, 1000000000])
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, nn.Parameter] = {}
    with mode:
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in made:
                    kind = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
                    empty = torch.empty(parameter.shape, dtype=kind)
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                part._parameters[name] = made[id(parameter)]
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class StepCost(NamedTuple):
    """What an optimizer step takes.

    Attributes:
        peak_parts: What the parts hold when the sum is highest.
        batch: Operations of the forward and backward pass of one micro-batch.
        update: Operations of the optimizer.
    """

    peak_parts: dict[str, float]
    batch: list[Operation]
    update: list[Operation]


def trace_step(
    forward: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    accumulate: int = 1,
    shares: Mapping[str, float] | None = None,
    whole: Iterable[Tensor] = (),
) -> StepCost:
    """Trace one optimizer step of a run that has made some, as Lightning takes it.

    The optimizer has its state, and the gradients of the step before stay until the first forward pass of
    this one has ended.

    Args:
        forward: Returns something to add up and differentiate.
        optimizer: Of all parameters that are trained; without state.
        accumulate: Micro-batches per step, >= 1; above 1, gradients stay during the passes.
        shares: As in `CostTrace`; parts are `weights`, `gradients`, `optimizer`, `activations` (kept for
            backward) and `working`.
        whole: Parameters whose gradients are `working` until the update.

    Returns:
        Peak and operations.

    Example:
        >>> layer = nn.Linear(64, 64, bias=False, device="meta")
        >>> without_data(layer)
        >>> sgd = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> trace_step(lambda: layer(torch.empty(1024, 64)), sgd).peak_parts["weights"]
        16384.0

    Source: ours.   Differs: nothing.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    keeps_whole = {id(parameter) for parameter in whole}
    trace = CostTrace(shares)
    handles = [
        p.register_post_accumulate_grad_hook(lambda p: trace.assign([p.grad], "gradients"))
        for p in parameters
        if id(p) not in keeps_whole
    ]

    def pack(tensor: Tensor) -> Tensor:
        trace.assign([tensor], "activations")
        return tensor

    with trace:
        trace.assign(parameters, "weights")
        trace.part = "gradients"
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        trace.part = "optimizer"
        optimizer.step()
        trace.part = "working"
        trace.restart()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = forward()
        trace.keep("activations")
        for parameter in parameters:
            if accumulate == 1 or id(parameter) in keeps_whole:
                parameter.grad = None
        output.sum().backward()
        batch, trace.operations = trace.operations, []
        del output
        trace.part = "optimizer"
        optimizer.step()
        optimizer.zero_grad()
    for handle in handles:
        handle.remove()
    return StepCost(trace.peak_parts, batch, trace.operations)


def seconds(operations: Iterable[Operation], flops_per_s: float, bytes_per_s: float = float("inf")) -> float:
    """Time that operations take one after the other, each bound by arithmetic or by memory.

    sum over operations of max(flops / flops_per_s, moved_bytes / bytes_per_s)

    Args:
        operations: Of a trace.
        flops_per_s: Rate of matrix products that the device reaches, > 0.
        bytes_per_s: Rate at which it reads and writes memory, > 0. Infinite if the rate of products is a
            mean over whole steps.

    Returns:
        Seconds.

    Example:
        >>> seconds([Operation(100.0, 10), Operation(0.0, 40)], flops_per_s=10.0, bytes_per_s=20.0)
        12.0

    Source: Williams et al. 2009, doi:10.1145/1498765.1498785 (roofline). Differs: per operation, added up.
    """
    return sum(max(op.flops / flops_per_s, op.moved_bytes / bytes_per_s) for op in operations)
