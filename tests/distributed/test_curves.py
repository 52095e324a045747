"""The curve of one process on several ranks: losses, gradient norms, validation, and what is exported."""

import json
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file

import rewarm
from tests import tiny
from tests.distributed.ranks import on_ranks
from tests.distributed.runs import Fit, Fitted, fit_all

pytestmark = pytest.mark.dist

LLAMA = {**tiny.LLAMA, "num_key_value_heads": 2}
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 16}
TIED = {"tie_word_embeddings": True}
MODELS = {
    "ContinualPretraining": LLAMA,
    "CurriculumSFT": {**QWEN3, **TIED},
    "DPO": {**LLAMA, **TIED},
    "GRPO": QWEN3,
}


def schedule() -> list[Callback]:
    return [rewarm.LRSchedule(rewarm.wsd(warmup=3, decay=0.5))]


def adamw(parameters) -> torch.optim.Optimizer:
    # At the 0.01 of the other tests, rounding grows to 1e-3 within 20 steps.
    return torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.1)


TRAINER = {
    "max_steps": 20,
    "gradient_clip_val": 0.5,
    "val_check_interval": 5,
    "check_val_every_n_epoch": None,
}
RUNS = {
    method: Fit(method, model=model, callbacks=schedule, optimizer=adamw, trainer=TRAINER)
    for method, model in MODELS.items()
}


def fit_on(size, strategy, methods, folder):
    """Fit some methods in one launch; return what the ranks have of each."""
    runs = [
        replace(
            RUNS[method],
            strategy=strategy,
            export=folder / f"{method} {strategy} {size}",
        )
        for method in methods
    ]
    results = on_ranks(size, fit_all, runs, folder)
    return dict(zip(methods, zip(*results, strict=True), strict=True))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return {method: fitted for method, (fitted,) in fit_on(1, "one process", MODELS, folder).items()}, folder


@pytest.mark.parametrize(
    ("strategy", "size", "methods"),
    [
        ("FSDP2", 2, MODELS),
        ("DDP", 2, MODELS),
        ("tensor parallel", 2, ["CurriculumSFT", "GRPO"]),
        pytest.param("tensor parallel", 4, MODELS, marks=pytest.mark.slow),
        # The other methods on four ranks: test_checkpoints.py, and all in test_exact_normalisation.py.
        pytest.param("FSDP2", 4, ["DPO", "GRPO"], marks=pytest.mark.slow),
        pytest.param("FSDP2", 1, MODELS, marks=pytest.mark.slow),
    ],
)
def test_ranks_have_the_curve_of_one_process(alone, tmp_path, strategy, size, methods):
    expected, folder = alone
    for method, ranks in fit_on(size, strategy, methods, tmp_path).items():
        for fitted in ranks:
            assert_same_curve(fitted, expected[method])
        for fitted in ranks:
            # What several ranks hold copies of must be the same on all of them.
            assert all(torch.equal(weight, ranks[0].weights[name]) for name, weight in fitted.weights.items())
        assert_same_export(tmp_path / f"{method} {strategy} {size}", folder / f"{method} one process 1")


def test_a_cached_reference_is_that_of_one_process(tmp_path):
    cached = replace(RUNS["DPO"], options={"reference": "cached"})
    ((expected,),) = on_ranks(1, fit_all, [cached], tmp_path)
    for (fitted,) in on_ranks(2, fit_all, [replace(cached, strategy="FSDP2")], tmp_path):
        assert_same_curve(fitted, expected)


def assert_same_curve(fitted: Fitted, expected: Fitted) -> None:
    assert len(fitted.losses) == len(expected.losses) == 20
    assert fitted.losses == pytest.approx(expected.losses, abs=1e-5)
    assert len({round(metrics["train/grad_norm"], 3) for metrics in expected.metrics}) > 10
    for one, other in zip(fitted.metrics, expected.metrics, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5)
    assert fitted.validated == pytest.approx(expected.validated, rel=1e-5, abs=1e-5)


def assert_same_export(folder, expected) -> None:
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == names
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"} <= set(names)
    for name in names:
        if name.endswith(".json"):
            assert json.loads((folder / name).read_text()) == json.loads((expected / name).read_text()), name
    weights, whole = load_file(folder / "model.safetensors"), load_file(expected / "model.safetensors")
    assert weights.keys() == whole.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, whole[name], rtol=1e-5, atol=1e-5)
