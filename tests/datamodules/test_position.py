"""The position of a data module's loader, without and with a trainer that counts."""

from types import SimpleNamespace

import pytest

from rewarm.datamodules.position import LoaderPosition


class Listed:
    """Ten batches, and a place among them that can be saved; `recut` as after a state of other batches."""

    def __init__(self, recut=None):
        self.place, self.recut = 0, recut

    def __len__(self):
        return 10

    def __iter__(self):
        while self.place < 10:
            self.place += 1
            yield {"number": self.place - 1, "counts": {"tokens": 1}}

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def numbers(loader):
    return [batch["number"] for batch in loader]


def test_without_a_trainer_a_step_is_a_batch_and_nothing_is_saved_before_there_is_a_loader():
    position = LoaderPosition(SimpleNamespace(trainer=None))
    assert position.accumulate() == 1
    assert position.state_dict() == {}
    assert numbers(position.windows(Listed())) == list(range(10))


@pytest.mark.parametrize("cut", range(1, 10))
def test_the_next_loader_goes_on_where_the_last_one_was(cut):
    data = SimpleNamespace(trainer=SimpleNamespace(accumulate_grad_batches=4, training=False))
    before, after = LoaderPosition(data), LoaderPosition(data)
    batches = iter(before.windows(Listed()))
    for _ in range(cut):
        next(batches)
    after.restored = before.state_dict()["loader"]
    assert numbers(after.windows(Listed())) == list(range(cut, 10))
    assert after.restored is None  # only the first loader begins there
    assert numbers(after.windows(Listed())) == list(range(10))


def training(ready, limit, last=False):
    """As much of a Trainer as counts batches: so many are begun in an epoch of so many."""
    current = SimpleNamespace(ready=ready)
    current.increment_by = lambda by: setattr(current, "ready", current.ready + by)
    progress = SimpleNamespace(current=current, is_last_batch=last)
    return SimpleNamespace(
        accumulate_grad_batches=2,
        training=True,
        num_training_batches=10,
        limit_train_batches=limit,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
    )


@pytest.mark.parametrize(
    ("ready", "limit", "last", "recut", "expected"),
    [
        (3, 1.0, False, 6, 6),  # counted in this run's batches
        (0, 1.0, False, 6, 0),  # an epoch that has not begun
        (5, 8, False, 6, 4),  # an epoch with a limit ends by Lightning's own count, from a whole step on
        (5, 0.5, False, 6, 4),
        (8, 8, True, 6, 6),
        (3, 1.0, False, None, 3),  # the same batches
    ],
)
def test_lightning_counts_in_batches_of_this_run(ready, limit, last, recut, expected):
    trainer = training(ready, limit, last)
    position = LoaderPosition(SimpleNamespace(trainer=trainer))
    position.restored = {"loader": {"place": 6}, "skip": 0}
    position.windows(Listed(recut))
    assert trainer.fit_loop.epoch_loop.batch_progress.current.ready == expected


def test_a_window_ends_with_what_is_left_of_a_limited_epoch():
    trainer = training(0, 5)
    trainer.num_training_batches, trainer.accumulate_grad_batches = 5, 3
    position = LoaderPosition(SimpleNamespace(trainer=trainer))
    windows = []
    for batch in position.windows(Listed()):
        trainer.fit_loop.epoch_loop.batch_progress.current.ready += 1
        windows.append(batch["window"]["tokens"])
    assert windows[:5] == [3, 3, 3, 2, 2]
