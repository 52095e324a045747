"""What a policy is measured against: log-probabilities under the model as it was when training began."""

import itertools
import logging
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track
from torch import Tensor

from rewarm.functional.sequences import sequence_sums
from rewarm.lightning_modules.policy import Policy, build_model
from rewarm.objectives.batch import num_sequences
from rewarm.rollouts.ranks import gather, place

if TYPE_CHECKING:
    from rewarm.lightning_modules.base import LanguageModule

log = logging.getLogger(__name__)

_AGAIN = "fit anew, or set reference to 'frozen'"


class FrozenReference:
    """A reference that is a copy of the weights, kept beside the policy in `module.reference`.

    It costs the memory of the weights, and a forward pass over every batch.

    Args:
        module: The module that keeps the copy.

    Example:
        >>> import rewarm
        >>> tiny = {"model_type": "llama", "vocab_size": 8, "hidden_size": 4}
        >>> tiny |= {"num_hidden_layers": 1, "num_attention_heads": 1}
        >>> module = rewarm.DPO(tiny, reference="frozen")
        >>> module.configure_model()
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> batch = rewarm.as_batch({"input_ids": ids, "labels": ids})
        >>> torch.equal(FrozenReference(module).logprobs(batch), module.logprobs(batch))  # before any step
        True
    """

    def __init__(self, module: "LanguageModule") -> None:
        self._module = module

    @torch.no_grad()
    def logprobs(self, batch: Mapping[str, Any], temperature: float = 1.0) -> Tensor:
        """Return the reference's log-probability of each target, in nats. Shape (B, T)."""
        return self._module.logprobs(batch, temperature, policy=self._module.reference)

    @torch.no_grad()
    def sums(self, batch: Mapping[str, Any], split: str) -> Tensor:
        """Return the reference's log-probability of each sequence of a batch, in nats. Shape (sequences,)."""
        return sequence_sums(self.logprobs(batch), batch["sequence_ids"], num_sequences(batch))


