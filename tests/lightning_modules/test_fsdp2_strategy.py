"""Sizes that follow the processes, and which checkpoints load; runs that go on are in tests/distributed."""

import re
import shutil
from dataclasses import replace

import pytest
import torch

import rewarm
from tests import fits, tiny
from tests.distributed.ranks import on_ranks
from tests.distributed.runs import Fit, files_in, fit_all, refusals


@pytest.mark.parametrize("name", ["tensor_parallel_size", "data_parallel_size"])
def test_sizes_are_at_least_one(name):
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        rewarm.FSDP2Strategy(**{name: 0})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor_parallel_size": 2}, "data_parallel_size is auto and tensor_parallel_size 2"),
        ({"data_parallel_size": 3}, "data_parallel_size is 3 and tensor_parallel_size 1"),
    ],
)
def test_sizes_that_do_not_fit_the_processes_are_an_error(tmp_path, sizes, message):
    trainer = fits.trainer(max_steps=1, strategy=rewarm.FSDP2Strategy(**sizes))
    with pytest.raises(ValueError, match=message + r", but there are 1 processes \(1 nodes with 1 each\)"):
        trainer.fit(rewarm.CurriculumSFT(tiny.LLAMA), datamodule=fits.instructions(fits.Files(tmp_path)))


# --- checkpoints ----------------------------------------------------------------------------------------


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=3e-3, betas=(0.8, 0.9))


def other_adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-5)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


