"""Next-token training against transformers' own loss."""

import copy

import pytest
import torch

import rewarm
from tests import fits, tiny


def fresh(**options):
    torch.manual_seed(0)
    module = rewarm.ContinualPretraining(tiny.LLAMA, fits.sgd(0.1), **options)
    module.configure_model()
    return module


def write(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def own_loss(model, tokenizer, texts):
    """transformers' summed loss over the documents, each on its own, and the number of its targets."""
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        total = total + model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total, count


def test_loss_and_gradients_are_those_of_transformers_on_separate_documents(tmp_path):
    texts = ["abc 1+2=3.", "b", "cab cab cab", "9-4=5 ab", "aa"]
    tokenizer = tiny.save_tokenizer(tmp_path / "tokenizer")
    module, record = fresh(), fits.Record()
    model = copy.deepcopy(module.policy.model)
    data = rewarm.CorpusData({"a": write(tmp_path / "a.txt", *texts)}, tokenizer, max_length=64, batch_size=1)
    fits.trainer(max_steps=1, callbacks=[record]).fit(module, datamodule=data)

    total, count = own_loss(model, data.tokenizer, texts)
    (total / count).backward()
    assert record.metrics[0]["train/loss"] == pytest.approx((total / count).item(), rel=1e-6)
    gradients = {f"policy.model.{name}": p.grad for name, p in model.named_parameters()}
    assert fits.distance(record.gradients[0], gradients) < 1e-5


def test_validation_losses_by_domain_are_those_of_their_documents(tmp_path):
    domains = {"sums": ["1+2=3", "2+2=4", "3+5=8 ."], "words": ["abc abc", "cab", "bca bca bca", "a"]}
    tokenizer = tiny.save_tokenizer(tmp_path / "tokenizer")
    paths = {name: write(tmp_path / f"{name}.txt", *texts) for name, texts in domains.items()}
    data = rewarm.CorpusData({"sums": paths["sums"]}, tokenizer, max_length=80, batch_size=1, val=paths)
    module, trainer = fresh(), fits.trainer(max_steps=3)
    trainer.fit(module, datamodule=data)  # so that the weights are not the first ones
    trainer.validate(module, datamodule=data, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}

    sums = {name: own_loss(module.policy.model, data.tokenizer, texts) for name, texts in domains.items()}
    for name, (total, count) in sums.items():
        assert metrics[f"val/loss/{name}"] == pytest.approx(total.item() / count, rel=1e-5)
    everything = sum(total.item() for total, _ in sums.values()) / sum(count for _, count in sums.values())
    assert metrics["val/loss"] == pytest.approx(everything, rel=1e-5)


def test_training_lowers_the_loss_of_its_domain_and_replay_that_of_the_old_one(tmp_path):
    files, losses = fits.Files(tmp_path), {}
    for replay in (False, True):
        torch.manual_seed(0)
        options = {"replay": {"old": files.old}, "replay_fraction": 0.5} if replay else {}
        data = fits.corpus(files, val={"new": files.new, "old": files.old}, batch_size=4, **options)
        trainer = fits.trainer(max_steps=40, limit_val_batches=0)
        module = rewarm.ContinualPretraining(tiny.LLAMA, fits.adamw())
        trainer.fit(module, datamodule=data)
        evaluation = fits.trainer()
        evaluation.validate(module, datamodule=data, verbose=False)
        losses[replay] = evaluation.callback_metrics
    assert losses[False]["val/loss/new"] < 3.0  # log 64 = 4.2 at the start
    assert losses[True]["val/loss/old"] < losses[False]["val/loss/old"] - 0.5
