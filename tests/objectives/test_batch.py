"""Batches of other loaders, and the keys that any batch may have."""

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

import rewarm
from rewarm.functional.logprob import IGNORE_INDEX
from rewarm.objectives.batch import as_batch, as_pair_batch, example_losses, num_sequences
from tests import fits, tiny

SEQUENCES = fits.sequences(5)


def foreign(side):
    """What a collator of transformers gives, padded on one side."""
    rows = {
        "input_ids": ([s.tokens for s in SEQUENCES], 0),
        "labels": ([s.tokens.masked_fill(~s.learn, IGNORE_INDEX) for s in SEQUENCES], IGNORE_INDEX),
        "attention_mask": ([torch.ones_like(s.tokens) for s in SEQUENCES], 0),
    }
    return {name: pad_sequence(r, True, fill, padding_side=side) for name, (r, fill) in rows.items()}


def flattened():
    """All sequences in one row, told apart by positions that restart."""
    labels = [s.tokens.masked_fill(~s.learn, IGNORE_INDEX) for s in SEQUENCES]
    for row in labels:
        row[0] = IGNORE_INDEX
    return {
        "input_ids": torch.cat([s.tokens for s in SEQUENCES])[None],
        "labels": torch.cat(labels)[None],
        "position_ids": torch.cat([torch.arange(len(s.tokens)) for s in SEQUENCES])[None],
    }


@pytest.mark.parametrize("make", [lambda: foreign("right"), lambda: foreign("left"), flattened])
@pytest.mark.parametrize("attention", [None, "sdpa"])
@pytest.mark.parametrize("method", ["CurriculumSFT", "ContinualPretraining"])
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_a_batch_of_transformers_trains_as_one_of_ours(make, attention, method):
    records = []
    for batch in (fits.text_batch(SEQUENCES, list(range(5))), make()):
        torch.manual_seed(0)
        module, record = getattr(rewarm, method)(tiny.LLAMA, fits.sgd(), attention=attention), fits.Record()
        loader = torch.utils.data.DataLoader([batch] * 2, None)
        fits.trainer(max_steps=2, callbacks=[record]).fit(module, loader)
        records.append(record)
    ours, theirs = records
    for step in range(2):
        assert theirs.metrics[step]["train/loss"] == pytest.approx(ours.metrics[step]["train/loss"], rel=1e-5)
        assert fits.distance(theirs.gradients[step], ours.gradients[step]) < 1e-5


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_batches_of_transformers_accumulate_behind_a_window_loader():
    whole, parts = (
        foreign("right"),
        [{n: v[i : i + 1] for n, v in foreign("right").items()} for i in range(5)],
    )
    records = []
    for batches in ([whole], parts):
        torch.manual_seed(0)
        module, record = rewarm.CurriculumSFT(tiny.LLAMA, fits.sgd()), fits.Record()
        trainer = fits.trainer(
            max_steps=1, accumulate_grad_batches=len(batches), callbacks=[record], max_epochs=1
        )
        trainer.fit(module, rewarm.WindowLoader(batches, len(batches)))
        records.append(record)
    assert fits.distance(records[1].gradients[0], records[0].gradients[0]) < 1e-6


def test_a_complete_batch_is_returned_as_it_is():
    batch = fits.text_batch(SEQUENCES, list(range(5)))
    assert as_batch(batch) is batch


@pytest.mark.parametrize(
    ("batch", "needs", "message"),
    [
        ([1, 2], (), "a batch is a list; it must be a mapping with 'input_ids' and 'labels'"),
        ({"tokens": 1}, (), "a batch lacks 'input_ids', 'labels'; it has 'tokens'"),
        ({"input_ids": torch.ones(1, 2), "labels": torch.ones(1, 2)}, ("x",), "a batch lacks 'x'; it has"),
        (
            {
                "input_ids": torch.ones(1, 2).long(),
                "labels": torch.ones(1, 2).long(),
                "attention_mask": torch.tensor([[1, 2]]),
            },
            (),
            r"attention_mask has shape \(1, 2\); it must be 0 for padding and 1 for tokens",
        ),
        (
            {
                "input_ids": torch.ones(1, 2).long(),
                "labels": torch.ones(1, 2).long(),
                "attention_mask": torch.tensor([[1, 0]]),
            },
            (),
            "labels has tokens where attention_mask is 0; it must be -100 there",
        ),
    ],
)
def test_what_is_no_batch_is_refused_by_what_it_lacks(batch, needs, message):
    with pytest.raises(ValueError, match=message):
        as_batch(batch, needs)


def test_the_target_of_a_position_is_the_label_of_the_next_and_the_last_has_none():
    ids = torch.tensor([[5, 6, 7, 8]])
    batch = as_batch({"input_ids": ids, "labels": torch.tensor([[-100, -100, 7, 8]])})
    assert batch["targets"].tolist() == [[-100, 7, 8, -100]]
    assert (batch["num_targets"], num_sequences(batch)) == (2, 1)
    assert as_pair_batch({"input_ids": ids.repeat(2, 1), "labels": ids.repeat(2, 1)})["counts"]["pairs"] == 1


def test_losses_of_examples_are_the_means_of_their_targets():
    batch = fits.text_batch(SEQUENCES, list(range(5)))
    logprobs = torch.where(batch["targets"] == IGNORE_INDEX, 0.0, -torch.rand(batch["targets"].shape))
    for row, loss in enumerate(example_losses(logprobs, batch).tolist()):
        said = [-float(v) for v, t in zip(logprobs[row], batch["targets"][row], strict=True) if t >= 0]
        assert loss == pytest.approx(sum(said) / len(said), rel=1e-5)
