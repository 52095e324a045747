"""Supervised fine-tuning against transformers' own loss."""

import copy

import pytest
import torch

import rewarm
from rewarm.functional.logprob import IGNORE_INDEX
from rewarm.lightning_modules.curriculum_sft import example_losses
from tests import fits, tiny

EXAMPLES = fits.sequences(8)


def fresh(seed=0, **options):
    torch.manual_seed(seed)
    module = rewarm.CurriculumSFT(tiny.LLAMA, fits.sgd(0.1), **options)
    module.configure_model()
    return module


def inputs_and_labels(examples):
    """As transformers wants them: padded on the right, labels at the token's own place."""
    width = max(len(example.tokens) for example in examples)
    ids, labels = (
        torch.zeros(len(examples), width, dtype=torch.long),
        torch.full((len(examples), width), IGNORE_INDEX),
    )
    for row, (tokens, learn) in enumerate(examples):
        ids[row, : len(tokens)] = tokens
        labels[row, : len(tokens)][learn] = tokens[learn]
    return {"input_ids": ids, "labels": labels}


def own_losses(model, examples):
    """transformers' mean loss of each example."""
    with torch.no_grad():
        return torch.stack([model(**inputs_and_labels([example])).loss for example in examples])


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize(("size", "accumulate"), [(8, 1), (3, 3)])
def test_loss_and_gradients_are_those_of_transformers(size, accumulate):
    module, record = fresh(), fits.Record()
    model = copy.deepcopy(module.policy.model)
    loader = rewarm.WindowLoader(fits.cut(EXAMPLES, size, fits.text_batch), accumulate)
    fits.trainer(max_epochs=1, accumulate_grad_batches=accumulate, callbacks=[record]).fit(module, loader)

    loss = model(**inputs_and_labels(EXAMPLES)).loss
    loss.backward()
    assert record.metrics[0]["train/loss"] == pytest.approx(loss.item(), rel=1e-6)
    gradients = {f"policy.model.{name}": p.grad for name, p in model.named_parameters()}
    assert fits.distance(record.gradients[0], gradients) < 1e-5


@pytest.mark.parametrize("packing", [False, True])
def test_scores_are_each_examples_mean_loss(tmp_path, packing):
    files, seen = fits.Files(tmp_path), {}

    class Watch(rewarm.CurriculumSFT):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            seen.update(zip(outputs["ids"], outputs["scores"].tolist(), strict=True))

    torch.manual_seed(0)
    module, data = Watch(tiny.LLAMA, fits.sgd(0.0)), fits.instructions(files, packing=packing)
    fits.trainer(max_epochs=1, limit_train_batches=5).fit(module, datamodule=data)
    assert len(seen) >= 10
    rows = [row.sequences[0] for row in data._examples["train"]]
    numbers = sorted(seen)
    expected = own_losses(module.policy.model, [rows[number] for number in numbers])
    assert [seen[number] for number in numbers] == pytest.approx(expected.tolist(), rel=1e-5)


def test_an_example_without_targets_scores_zero():
    batch = fits.text_batch([EXAMPLES[0], EXAMPLES[1]._replace(learn=EXAMPLES[1].learn & False)], [0, 1])
    losses = example_losses(torch.where(batch["targets"] == IGNORE_INDEX, 0.0, -2.0), batch)
    assert losses.tolist() == [2.0, 0.0]


def test_validation_loss_is_the_mean_over_all_target_tokens(tmp_path):
    files, module = fits.Files(tmp_path), fresh()
    data = fits.instructions(files, val=files.sft, batch_size=5)
    (metrics,) = fits.trainer().validate(module, datamodule=data, verbose=False)
    rows = [row.sequences[0] for row in data._examples["val"]]
    tokens = torch.tensor([int(row.learn[1:].sum()) for row in rows])
    expected = (own_losses(module.policy.model, rows) * tokens).sum() / tokens.sum()
    assert metrics["val/loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_it_learns_its_data(tmp_path):
    files, record = fits.Files(tmp_path), fits.Record()
    torch.manual_seed(0)
    module = rewarm.CurriculumSFT(tiny.LLAMA, fits.adamw())
    trainer = fits.trainer(max_steps=60, callbacks=[record], gradient_clip_val=1.0)
    trainer.fit(module, datamodule=fits.instructions(files, batch_size=8))
    assert record.metrics[0]["train/loss"] > 3.5
    assert record.metrics[-1]["train/loss"] < 1.0


def test_testing_is_validation_by_another_name_and_prediction_scores_every_example(tmp_path):
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.sums(10))
    data = rewarm.InstructionData(
        path, tiny.save_tokenizer(tmp_path / "tokenizer"), max_length=32, batch_size=4, val=path
    )
    module, trainer = fresh(), fits.trainer()
    (validated,) = trainer.validate(module, datamodule=data, verbose=False)
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    assert tested["test/loss"] == validated["val/loss"]
    predicted = trainer.predict(module, datamodule=data)
    assert [i for batch in predicted for i in batch["ids"]] == list(range(10))
    lengths = torch.tensor(
        [float(e.sequences[0].learn[1:].sum()) for e in data.scoring_dataloader()._data.examples]
    )
    scores = torch.cat([batch["scores"] for batch in predicted])
    assert float((scores * lengths).sum() / lengths.sum()) == pytest.approx(validated["val/loss"], rel=1e-5)
