"""A pass of a model over the examples of a data set, in batches, shared by the ranks, that can be killed."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, get_args

import numpy
import torch
from rich.progress import track
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rewarm.checks import at_least, one_of
from rewarm.lightning_modules.policy import Policy, build_model
from rewarm.rollouts.ranks import Place, everyone, gather
from rewarm.scoring.scored_data import Finished, ScoredData
from rewarm.text.encoding import Encoder, Tokens, load_tokenizer

Overlong = Literal["error", "drop", "keep_start"]


class Job:
    """Goes over the examples of a data set with a model, in batches of similar length, on this rank's share.

    Args:
        data: Examples to score.
        folder: Folder for what is finished.
        about: What the scores depend on.
        model: Hugging Face folder or id of the model.
        tokenizer: Hugging Face folder or id of a tokenizer; without it, the model's.
        device: Device to compute on, such as `cpu` or `cuda:1`; without it, an accelerator if there is one.
        dtype: Kind of the weights.
        batch_tokens: Most positions per batch, padding included, >= 1; a longer example is a batch of its
            own.

    Raises:
        ValueError: If the model or tokenizer cannot be loaded, or an argument is unknown.
    """

    def __init__(
        self,
        data: ScoredData,
        folder: Path,
        about: dict[str, Any],
        *,
        model: str,
        tokenizer: str | None = None,
        device: str | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        batch_tokens: int = 16384,
    ) -> None:
        one_of(("float32", "bfloat16"), dtype=dtype)
        at_least(1, batch_tokens=batch_tokens)
        self.data, self.folder, self.about, self.batch_tokens = data, folder, about, batch_tokens
        self.place = _joined()
        accelerator = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        self.device, self._dtype = torch.device(device or accelerator), getattr(torch, dtype)
        self.encoder = Encoder(load_tokenizer(tokenizer or model))
        self.policy = self.load(model)

    def load(self, model: str) -> Policy:
        """Load a model for scoring."""
        policy = Policy(build_model(model, dtype=self._dtype)).requires_grad_(False)
        return policy.eval().to(self.device)

    @property
    def context(self) -> int | None:
        """The model's longest input; None if it has no limit."""
        limit = getattr(self.policy.model.config.get_text_config(), "max_position_embeddings", None)
        return None if limit is None else int(limit)

    def over(
        self, lengths: list[int | None], width: int, compute: Callable[[list[int]], Tensor]
    ) -> numpy.ndarray[Any, Any]:
        """Compute values of all examples, those aside that are finished.

        Args:
            lengths: Positions of each example; None leaves it out.
            width: Values per example.
            compute: Numbers of examples of similar length -> their values (N, width).

        Returns:
            Shape (examples, width), nan for those left out. The same on all ranks.
        """
        finished = Finished(self.folder, self.about, width, self.place.rank)
        known = finished.places()
        batches = batches_of(lengths, self.data.ids, self.batch_tokens)[self.place.rank :: self.place.size]
        waiting = [batch for batch in batches if not known.issuperset(batch)]
        name = f"{self.about['by']} of {len(self.data)} examples"
        with torch.inference_mode():
            for batch in track(waiting, name, disable=self.place.rank > 0, transient=True):
                finished.add(batch, compute(batch))
        gather(None, self.place)  # all ranks have finished
        return finished.values(len(lengths))

    def fitting(
        self, sequences: list[Tokens | None], max_length: int | None, overlong: Overlong
    ) -> list[Tokens | None]:
        """Do with examples that are too long what training would do; those dropped are None.

        Raises:
            ValueError: If that is an error; names the row.
        """
        one_of(get_args(Overlong), overlong=overlong)
        most = self.context if max_length is None else max_length
        if most is None:
            return sequences
        if most < 1 or most > (self.context or most):
            raise ValueError(f"max_length is {most}; it must be in 1 to {self.context}, the model's context")
        fitting: list[Tokens | None] = []
        for place, sequence in enumerate(sequences):
            if sequence is None or sequence.positions <= most:
                fitting.append(sequence)
            elif overlong == "keep_start":
                fitting.append(sequence.without_end(most))
            elif overlong == "drop":
                fitting.append(None)
            else:
                raise ValueError(
                    f"{self.data.rows.where(self.data.numbers[place])}: {sequence.positions} positions, but"
                    f" max_length is {most}: set --overlong to drop or keep_start"
                )
        return fitting

    def hidden(self, tokens: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the last hidden states (B, T, D) of some sequences, and which are not padding (B, T)."""
        lengths = torch.tensor([len(row) for row in tokens])
        padded = pad_sequence(tokens, batch_first=True, padding_value=self.encoder.tokenizer.pad_token_id)
        real = torch.arange(padded.shape[1]) < lengths[:, None]
        model: Any = self.policy.model.base_model
        return model(input_ids=padded.to(self.device), use_cache=False)[0], real.to(self.device)


def _joined() -> Place:
    """Return this process's place among those that torchrun has started, which wait for the slowest."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
    return everyone()


def batches_of(lengths: list[int | None], ids: list[str], batch_tokens: int) -> list[list[int]]:
    """Put examples of similar length together, the longest first: memory fails early or never.

    Args:
        lengths: Positions of each; None leaves it out.
        ids: Decide between equals, so that the order of the data plays no part.
        batch_tokens: Most positions per batch, padding included; a longer example is a batch of its own.

    Example:
        >>> batches_of([3, 8, None, 4], ["a", "b", "c", "d"], batch_tokens=8)
        [[1], [3, 0]]
    """
    known = [(length, place) for place, length in enumerate(lengths) if length is not None]
    batches: list[list[int]] = []
    width = 0
    for length, place in sorted(known, key=lambda one: (-one[0], ids[one[1]])):
        if not batches or width * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
            width = length
        batches[-1].append(place)
    return batches
