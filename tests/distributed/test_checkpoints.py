"""Runs that go on from checkpoints: on as many ranks, on others, from a single file, from the wrong one."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback

import rewarm
from tests import tiny
from tests.distributed.ranks import on_ranks
from tests.distributed.runs import Fit, fit_all

pytestmark = pytest.mark.dist

STEPS = 9  # 6 are an epoch of instructions


def last_k() -> list[Callback]:
    return [
        rewarm.ExactResume(),
        rewarm.LRSchedule(rewarm.cosine(warmup=2)),
        rewarm.CheckpointAveraging(k=3, every_n_steps=1),
    ]


def ema() -> list[Callback]:
    return [*last_k()[:2], rewarm.CheckpointAveraging(mode="ema", decay=0.8)]


def adamw(parameters) -> torch.optim.Optimizer:
    # Rounding grows from step to step at a high LR.
    return torch.optim.AdamW(parameters, lr=2e-3, betas=(0.8, 0.9), weight_decay=0.1)


TIED = {**tiny.LLAMA, "tie_word_embeddings": True}
RUNS = {
    run.method: replace(run, optimizer=adamw)
    for run in (
        Fit("ContinualPretraining", callbacks=last_k),
        Fit("CurriculumSFT", model=TIED, callbacks=ema),
        Fit("DPO", model=TIED, callbacks=last_k),
        Fit("GRPO", callbacks=ema),
    )
}


def fit_on(size, strategy, folder, resume=None, *, split=1, methods=RUNS, **changes):
    """Fit some methods in one launch, each saving into its own folder of a folder."""
    runs = [
        replace(
            RUNS[method],
            strategy=strategy,
            save=folder / method,
            resume=None if resume is None else resume[0] / method / f"{resume[1]}.ckpt",
            # The rows of corpora that end an epoch depend on how many a micro-batch has.
            split=1 if method == "ContinualPretraining" else split,
            trainer={"max_steps": STEPS, "gradient_clip_val": 0.5},
            **changes,
        )
        for method in methods
    ]
    results = on_ranks(size, fit_all, runs, folder)
    return dict(zip(methods, zip(*results, strict=True), strict=True))


def assert_goes_on(found, expected, first=0, tolerance=1e-5):
    """The steps from `first` on are those of a run that was never stopped."""
    for method, ranks in found.items():
        whole = expected[method]
        last = first + len(ranks[0].metrics)
        for fitted in ranks:
            for one, other in zip(fitted.metrics, whole[0].metrics[first:last], strict=True):
                # Lightning leaves out a validation that was due at the step of the checkpoint.
                one, other = (
                    {name: value for name, value in metrics.items() if not name.startswith("val/")}
                    for metrics in (one, other)
                )
                assert one == (pytest.approx(other, rel=tolerance, abs=tolerance) if tolerance else other)
            if last == STEPS:
                for kind in ("weights", "left", "moments"):
                    assert_near(getattr(fitted, kind), getattr(whole[0], kind), tolerance)
        for step in range(first, last):
            seen, due = (
                Counter(number for fitted in readers(runs) for number in fitted.ids[step - start])
                for runs, start in ((ranks, first), (whole, 0))
            )
            assert seen == due, f"{method}, step {step}"


def readers(ranks):
    """Those ranks that have different data; where two share each layer, they have the same."""
    return {str(fitted.ids): fitted for fitted in ranks}.values()


def assert_near(one, other, tolerance):
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, dict):
            assert_near(value, other[name], tolerance)
        else:
            torch.testing.assert_close(
                value,
                other[name],
                rtol=tolerance,
                atol=tolerance,
                msg=lambda said, name=name: f"{name}: {said}",
            )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Every method in one process, saved at every step."""
    folder = tmp_path_factory.mktemp("alone")
    return fit_on(1, "one process", folder), folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Every method in shards on two ranks, saved at every step."""
    folder = tmp_path_factory.mktemp("shards")
    return fit_on(2, "FSDP2", folder), folder


def test_shards_go_on_with_equal_bits_on_as_many_ranks(shards, alone, tmp_path):
    whole, folder = shards
    assert_goes_on(whole, alone[0])
    assert_goes_on(fit_on(2, "FSDP2", tmp_path, (folder, 4)), whole, 4, tolerance=0)


def test_the_file_of_one_process_goes_on_in_shards(alone, tmp_path):
    whole, folder = alone
    methods = ["CurriculumSFT", "DPO"]
    assert_goes_on(fit_on(2, "FSDP2", tmp_path, (folder, 4), methods=methods), whole, 4)


def test_shards_assembled_in_a_file_go_on_anywhere(alone, tmp_path):
    whole, _ = alone
    one_file, methods = tmp_path / "one file", ["CurriculumSFT", "DPO"]
    assert_goes_on(fit_on(2, "FSDP2, one file", one_file, methods=methods), whole)
    assert (one_file / "DPO" / "4.ckpt").is_file()
    for size, strategy in ((1, "one process"), (2, "FSDP2")):
        folder = tmp_path / strategy
        assert_goes_on(fit_on(size, strategy, folder, (one_file, 4), methods=methods), whole, 4)


@pytest.mark.parametrize(
    ("methods", "legs"),
    [
        (["GRPO"], [(2, 2, 0), (1, 4, 2), (2, 1, 6)]),
        pytest.param(
            ["ContinualPretraining", "CurriculumSFT"],
            [(1, 4, 0), (2, 2, 2), (4, 1, 4), (2, 4, 6)],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_other_numbers_of_ranks_go_on(alone, tmp_path, methods, legs):
    """Each leg, of ranks, split and first step, ends the run; the next one goes on from within it."""
    whole, resume = alone[0], None
    for size, split, step in legs:
        folder = tmp_path / str(step)
        resume = resume and (resume, step)
        found = fit_on(size, "FSDP2", folder, resume, split=split, methods=methods)
        assert_goes_on(found, whole, step)
        resume = folder


def test_split_layers_go_on_with_equal_bits_and_on_other_ranks(tmp_path):
    split = {"methods": ["CurriculumSFT"], "model": {**tiny.LLAMA, "num_key_value_heads": 2}}
    whole = fit_on(2, "tensor parallel", tmp_path / "split", **split)
    resume = (tmp_path / "split", 4)
    assert_goes_on(fit_on(2, "tensor parallel", tmp_path / "again", resume, **split), whole, 4, tolerance=0)
    assert_goes_on(fit_on(2, "FSDP2", tmp_path / "whole layers", resume, **split), whole, 4)
