"""Which data a state belongs to: fingerprints of the training data, the same on any machine."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from rewarm.datamodules.loader import Example


def example_bytes(examples: Iterable[Example]) -> Iterator[bytes]:
    """Yield what training sees of some examples: their tokens, what is learnt of them, their boundaries.

    Args:
        examples: The examples, in their order.

    Example:
        >>> from rewarm.text.encoding import Tokens
        >>> tokens = torch.tensor([5, 6, 7])
        >>> one, other = Example(0, (Tokens(tokens, tokens > 5),)), Example(0, (Tokens(tokens, tokens > 6),))
        >>> list(example_bytes([one])) == list(example_bytes([other]))  # they learn other tokens
        False
    """
    remaining = iter(examples)
    while chunk := list(itertools.islice(remaining, 4096)):
        sequences = [sequence for example in chunk for sequence in example.sequences]
        lengths = [n for e in chunk for n in (len(e.sequences), *(len(s.tokens) for s in e.sequences))]
        yield torch.tensor(lengths).numpy().tobytes()
        yield torch.cat([sequence.tokens for sequence in sequences]).numpy().tobytes()
        yield torch.cat([sequence.learn for sequence in sequences]).numpy().tobytes()
        for values in (values for s in sequences for _, values in sorted(s.extra.items())):
            yield values.numpy().tobytes()
        if columns := [number for example in chunk for number in example.columns]:
            yield torch.tensor(columns, dtype=torch.float64).numpy().tobytes()


def fingerprint_of(count: int, content: Iterable[bytes]) -> dict[str, Any]:
    """Return the number of examples, and a digest that is the same on any machine.

    Args:
        count: Number of the examples.
        content: Bytes of all that training sees of the examples.

    Example:
        >>> fingerprint_of(1, [b"some"]) == fingerprint_of(1, [b"so", b"me"])
        True
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in content:
        digest.update(part)
    return {"examples": count, "fingerprint": digest.hexdigest()}


class Fingerprints:
    """Fingerprints of the sources of the training data, by name.

    Example:
        >>> now, then = Fingerprints(), Fingerprints()
        >>> now.add("train", "here.jsonl", 2, [b"some", b"rows"])
        >>> then.add("train", "there.jsonl", 2, [b"some", b"rows"])
        >>> now.check(then.state_dict())
    """

    def __init__(self) -> None:
        self._paths: dict[str, str | list[str]] = {}
        self._taken: dict[str, dict[str, Any]] = {}

    def add(self, name: str, path: str | list[str], count: int, content: Iterable[bytes]) -> None:
        """Take the fingerprint of a source.

        Args:
            name: Name of the source.
            path: Path of the source, on which the fingerprint does not depend.
            count: Number of the source's examples.
            content: Bytes of all that training sees of the source.
        """
        self._paths[name] = path
        self._taken[name] = fingerprint_of(count, content)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return the number of examples and the fingerprint of each source, by name."""
        return dict(self._taken)

    def check(self, then: Mapping[str, Mapping[str, Any]]) -> None:
        """Make sure that a state belongs to these data.

        Args:
            then: What `state_dict` returned where the state was made.

        Raises:
            ValueError: If the data differ; the message says in what.
        """
        again = "resume with the same data, or start a new run from an exported model"
        if then.keys() != self._taken.keys():
            raise ValueError(
                f"the checkpoint was made with {sorted(then)}, now there are {sorted(self._taken)}; {again}"
            )
        for name, now in self._taken.items():
            if then[name] != now:
                raise ValueError(
                    f"{self._paths[name]} ({name}): the checkpoint was made with"
                    f" {then[name]['examples']} examples (fingerprint {then[name]['fingerprint'][:8]}), now"
                    f" there are {now['examples']} ({now['fingerprint'][:8]}); {again}"
                )
