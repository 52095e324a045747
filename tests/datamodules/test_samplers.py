"""Which rows make a batch on which rank: counted over epochs, ranks and restarts."""

import itertools
import pickle
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewarm.curriculum.curriculum import Curriculum
from rewarm.curriculum.gates import AtLeast, Band, TopShare
from rewarm.curriculum.live_scores import RunningScore
from rewarm.curriculum.pacing import LinearPacing, StagedPacing
from rewarm.curriculum.packing import Packer
from rewarm.datamodules.samplers import CurriculumSampler, MixtureSampler

N = 23
LENGTHS = [1 + n * 7 % 10 for n in range(N)]


def shuffled(batch_size=4, **options):
    return CurriculumSampler(Curriculum(N, seed=2), batch_size, **options)


def ascending(batch_size=4, **options):
    return CurriculumSampler(Curriculum(N, scores=range(N), order="ascending"), batch_size, **options)


def packed(batch_size=4, open_bins=3, curriculum=None, **options):
    curriculum = curriculum or Curriculum(N, seed=2)
    return CurriculumSampler(curriculum, batch_size, lengths=LENGTHS, packer=Packer(12, open_bins), **options)


def paced(batch_size=4, **options):
    pacing = StagedPacing([3, 6], [0.2, 0.6, 1.0])
    curriculum = Curriculum(N, scores=range(N), order="ascending", pacing=pacing, seed=2)
    return CurriculumSampler(curriculum, batch_size, **options)


def gated(batch_size=4, **options):
    return CurriculumSampler(Curriculum(N, gate=Band(0.2, 0.8), seed=2), batch_size, **options)


def mixture(batch_size=4, **options):
    sizes, weights = {"new": 11, "more": 5, "old": 30}, {"new": 0.5, "more": 0.25, "old": 0.25}
    return MixtureSampler(sizes, weights, batch_size, epoch_sources=["new", "more"], seed=3, **options)


def varying(batch_size=4, **options):
    """Other shares in each step."""
    sizes = {"new": 11, "more": 5, "old": 30}
    return MixtureSampler(
        sizes,
        lambda step: {"new": 3.0 - step % 4, "more": step % 4, "old": 1.0},
        batch_size,
        epoch_sources=["new", "more"],
        seed=3,
        **options,
    )


def alike(batch_size=4, **options):
    """Rows of similar length together, over 16 rows of an order."""
    window = max(1, 16 // (batch_size * options.get("world_size", 1)))
    curriculum = Curriculum(N, scores=range(N), order="ascending")
    return CurriculumSampler(curriculum, batch_size, lengths=LENGTHS, length_bucket=window, **options)


def everything(batch_size=4, **options):
    """Packed, in shuffled windows of an order, through a gate that looks at all examples."""
    curriculum = Curriculum(
        N,
        order=[n * 5 % N for n in range(N)],
        window=4,
        gate=AtLeast(TopShare(0.4), 5),
        live=RunningScore(0.3),
    )
    return packed(batch_size, curriculum=curriculum, **options)


KINDS = {
    f.__name__: f for f in (shuffled, ascending, packed, paced, gated, everything, mixture, varying, alike)
}


def epochs(sampler, count):
    return [batch for _ in range(count) for batch in sampler]


def examples(batches):
    """All example numbers of some batches of rows."""
    return [n for batch in batches for row in batch for n in (row if isinstance(row, tuple) else (row,))]


# --- one epoch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [shuffled, ascending])
def test_an_epoch_shows_every_example_once_with_a_smaller_last_batch(make):
    sampler = make()
    for _ in range(3):
        batches = list(sampler)
        assert sorted(examples(batches)) == list(range(N))
        assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4, 3]
        assert len(sampler) == len(batches)
    assert sampler.passes_align


def test_a_sorted_epoch_is_in_order_and_every_epoch_again():
    assert examples(epochs(ascending(), 2)) == [*range(N), *range(N)]


@pytest.mark.parametrize("kind", [paced, gated, packed, mixture])
def test_other_epochs_have_full_batches_and_the_length_that_is_told(kind):
    sampler = kind()
    for _ in range(3):
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert {len(batch) for batch in batches} == {4}


@pytest.mark.parametrize("open_bins", [1, 3, 16])
@pytest.mark.parametrize("order", ["shuffled", "ascending", "descending"])
def test_a_packed_epoch_shows_every_example_of_the_first_pass_whole(open_bins, order):
    scores = None if order == "shuffled" else [float(n * 5 % N) for n in range(N)]
    curriculum = Curriculum(N, scores=scores, order=order, seed=4)
    batches = list(packed(1, open_bins, curriculum))
    assert sorted(examples(batches)) == list(range(N))
    assert all(sum(LENGTHS[n] for n in row) <= 12 for batch in batches for row in batch)


