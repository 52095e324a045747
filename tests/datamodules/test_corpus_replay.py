"""What was seen, remembered and replayed; how often each phase comes back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewarm.datamodules.corpus_replay import SeenRows, more_seen, read_seen, rehearsal_shares
from rewarm.datamodules.samplers import MixtureSampler
from rewarm.datamodules.token_store import TokenRows, token_store
from rewarm.text.encoding import Encoder
from tests import tiny

sizes = st.dictionaries(st.text(max_size=3), st.integers(1, 10**6), min_size=1, max_size=5)


@given(sizes, st.floats(0, 5))
def test_shares_of_the_phases_sum_to_one_and_follow_their_rule(given_sizes, power):
    rows = rehearsal_shares(given_sizes)
    uniform = rehearsal_shares(given_sizes, "uniform")
    law = rehearsal_shares(given_sizes, "power-law", power)
    for shares in (rows, uniform, law):
        assert sum(shares.values()) == pytest.approx(1.0)
        assert list(shares) == list(given_sizes)
    assert rows == pytest.approx({n: size / sum(given_sizes.values()) for n, size in given_sizes.items()})
    assert len(set(uniform.values())) == 1
    newest_first = list(law.values())[::-1]
    for ago, share in enumerate(newest_first, start=1):
        assert share == pytest.approx(newest_first[0] * ago**-power)


def test_power_0_is_uniform():
    assert rehearsal_shares({"a": 1, "b": 9}, "power-law", 0.0) == {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rehearsal": "random"}, "rehearsal is 'random'; it must be one of 'rows', 'uniform', 'power-law'"),
        ({"rehearsal": "power-law", "power": -1.0}, "rehearsal_power is -1.0; it must be at least 0"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(options, named):
    with pytest.raises(ValueError, match=named):
        rehearsal_shares({"a": 1}, **options)


@pytest.fixture
def rows(tmp_path):
    texts = [{"text": "abcdefgh"[: 2 + n % 6]} for n in range(40)]
    return TokenRows(
        token_store(tiny.write_jsonl(tmp_path / "a.jsonl", texts), Encoder(tiny.build_tokenizer())), 5
    )


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drawn", [1, 7, 1000])
def test_seen_rows_are_those_that_the_sampler_drew_in_its_order(rows, shuffle, drawn):
    sampler = MixtureSampler({"web": len(rows)}, {"web": 1.0}, 1, shuffle=shuffle, seed=5)
    first_pass = [number for (number,) in sampler]
    seen = SeenRows(rows, {"name": "web", "drawn": drawn, "seed": 5, "shuffle": shuffle})
    assert [row.id for row in seen] == first_pass[:drawn]
    assert len(seen) == min(drawn, len(rows))
    with pytest.raises(IndexError):
        seen[len(seen)]


def test_nothing_seen_is_nothing_to_replay(rows):
    with pytest.raises(ValueError, match="the checkpoint has seen none of the rows of web"):
        SeenRows(rows, {"name": "web", "drawn": 0, "seed": 5, "shuffle": True})


def test_of_the_same_rows_the_longer_memory_is_kept():
    one = {"x": {"drawn": 5, "seed": 1}, "y": {"drawn": 1, "seed": 1}}
    other = {"x": {"drawn": 4, "seed": 2}, "y": {"drawn": 2, "seed": 2}, "z": {"drawn": 0, "seed": 2}}
    assert more_seen(one, other) == {"x": one["x"], "y": other["y"], "z": other["z"]}
    assert more_seen(other, one)["x"] == one["x"]


def test_a_checkpoint_without_such_a_memory_is_named(tmp_path):
    entry = {"f": {"name": "web", "drawn": 3, "seed": 0, "shuffle": True}}
    torch.save({"CorpusData": {"seen": entry}, "state_dict": {}}, tmp_path / "good.ckpt")
    assert read_seen(str(tmp_path / "good.ckpt")) == entry
    (tmp_path / "sharded").mkdir()
    torch.save({"CorpusData": {"seen": entry}}, tmp_path / "sharded" / "meta.pt")
    assert read_seen(str(tmp_path / "sharded")) == entry
    torch.save({"InstructionData": {}, "epoch": 0}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.ckpt: the checkpoint does not say which rows"):
        read_seen(str(tmp_path / "other.ckpt"))
    (tmp_path / "torn.ckpt").write_bytes((tmp_path / "good.ckpt").read_bytes()[:300])
    for name in ("torn.ckpt", "none.ckpt"):
        with pytest.raises(ValueError, match=f"{name}: cannot be read as a checkpoint"):
            read_seen(str(tmp_path / name))
