"""The LightningModule that every method builds on."""

import copy
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rewarm.checkpoints.placing import put_in_place
from rewarm.checkpoints.weights import WEIGHTS
from rewarm.functional.gradients import clip_gradients_, gradient_norm
from rewarm.functional.logprob import IGNORE_INDEX, Backend
from rewarm.functional.sequences import sequence_sums
from rewarm.lightning_modules.policy import (
    Policy,
    apply_liger_layers,
    build_empty,
    build_model,
    compile_layers,
)
from rewarm.lightning_modules.sharding import decoder_layers, shard

log = logging.getLogger(__name__)


class LanguageModule(LightningModule):
    """What all methods share: the policy, its optimizer, exact normalisation, validation losses, export.

    A loss is a sum divided by a count over the whole optimizer step: every micro-batch of the accumulation
    window on every rank. Batches carry the counts of their window in `batch["window"]`
    (`rewarm.datamodules.loader.WindowLoader` adds them). Without `accumulate_grad_batches` any batch will do.

    Args:
        model: Hugging Face folder or id, or a config with `model_type` for random weights.
        optimizer: Called with parameter groups; biases and norms come with `weight_decay` 0.
        backend: How log-probabilities are computed: `auto`, `torch`, `liger` or `dense`.
        attention: `documents` keeps packed documents apart without a mask, or an `attn_implementation` of
            transformers. None is `documents` where the model allows it, else transformers' choice.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        compile: Run each decoder layer through `torch.compile`.
        liger_layers: Liger's layer kernels: `auto` uses them on CUDA where Liger knows the model.
    """

    def __init__(
        self,
        model: str | dict[str, Any],
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=2e-5, betas=(0.9, 0.95), fused=True),
        backend: Backend = "auto",
        attention: str | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        liger_layers: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        self.model_source = model
        self.optimizer = optimizer
        self.backend: Backend = backend
        self.attention = attention
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_layers = compile
        self.liger_layers = liger_layers
        self.policy: Policy = None  # type: ignore[assignment]  # built in configure_model
        self.reference: Policy | None = None
        self._vectors: set[str] = set()
        self._step_counts: tuple[int, dict[str, Tensor]] | None = None
        self._step_metrics: dict[str, Tensor] = {}
        self._validation_sums: dict[str, Tensor] = {}
        self._skipped: int | Tensor = 0
        self._skipped_known = 0

    @property
    def policy_class(self) -> type[Policy]:
        """What the policy is."""
        return Policy

    @property
    def uses_reference(self) -> bool:
        """Whether the method keeps a frozen copy of the initial weights."""
        return False

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps so far that were left out; a look waits for the device."""
        return int(self._skipped)

    def configure_model(self) -> None:
        """Build the policy once, and its frozen reference if the method uses one; in shards under FSDP2."""
        if self.policy is not None:
            return
        if self.device_mesh is not None:
            self._build_sharded(self.device_mesh)
        else:
            model = build_model(self.model_source, self.attention)
            self.policy = self.policy_class(self.equip(model), self.backend)
            if self.uses_reference:
                self.reference = copy.deepcopy(self.policy).requires_grad_(False).eval()
        # Now, since FSDP1 makes a vector of every shard.
        self._vectors = {name for name, p in self.policy.named_parameters() if p.ndim < 2}

    def _build_sharded(self, mesh: DeviceMesh) -> None:
        for loop in (self.trainer.validate_loop, self.trainer.test_loop, self.trainer.predict_loop):
            # FSDP2 keeps the buffers that it first gathers into, and training can't use those of this mode.
            loop.inference_mode = False
        source = None
        if self.trainer.is_global_zero:
            # Ranks that share a layer must go on drawing the same.
            with torch.random.fork_rng(devices=[]):
                source = build_model(self.model_source, self.attention, dtype="auto")
        # With bfloat16 weights throughout (bf16-true) there is nothing to cast.
        compute_dtype = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
        device = self.trainer.strategy.root_device
        policies = []
        for trainable in (True, False) if self.uses_reference else (True,):
            model = self.equip(build_empty(self.model_source, self.attention))
            policy = self.policy_class(model, self.backend).requires_grad_(trainable).train(trainable)
            shard(policy, model, source, mesh, device, compute_dtype)
            policies.append(policy)
        if source is not None:
            policies[0].model.generation_config = source.generation_config
        self.policy, self.reference = policies if self.uses_reference else (policies[0], None)

    def equip(self, model: PreTrainedModel) -> PreTrainedModel:
        """Give a model the kernels, checkpointing and compilation that were asked for."""
        if self.liger_layers is True or (self.liger_layers == "auto" and torch.cuda.is_available()):
            try:
                apply_liger_layers(model)
            except RuntimeError as error:
                if self.liger_layers is True:
                    raise
                log.info("layer kernels: transformers' own (%s)", error)
        if self.gradient_checkpointing:
            # The only name up to transformers 5.17, deprecated in later versions.
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        if self.compile_layers:
            compile_layers(decoder_layers(model))
        return model

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Matrices decay, vectors (biases, norms) don't."""
        matrices: list[nn.Parameter] = []
        vectors: list[nn.Parameter] = []
        for name, parameter in self.policy.named_parameters():
            if parameter.requires_grad:
                is_vector = name.replace("_fsdp_wrapped_module.", "") in self._vectors
                (vectors if is_vector else matrices).append(parameter)
        groups: list[dict[str, Any]] = [{"params": matrices}]
        if vectors:
            groups.append({"params": vectors, "weight_decay": 0.0})
        return self.optimizer(groups)

    def on_fit_start(self) -> None:
        """Forget a window that an earlier fit left unfinished; refuse tokens without an embedding."""
        self._step_counts, self._step_metrics = None, {}
        tokenizer = getattr(self.trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]
        vocab_size = self.policy.model.config.get_text_config().vocab_size
        if tokenizer is not None and len(tokenizer) > vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, the model embeds {vocab_size}: set vocab_size"
            )
        if str(self.trainer.precision).endswith("-true") and self.trainer.precision != "32-true":
            log.warning(
                "precision %s keeps the optimizer's moments in it too; use bf16-mixed", self.trainer.precision
            )

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Refuse packed rows where attention would mix what shares a row."""
        rows, sequences = len(batch["input_ids"]), (batch.get("counts") or {}).get("sequences", 0)
        if rows > 1 and sequences > rows and "flash" in str(self.attention):
            raise ValueError(
                f"attention is {self.attention!r}, which keeps packed examples apart in a single row only;"
                f" this batch has {rows}: set the data's packing to 'padding_free', or batch_size to 1"
            )

    def logprobs(self, batch: dict[str, Any], temperature: float = 1.0) -> Tensor:
        """Return the policy's log-probability of each target of a batch. Shape (B, T)."""
        return self.policy(
            batch["input_ids"],
            batch["position_ids"],
            batch["targets"],
            temperature,
            documents=batch.get("documents"),
            num_targets=batch.get("num_targets"),
        )

    def forward(self, batch: dict[str, Any], temperature: float = 1.0) -> Tensor:
        """Do the same through the wrapper of a distributed strategy: `trainer.strategy.model(batch)`."""
        return self.logprobs(batch, temperature)

    @property
    def _wide(self) -> torch.dtype:
        return torch.float32 if self.device.type == "mps" else torch.float64

    # one optimizer step, exactly normalised

    def step_counts(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Return the counts of the whole optimizer step: all its micro-batches on all ranks.

        Raises:
            ValueError: If gradients accumulate and the batch doesn't carry its window's counts.
        """
        accumulate = self.trainer.accumulate_grad_batches
        window = batch_idx // accumulate
        # The first batch of every epoch is in window 0.
        if self._step_counts is None or self._step_counts[0] != window or batch_idx % accumulate == 0:
            counts = batch.get("window") or batch.get("counts")
            if counts is None or ("window" not in batch and accumulate > 1):
                if accumulate > 1:
                    raise ValueError(
                        f"accumulate_grad_batches is {accumulate}, but the batches lack the counts of their"
                        " window: wrap your loader in rewarm.WindowLoader(loader, accumulate_grad_batches)"
                    )
                counts = {
                    "tokens": int((batch["targets"] != IGNORE_INDEX).sum()),
                    "sequences": batch["input_ids"].shape[0],
                }
            totals = torch.tensor(list(counts.values()), dtype=self._wide, device=self.device)
            totals = self._sum_over_ranks(totals)
            # A step without a single target has loss 0, not NaN.
            self._step_counts = (window, dict(zip(counts, totals.clamp(min=1.0), strict=True)))
        return self._step_counts[1]

    def step_loss(self, share: Tensor) -> Tensor:
        """Turn a share of the step's loss into what Lightning wants returned.

        Lightning divides by `accumulate_grad_batches` also in a shorter last window, and distributed
        strategies average over ranks; both are undone here, so that the step's gradient is the gradient of
        the sum of all shares.
        """
        mesh = self.device_mesh
        replicas = self.trainer.world_size if mesh is None else mesh["data_parallel"].size()
        return share * (self.trainer.accumulate_grad_batches * replicas)

    def log_step(self, shares: dict[str, Tensor], batch_idx: int) -> None:
        """Log values given as shares that add up over the micro-batches and ranks of an optimizer step."""
        if not self._step_is_logged():
            return
        for name, share in shares.items():
            self._step_metrics[name] = self._step_metrics.get(name, 0.0) + share.detach()
        accumulate = self.trainer.accumulate_grad_batches
        if (batch_idx + 1) % accumulate and batch_idx + 1 != self.trainer.num_training_batches:
            return
        metrics, self._step_metrics = self._step_metrics, {}
        totals = self._sum_over_ranks(torch.stack([v.float() for v in metrics.values()]))
        for name, total in zip(metrics, totals, strict=True):
            self.log(name, total, prog_bar=name == "train/loss", batch_size=1)

    def _step_is_logged(self) -> bool:
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        step = self.trainer.global_step
        return bool(every) and (step == 0 or (step + 1) % every == 0)

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum over the ranks that have different data; those that share a layer have the same."""
        if self.trainer.world_size == 1:
            return values
        group = None if self.device_mesh is None else self.device_mesh["data_parallel"].get_group()
        dist.all_reduce(values, group=group)  # Lightning's `reduce` would also wait at a barrier
        return values

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, also sharded gradients, for which Lightning can't by norm, and log the norm in any case.

        A step whose norm is not finite is left out, so that neither weights nor the optimizer's state change.
        A fused optimizer is told on the device, and nothing waits for it; any other finds no gradients.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        is_fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        if scaler is not None and is_fused:
            # Lightning leaves it to such an optimizer's step, which is too late for a norm.
            scaler.unscale_(optimizer)
        by_value = gradient_clip_algorithm == "value"
        bound = math.inf if by_value or not gradient_clip_val else gradient_clip_val
        wrapper = self.trainer.strategy.model
        if isinstance(wrapper, FullyShardedDataParallel):
            norm = wrapper.clip_grad_norm_(bound)
        elif bound < math.inf:
            norm = clip_gradients_(parameters, bound)
        else:
            norm = gradient_norm(parameters)
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
        if self._step_is_logged():
            self.log("train/grad_norm", norm, batch_size=1)
            self.log("train/skipped_steps", float(self._skipped), batch_size=1)
            self._tell_of_skipped()

    def _tell_of_skipped(self) -> None:
        new = self.skipped_steps - self._skipped_known
        self._skipped_known += new
        if new:
            rank_zero_warn(
                f"step {self.global_step + 1}: {new} left out since the last log, for gradients without a"
                " finite norm"
            )

    def on_train_end(self) -> None:
        """Tell of steps that were left out after the last log."""
        self._tell_of_skipped()

    # validation

    def on_validation_epoch_start(self) -> None:
        """Start new sums."""
        self._validation_sums = {}

    def add_validation(self, name: str, total: Tensor, count: Tensor | float) -> None:
        """Add to the mean that is logged as `val/name` when validation ends."""
        sums = torch.stack([total.detach(), torch.as_tensor(count, device=total.device)]).to(self._wide)
        self._validation_sums[name] = self._validation_sums.get(name, 0.0) + sums

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Mean negative log-likelihood per target token, overall and by domain."""
        logprobs = self.logprobs(batch)
        tokens = (batch["targets"] != IGNORE_INDEX).sum()
        self.add_validation("loss", -logprobs.sum(), tokens)
        if "domain" in batch:
            self.add_validation(f"loss/{batch['domain']}", -logprobs.sum(), tokens)

    def on_validation_epoch_end(self) -> None:
        """Log the means over all ranks."""
        for name, sums in self._validation_sums.items():
            total, count = self._sum_over_ranks(sums)
            split = "test" if self.trainer.testing else "val"
            self.log(f"{split}/{name}", total / count, batch_size=1, prog_bar=name == "loss")

    def on_test_epoch_start(self) -> None:
        """Start new sums."""
        self.on_validation_epoch_start()

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Do what validation does, logged as `test/...`."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Log the means over all ranks."""
        self.on_validation_epoch_end()

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Return the mean negative log-likelihood of each example, in nats, as `scores` beside the `ids`."""
        return {"ids": batch["ids"], "scores": example_losses(self.logprobs(batch), batch)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what `rewarm export` needs to rebuild the model without this run's configuration."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        checkpoint["rewarm_model"] = {
            "method": type(self).__name__,
            "config": self.policy.model.config.to_dict(),
            "generation_config": self.policy.model.generation_config.to_dict(),
            "tokenizer": getattr(data, "tokenizer_source", None),
        }
        checkpoint["rewarm_skipped_steps"] = self.skipped_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting; refuse a checkpoint of another model or, to train on from, of another method."""
        self._skipped = self._skipped_known = checkpoint.get("rewarm_skipped_steps", 0)
        if self._trainer is None:
            return
        path, made_with = str(self.trainer.ckpt_path), checkpoint.get("rewarm_model", {})
        method = made_with.get("method", type(self).__name__)
        if self.trainer.state.fn == "fit" and method != type(self).__name__:
            raise ValueError(
                f"{path}: the checkpoint is of {method}, this run trains {type(self).__name__}: export it,"
                " and give the folder as model"
            )
        kinds = (made_with.get("config", {}).get("model_type"), self.policy.model.config.model_type)
        if None not in kinds and kinds[0] != kinds[1]:
            raise ValueError(f"{path}: the checkpoint is of {kinds[0]}, this run's model is {kinds[1]}")
        # Strategies that shard have loaded and checked the weights by now.
        if "state_dict" in checkpoint:
            shapes = {name: weight.shape for name, weight in checkpoint["state_dict"].items()}
            check_weights(path, shapes, self, self.strict_loading)

    # export

    def save_pretrained(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Write a Hugging Face folder that `AutoModelForCausalLM.from_pretrained` loads.

        The folder appears whole or not at all. Shards are gathered on rank 0, in its main memory: all ranks
        must call this together.

        Args:
            folder: Where to; replaced if it is there.
            tokenizer: Saved beside the model, with its chat template.
        """
        weights = self._gathered_weights()
        if self._trainer is not None and not self._trainer.is_global_zero:
            return
        with put_in_place(folder, replace=True) as place:
            self.policy.model.save_pretrained(place, state_dict=weights)
            if tokenizer is not None:
                tokenizer.save_pretrained(place)

    def _gathered_weights(self) -> dict[str, Any] | None:
        """The language model's weights, assembled on rank 0; None if they are not in shards."""
        model, options = self.policy.model, StateDictOptions(full_state_dict=True, cpu_offload=True)
        wrapper = self._trainer.strategy.model if self._trainer is not None else None
        if isinstance(wrapper, FullyShardedDataParallel):
            prefix, weights = WEIGHTS, get_model_state_dict(wrapper, options=options)
        elif any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            prefix, weights = "model.", get_model_state_dict(self.policy, options=options)
        else:
            return None
        # Tied weights once, as transformers writes them.
        tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        tied -= {name for name, _ in model.named_parameters()}
        return {
            name.removeprefix(prefix): weight
            for name, weight in weights.items()
            if name.startswith(prefix) and name.removeprefix(prefix) not in tied
        }


def check_weights(
    path: str | Path, shapes: Mapping[str, torch.Size], module: nn.Module, strict: bool = True
) -> None:
    """Compare the weights of a checkpoint with those of a module, before they are read.

    Args:
        path: Of the checkpoint.
        shapes: Of its weights, by name.
        module: What is to be loaded.
        strict: Whether both must have the same names.

    Raises:
        ValueError: If they differ; names both sides.
    """
    ours = {name: weight.shape for name, weight in module.state_dict().items()}
    for name in ours.keys() & shapes.keys() if not strict else [*ours, *shapes]:
        if name not in shapes:
            raise ValueError(f"{path}: the checkpoint lacks {name}, which this run's model has")
        if name not in ours:
            raise ValueError(f"{path}: the checkpoint has {name}, which this run's model lacks")
        if shapes[name] != ours[name]:
            raise ValueError(
                f"{path}: {name} has shape {tuple(shapes[name])} in the checkpoint, {tuple(ours[name])} in"
                " this run's model"
            )


@torch.no_grad()
def example_losses(logprobs: Tensor, batch: dict[str, Any]) -> Tensor:
    """Return the mean negative log-likelihood of each sequence of a batch, in nats. Shape (sequences,)."""
    sequences = len(batch["ids"])
    totals = sequence_sums(-logprobs, batch["sequence_ids"], sequences)
    lengths = sequence_sums((batch["targets"] != IGNORE_INDEX).float(), batch["sequence_ids"], sequences)
    return totals / lengths.clamp(min=1.0)