def test_packed_passes_follow_each_other_without_mixing():
    drawn = examples(epochs(packed(1), 6))
    counts = Counter(drawn)
    assert max(counts.values()) - min(counts.values()) <= 1
    for start in range(0, len(drawn) - N + 1, N):
        assert sorted(drawn[start : start + N]) == list(range(N))


def test_a_gate_passes_over_what_training_found_outside_its_band():
    sampler = gated(1)
    first = [batch[0] for batch in itertools.islice(iter(sampler), N)]
    sampler.curriculum.observe(first, [1.0 if n % 2 else 0.5 for n in first])
    even = [batch[0] for batch in itertools.islice(iter(sampler), N // 2 + 1)]
    assert sorted(even) == list(range(0, N, 2))


def test_rows_of_similar_length_come_together_and_an_epoch_stays_a_pass():
    def spread(sampler):
        batches = [[LENGTHS[n] for n in batch] for batch in sampler]
        return sum(max(batch) - min(batch) for batch in batches)

    sampler = alike()
    assert len(sampler) == 6
    batches = list(sampler)
    assert sorted(examples(batches)) == list(range(N))
    # Never further than the window of 16 rows.
    assert sorted(examples(batches)[:16]) == list(range(16))
    assert spread(alike()) < spread(ascending()) / 2
    assert [sorted(batch) for batch in batches] != [sorted(batch) for batch in sampler]  # another order


# --- ranks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 4), (4, 2), (8, 1)])
def test_ranks_together_draw_what_one_alone_draws_batch_by_batch(kind, world_size, batch_size):
    alone = epochs(KINDS[kind](8), 3)
    ranks = [epochs(KINDS[kind](batch_size, rank=r, world_size=world_size), 3) for r in range(world_size)]
    assert {len(batches) for batches in ranks} == {len(alone)}
    for together, *parts in zip(alone, *ranks, strict=True):
        assert Counter(together) == Counter(row for part in parts for row in part)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_rank_may_be_left_without_a_row_in_the_last_batch():
    last = [list(ascending(2, rank=rank, world_size=4))[-1] for rank in range(4)]
    assert last == [[16, 20], [17, 21], [18, 22], [19]]
    alone = [list(CurriculumSampler(Curriculum(5, seed=0), 1, rank=r, world_size=4))[-1] for r in range(4)]
    assert [len(batch) for batch in alone] == [1, 0, 0, 0]


# --- state ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_saved_after_any_batch_gives_the_rest_of_the_stream(kind):
    whole = epochs(KINDS[kind](), 4)
    for cut in range(len(whole)):
        before, after = KINDS[kind](), KINDS[kind](rank=0)
        stream = itertools.chain.from_iterable(before for _ in range(4))
        assert list(itertools.islice(stream, cut)) == whole[:cut]
        after.load_state_dict(pickle.loads(pickle.dumps(before.state_dict())))
        assert len(after) == len(before)
        resumed = itertools.chain.from_iterable(after for _ in range(5))
        assert list(itertools.islice(resumed, len(whole) - cut)) == whole[cut:]


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_the_same_on_every_rank(kind):
    samplers = [KINDS[kind](2, rank=rank, world_size=2) for rank in range(2)]
    for batches in zip(*samplers, strict=True):
        assert len(batches) == 2
        assert samplers[0].state_dict() == samplers[1].state_dict()


def trained(kind, batch_size, world_size, steps, state=None):
    """The rows of each step of ranks that all observe what the ranks together have seen; and the state."""
    ranks = [KINDS[kind](batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    streams = [itertools.chain.from_iterable(itertools.repeat(sampler)) for sampler in ranks]
    for sampler in ranks:
        if state is not None:
            sampler.load_state_dict(pickle.loads(pickle.dumps(state)))
    seen = []
    for _ in range(steps):
        parts = [next(stream) for stream in streams]
        seen.append(Counter(row for part in parts for row in part))
        ids = sorted(examples(parts))
        for sampler in ranks:
            sampler.curriculum.observe(ids, [n * 37 % 10 / 10 for n in ids])
    assert all(sampler.state_dict() == ranks[0].state_dict() for sampler in ranks)
    return seen, ranks[0].state_dict()


@pytest.mark.parametrize("kind", ["gated", "everything"])
def test_packing_and_gates_resumed_at_any_step_on_other_ranks_draw_the_same_rows_in_each_step(kind):
    whole, last = trained(kind, 8, 1, 14)
    assert last["curriculum"]["num_refused"] > 10
    for stopped in range(0, 14, 3):
        for first, then in ((1, 2), (2, 4), (4, 1)):
            before, state = trained(kind, 8 // first, first, stopped)
            after, end = trained(kind, 8 // then, then, 14 - stopped, state)
            assert before + after == whole
            assert end["curriculum"] == last["curriculum"]


cuts = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))


def epoch_in_parts(make, parts, last):
    """The rows of an epoch's windows that other ranks, batches and windows go on with every few windows.

    Counts batches as a trainer does: an epoch has as many as the sampler says, and a window as many as are
    accumulated, but for the last one.
    """
    windows, state, count = [], None, 0
    for (batch_size, world_size, accumulate), stop in [*parts, (last, N)]:
        ranks = [
            make(batch_size, rank=rank, world_size=world_size, accumulate_grad_batches=accumulate)
            for rank in range(world_size)
        ]
        if state is not None:
            for sampler in ranks:
                sampler.load_state_dict(pickle.loads(pickle.dumps(state)))
            count = count if ranks[0].recut is None else ranks[0].recut
        assert count % accumulate == 0
        batches = zip(*map(iter, ranks), strict=True)
        for _ in range(stop):
            window = [
                [row for part in batch for row in part] for batch in itertools.islice(batches, accumulate)
            ]
            windows.append([row for batch in window for row in batch])
            count += len(window)
            assert max(map(len, window)) <= batch_size * world_size
            if count == len(ranks[0]):
                return windows
            assert len(window) == accumulate
        state = ranks[0].state_dict()
    raise AssertionError("the epoch does not end")


@pytest.mark.parametrize("kind", ["shuffled", "ascending", "alike"])
@given(st.lists(st.tuples(cuts, st.integers(1, 3)), max_size=3), cuts)
@settings(deadline=None)
def test_however_often_ranks_and_batches_change_an_epoch_shows_every_example_once(kind, parts, last):
    windows = epoch_in_parts(KINDS[kind], parts, last)
    assert sorted(row for window in windows for row in window) == list(range(N))
    assert all(windows)  # a step without rows would still move weights by momentum


@pytest.mark.parametrize("kind", ["packed", "gated", "mixture"])
@given(st.lists(st.tuples(cuts, st.integers(1, 3)), max_size=3), cuts)
@settings(deadline=None, max_examples=40)
def test_however_often_ranks_and_batches_change_the_rows_are_those_of_one_stream(kind, parts, last):
    stream = [row for batch in epochs(KINDS[kind](1), 4) for row in batch]
    windows = epoch_in_parts(KINDS[kind], parts, last)
    drawn = [row for window in windows for row in window]
    # Ranks take turns at the rows of a batch, so the order within one is that of the ranks.
    assert Counter(drawn) == Counter(stream[: len(drawn)])
    assert all(windows)
    largest = max(size * ranks for (size, ranks, _), _ in [*parts, (last, 0)])
    assert 0 <= len(drawn) - len(KINDS[kind](1)) < largest  # only a full last batch goes beyond


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 2, 8, 30])
def test_an_epoch_that_is_over_is_over_for_other_batches_too(kind, batch_size):
    before, after = KINDS[kind](4), KINDS[kind](batch_size, accumulate_grad_batches=3)
    list(before)
    after.load_state_dict(before.state_dict())
    assert after.recut == len(after) == len(list(after))  # and the next one is whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("first", "then"), [((2, 4), (4, 2)), ((8, 1), (1, 8)), ((1, 8), (2, 4))])
def test_other_ranks_with_the_same_batch_together_go_on_as_if_nothing_had_changed(kind, first, then):
    """Pacing and gates depend on what was drawn at which step, so this is theirs too."""
    whole = epochs(KINDS[kind](8), 3)
    for stopped in range(1, len(whole)):
        before = [KINDS[kind](first[0], rank=rank, world_size=first[1]) for rank in range(first[1])]
        for sampler in before:
            list(itertools.islice(itertools.chain.from_iterable(sampler for _ in range(3)), stopped))
        after = [KINDS[kind](then[0], rank=rank, world_size=then[1]) for rank in range(then[1])]
        for sampler in after:
            sampler.load_state_dict(before[0].state_dict())
            assert sampler.recut is None
        rest = zip(*(itertools.chain.from_iterable([s] * 4) for s in after), strict=True)
        for expected, parts in zip(whole[stopped:], rest, strict=False):
            assert Counter(expected) == Counter(row for part in parts for row in part)


def test_pacing_counts_optimizer_steps_also_with_a_ragged_window_and_on_other_ranks():
    class Spy:
        def __init__(self):
            self.steps = []

        def __call__(self, step):
            self.steps.append(step)
            return 1.0

    def make(batch_size, **options):
        spy = Spy()
        curriculum = Curriculum(10, scores=range(10), order="ascending", pacing=spy)
        return spy, CurriculumSampler(curriculum, batch_size, **options)

    spy, sampler = make(2, accumulate_grad_batches=2)
    epochs(sampler, 2)
    # Five batches an epoch: windows of two, two and one.
    assert spy.steps == [0, 0, 1, 1, 2, 3, 3, 4, 4, 5]
    spy, other = make(1, accumulate_grad_batches=1, world_size=5)
    other.load_state_dict(sampler.state_dict())
    list(other)
    assert spy.steps == [6, 7]


def test_a_state_of_other_data_or_another_way_of_packing_is_refused():
    with pytest.raises(ValueError, match="the checkpoint's rows are not packed, this run's are packed"):
        packed().load_state_dict(shuffled().state_dict())
    with pytest.raises(ValueError, match="curriculum has 5 examples, this 23"):
        shuffled().load_state_dict(CurriculumSampler(Curriculum(5), 1).state_dict())
    with pytest.raises(
        ValueError, match=r"checkpoint has sizes {'a': 2}, this run {'new': 11, 'more': 5, 'old': 30}"
    ):
        mixture().load_state_dict(MixtureSampler({"a": 2}, {"a": 1.0}, 1).state_dict())
    one, other = (MixtureSampler({"a": 2}, {"a": 1.0}, 1, seed=seed) for seed in (1, 2))
    with pytest.raises(ValueError, match="the checkpoint has seed 1, this run 2"):
        other.load_state_dict(one.state_dict())


# --- shares -----------------------------------------------------------------------------------------------


def source_of(row, sizes):
    for name, size in sizes.items():
        if row < size:
            return name
        row -= size
    raise AssertionError(row)


@pytest.mark.parametrize("fraction", [0.05, 0.25, 0.5])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_replay_is_exact_to_one_row_in_every_stretch_of_rows(fraction, batch_size):
    sizes = {"new": 90, "old": 1000}
    weights = {"new": 1 - fraction, "old": fraction}
    sampler = MixtureSampler(sizes, weights, batch_size, epoch_sources=["new"])
    old = [row >= 90 for batch in epochs(sampler, 3) for row in batch]
    for width in (1, 2, 8, 16, 20, 64, 100):
        for start in range(len(old) - width + 1):
            assert abs(sum(old[start : start + width]) - fraction * width) <= 1 + 1e-9
    for stop_at in range(1, len(old)):
        assert abs(sum(old[:stop_at]) - fraction * stop_at) <= 0.5 + 1e-9


@pytest.mark.parametrize("fraction", [0.05, 0.25, 0.5])
def test_several_new_and_old_sources_keep_the_replay_exact(fraction):
    sizes = {"a": 40, "b": 25, "c": 7, "old": 300, "older": 500}
    shares = {"a": 0.6, "b": 0.3, "c": 0.1, "old": 0.37, "older": 0.63}
    weights = {
        name: share * (fraction if name.startswith("old") else 1 - fraction) for name, share in shares.items()
    }
    sampler = MixtureSampler(sizes, weights, 8, epoch_sources=["a", "b", "c"])
    names = [source_of(row, sizes) for batch in epochs(sampler, 3) for row in batch]
    old = [name.startswith("old") for name in names]
    for width in (2, 8, 16, 40):
        for start in range(len(old) - width + 1):
            assert abs(sum(old[start : start + width]) - fraction * width) <= 1 + 1e-9
    for name, weight in weights.items():
        assert names.count(name) == pytest.approx(weight * len(names), abs=2)


def test_without_other_sources_the_weights_alone_decide():
    sampler = MixtureSampler({"a": 6, "b": 100}, {"a": 3.0, "b": 1.0}, 4)
    names = [source_of(row, {"a": 6, "b": 100}) for row in itertools.chain.from_iterable(sampler)]
    assert abs(names.count("a") - 0.75 * len(names)) <= 0.5


def test_a_source_of_weight_0_is_never_drawn():
    sampler = MixtureSampler(
        {"a": 5, "b": 5, "c": 5}, {"a": 1.0, "b": 0.0, "c": 1.0}, 3, epoch_sources=["a", "b"]
    )
    drawn = {row for batch in epochs(sampler, 4) for row in batch}
    assert drawn == {*range(5), *range(10, 15)}


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.25, 0.3])
def test_an_epoch_is_one_pass_over_its_sources_together(fraction):
    sizes = {"new": 60, "more": 30, "old": 50}
    weights = {"new": (1 - fraction) * 60, "more": (1 - fraction) * 30, "old": fraction * 90}
    sampler = MixtureSampler(sizes, weights, 1, epoch_sources=["new", "more"])
    drawn = Counter(row for batch in sampler for row in batch)
    assert len(sampler) == sum(drawn.values()) == -(-90 * 1000 // round(1000 * (1 - fraction)))
    fresh = [drawn[row] for row in range(90)]
    assert fresh.count(1) >= 88  # two sources in rotation, each to a row
    # 0.7 + 0.1 is not quite 0.8, which must not cost a batch.
    assert (
        len(MixtureSampler({"a": 7, "b": 1, "c": 9}, {"a": 0.7, "b": 0.1, "c": 0.2}, 1, epoch_sources="ab"))
        == 10
    )


def test_rows_in_order_go_through_each_source_from_its_beginning():
    sampler = MixtureSampler(
        {"new": 4, "old": 3}, {"new": 1.0, "old": 1.0}, 2, epoch_sources=["new"], shuffle=False
    )
    rows = [row for batch in epochs(sampler, 2) for row in batch]
    assert [row for row in rows if row < 4] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert [row for row in rows if row >= 4] == [4, 5, 6, 4, 5, 6, 4, 5]


def test_shuffled_sources_of_equal_size_have_their_own_permutations():
    sampler = MixtureSampler({"a": 40, "b": 40}, {"a": 1.0, "b": 1.0}, 1)
    rows = [row for batch in sampler for row in batch]
    a, b = [row for row in rows if row < 40], [row - 40 for row in rows if row >= 40]
    assert sorted(a) == sorted(b) == list(range(40))
    assert a != b


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: shuffled(0), "batch_size is 0; it must be at least 1"),
        (lambda: shuffled(rank=2, world_size=2), r"rank is 2; it must be in \[0, 2\)"),
        (lambda: CurriculumSampler(Curriculum(3), 1, packer=Packer(5)), "packing needs the lengths"),
        (lambda: CurriculumSampler(Curriculum(3), 1, length_bucket=2), "length_bucket needs the lengths"),
        (lambda: shuffled(length_bucket=0), "length_bucket is 0"),
        (lambda: packed(length_bucket=2), "length_bucket is 2, but packed rows"),
        (lambda: MixtureSampler({"a": 1}, {"b": 1.0}, 1), r"weights names \['b'\], the sources are \['a'\]"),
        (lambda: MixtureSampler({"a": 0}, {"a": 1.0}, 1), "source 'a' is empty"),
        (lambda: MixtureSampler({"a": 1}, {"a": -1.0}, 1), "the weight of source 'a' is -1.0"),
        (lambda: MixtureSampler({"a": 1}, {"a": 0.0}, 1), "all weights are 0"),
        (
            lambda: MixtureSampler({"a": 1, "b": 1}, {"a": 1.0, "b": 0.0}, 1, epoch_sources=["b"]),
            r"the sources \['b'\] have weight 0",
        ),
        (
            lambda: MixtureSampler({"a": 1}, {"a": 1.0}, 1, epoch_sources=["b"]),
            r"epoch_sources is \['b'\]; the sources are \['a'\]",
        ),
        (lambda: MixtureSampler({"a": 1}, {"a": 1.0}, 1, rank=1), r"rank is 1; it must be in \[0, 1\)"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(make, named):
    with pytest.raises(ValueError, match=named):
        make()


@pytest.mark.parametrize(("batch_size", "ranks", "accumulate"), [(1, 1, 8), (8, 1, 1), (2, 2, 2), (1, 8, 1)])
def test_shares_that_change_are_those_of_the_step_however_it_is_cut(batch_size, ranks, accumulate):
    """Rows of a step of 8, by source: 5 % replay, and instruction data from step 3 on."""
    sizes = {"web": 400, "instructions": 56, "old": 900}  # 480 rows an epoch

    def shares(step):
        return {"web": 0.95 if step < 3 else 0.7, "instructions": 0.0 if step < 3 else 0.25, "old": 0.05}

    samplers = [
        MixtureSampler(
            sizes,
            shares,
            batch_size,
            epoch_sources=["web", "instructions"],
            rank=rank,
            world_size=ranks,
            accumulate_grad_batches=accumulate,
        )
        for rank in range(ranks)
    ]
    drawn = [[row for part in batch for row in part] for batch in zip(*samplers, strict=True)]
    steps = [
        list(itertools.chain(*drawn[start : start + accumulate]))
        for start in range(0, len(drawn), accumulate)
    ]
    names = [[source_of(row, sizes) for row in step] for step in steps]
    assert not any("instructions" in step for step in names[:3])
    for start, stop in ((0, 3), (3, 13), (3, len(names) - 1)):
        for name, share in shares(start).items():
            count = sum(step.count(name) for step in names[start:stop])
            assert abs(count - share * 8 * (stop - start)) <= 1.5
    assert [sorted(step) for step in steps] == [
        sorted(step) for step in MixtureSampler(sizes, shares, 8, epoch_sources=["web", "instructions"])
    ]


def test_a_share_that_ends_ends_at_once_whatever_is_owed():
    sizes = dict.fromkeys("abcde", 50)

    def shares(step):
        return {name: 0.0 if name == "e" and step else 1.0 for name in sizes}

    sampler = MixtureSampler(sizes, shares, 2, shuffle=False)  # e is owed 0.4 of a row when it ends
    assert all(source_of(row, sizes) != "e" for batch in sampler for row in batch)


def test_weights_of_a_function_are_checked_in_every_step():
    sampler = MixtureSampler({"a": 9, "b": 9}, lambda step: {"a": 1.0, "b": 1.0 - step}, 2)
    with pytest.raises(ValueError, match="the weight of source 'b' is -1.0; it must not be below 0"):
        list(sampler)


def test_the_state_does_not_grow_with_the_sources():
    def state(size):
        sampler = MixtureSampler({"new": size, "old": 7 * size}, {"new": 1.0, "old": 1.0}, 8)
        list(itertools.islice(sampler, 10))
        return len(pickle.dumps(sampler.state_dict()))

    assert state(10**12) <= state(10**3) + 30


def test_passes_of_a_source_have_orders_of_their_own():
    sampler = MixtureSampler({"a": 30}, {"a": 1.0}, 1)
    first, second = ([row for (row,) in sampler] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(30))
    assert first != second


@pytest.mark.parametrize("stopped", [1, 3, 5])
def test_a_branch_goes_on_with_what_it_shares_and_begins_what_is_new(stopped):
    stable = MixtureSampler(
        {"web": 40, "old": 30}, {"web": 3.0, "old": 1.0}, 8, seed=1, epoch_sources=["web"]
    )
    begun = [row for batch in itertools.islice(stable, stopped) for row in batch]
    sizes = {"qa": 12, "web": 40}

    def branched(**options):
        return MixtureSampler(sizes, {"qa": 1.0, "web": 1.0}, 8, seed=1, **options)

    with pytest.raises(
        ValueError, match="the checkpoint has sizes {'web': 40, 'old': 30}, this run {'qa': 12"
    ):
        branched().load_state_dict(stable.state_dict())
    sampler = branched(branch=True)
    sampler.load_state_dict(pickle.loads(pickle.dumps(stable.state_dict())))
    # An epoch of 52 rows in 7 batches; so many are left as the rows that are left take.
    assert sampler.recut == 7 - -(-(52 - 8 * stopped) // 8)
    rest = [row for batch in sampler for row in batch]
    web = [row for row in begun if row < 40] + [row - 12 for row in rest if row >= 12]
    assert sorted(web[:40]) == list(range(40))[: len(web)] or len(set(web)) == len(web) < 40
    assert abs(sum(row < 12 for row in rest) - len(rest) / 2) <= 1
    again = branched(branch=True)
    again.load_state_dict(sampler.state_dict())  # and a branch is resumed like any run
    assert again.recut is None


def test_linear_pacing_shows_the_easy_rows_first():
    curriculum = Curriculum(100, scores=range(100), order="ascending", pacing=LinearPacing(20, start=0.1))
    sampler = CurriculumSampler(curriculum, 5)
    hardest = [max(batch) for batch in sampler]
    assert hardest[0] < 10
    assert all(top < 10 + 4.5 * (step + 1) for step, top in enumerate(hardest))
