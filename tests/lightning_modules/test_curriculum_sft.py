"""Supervised fine-tuning against transformers' own loss."""

import copy

import pytest
import torch

import rewarm
from rewarm.datamodules.loader import Collate, Example
from rewarm.functional.logprob import IGNORE_INDEX
from rewarm.objectives.batch import example_losses
from rewarm.objectives.token_losses import TASK_COUNT
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
    for row, (tokens, learn, _) in enumerate(examples):
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


# --- other losses -----------------------------------------------------------------------------------------

LOSSES = {
    "NLL": rewarm.NLL(),
    "label smoothing": rewarm.LabelSmoothing(0.2),
    "z": rewarm.ZLoss(0.01),
    "DFT": rewarm.DFT(),
    "DITTO": rewarm.DITTO(),
    "tasks": rewarm.MultiTask({"long": 0.3, "short": 0.7}),
    "distillation": rewarm.Distillation(at_temperature=2.0),
    "several": rewarm.ZLoss(0.01, rewarm.MultiTask({"long": 0.3, "short": 0.7}, rewarm.LabelSmoothing(0.1))),
}


def with_extras(seed=0):
    """The examples with weights, tasks, repetitions and a teacher."""
    generator, made = torch.Generator().manual_seed(seed), []
    for number, example in enumerate(fits.sequences(8)):
        count = example.positions
        teacher = torch.randn(count, 3, generator=generator).log_softmax(1) - 0.1
        places = torch.arange(count)
        extra = {
            "weights": 0.25 + torch.rand(count, generator=generator),
            "tasks": torch.full((count,), number % 2),
            "repeats": torch.where(places >= 6, 4, 0),
            "teacher_ids": torch.randint(64, (count, 3), generator=generator),
            "teacher_logprobs": teacher,
        }
        made.append(example._replace(extra=extra))
    return made


def count_tasks(examples):
    counts = {TASK_COUNT + "long": 0, TASK_COUNT + "short": 0}
    for example in examples:
        (sequence,) = example.sequences
        name = ("long", "short")[int(sequence.extra["tasks"][0])]
        counts[TASK_COUNT + name] += int(sequence.learn[1:].sum())
    return counts


def batches(sequences, size, packed=False):
    def make(chosen, numbers):
        bins = [[Example(n, (sequence,))] for n, sequence in zip(numbers, chosen, strict=True)]
        if packed:
            bins = [[example for bin in bins for example in bin]]
        return Collate(0, packed=packed, count=count_tasks)(bins)

    return fits.cut(sequences, size, make)


