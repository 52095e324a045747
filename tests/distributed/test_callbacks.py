"""Callbacks, rollouts and the loops beside training do on models in shards what they do in one process."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loops import utilities
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import rewarm
from tests import fits, tiny
from tests.distributed.ranks import on_ranks
from tests.distributed.runs import STRATEGIES, Fit, Steps, files_in, ranks, wholes

pytestmark = pytest.mark.dist


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=2e-3)


LLAMA = {**tiny.LLAMA, "num_key_value_heads": 2}
RUNS = {
    method: Fit(method, model=LLAMA, optimizer=adamw, trainer={"max_steps": 7, "val_check_interval": 2})
    for method in ("CurriculumSFT", "GRPO")
}


class Samples(rewarm.SampleTable):
    """Keeps what it prints."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.shown: list[list[str]] = []

    def _table(self, groups, step):
        self.shown.append([group.texts[0] for group in groups])
        return super()._table(groups, step)


def sampling(files, **options):
    """Callbacks that sample for three prompts on two ranks, and for one, which leaves a rank without."""
    plain = {"reward": fits.odd_length, "max_new_tokens": 6, **options}
    return [
        rewarm.PassRateMonitor(files.prompts, limit=3, samples=4, name="three", **plain),
        rewarm.PassRateMonitor(files.prompts, limit=1, samples=2, name="one", **plain),
        Samples(files.prompts, num_prompts=3, every_n_steps=3, temperature=1.0, **plain),
    ]


def fit_with_everything(run, folder, averaged):
    """On a rank: a fit with all callbacks, and what they found."""
    files, steps, throughput, resume = files_in(folder), Steps(), rewarm.Throughput(), rewarm.ExactResume()
    monitors = sampling(files)
    callbacks = [*monitors, rewarm.DifficultyFilter(0.3, 4.0), throughput, resume, steps]
    if averaged:
        export = rewarm.HuggingFaceExport(str(folder / f"{run.method} {run.strategy} {ranks()}"))
        callbacks = [rewarm.CheckpointAveraging(mode="ema", decay=0.7), *callbacks, export]
    module, data, trainer = run.module(), run.datamodule(files), run.lightning_trainer(*callbacks)
    trainer.fit(module, datamodule=data)
    return {
        "metrics": steps.metrics,
        "curriculum": data.curriculum.state_dict(),
        "states": len(resume.state_dict()["ranks"]),
        "tokens": throughput.total_tokens,
        "rates": {**monitors[0].last, **{f"one{k}": v for k, v in monitors[1].last.items()}},
        "shown": monitors[2].shown,
    }


