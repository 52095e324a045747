"""Rows, batches and windows, against loops over the sequences themselves."""

import copy
import itertools
import multiprocessing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchdata.stateful_dataloader import StatefulDataLoader

from rewarm.curriculum.curriculum import Curriculum
from rewarm.datamodules.loader import (
    Bins,
    Collate,
    Example,
    ListedLoader,
    RowLoader,
    WindowLoader,
    collate_rows,
)
from rewarm.datamodules.samplers import CurriculumSampler
from rewarm.functional.logprob import IGNORE_INDEX
from rewarm.text.encoding import Tokens

PAD = 99


def sequence(length, first=0, prompt=1):
    """Tokens that count up from `first`; the first ones are the prompt."""
    return Tokens(torch.arange(first, first + length), torch.arange(length) >= prompt)


def examples(lengths):
    return [Example(number, (sequence(length, first=100 * number),)) for number, length in enumerate(lengths)]


ragged = st.lists(st.tuples(st.integers(2, 9), st.integers(0, 10)), min_size=1, max_size=4)


# --- rows -------------------------------------------------------------------------------------------------


@given(st.lists(ragged, min_size=1, max_size=4), st.booleans(), st.one_of(st.none(), st.integers(1, 60)))
@settings(deadline=None)
def test_targets_are_the_tokens_that_follow_where_they_are_learnt(sizes, restart, pad_to):
    rows = [[sequence(length, 7 * n, prompt) for n, (length, prompt) in enumerate(row)] for row in sizes]
    batch = collate_rows(rows, PAD, restart=restart, pad_to=pad_to)
    width = max([sum(len(s.tokens) - 1 for s in row) for row in rows] + [pad_to or 0])
    number = 0
    for place, row in enumerate(rows):
        inputs, targets, owners, positions = [], [], [], []
        for tokens, learn, _ in row:
            inputs += tokens[:-1].tolist()
            targets += [
                int(t) if learnt else IGNORE_INDEX for t, learnt in zip(tokens[1:], learn[1:], strict=True)
            ]
            owners += [number] * (len(tokens) - 1)
            positions += range(len(tokens) - 1)
            number += 1
        padding = width - len(inputs)
        positions += range(padding)
        assert batch["input_ids"][place].tolist() == inputs + [PAD] * padding
        assert batch["targets"][place].tolist() == targets + [IGNORE_INDEX] * padding
        assert batch["sequence_ids"][place].tolist() == owners + [-1] * padding
        assert batch["position_ids"][place].tolist() == (positions if restart else list(range(width)))
    learnt = sum(int(s.learn[1:].sum()) for row in rows for s in row)
    assert batch["num_targets"] == learnt
    assert batch["counts"] == {"tokens": learnt, "sequences": number}


def test_a_rank_without_work_gets_one_row_that_counts_nothing():
    for rows in ([], [[]]):
        batch = collate_rows(rows, PAD, restart=True, pad_to=3)
        assert batch["input_ids"].tolist() == [[PAD] * 3]
        assert batch["targets"].tolist() == [[IGNORE_INDEX] * 3]
        assert batch["counts"] == {"tokens": 0, "sequences": 0}
    empty = Collate(PAD, packed=False, count=lambda given: {"pairs": len(given)})([])
    assert (empty["ids"], empty["counts"]) == ([], {"tokens": 0, "sequences": 0, "pairs": 0})


def with_prompt(prompt, *completion):
    tokens = torch.tensor([*prompt, *completion])
    return [Tokens(tokens, torch.arange(len(tokens)) >= len(prompt))]


def test_padding_is_not_computed_and_a_prompt_once_but_for_its_last_token():
    rows = [
        with_prompt((5, 6, 7), 8, 9),
        with_prompt((5, 6), 7),
        with_prompt((5, 6, 7), 8),
        with_prompt((5,), 6),
    ]
    batch = collate_rows(rows, PAD, restart=False)
    assert batch["documents"].places.tolist() == [0, 1, 2, 3, 10, 4, 5, 12]
    assert [tuple(run) for run in batch["documents"].runs] == [
        (0, 4, 0, 0),
        (4, 1, 0, 2),
        (5, 2, 2, 0),
        (7, 1, 3, 0),
    ]
    assert set(batch["documents"].places.tolist()) >= set(
        (batch["targets"] != IGNORE_INDEX).flatten().nonzero()[:, 0].tolist()
    )


def test_prompts_that_the_model_reads_differently_are_not_shared():
    (first,), (second,) = with_prompt((1, 2, 3, 4), 5, 6), with_prompt((1, 2, 3, 4), 7, 8)
    other = second.tokens[:-1].clone()
    other[1] = 9
    second = second._replace(extra={"inputs": other})
    batch = collate_rows([[first], [second]], PAD, restart=False)
    assert batch["documents"].places is None  # nothing to leave out
    batch = collate_rows([[first], [second]], PAD, restart=False, pad_to=12)
    assert batch["documents"].places.tolist() == [*range(5), *range(12, 17)]


