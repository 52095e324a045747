"""How fast training goes: tokens per second, padding, seconds per step and model FLOPs utilisation."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from rewarm.callbacks.ended_steps import EndedSteps
from rewarm.checks import above, at_least
from rewarm.functional.flops import matmul_parameters, peak_flops, training_flops_per_token
from rewarm.functional.logprob import IGNORE_INDEX

# What is counted of every batch, summed on its device: positions, those that are no padding, those with a
# target, those that are computed, and over all documents the sum of squared lengths.
_COUNTS = 5


class _Mark(NamedTuple):
    step: int
    seconds: float
    positions: int
    tokens: int
    targets: int
    computed: int
    attended: int


class Throughput(Callback):
    """Measures the training speed of any LightningModule, over all ranks.

    Rates are means over the last `window` optimizer steps, rounded up to logging points. The clock runs while
    batches are fetched and trained on, and stands still during validation and while a checkpoint is saved
    (with the fetch of the next batch). The first optimizer step of a fit, with its compilation and set-up, is
    not timed.

    Of a batch that is a mapping with a tensor `input_ids`, tokens are the positions that are no padding:
    `sequence_ids` is not -1 or, without that, `attention_mask` is not 0; with neither, padding is unknown and
    every position is a token. `targets` other than -100 are target tokens. For other batches give
    `count_tokens`; without it only `throughput/step_s` is logged. Counts stay on the device; it is waited for
    only when something is logged, paused or saved.

    Model FLOPs utilisation (MFU) is what forward and backward passes need by the PaLM convention (no
    recomputation, full attention scores, within documents where `position_ids` show them; prompts that rows
    share count once where the model computes them once), over what the devices could do in that time. The
    cost comes from the first trained submodule with a transformers config. It is logged only if the device's
    peak is known and the cost is too: models with frozen matrices (LoRA), experts or convolutions need
    `flops_per_token`. Passes beyond training's own (a reference model, sampling) are not counted.

    Logs (every `log_every_n_steps` optimizer steps):
        throughput/tokens_per_s: Tokens per second, all ranks together.
        throughput/target_tokens_per_s: Of those, tokens that the loss counts.
        throughput/padding_frac: Share of padding among the positions, in [0, 1].
        throughput/step_s: Seconds per optimizer step.
        throughput/mfu: Model FLOPs utilisation, in [0, 1].
        throughput/total_tokens: Tokens since training began, over all ranks, also before a resume.

    Args:
        window: Number of optimizer steps that a rate is the mean of, >= 1.
        peak_flops: Peak FLOP/s of one device. None looks CUDA devices up (dense bf16), and is unknown for
            others.
        flops_per_token: Training FLOPs per token that is computed. None takes them from the model's config
            and linear layers.
        count_tokens: Number of tokens of a batch, used in place of the rules above; an int or a tensor.
        clock: Seconds from any fixed moment; for tests.

    Raises:
        ValueError: If window, peak_flops or flops_per_token is out of range.

    Example:
        >>> throughput = Throughput(window=20)
        >>> trainer = Trainer(callbacks=[throughput])  # doctest: +SKIP
        >>> throughput.total_tokens
        0

    Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B, for MFU. Differs: packed documents
    don't attend to each other.
    """

    def __init__(
        self,
        window: int = 50,
        peak_flops: float | None = None,
        *,
        flops_per_token: float | None = None,
        count_tokens: Callable[[Any], int | Tensor] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        at_least(1, window=window)
        costs = {"peak_flops": peak_flops, "flops_per_token": flops_per_token}
        above(0, **{name: value for name, value in costs.items() if value is not None})
        self.window = window
        self.peak_flops = peak_flops
        self.flops_per_token = flops_per_token
        self.count_tokens = count_tokens
        self.clock = clock
        self.total_tokens = 0
        self.total_target_tokens = 0

        self._trainer: Trainer | None = None
        self._peak: float | None = None
        self._flops: Callable[[int, int], float] | None = None
        self._pending: Tensor | None = None
        self._known: set[str] = set()
        self._positions = self._computed = self._attended = 0
        self._compacts = False
        self._marks: deque[_Mark] = deque()
        self._steps = EndedSteps()
        self._seconds = 0.0
        self._started: float | None = None
        self._batch_end: float | torch.cuda.Event | None = None

    # --- hooks ----------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look up the peak and the model's cost."""
        if trainer.global_step == 0:
            self.total_tokens = self.total_target_tokens = 0
        self._trainer = trainer
        self._steps.begin(trainer)
        self._pending, self._started, self._batch_end = None, None, None
        self._marks.clear()
        self._known.clear()
        device = trainer.strategy.root_device
        configs = (getattr(module, "config", None) for module in pl_module.modules())
        self._compacts = any(getattr(c, "_attn_implementation", None) == "documents" for c in configs)
        self._peak = self.peak_flops
        if self._peak is None and device.type == "cuda":
            self._peak = peak_flops(torch.cuda.get_device_name(device))
        self._flops = None
        if self.flops_per_token is not None:
            self._flops = self._given_flops
        elif self._peak is not None:
            try:
                self._flops = _model_flops(pl_module)
            except ValueError as error:
                rank_zero_info(
                    f"throughput/mfu is not logged: {error}. Give Throughput(flops_per_token=...) for it."
                )

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Let the clock run."""
        if self._started is None:
            self._started = self._synchronised()
        self._batch_end = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and log if an optimizer step was taken and it is time."""
        counts = self._count(batch)
        if counts is not None:
            self._pending = counts if self._pending is None else self._pending + counts
        if self._on_cuda:
            self._batch_end = torch.cuda.Event(enable_timing=True)
            self._batch_end.record()
        else:
            self._batch_end = self.clock()
        if not self._steps.look(trainer):
            return
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not self._marks:
            self._marks.append(self._mark())
        elif every and self._steps.reached(every):
            self._marks.append(self._mark())
            while len(self._marks) > 2 and self._steps.now - self._marks[1].step >= self.window:
                self._marks.popleft()
            pl_module.log_dict(self._rates(trainer.world_size))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._pause()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Stop the clock."""
        self._pause()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock and take in what was counted last."""
        self._pause()
        self._collect()
        self._trainer = None

    def state_dict(self) -> dict[str, Any]:
        """Return the token totals over all ranks. Every rank has to call it."""
        self._collect()
        return {"total_tokens": self.total_tokens, "total_target_tokens": self.total_target_tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from saved totals."""
        self.total_tokens = state_dict["total_tokens"]
        self.total_target_tokens = state_dict["total_target_tokens"]

    # --- tokens ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _count(self, batch: Any) -> Tensor | None:
        if self.count_tokens is not None:
            tokens = torch.as_tensor(self.count_tokens(batch))
            self._known |= {"tokens"}
            return torch.stack([tokens * 0, tokens, tokens * 0, tokens, tokens * 0]).long()
        input_ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if not isinstance(input_ids, Tensor):
            return None
        self._known |= {"tokens", "attended"}
        real = torch.ones_like(input_ids, dtype=torch.bool)
        for name, padding in (("sequence_ids", -1), ("attention_mask", 0)):
            mask = batch.get(name)
            if isinstance(mask, Tensor) and mask.shape == input_ids.shape:
                real = mask != padding
                self._known.add("padding")
                break
        targets = batch.get("targets")
        if isinstance(targets, Tensor):
            self._known.add("targets")
            num_targets = (targets != IGNORE_INDEX).sum()
        else:
            num_targets = input_ids.new_zeros(())
        positions = batch.get("position_ids")
        if isinstance(positions, Tensor) and positions.shape == input_ids.shape:
            # 1 + 3 + 5 + .. is the square of the number of terms: a document of n tokens adds n^2.
            attended = ((2 * positions + 1) * real).sum()
        else:
            attended = real.sum() * input_ids.shape[-1]
        counted, computed = input_ids.new_full((), input_ids.numel()), real.sum()
        documents = batch.get("documents") if self._compacts else None
        if documents is not None and documents.places is not None:
            computed = input_ids.new_full((), len(documents.places))
            squares = ((run.shared + run.length) ** 2 - run.shared**2 for run in documents.runs)
            attended = input_ids.new_full((), sum(squares))
        return torch.stack([counted, real.sum(), num_targets, computed, attended]).long()

    def _collect(self) -> None:
        """Move what was counted on the device into the totals; waits for the device, and for all ranks."""
        if self._trainer is None:
            return
        strategy = self._trainer.strategy
        pending = self._pending if self._pending is not None else torch.zeros(_COUNTS, dtype=torch.long)
        pending = pending.to(strategy.root_device, copy=True)
        self._pending = None
        total = strategy.reduce(pending, reduce_op="sum")
        # Ranks that split a layer among them see the same batch.
        sampler = getattr(strategy, "distributed_sampler_kwargs", None) or {
            "num_replicas": self._trainer.world_size
        }
        copies = self._trainer.world_size // sampler["num_replicas"]
        positions, tokens, targets, computed, attended = (int(n) // copies for n in total.tolist())
        self._positions += positions
        self._computed += computed
        self._attended += attended
        self.total_tokens += tokens
        self.total_target_tokens += targets

    # --- time -----------------------------------------------------------------------------------------------

    @property
    def _on_cuda(self) -> bool:
        return self._trainer is not None and self._trainer.strategy.root_device.type == "cuda"

    def _synchronised(self) -> float:
        if self._on_cuda:
            torch.cuda.synchronize()
        return self.clock()

    def _pause(self) -> None:
        if self._started is None:
            return
        # What came after the batch, such as gathering the state to save, is not training.
        end = self._batch_end
        if isinstance(end, torch.cuda.Event):
            now = torch.cuda.Event(enable_timing=True)
            now.record()
            end = self._synchronised() - end.elapsed_time(now) / 1000.0
        elif end is None:
            end = self._synchronised()
        self._seconds += end - self._started
        self._started, self._batch_end = None, None

    def _mark(self) -> _Mark:
        self._collect()
        running = self._synchronised() - self._started if self._started is not None else 0.0
        return _Mark(
            step=self._steps.now,
            seconds=self._seconds + running,
            positions=self._positions,
            tokens=self.total_tokens,
            targets=self.total_target_tokens,
            computed=self._computed,
            attended=self._attended,
        )

    # --- rates ----------------------------------------------------------------------------------------------

    def _rates(self, world_size: int) -> dict[str, float]:
        first, last = self._marks[0], self._marks[-1]
        seconds = last.seconds - first.seconds
        rates = {"throughput/step_s": seconds / (last.step - first.step)}
        tokens = last.tokens - first.tokens
        if "tokens" not in self._known or seconds <= 0.0 or not tokens:
            return rates
        rates["throughput/tokens_per_s"] = tokens / seconds
        rates["throughput/total_tokens"] = float(last.tokens)
        if "targets" in self._known:
            rates["throughput/target_tokens_per_s"] = (last.targets - first.targets) / seconds
        if "padding" in self._known:
            rates["throughput/padding_frac"] = 1.0 - tokens / (last.positions - first.positions)
        if (
            self._flops is not None
            and self._peak is not None
            and (self.flops_per_token or "attended" in self._known)
        ):
            flops = self._flops(last.computed - first.computed, last.attended - first.attended)
            rates["throughput/mfu"] = flops / (seconds * self._peak * world_size)
        return rates

    def _given_flops(self, tokens: int, attended: int) -> float:
        return (self.flops_per_token or 0.0) * tokens


def _model_flops(pl_module: nn.Module) -> Callable[[int, int], float]:
    """Return the FLOPs of training, as a function of tokens and the sum of squared document lengths."""
    models = (m for m in pl_module.modules() if hasattr(getattr(m, "config", None), "get_text_config"))
    model: Any = next((m for m in models if any(p.requires_grad for p in m.parameters())), None)
    if model is None:
        raise ValueError("no trained submodule has a transformers config")
    config = model.config.get_text_config()
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if getattr(config, name, None):
            raise ValueError(f"the config has {name}, and not every token visits every expert")
    if not all(layer.weight.requires_grad for layer in model.modules() if isinstance(layer, nn.Linear)):
        raise ValueError("some linear layers are frozen, and cost less than trained ones")
    weights = matmul_parameters(model)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    layers = config.num_hidden_layers
    return lambda tokens, attended: (
        tokens * training_flops_per_token(weights, layers, width, attended / tokens)
    )
