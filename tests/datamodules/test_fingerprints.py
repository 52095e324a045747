"""Fingerprints of training data: what changes them, and what other data are told."""

import pytest
import torch

from rewarm.datamodules.fingerprints import Fingerprints, example_bytes
from rewarm.datamodules.loader import Example
from rewarm.text.encoding import Tokens


def made(*examples):
    """Examples of sequences, each given as tokens with a star behind those that are learnt."""
    return [
        Example(
            number,
            tuple(
                Tokens(
                    torch.tensor([int(t.strip("*")) for t in text.split()]),
                    torch.tensor(["*" in t for t in text.split()]),
                )
                for text in texts
            ),
        )
        for number, texts in enumerate(examples)
    ]


def test_the_fingerprint_sees_tokens_masks_and_boundaries():
    variants = [
        made(["1 2* 3*"], ["4 5*"]),
        made(["1 2* 3*"], ["4 6*"]),
        made(["1 2 3*"], ["4 5*"]),
        made(["1 2* 3* 4", "5*"]),
        made(["1 2* 3*", "4 5*"]),
        made(["1 2* 3*"], ["4"], ["5*"]),
        made(["4 5*"], ["1 2* 3*"]),
        made(["1 2* 3*"]),
    ]
    assert len({b"".join(example_bytes(examples)) for examples in variants}) == len(variants)
    many = made(*[[f"{number} 1*"] for number in range(9000)])
    assert len(b"".join(example_bytes(many))) > len(b"".join(example_bytes(many[:-1])))


def taken(**sources):
    fingerprints = Fingerprints()
    for name, content in sources.items():
        fingerprints.add(name, f"{name}.jsonl", len(content), content)
    return fingerprints


def test_the_same_content_in_other_pieces_and_another_place_is_accepted():
    then, now = Fingerprints(), Fingerprints()
    then.add("train", "here.jsonl", 3, [b"ab", b"c"])
    now.add("train", ["there.jsonl"], 3, [b"a", b"bc"])
    now.check(then.state_dict())


def test_other_content_is_refused_with_both_numbers_and_fingerprints():
    then, now = taken(old=[b"a"], new=[b"b", b"c"]), taken(old=[b"a"], new=[b"b"])
    first, second = (f.state_dict()["new"]["fingerprint"][:8] for f in (then, now))
    with pytest.raises(
        ValueError,
        match=rf"new.jsonl \(new\): .* with 2 examples \(fingerprint {first}\), now there are 1 \({second}\)",
    ):
        now.check(then.state_dict())


def test_other_sources_are_refused_with_their_names():
    with pytest.raises(ValueError, match=r"was made with \['a'\], now there are \['a', 'b'\]; resume with"):
        taken(a=[], b=[]).check(taken(a=[]).state_dict())


def test_a_state_that_was_taken_does_not_grow_with_further_sources():
    fingerprints = taken(a=[b"x"])
    state = fingerprints.state_dict()
    fingerprints.add("b", "b.jsonl", 0, [])
    assert list(state) == ["a"]