SFT = Fit("CurriculumSFT", optimizer=adamw, trainer={"max_steps": 2})
SGD = replace(SFT, optimizer=sgd)
GRPO = Fit("GRPO", optimizer=adamw, options={"kl": 0.0}, trainer={"max_steps": 2})
KL = replace(GRPO, options={"kl": 0.1})
RUNS = {"sft": SFT, "sgd": SGD, "grpo": GRPO, "kl": KL}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of one process and of two ranks after two steps, and what the one process had then."""
    folder = tmp_path_factory.mktemp("saved")
    alone, shards = (
        [replace(run, strategy=strategy, save=folder / place / name) for name, run in RUNS.items()]
        for place, strategy in (("file", "one process"), ("shards", "FSDP2"))
    )
    (found,) = on_ranks(1, fit_all, alone, folder)
    on_ranks(2, fit_all, shards, folder)
    file = torch.load(folder / "file" / "sft" / "2.ckpt")
    del file["optimizer_states"]
    torch.save(file, folder / "weights.ckpt")
    (folder / "empty").mkdir()
    shutil.copytree(folder / "shards" / "sft" / "2.ckpt", folder / "torn")
    next((folder / "torn").glob("__1_*.distcp")).unlink()
    return folder, dict(zip(RUNS, found, strict=True))


def test_weights_moments_and_settings_of_a_file_are_loaded_to_the_bit(saved, tmp_path):
    folder, alone = saved
    runs = [
        replace(run, strategy="FSDP2", resume=folder / "file" / name / "2.ckpt") for name, run in RUNS.items()
    ]
    # Settings, too, are those of the checkpoint.
    runs[0] = replace(runs[0], optimizer=other_adamw)
    for rank in on_ranks(2, fit_all, runs, tmp_path):
        for fitted, expected in zip(rank, alone.values(), strict=True):
            assert fitted.weights.keys() == expected.weights.keys()
            assert all(torch.equal(weight, expected.weights[name]) for name, weight in fitted.weights.items())
            assert fitted.settings == expected.settings
            assert fitted.moments.keys() == expected.moments.keys()
            for name, state in fitted.moments.items():
                assert state.keys() == expected.moments[name].keys()
                assert all(torch.equal(value, expected.moments[name][kind]) for kind, value in state.items())
    assert {group["lr"] for group in alone["sft"].settings} == {3e-3}
    assert len(alone["sft"].moments) == 21
    assert not alone["sgd"].moments


def validate(runs, folder):
    """On a rank: the validation losses of checkpoints."""
    files = files_in(folder)
    return [
        run.lightning_trainer().validate(run.module(), run.datamodule(files), str(run.resume), verbose=False)
        for run in runs
    ]


def test_a_checkpoint_of_either_kind_is_validated(saved, tmp_path):
    folder, _ = saved
    file, shards = (folder / place / "sft" / "2.ckpt" for place in ("file", "shards"))
    (expected,) = on_ranks(1, validate, [replace(SFT, resume=file)], tmp_path)[0]
    sharded = replace(SFT, strategy="FSDP2", model={**tiny.LLAMA, "initializer_range": 0.5})
    runs = [replace(sharded, resume=path) for path in (file, shards, folder / "weights.ckpt")]
    for found in on_ranks(2, validate, runs, tmp_path):
        for losses in found:
            assert losses[0] == pytest.approx(expected[0], rel=1e-6)


OTHER = {**tiny.LLAMA, "hidden_size": 64, "num_attention_heads": 4}
MISTRAL = {**tiny.LLAMA, "model_type": "mistral"}
EMBEDDING = "policy.model.model.embed_tokens.weight"
REFUSED = {
    "a file of another size": (
        replace(SFT, model=OTHER),
        "file/sft/2.ckpt",
        f"{EMBEDDING} has shape (64, 32) in the checkpoint, (64, 64) in this run's model",
    ),
    "a file of another kind of model": (
        replace(SFT, model=MISTRAL),
        "file/sft/2.ckpt",
        "the checkpoint is of llama, this run's model is mistral",
    ),
    "a file of another method": (
        GRPO,
        "file/sft/2.ckpt",
        "the checkpoint is of CurriculumSFT, this run trains GRPO: export it, and give the folder as model",
    ),
    "a file without a reference": (
        KL,
        "file/grpo/2.ckpt",
        "the checkpoint lacks reference.model.model.embed_tokens.weight, which this run's model has",
    ),
    "a file with a reference": (
        GRPO,
        "file/kl/2.ckpt",
        "the checkpoint has reference.model.model.embed_tokens.weight, which this run's model lacks",
    ),
}
REFUSED_SHARDS = {
    name.replace("file", "folder"): (run, path.replace("file/", "shards/"), message)
    for name, (run, path, message) in REFUSED.items()
} | {
    "a file of weights": (
        SFT,
        "weights.ckpt",
        "the checkpoint has weights alone, so training cannot go on from it",
    ),
    "no checkpoint": (SFT, "missing.ckpt", "no such checkpoint"),
    "an empty folder": (SFT, "empty", "no such checkpoint"),
    "a folder without one of its files": (SFT, "torn", "No such file or directory"),
    "a folder of another optimizer": (
        SFT,
        "shards/sgd/2.ckpt",
        "Missing key in checkpoint state_dict: optimizer_0",
    ),
}


@pytest.mark.parametrize(
    ("size", "strategy", "refused"),
    [(1, "one process", REFUSED), (2, "FSDP2", REFUSED | REFUSED_SHARDS)],
)
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(saved, tmp_path, size, strategy, refused):
    folder, _ = saved
    runs = [replace(run, strategy=strategy, resume=folder / path) for run, path, _ in refused.values()]
    for rank in on_ranks(size, refusals, runs, tmp_path):
        for said, (_, path, message) in zip(rank, refused.values(), strict=True):
            assert re.fullmatch(rf"ValueError: {folder / path}: .*{re.escape(message)}.*", said), said


def test_lightning_itself_hands_the_moments_of_a_file_to_other_parameters(saved, tmp_path):
    """Why `load_checkpoint` and `optimizer_state` are ours: when this fails, they may go."""
    run = replace(SFT, strategy="Lightning's", resume=saved[0] / "file" / "sft" / "2.ckpt")
    for (said,) in on_ranks(2, refusals, [run], tmp_path):
        assert said.startswith("RuntimeError: The size of tensor a")