class CachedReference:
    """A reference whose log-probabilities of all examples are computed once, before the first step.

    The table belongs to the data that it was made from, split by split, and travels in checkpoints, since a
    resumed run has other weights than the reference. A fit that goes on from no checkpoint makes the table
    anew.

    It reads the data through two methods of the data module: `scoring_dataloader(split)` yields every example
    once, `fingerprint(split)` tells the data from any others.

    Args:
        module: The module whose policy, as it is when training begins, is the reference.

    Example:
        >>> import rewarm
        >>> cached = CachedReference(rewarm.DPO("models/sft"))
        >>> tables = {"train": torch.tensor([[-3.0, -5.0], [-4.0, -2.0]])}
        >>> cached.load_state_dict({"tables": tables, "made_from": {}})
        >>> cached.sums({"ids": [1, 1]}, "train")
        tensor([-4., -2.])
    """

    def __init__(self, module: "LanguageModule") -> None:
        self._module = module
        self.tables: dict[str, Tensor] = {}
        self._made_from: dict[str, Any] = {}

    def begin_fit(self) -> None:
        """Forget the reference of an earlier fit, unless this one goes on from a checkpoint."""
        if self._module.trainer.ckpt_path is None:
            self.tables, self._made_from = {}, {}

    def prepare(self) -> None:
        """Compute the table of each split, unless it is there for these data.

        If the data of a split are not those that its table was made from, the reference is built again from
        the module's folder, and the table anew. Other data are refused where there is no folder, or the
        folder does not hold the reference any more. All ranks must call this together.

        Raises:
            ValueError: If the table was made from other data, or the data module lacks what is needed.
        """
        data = self._module.trainer.datamodule  # type: ignore[attr-defined]
        for method in ("scoring_dataloader", "fingerprint"):
            if not hasattr(data, method):
                raise ValueError(
                    f"reference 'cached' reads the data through datamodule.{method}(split), which"
                    f" {type(data).__name__} does not have: use PreferenceData, or reference 'frozen'"
                )
        now = {split: data.fingerprint(split) for split in ("train", "val")}
        if not self.tables:
            self.tables = {split: self._compute(split) for split in now}
            self._made_from = now
        changed = [split for split, made_from in self._made_from.items() if made_from != now[split]]
        if not changed:
            return
        policy = self._initial_policy(set(now) - set(changed))
        if policy is None:
            split = changed[0]
            raise ValueError(
                f"the cached reference of {split!r} was made from {_named(self._made_from[split])}, now there"
                f" are {_named(now[split])}: {_AGAIN}"
            )
        for split in changed:
            log.info("reference: the pairs of %r are new, computed from %s", split, self._module.model_source)
            self.tables[split], self._made_from[split] = self._compute(split, policy), now[split]

    def sums(self, batch: Mapping[str, Any], split: str) -> Tensor:
        """Return the reference's log-probability of each sequence of a batch, in nats. Shape (sequences,).

        Raises:
            ValueError: If the batch has no `ids`, by which the table is read.
        """
        if "ids" not in batch:
            raise ValueError(f"the batch has no 'ids', by which reference 'cached' is read: {_AGAIN}")
        per_example = self.tables[split].shape[1]
        # A rank without rows has no ids, which would make floats.
        examples = torch.tensor(batch["ids"][::per_example], dtype=torch.long)
        # The table stays on the CPU: only the batch's rows travel.
        return self.tables[split][examples].flatten().to(self._module.device)

    def state_dict(self) -> dict[str, Any]:
        """Return the tables, and from which data they were made."""
        return {"tables": self.tables, "made_from": self._made_from}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.tables, self._made_from = dict(state["tables"]), dict(state["made_from"])

    def _initial_policy(self, unchanged: Collection[str]) -> Policy | None:
        """The reference itself, built anew from its folder; None if it can't be, or is another by now."""
        module = self._module
        split = next((split for split in sorted(unchanged) if len(self.tables[split])), None)
        if split is None or module.device_mesh is not None or not isinstance(module.model_source, str):
            return None
        model = build_model(module.model_source, module.attention)
        policy = Policy(model, module.backend).to(module.device)
        found, known = self._compute(split, policy, most=1), self.tables[split]
        return policy if torch.allclose(found, known[: len(found)], rtol=1e-3, atol=1e-2) else None

    @torch.no_grad()
    def _compute(self, split: str, policy: Policy | None = None, most: int | None = None) -> Tensor:
        """Log-probability of each sequence of every example, (N, sequences of an example).

        Of a policy in place of the module's own, and of a number of batches in place of all.
        """
        module, trainer = self._module, self._module.trainer
        policy = module.policy if policy is None else policy
        loader = trainer.datamodule.scoring_dataloader(split)  # type: ignore[attr-defined]
        if loader is None:
            return torch.empty(0, 1)
        training = policy.training
        sums: dict[int, list[float]] = {}
        policy.eval()
        hide = not trainer.is_global_zero or trainer.progress_bar_callback is None
        batches = itertools.islice(loader, most)
        total = len(loader) if most is None else most
        for batch in track(batches, f"reference log-probabilities ({split})", total=total, disable=hide):
            batch = trainer.strategy.batch_to_device(batch, module.device)
            with trainer.precision_plugin.forward_context():
                logprobs = module.logprobs(batch, policy=policy)
            totals = sequence_sums(logprobs, batch["sequence_ids"], num_sequences(batch))
            for example, total in zip(batch["ids"], totals.tolist(), strict=True):
                sums.setdefault(example, []).append(total)
        policy.train(training)
        everywhere = {example: own for part in gather(sums, place(trainer)) for example, own in part.items()}
        return torch.tensor([everywhere[example] for example in range(len(everywhere))])


def _named(made_from: Mapping[str, Any]) -> str:
    if not made_from["examples"]:
        return "no examples"
    return f"{made_from['examples']} examples (fingerprint {made_from['fingerprint'][:8]})"