def fit_both(strategy, folder, averaged=True):
    return {
        method: fit_with_everything(replace(run, strategy=strategy), folder, averaged)
        for method, run in RUNS.items()
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return on_ranks(1, fit_both, "one process", folder)[0], folder


@pytest.mark.parametrize(
    ("strategy", "size"),
    [
        ("FSDP2", 2),
        ("DDP", 2),
        pytest.param("tensor parallel", 4, marks=pytest.mark.slow),
    ],
)
def test_callbacks_find_in_shards_what_they_find_in_one_process(alone, tmp_path, strategy, size):
    expected, folder = alone
    assert_found(on_ranks(size, fit_both, strategy, tmp_path), expected)
    for method in RUNS:
        whole = load_file(folder / f"{method} one process 1" / "model.safetensors")
        name = f"{method} {strategy} {size}/model.safetensors"
        for parameter, weight in load_file(tmp_path / name).items():
            torch.testing.assert_close(weight, whole[parameter], rtol=1e-5, atol=1e-5)


def assert_found(ranks, expected):
    for method, whole in expected.items():
        first = ranks[0][method]
        for found in (rank[method] for rank in ranks):
            assert found["curriculum"] == first["curriculum"]
            assert found["states"] == len(ranks)
            assert found["tokens"] == whole["tokens"]
            assert found["rates"] == whole["rates"]
            assert len(found["metrics"]) == 7
            for one, other in zip(timeless(found), timeless(whole), strict=True):
                assert one == pytest.approx(other, rel=1e-5, abs=1e-5)
        assert first["shown"] == whole["shown"]


def timeless(found):
    """The logged metrics but those that depend on the time, or on the rows that are padded together."""
    return [
        {name: value for name, value in metrics.items() if not name.startswith("throughput/")}
        for metrics in found["metrics"]
    ]


def test_the_callbacks_have_something_to_find(alone):
    sft, grpo = alone[0].values()
    assert sft["curriculum"]["num_refused"] > 0
    assert max(metrics["rollout/rounds"] for metrics in grpo["metrics"]) > 1
    for found in (sft, grpo):
        assert found["tokens"] > 0
        assert 0.0 < found["metrics"][-1]["val/three"] < 1.0
        assert len(found["shown"]) == 3
        assert len({text for shown in found["shown"] for text in shown}) >= 3


# --- the other loops ------------------------------------------------------------------------------------


def loops(run, folder):
    """On a rank: what validating, testing and predicting give before a fit, and the losses of that fit."""
    # Lightning validates in inference mode, but not on gloo.
    utilities._distributed_is_initialized = lambda: False
    steps = Steps()
    module, data, trainer = run.module(), run.datamodule(files_in(folder)), run.lightning_trainer(steps)
    (validated,) = trainer.validate(module, data, verbose=False)
    (tested,) = trainer.test(module, data, verbose=False)
    batches = trainer.predict(module, data)
    scores = {
        int(number): score
        for batch in batches
        for number, score in zip(batch["ids"], batch["scores"].tolist(), strict=True)
    }
    trainer.fit(module, data)
    return validated, tested, scores, [metrics["train/loss"] for metrics in steps.metrics]


def all_loops(strategy, folder):
    run = Fit("CurriculumSFT", strategy, model=LLAMA, optimizer=adamw, trainer={"max_steps": 4})
    return loops(run, folder)


def test_shards_are_validated_tested_and_predicted_with_and_then_trained(tmp_path):
    ((validated, tested, scores, losses),) = on_ranks(1, all_loops, "one process", tmp_path)
    found = on_ranks(2, all_loops, "FSDP2", tmp_path)
    together = {}
    for rank_validated, rank_tested, rank_scores, rank_losses in found:
        assert rank_validated == pytest.approx(validated, rel=1e-6)
        assert rank_tested == pytest.approx(tested, rel=1e-6)
        assert rank_losses == pytest.approx(losses, rel=1e-6)
        assert not together.keys() & rank_scores.keys()
        together |= rank_scores
    assert together == pytest.approx(scores, rel=1e-5)
    assert len(together) == 48


# --- somebody else's module -----------------------------------------------------------------------------


class Foreign(LightningModule):
    """A transformers model and its own loss; under Lightning's strategy it shards itself."""

    def configure_model(self):
        if hasattr(self, "net"):
            return
        torch.manual_seed(0)
        self.net = LlamaForCausalLM(LlamaConfig(**LLAMA))
        if self.device_mesh is not None:
            for layer in self.net.model.layers:
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return self.net(input_ids=batch, labels=batch).loss

    def validation_step(self, batch, batch_idx):
        self.log("val", self.net(input_ids=batch, labels=batch).loss, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def fit_foreign(strategy, folder):
    files = files_in(folder)
    monitors = sampling(files, model="net", tokenizer=files.tokenizer)
    callbacks = [
        rewarm.CheckpointAveraging(k=2, every_n_steps=1),
        *monitors,
        rewarm.LRSchedule(rewarm.cosine(warmup=1)),
        rewarm.ExactResume(),
        rewarm.Throughput(count_tokens=torch.numel),
    ]
    trainer = fits.trainer(
        max_steps=4,
        val_check_interval=2,
        callbacks=callbacks,
        devices=ranks(),
        strategy=STRATEGIES[strategy](),
        use_distributed_sampler=False,
        num_sanity_val_steps=1,
    )
    rows = torch.randint(3, 50, (16, 12), generator=torch.Generator().manual_seed(0))
    rows = rows.view(4, ranks(), -1, 12)[:, trainer.global_rank]
    module = Foreign()
    trainer.fit(module, DataLoader(rows, batch_size=None), DataLoader(rows, batch_size=None))
    return {
        "rates": [monitor.last[""] for monitor in monitors[:2]],
        "shown": monitors[2].shown,
        "tokens": callbacks[-1].total_tokens,
        "val": float(trainer.callback_metrics["val"]),
        "weights": wholes(fits.weights(module)),
    }


def test_somebody_elses_sharded_module_takes_the_callbacks(tmp_path):
    (alone,) = on_ranks(1, fit_foreign, "one process", tmp_path)
    for rank, found in enumerate(on_ranks(2, fit_foreign, "Lightning's", tmp_path)):
        assert found["rates"] == alone["rates"]
        assert found["shown"] == (alone["shown"] if rank == 0 else [])
        assert found["tokens"] == alone["tokens"] == 4 * 4 * 12
        assert found["val"] == pytest.approx(alone["val"], rel=1e-5)
        for name, weight in found["weights"].items():
            torch.testing.assert_close(weight, alone["weights"][name], rtol=1e-5, atol=1e-5)