def gradients_of(loss, size, packed=False, sequences=None):
    record = fits.Record()
    sequences = with_extras() if sequences is None else sequences
    given = batches(sequences, size, packed)
    loader = rewarm.WindowLoader(given, len(given))
    trainer = fits.trainer(max_epochs=1, accumulate_grad_batches=len(given), callbacks=[record])
    trainer.fit(fresh(loss=loss), loader)
    return record.gradients[0], record.metrics[0]["train/loss"]


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_the_same_in_one_batch_micro_batches_and_packed(name):
    gradients, loss = gradients_of(LOSSES[name], 8)
    assert loss == loss
    for size, packed in ((3, False), (8, True), (3, True)):
        others, other = gradients_of(LOSSES[name], size, packed)
        assert other == pytest.approx(loss, rel=1e-5)
        assert fits.distance(others, gradients) < 1e-5


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_without_rows_changes_nothing(name):
    """What a rank is given that has none left."""
    gradients, loss = gradients_of(LOSSES[name], 8)
    record, given = fits.Record(), batches(with_extras(), 8)
    given.append(Collate(0, packed=False, count=count_tasks)([]))
    trainer = fits.trainer(max_epochs=1, accumulate_grad_batches=2, callbacks=[record])
    trainer.fit(fresh(loss=LOSSES[name]), rewarm.WindowLoader(given, 2))
    assert record.metrics[0]["train/loss"] == pytest.approx(loss, rel=1e-6)
    assert fits.distance(record.gradients[0], gradients) < 1e-6


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_losses_differ_and_each_is_that_of_dense_logits():
    module, sequences = fresh(), with_extras()
    (batch,) = batches(sequences, 8)
    with torch.no_grad():
        logits = module.policy.model(batch["input_ids"], position_ids=batch["position_ids"]).logits
    known = batch["targets"] != IGNORE_INDEX
    targets, weights = batch["targets"].clamp(min=0)[..., None], batch["weights"]
    logprobs = logits.log_softmax(-1)
    own, p = logprobs.gather(-1, targets)[..., 0], logits.softmax(-1).gather(-1, targets)[..., 0]

    def mean(values):
        return float((values * weights)[known].sum() / known.sum())

    soft = (logits / 2).log_softmax(-1).gather(-1, batch["teacher_ids"])
    q, q_rest = batch["teacher_logprobs"].exp(), 1 - batch["teacher_logprobs"].exp().sum(-1)
    divergence = (q * (batch["teacher_logprobs"] - soft)).nan_to_num().sum(-1)
    divergence += q_rest * (q_rest.log() - (1 - soft.exp().sum(-1)).log())
    halves = [float((own * weights)[known & (batch["tasks"] == task)].sum()) for task in (0, 1)]
    sizes = [int((known & (batch["tasks"] == task)).sum()) for task in (0, 1)]
    expected = {
        "NLL": mean(-own),
        "label smoothing": mean(-0.8 * own - 0.2 * logprobs.mean(-1)),
        "z": mean(-own + 0.01 * logits.logsumexp(-1) ** 2),
        "DFT": mean(-p * own),
        "tasks": -0.3 * halves[0] / sizes[0] - 0.7 * halves[1] / sizes[1],
        "distillation": mean(4 * divergence),
    }
    found = {name: gradients_of(LOSSES[name], 8)[1] for name in expected}
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_entropy_sft_learns_the_share_of_the_tokens_that_it_names():
    plain = [sequence._replace(extra={}) for sequence in with_extras()]
    tasks = [s._replace(extra={"tasks": torch.zeros(s.positions, dtype=torch.long)}) for s in plain]
    (batch,), module = batches(tasks, 8), fresh()
    with torch.no_grad():
        logits = module.policy.model(batch["input_ids"], position_ids=batch["position_ids"]).logits
    known = batch["targets"] != IGNORE_INDEX
    logprobs = logits[known].log_softmax(-1)
    own = logprobs.gather(-1, batch["targets"][known][:, None])[:, 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    number = int(0.4 * known.sum())
    kept = (-own - 0.8 * entropy).topk(number).indices
    _, loss = gradients_of(rewarm.EntropySFT(0.4, 0.8), 8, sequences=tasks)
    assert loss == pytest.approx(float(-own[kept].sum() / number), rel=1e-5)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_flash_attention_refuses_what_it_would_mix(tmp_path):
    """transformers tells packed documents apart by their positions in a batch of one row."""
    files = fits.Files(tmp_path)
    for options, is_refused in (
        ({"packing": True}, True),
        ({"packing": False}, False),
        ({"packing": "padding_free"}, False),
        ({"packing": True, "batch_size": 1}, False),
    ):
        module = fresh()
        module.attention = "flash_attention_2"  # only asked about: the model was built with another
        trainer = fits.trainer(max_steps=1)
        if is_refused:
            with pytest.raises(ValueError, match="keeps packed examples apart in a single row only"):
                trainer.fit(module, datamodule=fits.instructions(files, **options))
        else:
            trainer.fit(module, datamodule=fits.instructions(files, **options))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_a_loss_that_needs_what_the_data_lack_says_so():
    loader = rewarm.WindowLoader(fits.cut(EXAMPLES, 8, fits.text_batch), 1)
    with pytest.raises(ValueError, match="the data have no column 'teacher_ids'"):
        fits.trainer(max_epochs=1).fit(fresh(loss=rewarm.Distillation()), loader)


def test_a_loss_with_statistics_trains_from_data_and_validates_plainly(tmp_path):
    files = fits.Files(tmp_path)
    rows = [row | {"kind": "ab"[n % 2]} for n, row in enumerate(tiny.sums(48))]
    path = tiny.write_jsonl(tmp_path / "tasks.jsonl", rows)
    data = rewarm.InstructionData(
        path, files.tokenizer, max_length=48, batch_size=8, val=path, task="kind", packing=True
    )
    torch.manual_seed(0)
    loss = rewarm.MultiTask({"a": 0.5, "b": 0.5}, rewarm.ZLoss(1e-3, rewarm.LabelSmoothing(0.05)))
    module = rewarm.CurriculumSFT(tiny.LLAMA, fits.adamw(), loss=loss)
    trainer = fits.trainer(max_steps=40)
    (before,) = trainer.validate(module, datamodule=data, verbose=False)
    trainer.fit(module, datamodule=data)
    assert trainer.logged_metrics["val/loss"] < before["val/loss"] / 2


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
