"""What the data modules share: the tokenizer, the place among the ranks, loaders, what checkpoints keep."""

import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningDataModule
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from rewarm.curriculum.curriculum import Curriculum
from rewarm.curriculum.gates import Gate, admitted
from rewarm.curriculum.ordering import Order
from rewarm.curriculum.pacing import Pacing
from rewarm.datamodules.loader import Collate, Example, Examples, ListedLoader, RowLoader, WindowLoader
from rewarm.datamodules.samplers import CurriculumSampler, MixtureSampler
from rewarm.rollouts.ranks import Place, place
from rewarm.text.encoding import Encoder, Tokens, load_tokenizer
from rewarm.text.formats import Row, Rows

log = logging.getLogger(__name__)

Overlong = Literal["error", "drop", "keep_start", "keep_end"]

Column = Callable[[str, bool], list[Any]]
"""The name of a column, and whether it holds numbers -> its value for each example."""


def check_overlong(overlong: Overlong) -> Overlong:
    """Return what it is given, if that is known.

    Raises:
        ValueError: If it is not.
    """
    if overlong not in get_args(Overlong):
        raise ValueError(f"overlong is {overlong!r}; known are {', '.join(map(repr, get_args(Overlong)))}")
    return overlong


def example_bytes(examples: Iterable[Example]) -> Iterator[bytes]:
    """Yield what training sees of some examples: their tokens, what is learnt of them, their boundaries."""
    remaining = iter(examples)
    while chunk := list(itertools.islice(remaining, 4096)):
        sequences = [sequence for example in chunk for sequence in example.sequences]
        lengths = [n for e in chunk for n in (len(e.sequences), *(len(s.tokens) for s in e.sequences))]
        yield torch.tensor(lengths).numpy().tobytes()
        yield torch.cat([sequence.tokens for sequence in sequences]).numpy().tobytes()
        yield torch.cat([sequence.learn for sequence in sequences]).numpy().tobytes()
        for values in (values for s in sequences for _, values in sorted(s.extra.items())):
            yield values.numpy().tobytes()


