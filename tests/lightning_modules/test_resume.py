"""Killed at any optimizer step and resumed == never killed, to the last bit."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import rewarm
from tests import fits, tiny

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:Found .* in eval mode at the start of training"
    ),  # the frozen reference
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),  # resumed runs save elsewhere
]

STEPS = 8
NOISY = {**tiny.LLAMA, "attention_dropout": 0.2}  # the random state is part of every step

RUNS = {
    "continual pretraining with replay": (
        rewarm.ContinualPretraining,
        {},
        lambda files: fits.corpus(files, replay={"old": files.old}, replay_fraction=0.25),
        None,
    ),
    "sft": (
        rewarm.CurriculumSFT,
        {},
        lambda files: fits.instructions(files, batch_size=6, val=files.sft),
        None,
    ),
    "sft in order": (
        rewarm.CurriculumSFT,
        {},
        lambda files: fits.instructions(
            files, score="difficulty", order="ascending", pacing=rewarm.RootPacing(total_steps=6, start=0.2)
        ),
        None,
    ),
    "packed and filtered sft": (
        rewarm.CurriculumSFT,
        {},
        lambda files: fits.instructions(files, packing=True, batch_size=2),
        (0.0, 4.0),
    ),
    "dpo with a cached reference": (
        rewarm.DPO,
        {"loss": rewarm.Sum([rewarm.Sigmoid(), rewarm.ChosenNLL()], [1.0, 0.1])},
        lambda files: fits.preferences(files, batch_size=6, val=files.pairs),
        None,
    ),
    "filtered dpo with a frozen reference": (
        rewarm.DPO,
        {"reference": "frozen"},
        lambda files: fits.preferences(files, batch_size=6),
        (-1.0, 1.0),
    ),
    "grpo": (rewarm.GRPO, {"kl": 0.1}, lambda files: fits.prompts(files, val=files.prompts), None),
    "filtered grpo with rollouts used twice": (
        rewarm.GRPO,
        {"weights": rewarm.PerSequence()},
        lambda files: fits.prompts(files, passes=2, minibatches=1, max_rounds=2),
        (0.1, 0.9),
    ),
}

WORKERS = (
    rewarm.CurriculumSFT,
    {},
    lambda files: fits.instructions(files, batch_size=6, num_workers=2),
    None,
)


def fit(name, files, folder, seed, ckpt_path=None):
    kind, options, data, band = RUNS.get(name, WORKERS)
    for seeded in (random.seed, np.random.seed, torch.manual_seed):
        seeded(seed)
    record = fits.Record()
    callbacks = [
        rewarm.LRSchedule(rewarm.cosine(warmup=2)),
        rewarm.CheckpointAveraging(mode="ema", decay=0.9),
        rewarm.ExactResume(),
        record,
        ModelCheckpoint(
            folder, "{step}", save_top_k=-1, every_n_train_steps=1, auto_insert_metric_name=False
        ),
    ]
    if band is not None:
        callbacks.insert(0, rewarm.DifficultyFilter(*band))
    trainer = fits.trainer(
        max_steps=STEPS,
        accumulate_grad_batches=2,
        callbacks=callbacks,
        enable_checkpointing=True,
        val_check_interval=3,
    )
    module, data = kind(NOISY, fits.adamw(), **options), data(files)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return record, callbacks, trainer


def trained(metrics):
    # Lightning skips a validation that was due at the step of the checkpoint.
    return {name: value for name, value in metrics.items() if not name.startswith("val/")}


@pytest.mark.parametrize("name", RUNS)
def test_resumed_at_any_step_it_ends_with_equal_bits(tmp_path, name):
    resume_at(range(1, STEPS), tmp_path, name)


@pytest.mark.dist
@pytest.mark.usefixtures("no_worker_outlives_the_test")
def test_resumed_with_workers_it_ends_with_equal_bits(tmp_path):
    resume_at((3, 4), tmp_path, "with workers")  # within an epoch, and at the end of one


def resume_at(steps, tmp_path, name):
    files = fits.Files(tmp_path)
    whole, callbacks, _ = fit(name, files, tmp_path / "whole", seed=0)
    assert len(whole.weights) == STEPS
    if isinstance(callbacks[0], rewarm.DifficultyFilter):
        assert whole.metrics[-1]["data/refused"] > 0 or "grpo" in name
    for step in steps:
        rest, resumed, _ = fit(
            name, files, tmp_path / f"rest{step}", 100 + step, str(tmp_path / f"whole/{step}.ckpt")
        )
        assert len(rest.weights) == STEPS - step
        for one, other in zip(rest.metrics, whole.metrics[step:], strict=True):
            assert trained(one) == trained(other), f"resumed at {step}"
        for one, other in zip(rest.weights, whole.weights[step:], strict=True):
            assert all(torch.equal(one[parameter], other[parameter]) for parameter in other), (
                f"resumed at {step}"
            )
        average, expected = (
            next(c for c in found if isinstance(c, rewarm.CheckpointAveraging)).state_dict()["averages"][0]
            for found in (resumed, callbacks)
        )
        assert all(torch.equal(one, other) for one, other in zip(average, expected, strict=True))
