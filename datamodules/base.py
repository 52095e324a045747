"""What the data modules share: the tokenizer, the splits, loaders, what checkpoints keep."""

import itertools
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from transformers import PreTrainedTokenizerBase

from rewarm.checks import at_least
from rewarm.curriculum.curriculum import Curriculum
from rewarm.datamodules.arrangement import Arrangement, Measures
from rewarm.datamodules.fingerprints import Fingerprints, example_bytes, fingerprint_of
from rewarm.datamodules.loader import Collate, Example, Examples, ListedLoader, RowLoader, WindowLoader
from rewarm.datamodules.position import LoaderPosition
from rewarm.datamodules.samplers import CurriculumSampler, MixtureSampler
from rewarm.datamodules.tokenising import Tokenised
from rewarm.rollouts.ranks import Place, place
from rewarm.text.encoding import Encoder, load_tokenizer
from rewarm.text.formats import Rows

log = logging.getLogger(__name__)


class LanguageData(LightningDataModule):
    """Base of the data modules.

    Checkpoints keep a fingerprint of the training data. A run goes on with the same data wherever it lies,
    and with another number of ranks or rows per step; other data are refused.

    Args:
        tokenizer: Hugging Face folder or id of a tokenizer.
        batch_size: Number of rows per batch and rank, >= 1.
        max_length: Largest number of positions per row, >= 1.
        num_workers: Number of processes that collate, >= 0. The rows are tokenised beforehand, so 0 is nearly
            always fastest.
        seed: Seed of every random choice about the data.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> data = LanguageData("models/base", batch_size=4, max_length=128)
        >>> data.examples("train"), data.rank, data.world_size  # before `setup`, in a process without others
        ([], 0, 1)
        >>> LanguageData("models/base", batch_size=0, max_length=128)
        Traceback (most recent call last):
            ...
        ValueError: batch_size is 0; it must be at least 1
    """

    def __init__(
        self, tokenizer: str, batch_size: int, max_length: int, num_workers: int = 0, seed: int = 0
    ) -> None:
        super().__init__()
        at_least(1, batch_size=batch_size, max_length=max_length)
        at_least(0, num_workers=num_workers)
        self.tokenizer_source = tokenizer
        self.batch_size, self.max_length = batch_size, max_length
        self.num_workers, self.seed = num_workers, seed
        self.curriculum: Curriculum | None = None
        self.left_out: dict[str, Counter[str]] = {}
        self._examples: dict[str, list[Example]] = {}
        self._encoder: Encoder | None = None
        self._row_loader: RowLoader | None = None
        self._position = LoaderPosition(self)
        self._fingerprints = Fingerprints()
        self._digests: dict[str, dict[str, Any]] = {}

    @property
    def encoder(self) -> Encoder:
        """The encoder, loaded on first use."""
        if self._encoder is None:
            self._encoder = Encoder(load_tokenizer(self.tokenizer_source))
        return self._encoder

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use."""
        return self.encoder.tokenizer

    def teardown(self, stage: str) -> None:
        """End the loader's workers."""
        if self._row_loader is not None:
            self._row_loader.close()

    def on_exception(self, exception: BaseException) -> None:
        """End the loader's workers: the process cannot end before them, and they outlive SIGTERM."""
        self.teardown("fit")

    def transfer_batch_to_device(
        self, batch: dict[str, Any], device: torch.device, dataloader_idx: int
    ) -> dict[str, Any]:
        """Move a batch's tensors, to a CUDA device from pinned memory, so that nothing waits for the copy.

        Whatever is no tensor stays on the host as it is.
        """
        pinned = device.type == "cuda"
        return {
            name: (value.pin_memory() if pinned else value).to(device, non_blocking=pinned)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in batch.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return which data these are, how many rows an optimizer step takes, and the loader's position."""
        data = {"data": self._fingerprints.state_dict(), "rows_per_step": self._rows_per_step()}
        return data | self._position.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make sure that the data are the same, and go on from the saved position.

        Raises:
            ValueError: If the training data differ; the message says in what.
        """
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return
        self._fingerprints.check(state["data"])
        first = self.trainer is None or self.trainer.is_global_zero
        if state["rows_per_step"] != self._rows_per_step() and first:
            log.warning(
                "an optimizer step takes %d rows; it took %d where the checkpoint was made",
                self._rows_per_step(),
                state["rows_per_step"],
            )
        self._position.restored = state.get("loader")

    def val_dataloader(self) -> Any:
        """Return a loader of the validation examples in their order, unpacked."""
        return self.scoring_dataloader("val") or []

    def test_dataloader(self) -> Any:
        """Return what `val_dataloader` returns."""
        return self.val_dataloader()

    def predict_dataloader(self) -> ListedLoader | None:
        """Return a loader of every validation example once; of the training examples where there are none."""
        return self.scoring_dataloader("val" if "val" in self._examples else "train")

    def examples(self, split: str = "train") -> list[Example]:
        """Return the tokenised examples of a split after `setup`; none if there is no such split."""
        return self._examples.get(split, [])

    def fingerprint(self, split: str = "train") -> dict[str, Any]:
        """Return the number of a split's tokenised examples and a digest, which tell them from any others."""
        if split not in self._digests:
            examples = self.examples(split)
            self._digests[split] = fingerprint_of(len(examples), example_bytes(examples))
        return self._digests[split]

    def scoring_dataloader(self, split: str = "train") -> ListedLoader | None:
        """Return a loader of every example of a split once, unpacked; None if there is no such split."""
        examples = self._examples.get(split)
        return None if examples is None else self._listed_loader(examples, self._collate())

    def _collate(self) -> Collate:
        """How examples become unpacked batches."""
        raise ValueError(f"{type(self).__name__} has no examples to score")

    def _set_up_examples(
        self,
        train: str | list[str],
        val: str | list[str] | None,
        arrangement: Arrangement,
        read: Callable[[Rows], Tokenised],
        measures: Measures[Example],
    ) -> None:
        """Read the training and validation examples, and make the curriculum of the former, once."""
        if self._examples:
            return
        rows = arrangement.rows(train, measures)
        tokenised = self._read(read, rows)
        arranged = arrangement.arrange(rows, tokenised.examples, tokenised.numbers, measures, self.seed)
        examples = [
            replace(tokenised.examples[place], id=number) for number, place in enumerate(arranged.kept)
        ]
        self.curriculum = arranged.curriculum
        self._examples = {"train": examples}
        content = itertools.chain(example_bytes(examples), arranged.content)
        self._fingerprints.add("train", train, len(examples), content)
        if val is not None:
            self._examples["val"] = self._read(read, Rows(val)).examples

    def _read(self, read: Callable[[Rows], Tokenised], rows: Rows) -> Tokenised:
        tokenised = read(rows)
        self.left_out[str(rows.path)] = tokenised.left_out
        return tokenised

    @property
    def place(self) -> Place:
        """The place of this process among those that have different data."""
        return place(self.trainer)

    @property
    def rank(self) -> int:
        """The number of this process among those that have different data."""
        return self.place.rank

    @property
    def world_size(self) -> int:
        """The number of processes that have different data."""
        return self.place.size

    def _rows_per_step(self) -> int:
        return self.batch_size * self.world_size * self._position.accumulate()

    def _train_loader(
        self, examples: Examples, sampler: CurriculumSampler | MixtureSampler, collate: Collate
    ) -> WindowLoader:
        self._row_loader = RowLoader(examples, sampler, collate, self.num_workers)
        return self._position.windows(self._row_loader)

    def _listed_loader(
        self,
        examples: Examples,
        collate: Collate,
        **extra: Any,
    ) -> ListedLoader:
        return ListedLoader(
            range(len(examples)), examples, collate, self.batch_size, self.rank, self.world_size, extra
        )

    def _curriculum_sampler(
        self, curriculum: Curriculum, examples: list[Example], **packing: Any
    ) -> CurriculumSampler:
        if curriculum.gate is not None and self.num_workers:
            raise ValueError(
                f"num_workers is {self.num_workers}; a gate on live scores needs 0, to decide batch by batch"
            )
        return CurriculumSampler(
            curriculum,
            self.batch_size,
            lengths=[example.positions for example in examples],
            rank=self.rank,
            world_size=self.world_size,
            accumulate_grad_batches=self._position.accumulate(),
            **packing,
        )
