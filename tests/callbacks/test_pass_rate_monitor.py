"""Logged pass rates against counts of what the reward function was shown."""

import math
import statistics
from collections import defaultdict

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig

import rewarm
from rewarm.rollouts.engine import TransformersEngine
from rewarm.rollouts.rewards import RewardError
from tests import fits, tiny

LENGTH = 6


class Counting:
    """A reward of 1 for completions with an even number of characters, which counts for itself."""

    def __init__(self):
        self.passed = []

    def __call__(self, prompts, completions, difficulty, **columns):
        passed = [float(len(text) % 2 == 0) for text in completions]
        self.passed.append([(p, d, r) for p, d, r in zip(prompts, difficulty, passed, strict=True)])
        return passed


class Logger(DummyLogger):
    def __init__(self):
        super().__init__()
        self.logged = []

    def log_metrics(self, metrics, step=None):
        self.logged.append((step, metrics))


def fit(tmp_path, monitor, steps=4, **options):
    files, logger = fits.Files(tmp_path), Logger()
    torch.manual_seed(0)
    module, data = rewarm.CurriculumSFT(tiny.LLAMA, fits.adamw()), fits.instructions(files, val=files.sft)
    trainer = fits.trainer(
        max_steps=steps, callbacks=[monitor], val_check_interval=2, logger=logger, **options
    )
    trainer.fit(module, datamodule=data)
    return module, trainer, logger


def test_rates_are_those_of_an_independent_count(tmp_path):
    reward = Counting()
    monitor = rewarm.PassRateMonitor(
        fits.Files(tmp_path).prompts, reward, group="difficulty", samples=4, max_new_tokens=LENGTH
    )
    _, _, logger = fit(tmp_path, monitor)
    assert len(reward.passed) == 3  # after steps 2 and 4, and at the end
    measured = [metrics for _, metrics in logger.logged if "val/pass_rate" in metrics]
    assert len(measured) == 3
    assert [step for step, metrics in logger.logged if "val/pass_rate" in metrics][-1] == 4

    for metrics, seen in zip(measured, reward.passed, strict=True):
        assert len(seen) == 4 * 48
        fractions = [statistics.fmean(r for *_, r in seen[4 * n : 4 * n + 4]) for n in range(48)]
        mean = statistics.fmean(fractions)
        half = 1.959964 * statistics.stdev(fractions) / math.sqrt(48)
        assert metrics["val/pass_rate"] == pytest.approx(mean)
        assert metrics["val/pass_rate_low"] == pytest.approx(mean - half)
        assert metrics["val/pass_rate_high"] == pytest.approx(mean + half)
        by_kind = defaultdict(list)
        for _, difficulty, passed in seen:
            by_kind[difficulty].append(passed)
        assert len(by_kind) > 5
        for kind, passed in by_kind.items():
            assert metrics[f"val/pass_rate/{kind}"] == pytest.approx(statistics.fmean(passed))
    assert monitor.last[""].mean == pytest.approx(measured[-1]["val/pass_rate"])


def test_it_can_be_monitored_by_other_callbacks(tmp_path):
    monitor = rewarm.PassRateMonitor(fits.Files(tmp_path).prompts, Counting(), max_new_tokens=LENGTH, limit=8)
    _, trainer, _ = fit(tmp_path, monitor)
    assert 0.0 <= float(trainer.callback_metrics["val/pass_rate"]) <= 1.0
    assert monitor.last[""].num_prompts == 8


def test_unchanged_weights_have_an_unchanged_rate_and_training_is_not_disturbed(tmp_path):
    files, rates, weights = fits.Files(tmp_path), [], []
    for callbacks in (
        [],
        [rewarm.PassRateMonitor(files.prompts, Counting(), max_new_tokens=LENGTH, samples=2)],
    ):
        torch.manual_seed(0)
        module = rewarm.CurriculumSFT({**tiny.LLAMA, "attention_dropout": 0.2}, fits.adamw())
        trainer = fits.trainer(max_steps=4, callbacks=callbacks, val_check_interval=1)
        trainer.fit(module, datamodule=fits.instructions(files, val=files.sft))
        weights.append(fits.weights(module))
        assert all(part.training for part in module.modules())
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    for _ in range(2):
        rates.append(callbacks[0].measure(trainer, module))
    assert rates[0] == rates[1]


class Foreign(LightningModule):
    """Somebody else's module, with its own data and a transformers model in a place of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = AutoModelForCausalLM.from_config(config())

    def training_step(self, batch, batch_idx):
        return self.net(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def config():
    return LlamaConfig(**{name: value for name, value in tiny.LLAMA.items() if name != "model_type"})


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_it_works_in_somebody_elses_module(tmp_path):
    files, reward = fits.Files(tmp_path), Counting()
    monitor = rewarm.PassRateMonitor(
        files.prompts, reward, tokenizer=files.tokenizer, model="net", max_new_tokens=LENGTH, samples=2
    )
    fits.trainer(max_steps=1, callbacks=[monitor]).fit(
        Foreign(), DataLoader(torch.ones(2, 5, dtype=torch.long))
    )
    seen = [passed for *_, passed in reward.passed[-1]]
    assert monitor.last[""].mean == pytest.approx(statistics.fmean(seen))


def test_a_missing_column_is_an_error_before_training(tmp_path):
    monitor = rewarm.PassRateMonitor(fits.Files(tmp_path).prompts, Counting(), group="level")
    with pytest.raises(ValueError, match="no column 'level' among .*difficulty"):
        fit(tmp_path, monitor)


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_no_tokenizer_is_an_error_before_training(tmp_path):
    monitor = rewarm.PassRateMonitor(fits.Files(tmp_path).prompts, Counting(), model="net")
    with pytest.raises(ValueError, match="no tokenizer: the data module has none, so give `tokenizer`"):
        fits.trainer(max_steps=1, callbacks=[monitor]).fit(Foreign(), DataLoader(torch.ones(2, 5)))


def test_partial_credit_is_no_pass(tmp_path):
    monitor = rewarm.PassRateMonitor(
        fits.Files(tmp_path).prompts,
        lambda prompts, completions, **_: [0.5] * len(prompts),
        samples=2,
        max_new_tokens=2,
    )
    with pytest.raises(
        ValueError, match=r"prompt 0: the rewards are \[0.5, 0.5\], but a pass rate needs 0 or 1"
    ):
        fit(tmp_path, monitor)


def test_a_reward_that_is_no_number_stops_the_run(tmp_path):
    monitor = rewarm.PassRateMonitor(
        fits.Files(tmp_path).prompts,
        lambda prompts, completions, **_: [math.nan] * len(prompts),
        max_new_tokens=2,
    )
    with pytest.raises(RewardError, match="nan"):
        fit(tmp_path, monitor)


def test_a_bound_on_what_is_in_flight_changes_no_rate_and_is_held(tmp_path, monkeypatch):
    sizes, rates = [], []
    decode = TransformersEngine._decode

    def watched(engine, model, prompts, uniform):
        sizes.append(len(prompts))
        return decode(engine, model, prompts, uniform)

    monkeypatch.setattr(TransformersEngine, "_decode", watched)
    for bound in (None, 64):
        sizes.clear()
        monitor = rewarm.PassRateMonitor(
            fits.Files(tmp_path).prompts, Counting(), max_new_tokens=LENGTH, max_tokens_in_flight=bound
        )
        fit(tmp_path, monitor)
        rates.append(monitor.last)
        assert max(sizes) == (48 if bound is None else 64 // (4 + LENGTH))
    assert rates[0] == rates[1]