def test_rows_stay_as_they_are_where_little_would_be_left_out():
    alike = [with_prompt((n, 6, 7), *range(8, 28)) for n in range(3)]
    assert collate_rows(alike, PAD, restart=False)["documents"].places is None
    assert collate_rows(alike, PAD, restart=False, pad_to=24)["documents"].places is not None
    # Packed rows have one shape, whatever their fill: that is what compiled code is made for.
    packed = collate_rows(alike, PAD, restart=True, pad_to=64)["documents"]
    assert (packed.places, packed.shape) == (None, (3, 64))
    assert collate_rows([], PAD, restart=False)["documents"].places is None


def test_packed_rows_hold_a_bin_each_and_unpacked_ones_a_sequence_each():
    first, second, third = examples([3, 4, 2])
    packed = Collate(PAD, packed=True)([[first, second], [third]])
    assert packed["input_ids"].tolist() == [[0, 1, 100, 101, 102], [200, PAD, PAD, PAD, PAD]]
    assert packed["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 2, 3]]
    assert packed["ids"] == [0, 1, 2]
    unpacked = Collate(PAD, packed=False)([[first], [second], [third]])
    assert unpacked["input_ids"].tolist() == [[0, 1, PAD], [100, 101, 102], [200, PAD, PAD]]
    assert unpacked["position_ids"].tolist() == [[0, 1, 2]] * 3


def test_the_sequences_of_an_example_are_neighbours_with_one_id_each():
    pairs = [Example(n, (sequence(3, 10 * n), sequence(4, 100 + 10 * n))) for n in (5, 6)]
    batch = Collate(PAD, packed=False, count=lambda given: {"pairs": len(given)})([[pair] for pair in pairs])
    assert batch["input_ids"][:, 0].tolist() == [50, 150, 60, 160]
    assert batch["ids"] == [5, 5, 6, 6]
    assert batch["counts"] == {"tokens": 10, "sequences": 4, "pairs": 2}
    assert pairs[0].positions == 2 + 3


def test_a_row_is_asked_for_by_one_number_or_by_several():
    data = Bins(examples([2, 3, 4]))
    assert len(data) == 3
    assert [example.id for example in data[1]] == [1]
    assert [example.id for example in data[(2, 0)]] == [2, 0]
    assert data[()] == []


# --- listed batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_listed_batches_show_every_example_once_over_all_ranks(world_size):
    data = examples([3] * 11)
    ranks = [
        list(ListedLoader(range(11), data, Collate(PAD, packed=False), 2, rank, world_size, {"domain": "d"}))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    seen = [number for step in zip(*ranks, strict=True) for batch in step for number in batch["ids"]]
    assert sorted(seen) == list(range(11))
    assert all(batch["domain"] == "d" for batches in ranks for batch in batches)
    single = ListedLoader(range(11), data, Collate(PAD, packed=False), 2, 0, 1)
    assert [batch["ids"] for batch in single] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10]]
    assert len(single) == len(list(single)) == 6


# --- windows ----------------------------------------------------------------------------------------------


class Source:
    """A loader with a state: batch n counts n + 1 tokens. It goes on across epochs, as our samplers do."""

    def __init__(self, length):
        self.length, self.place, self.reads = length, 0, 0

    def __len__(self):
        return self.length

    def __iter__(self):
        if self.place >= self.length:
            self.place = 0
        while self.place < self.length:
            self.place += 1
            self.reads += 1
            yield {"number": self.place - 1, "counts": {"tokens": self.place, "rows": 1}}

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def stream(loader, epochs):
    return [(batch["number"], batch["window"]) for _ in range(epochs) for batch in loader]


def windows(length, size):
    """What every batch of an epoch must say about its window."""
    for number in range(length):
        start = number // size * size
        tokens = [n + 1 for n in range(start, min(start + size, length))]
        yield number, {"tokens": sum(tokens), "rows": len(tokens)}


@pytest.mark.parametrize("length", [1, 4, 6, 7])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_every_batch_carries_the_sums_of_its_window_also_of_a_shorter_last_one(length, size):
    loader = WindowLoader(Source(length), size)
    assert len(loader) == length
    assert stream(loader, 2) == list(windows(length, size)) * 2