class LanguageData(LightningDataModule):
    """Base of the data modules.

    Checkpoints keep a fingerprint of the training data. A run goes on with the same data wherever it lies,
    and with another number of ranks or rows per step; other data are refused.

    Args:
        tokenizer: Hugging Face folder or id of a tokenizer.
        batch_size: Rows per batch and rank, >= 1.
        max_length: Most positions per row, >= 1.
        num_workers: Processes that collate, >= 0; the rows are tokenised beforehand, so 0 is nearly always
            fastest.
        seed: Of every random choice about the data.
    """

    def __init__(
        self, tokenizer: str, batch_size: int, max_length: int, num_workers: int = 0, seed: int = 0
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}; it must be at least 1")
        if num_workers < 0:
            raise ValueError(f"num_workers is {num_workers}; it must not be below 0")
        self.tokenizer_source = tokenizer
        self.batch_size, self.max_length, self.num_workers, self.seed = (
            batch_size,
            max_length,
            num_workers,
            seed,
        )
        self.curriculum: Curriculum | None = None
        self.left_out: dict[str, Counter[str]] = {}
        self._examples: dict[str, list[Example]] = {}
        self._encoder: Encoder | None = None
        self._row_loader: RowLoader | None = None
        self._loader: WindowLoader | None = None
        self._restored: dict[str, Any] | None = None
        self._paths: dict[str, str | list[str]] = {}
        self._fingerprints: dict[str, dict[str, Any]] = {}

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

        All else stays on the host, unlooked at.
        """
        pinned = device.type == "cuda"
        return {
            name: (value.pin_memory() if pinned else value).to(device, non_blocking=pinned)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in batch.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return which data these are, how many rows an optimizer step takes, and where the loader is."""
        state: dict[str, Any] = {"data": self._fingerprints, "rows_per_step": self._rows_per_step()}
        # Lightning keeps it too, but gives it back only inside an epoch: the next one would repeat its order.
        return state if self._loader is None else state | {"loader": self._loader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make sure that the data are the same, and go on from the saved position.

        Raises:
            ValueError: If the training data differ; says in what.
        """
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return
        again = "resume with the same data, or start a new run from an exported model"
        then, now = state["data"], self._fingerprints
        if then.keys() != now.keys():
            raise ValueError(
                f"the checkpoint was made with {sorted(then)}, now there are {sorted(now)}; {again}"
            )
        for name, path in self._paths.items():
            if then[name] != now[name]:
                raise ValueError(
                    f"{path} ({name}): the checkpoint was made with {then[name]['examples']} examples"
                    f" (fingerprint {then[name]['fingerprint'][:8]}), now there are {now[name]['examples']}"
                    f" ({now[name]['fingerprint'][:8]}); {again}"
                )
        first = self.trainer is None or self.trainer.is_global_zero
        if state["rows_per_step"] != self._rows_per_step() and first:
            log.warning(
                "an optimizer step takes %d rows; it took %d where the checkpoint was made",
                self._rows_per_step(),
                state["rows_per_step"],
            )
        self._restored = state.get("loader")

    def _remember(self, name: str, path: str | list[str], count: int, content: Iterable[bytes]) -> None:
        """Take the fingerprint of training data, which is the same on any machine."""
        digest = hashlib.blake2b(digest_size=16)
        for part in content:
            digest.update(part)
        self._paths[name] = path
        self._fingerprints[name] = {"examples": count, "fingerprint": digest.hexdigest()}

    def val_dataloader(self) -> Any:
        """The validation examples in their order, unpacked."""
        return self.scoring_dataloader("val") or []

    def test_dataloader(self) -> Any:
        """The validation data."""
        return self.val_dataloader()

    def predict_dataloader(self) -> ListedLoader | None:
        """Every validation example once, or every training example where there are none."""
        return self.scoring_dataloader("val" if "val" in self._examples else "train")

    def examples(self, split: str = "train") -> list[Example]:
        """The tokenised examples of a split; none if there is no such split. There after `setup`."""
        return self._examples.get(split, [])

    def scoring_dataloader(self, split: str = "train") -> ListedLoader | None:
        """Every example of a split once, unpacked; None if there is no such split."""
        examples = self._examples.get(split)
        return None if examples is None else self._listed_loader(examples, self._collate())

    def _collate(self) -> Collate:
        """How examples become unpacked batches."""
        raise ValueError(f"{type(self).__name__} has no examples to score")

    def _set_up_splits(
        self,
        read: Callable[[Any, set[str]], tuple[list[Example], Column]],
        train: Any,
        val: Any,
        *,
        score: str | None,
        order: Literal["shuffled", "ascending", "descending"] | Order,
        window: int = 1,
        pacing: Pacing | None,
        keep: Gate | None = None,
        group: str | None = None,
    ) -> None:
        """Read the training and validation examples, and make the curriculum of the former, once."""
        if self._examples:
            return
        if keep is not None and score is None:
            raise ValueError("keep chooses examples by their scores: set score")
        numbers, labels = {score} if score else set(), {group} if group else set()
        if isinstance(order, Order):
            numbers, labels = numbers | set(order.numbers), labels | set(order.labels)
        examples, column = read(train, numbers | labels)
        columns = {name: column(name, name in numbers) for name in sorted(numbers | labels)}
        if keep is not None:
            examples, columns = self._kept(train, examples, columns, keep, str(score), group)
        scores = columns[score] if score and (order != "shuffled" or keep is None) else None
        ranking = order(columns) if isinstance(order, Order) else order
        self.curriculum = Curriculum(
            len(examples),
            scores=scores,
            order=ranking,
            window=window,
            pacing=pacing,
            groups=columns[group] if group else None,
            seed=self.seed,
        )
        self._examples = {"train": examples}
        seen = [torch.tensor(scores or [], dtype=torch.float64).numpy().tobytes()]
        if not isinstance(ranking, str):
            seen.append(torch.tensor(ranking).numpy().tobytes())
        self._remember("train", train, len(examples), itertools.chain(example_bytes(examples), seen))
        if val is not None:
            self._examples["val"], _ = read(val, set())

    def _kept(
        self,
        path: Any,
        examples: list[Example],
        columns: dict[str, list[Any]],
        keep: Gate,
        score: str,
        group: str | None,
    ) -> tuple[list[Example], dict[str, list[Any]]]:
        """Leave out the examples that a gate does not admit, and log how many."""
        chosen = admitted(keep, columns[score], columns[group] if group else None)
        kept = [number for number, is_in in enumerate(chosen) if is_in]
        if not kept:
            raise ValueError(f"{path}: keep admits none of {len(examples)} rows by their {score}")
        log.warning("%s: %d of %d rows kept by %s", path, len(kept), len(examples), score)
        examples = [Example(place, examples[number].sequences) for place, number in enumerate(kept)]
        return examples, {name: [values[number] for number in kept] for name, values in columns.items()}

    @property
    def rank(self) -> int:
        """This process's place among those that share the data."""
        return self.place.rank

    @property
    def world_size(self) -> int:
        """How many processes share the data."""
        return self.place.size

    @property
    def place(self) -> Place:
        """This process's place among those that share the data."""
        return place(self.trainer)

    def _accumulate(self) -> int:
        return 1 if self.trainer is None else self.trainer.accumulate_grad_batches

    def _remaining(self) -> float:
        if self.trainer is None or not self.trainer.training:
            return float("inf")
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        return self.trainer.num_training_batches - progress.current.ready

    def _rows_per_step(self) -> int:
        return self.batch_size * self.world_size * self._accumulate()

    def _recount(self, done: int) -> None:
        """Let Lightning count in batches of this run's size; its checkpoint counted those of another."""
        if self.trainer is None or not self.trainer.training:
            return
        progress, limit = self.trainer.fit_loop.epoch_loop.batch_progress, self.trainer.limit_train_batches
        batches = len(self._loader) if self._loader is not None else 0
        if (limit if isinstance(limit, int) else limit * batches) < batches and not progress.is_last_batch:
            # It ends such an epoch by its own count, wherever the pass over the data is.
            done = progress.current.ready - progress.current.ready % self._accumulate()
        if progress.current.ready:
            progress.current.increment_by(done - progress.current.ready)

    def _train_loader(
        self, examples: Examples, sampler: CurriculumSampler | MixtureSampler, collate: Collate
    ) -> WindowLoader:
        self._row_loader = RowLoader(examples, sampler, collate, self.num_workers)
        return self._with_windows(self._row_loader)

    def _with_windows(self, loader: Any) -> WindowLoader:
        self._loader = WindowLoader(loader, self._accumulate, self._remaining, self._recount)
        state, self._restored = self._restored, None
        if state is not None:
            self._loader.load_state_dict(state)
        return self._loader

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
            accumulate_grad_batches=self._accumulate(),
            **packing,
        )

    def _truncated(
        self, sequences: tuple[Tokens, ...], longest: int, overlong: Overlong
    ) -> tuple[Tokens, ...]:
        """Cut sequences that share a prompt so that they still do; none if there is too little to cut."""
        if overlong == "keep_start":
            return tuple(sequence.without_end(self.max_length) for sequence in sequences)
        bos = self.tokenizer.bos_token_id
        after = int(bos is not None and all(int(s.tokens[0]) == bos for s in sequences))
        count = longest - self.max_length
        if len(sequences) > 1 and count + after > min(_shared(sequences), *map(_prompt, sequences)):
            return ()
        return tuple(sequence.without_start(count, after) for sequence in sequences)

    def _tokenise(
        self,
        rows: Rows,
        encode: Callable[[int, Row], tuple[Tokens, ...] | str],
        overlong: Overlong,
    ) -> tuple[list[Example], list[int]]:
        """Encode every row; return the examples and the row number of each, and log what was left out."""
        examples: list[Example] = []
        numbers: list[int] = []
        left_out: Counter[str] = Counter()
        for number, row in enumerate(
            track(rows, f"tokenising {rows.path}", total=len(rows), disable=len(rows) < 5000, transient=True)
        ):
            try:
                sequences = encode(number, row)
            except ValueError as error:
                if str(error).startswith(rows.where(number)) or str(rows.path) in str(error):
                    raise
                raise ValueError(f"{rows.where(number)}: {error}") from error
            if isinstance(sequences, str):
                left_out[f"{sequences}, dropped"] += 1
                continue
            longest = max(sequence.positions for sequence in sequences)
            if longest > self.max_length:
                if overlong == "error":
                    raise ValueError(
                        f"{rows.where(number)}: {longest} positions, but max_length is {self.max_length}:"
                        " raise it, or set overlong to 'drop', 'keep_start' or 'keep_end'"
                    )
                cut = () if overlong == "drop" else self._truncated(sequences, longest, overlong)
                left_out["too long, truncated" if cut else "too long, dropped"] += 1
                if not cut:
                    continue
                sequences = cut
            if not all(bool(sequence.learn[1:].any()) for sequence in sequences):
                left_out["without a target, dropped"] += 1
                continue
            examples.append(Example(len(examples), sequences))
            numbers.append(number)
        self.left_out[str(rows.path)] = left_out
        for reason, count in left_out.items():
            log.warning("%s: %d of %d rows %s", rows.path, count, len(rows), reason)
        if self.encoder.straddled:
            log.warning(
                "%s: %d sequences have a token across prompt and completion",
                rows.path,
                self.encoder.straddled,
            )
            self.encoder.straddled = 0
        if not examples:
            raise ValueError(f"{rows.path}: no row is left to train on ({dict(left_out)})")
        return examples, numbers


def _shared(sequences: tuple[Tokens, ...]) -> int:
    """How many first tokens all have in common."""
    shortest = min(len(sequence.tokens) for sequence in sequences)
    first = sequences[0].tokens[:shortest]
    differ = [(sequence.tokens[:shortest] != first).nonzero() for sequence in sequences]
    return min([int(places[0]) for places in differ if len(places)] + [shortest])


def _prompt(sequence: Tokens) -> int:
    """How many first tokens are not learnt."""
    learnt = sequence.learn.nonzero()
    return int(learnt[0]) if len(learnt) else len(sequence.learn)
