"""A corpus as tokens on disk, written once in a stream and read at any place in no time and no memory.

The folder of a store has the tokens of all documents one after the other (`tokens.bin`), where each document
begins (`starts.bin`, 8 bytes a document), and `store.json`. A row is read with one `pread` for its tokens and
a bisection of the starts, so that the memory of a run is the same for any corpus.
"""

import hashlib
import itertools
import json
import logging
import os
import struct
import weakref
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from filelock import FileLock
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer

from rewarm.checkpoints.placing import put_in_place
from rewarm.datamodules.corpus_text import SampleBy, documents, source_identity
from rewarm.datamodules.loader import Example
from rewarm.text.encoding import Encoder, Tokens

log = logging.getLogger(__name__)

_FORMAT = 1
_FILES = ("tokens.bin", "starts.bin")
_BATCH = 4_000_000  # characters that are tokenised at once


class TokenStore:
    """The tokens of a corpus on disk, read a piece at a time.

    Args:
        folder: Folder that `token_store` wrote.

    Attributes:
        num_documents: Number of documents, each with at least two tokens, its end counted.
        num_tokens: Number of tokens of all documents.
        num_empty: Number of documents that were left out as empty.
        digest: Hash of all tokens.

    Raises:
        ValueError: If the folder holds no whole store.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> about = {"documents": 2, "tokens": 7, "empty": 0, "digest": "", "kind": "<u2"}
        >>> _ = (folder / "store.json").write_text(json.dumps(about))
        >>> _ = (folder / "tokens.bin").write_bytes(np.array([4, 5, 1, 6, 7, 8, 1], "<u2").tobytes())
        >>> _ = (folder / "starts.bin").write_bytes(np.array([0, 3, 7], "<i8").tobytes())
        >>> store = TokenStore(folder)
        >>> store.starts(0, 3), store.read(3, 7).tokens.tolist()
        ((0, 3, 7), [6, 7, 8, 1])
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        about = json.loads((folder / "store.json").read_text())
        self.num_documents, self.num_tokens = about["documents"], about["tokens"]
        self.num_empty, self.digest = about["empty"], about["digest"]
        self._kind = np.dtype(about["kind"])
        self._tokens, self._starts = (os.open(folder / name, os.O_RDONLY) for name in _FILES)
        for file in (self._tokens, self._starts):
            weakref.finalize(self, os.close, file)
        wanted = [self.num_tokens * self._kind.itemsize, (self.num_documents + 1) * 8]
        if [os.fstat(file).st_size for file in (self._tokens, self._starts)] != wanted:
            raise ValueError(f"{folder}: the tokens are damaged; remove the folder to have them made anew")

    def __reduce__(self) -> tuple[type["TokenStore"], tuple[Path]]:
        """Open the files again in another process."""
        return TokenStore, (self.folder,)

    def starts(self, first: int, end: int) -> tuple[int, ...]:
        """Return where documents `first` to `end - 1` begin, in tokens; the one after the last is the end."""
        return struct.unpack(f"<{end - first}q", os.pread(self._starts, (end - first) * 8, first * 8))

    def read(self, start: int, end: int) -> Tokens:
        """Return tokens `start` to `end - 1`, and which of them are learnt."""
        size = self._kind.itemsize
        raw = np.frombuffer(os.pread(self._tokens, (end - start) * size, start * size), self._kind)
        flag = _flag(self._kind)
        return Tokens(torch.from_numpy((raw & ~flag).astype(np.int64)), torch.from_numpy((raw & flag) == 0))


class TokenRows:
    """Rows of a fixed length that a store is cut into, read when they are asked for.

    A document that reaches over the end of a row goes on in the next one; the last row may be shorter.

    Args:
        store: Store that has the tokens.
        length: Number of positions per row, >= 1.
        first: Id of the first row.
        across: Whether a row is one sequence, in which a document sees those before it and its first token is
            predicted; else a row is one sequence per document.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> about = {"documents": 2, "tokens": 7, "empty": 0, "digest": "", "kind": "<u2"}
        >>> _ = (folder / "store.json").write_text(json.dumps(about))
        >>> _ = (folder / "tokens.bin").write_bytes(np.array([4, 5, 1, 6, 7, 8, 1], "<u2").tobytes())
        >>> _ = (folder / "starts.bin").write_bytes(np.array([0, 3, 7], "<i8").tobytes())
        >>> rows = TokenRows(TokenStore(folder), length=3)
        >>> [[piece.tokens.tolist() for piece in rows[number].sequences] for number in range(len(rows))]
        [[[4, 5, 1], [6, 7]], [[7, 8, 1]]]
    """

    def __init__(self, store: TokenStore, length: int, first: int = 0, across: bool = False) -> None:
        self.store, self.length, self.first, self.across = store, length, first, across
        # The last token of a document (of the stream) is never an input.
        self._positions = store.num_tokens - (1 if across else store.num_documents)

    @property
    def fingerprint(self) -> str:
        """What tells these rows from others: the tokens, and how they are cut."""
        return f"{self.store.digest} {self.length}{' across' if self.across else ''}"

    def __len__(self) -> int:
        """Return the number of rows."""
        return -(-self._positions // self.length)

    def __getitem__(self, number: int) -> Example:
        """Return a row: an example whose sequences are the pieces of documents."""
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        start, end = number * self.length, min((number + 1) * self.length, self._positions)
        if self.across:
            return Example(self.first + number, (self.store.read(start, end + 1),))
        count = self.store.num_documents
        document = bisect_right(range(count), start, key=self._position) - 1
        # Each document takes a position at least.
        within = min(count, document + end - start)
        last = bisect_right(range(count), end - 1, document, within, key=self._position) - 1
        # Before document d there are d tokens more than positions.
        base, begins = start + document, self.store.starts(document, last + 2)
        tokens, learn, _ = self.store.read(base, end + last + 1)
        cuts = [(max(base, a), min(b, end + last + 1)) for a, b in itertools.pairwise(begins)]
        pieces = (Tokens(tokens[a - base : b - base], learn[a - base : b - base]) for a, b in cuts)
        return Example(self.first + number, tuple(pieces))

    def _position(self, document: int) -> int:
        return self.store.starts(document, document + 1)[0] - document


def token_store(
    path: str | list[str],
    encoder: Encoder,
    sample_by: SampleBy = "line",
    most_tokens: int | None = None,
) -> TokenStore:
    r"""Open the tokens of a source, and make them where they are not there yet.

    The tokens are kept in the cache of `datasets` (`HF_DATASETS_CACHE`), in a folder whose name is a hash of
    the tokenizer and of what tells the source from others. A process that comes while another one makes them
    waits.

    Args:
        path: A file, a list of files, a folder, or a Hub id.
        encoder: Encoder with the tokenizer.
        sample_by: Unit of a `.txt` file that is one document.
        most_tokens: Number of tokens with whose document the reading ends, >= 1; None reads everything.

    Returns:
        The store.

    Raises:
        ValueError: If the source cannot be read, or has no text.

    Example:
        >>> import tempfile
        >>> from tokenizers import models
        >>> from transformers import PreTrainedTokenizerFast
        >>> from unittest.mock import patch
        >>> words = Tokenizer(models.WordLevel({"</s>": 0, "word": 1}, unk_token="word"))
        >>> encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>"))
        >>> folder = tempfile.mkdtemp()
        >>> _ = Path(folder, "corpus.txt").write_text("one\ntwo")
        >>> with patch.object(datasets.config, "HF_DATASETS_CACHE", folder):
        ...     store = token_store(f"{folder}/corpus.txt", encoder)
        >>> store.num_documents, store.num_tokens  # a word and an end each
        (2, 4)
    """
    backend = encoder.tokenizer.backend_tokenizer.to_str()
    about = [_FORMAT, source_identity(path), sample_by, most_tokens, backend]
    about += [encoder.tokenizer.eos_token_id, str(encoder.tokenizer.chat_template)]
    name = hashlib.blake2b(json.dumps(about).encode(), digest_size=16).hexdigest()
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "rewarm_tokens" / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                with put_in_place(folder) as new:
                    _write(new, path, encoder, backend, sample_by, most_tokens)
    store = TokenStore(folder)
    if store.num_empty:
        total = store.num_documents + store.num_empty
        log.info("%s: %d of %d documents are empty and left out", path, store.num_empty, total)
    return store


def _flag(kind: np.dtype[Any]) -> Any:
    """The highest bit: the token is not to be learnt."""
    return kind.type(1 << (8 * kind.itemsize - 1))


def _write(
    folder: Path,
    path: str | list[str],
    encoder: Encoder,
    backend: str,
    sample_by: SampleBy,
    most_tokens: int | None,
) -> None:
    folder.mkdir()
    kind = np.dtype("<u2" if len(encoder.tokenizer) <= 1 << 15 else "<u4")
    digest, digest_of_starts = hashlib.blake2b(), hashlib.blake2b(digest_size=16)
    count = tokens = empty = 0
    bar = Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), transient=True)
    task = bar.add_task("")
    with ExitStack() as stack:
        content, starts = (stack.enter_context(open(folder / name, "wb")) for name in _FILES)
        starts.write(struct.pack("<q", 0))
        batches = _encode_in_batches(documents(path, sample_by, encoder), encoder, backend, kind)
        for number, encoded in enumerate(batches):
            if number == 1:  # no bar for what is done at once
                stack.enter_context(bar)
            whole = [ids for ids in encoded if len(ids) > 1]
            empty += len(encoded) - len(whole)
            ends = tokens + np.cumsum([len(ids) for ids in whole], dtype="<i8")
            if most_tokens is not None and len(ends) and ends[-1] >= most_tokens:
                whole = whole[: int(np.searchsorted(ends, most_tokens)) + 1]
                ends = ends[: len(whole)]
            for ids in whole:
                digest.update(ids.tobytes())
                content.write(ids.tobytes())
            digest_of_starts.update(ends.tobytes())
            starts.write(ends.tobytes())
            count, tokens = count + len(whole), int(ends[-1]) if len(ends) else tokens
            bar.update(task, description=f"tokenising {path}: {tokens / 1e6:.1f} million tokens")
            if most_tokens is not None and tokens >= most_tokens:
                break
    if not count:
        raise ValueError(f"{path}: all documents are empty")
    digest_of_starts.update(digest.digest())
    about = {"documents": count, "tokens": tokens, "empty": empty, "kind": kind.str}
    about |= {"digest": digest_of_starts.hexdigest(), "source": path}
    (folder / "store.json").write_text(json.dumps(about, indent=1))


def _encode_in_batches(
    texts: Iterator[str | Tokens], encoder: Encoder, backend: str, kind: np.dtype[Any]
) -> Iterator[list[np.ndarray[Any, Any]]]:
    """Tokenise many documents at once, on all cores and without the offsets that masks need."""
    tokenizer = Tokenizer.from_str(backend)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    eos = encoder.tokenizer.eos_token_id

    def encode(batch: list[str | Tokens]) -> list[np.ndarray[Any, Any]]:
        found = tokenizer.encode_batch_fast([text for text in batch if isinstance(text, str)])
        plain = iter(found)
        result = []
        for text in batch:
            if isinstance(text, str):
                ids = next(plain).ids
                result.append(np.array([*ids, eos] if ids[-1:] != [eos] else ids, kind))
            else:
                tokens = text.tokens.numpy().astype(kind)
                result.append(np.where(text.learn.numpy(), tokens, tokens | _flag(kind)))
        return result

    batch: list[str | Tokens] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += 1 + len(text if isinstance(text, str) else text.tokens)
        if size >= _BATCH:
            yield encode(batch)
            batch, size = [], 0
    if batch:
        yield encode(batch)