def test_nothing_beyond_the_running_window_is_read():
    source = Source(7)
    for taken, _ in enumerate(WindowLoader(source, 3), 1):
        assert source.reads == min(7, -(-taken // 3) * 3)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_limited_epoch_ends_its_last_window_where_training_ends_it(size):
    limit, seen = 5, []
    source = Source(9)
    loader = WindowLoader(source, lambda: size, lambda: limit - len(seen))
    for batch in loader:
        seen.append((batch["number"], batch["window"]))
    assert seen == list(windows(limit, size))
    assert source.reads == limit


def test_no_limit_is_infinity():
    loader = WindowLoader(Source(5), 2, lambda: float("inf"))
    assert stream(loader, 1) == list(windows(5, 2))


@pytest.mark.parametrize("length", [4, 6, 7])
@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_a_state_saved_after_any_batch_gives_the_rest_of_the_stream(length, size):
    whole = stream(WindowLoader(Source(length), size), 3)
    for cut in range(1, 2 * length + 1):
        before = WindowLoader(Source(length), size)
        epochs = itertools.chain.from_iterable(before for _ in range(3))
        assert [(b["number"], b["window"]) for b in itertools.islice(epochs, cut)] == whole[:cut]
        state = copy.deepcopy(before.state_dict())
        # Saved again before anything is read, as when a run is killed twice.
        for _ in range(2):
            after = WindowLoader(Source(length), size)
            after.load_state_dict(state)
            state = copy.deepcopy(after.state_dict())
        resumed = itertools.chain.from_iterable(after for _ in range(3))
        rest = [(b["number"], b["window"]) for b in itertools.islice(resumed, len(whole) - cut)]
        assert rest == whole[cut:]


@pytest.mark.parametrize("size", [2, 4])
def test_after_a_finished_epoch_the_state_is_that_of_the_next_one(size):
    before, after = WindowLoader(Source(6), size), WindowLoader(Source(6), size)
    list(before)
    after.load_state_dict(before.state_dict())
    assert stream(after, 1) == list(windows(6, size))


def test_a_plain_list_will_do_where_nothing_is_to_resume():
    loader = WindowLoader([{"number": n, "counts": {"tokens": n + 1, "rows": 1}} for n in range(5)], 2)
    next(iter(loader))
    loader.load_state_dict(loader.state_dict())
    assert stream(loader, 2) == list(windows(5, 2)) * 2


def test_a_window_holds_at_least_one_batch():
    with pytest.raises(ValueError, match="accumulate_grad_batches is 0; it must be at least 1"):
        WindowLoader([], 0)


# --- with a sampler, and with torchdata's loader ---------------------------------------------------------


def rows_loader(num_workers, size=2, batch_size=3):
    data = examples([2 + n % 5 for n in range(23)])
    sampler = CurriculumSampler(Curriculum(23, seed=1), batch_size, accumulate_grad_batches=size)
    return RowLoader(data, sampler, Collate(PAD, packed=False), num_workers)


def torchdata_loader(num_workers, size=2):
    rows = rows_loader(num_workers, size)
    return StatefulDataLoader(
        rows._data, batch_sampler=rows._sampler, collate_fn=rows._collate, num_workers=num_workers
    )


def ids(batches):
    return [(batch["ids"], batch["window"]) for batch in batches]


@pytest.mark.usefixtures("no_worker_outlives_the_test")
@pytest.mark.parametrize(
    ("make", "before", "after"),
    [
        (rows_loader, 0, 0),
        (rows_loader, 2, 1),
        (rows_loader, 0, 1),
        (rows_loader, 1, 0),
        (torchdata_loader, 0, 0),
    ],
)
def test_a_real_loader_goes_on_where_it_was_saved_also_with_other_workers(make, before, after):
    epochs = WindowLoader(make(0), 2)
    whole = ids(epochs) + ids(epochs)
    # Mid-window, at a window's end, in the ragged last window, at the end of the epoch, in the next epoch.
    for cut in (3, 4, 7, 8, 11) if before == after == 0 else (3, 8):
        first, second = WindowLoader(make(before), 2), WindowLoader(make(after), 2)
        read = itertools.islice(itertools.chain.from_iterable(first for _ in range(2)), cut)
        assert ids(read) == whole[:cut]
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        rest = itertools.chain.from_iterable(second for _ in range(2))
        assert ids(itertools.islice(rest, 16 - cut)) == whole[cut:]
        for loader in (first.loader, second.loader):
            if isinstance(loader, RowLoader):
                loader.close()


@pytest.mark.usefixtures("no_worker_outlives_the_test")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_that_is_left_early_is_gone_on_with(num_workers):
    """Lightning leaves a limited epoch so. Workers have drawn more rows by then."""
    loader = rows_loader(num_workers)
    whole = [batch["ids"] for batch in rows_loader(0)]
    begun = [batch["ids"] for batch in itertools.islice(loader, 3)]
    assert begun + [batch["ids"] for batch in loader] == whole
    assert len(loader) == len(whole)


def test_closing_a_loader_ends_its_workers():
    loader = rows_loader(2)
    next(iter(loader))
    assert len(multiprocessing.active_children()) == 2
    loader.close()
    assert multiprocessing.active_children() == []
    loader.close()


@pytest.mark.parametrize("taken", [2, 3])
def test_other_batches_are_counted_from_the_start_of_the_window(taken):
    first, counted = WindowLoader(rows_loader(0, 2), 2), []
    begun = ids(itertools.islice(first, taken))
    second = WindowLoader(rows_loader(0, 3, batch_size=2), 3, recount=counted.append)
    second.load_state_dict(first.state_dict())
    rest = ids(second)
    # 6 rows are done; the other 17 take 9 batches of 2, the last of 12 batches, in windows of 3.
    assert counted == [3]
    assert len(rest) == len(second) - 3
    assert sorted(n for numbers, _ in begun[:2] + rest for n in numbers) == list(range(23))
    assert [window["sequences"] for _, window in rest[::3]] == [
        sum(len(numbers) for numbers, _ in rest[start : start + 3]) for start in range(0, len(rest), 3)
    ]
    first.load_state_dict(first.state_dict())
    assert counted == [3]
