"""Mixed and true bfloat16 in shards."""

from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback

from rewarm.lightning_modules.sharding import decoder_layers
from tests.distributed.ranks import on_ranks
from tests.distributed.runs import Fit, fit_all

pytestmark = pytest.mark.dist

BF16, FP32 = torch.bfloat16, torch.float32


class Dtypes(Callback):
    """Asserts in which dtypes policy and reference compute, are gathered, step and keep their state."""

    def __init__(self, computed: torch.dtype, kept: torch.dtype) -> None:
        self.computed, self.kept, self.looks = computed, kept, 0

    def on_fit_start(self, trainer, pl_module):
        for policy in (pl_module.policy, pl_module.reference):
            decoder_layers(policy.model)[0].mlp.gate_proj.register_forward_hook(self.look)

    def look(self, module, inputs, output):
        assert {module.weight.dtype, inputs[0].dtype, output.dtype} == {self.computed}
        self.looks += 1

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for parameter in pl_module.policy.parameters():
            assert parameter.dtype == parameter.grad.dtype == self.kept

    def on_train_end(self, trainer, pl_module):
        states = trainer.optimizers[0].state.values()
        assert {state[name].dtype for state in states for name in ("exp_avg", "exp_avg_sq")} == {self.kept}
        assert self.looks > 8


def mixed() -> list[Callback]:
    return [Dtypes(BF16, FP32)]


def true() -> list[Callback]:
    return [Dtypes(BF16, BF16)]


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=2e-3)


PLAIN = Fit("DPO", optimizer=adamw, trainer={"max_steps": 8, "gradient_clip_val": 0.5})
MIXED = replace(PLAIN, trainer=PLAIN.trainer | {"precision": "bf16-mixed"})
TRUE = replace(PLAIN, trainer=PLAIN.trainer | {"precision": "bf16-true"}, callbacks=true)


def test_mixed_precision_keeps_float32_where_it_counts_and_the_curve_of_ddp(tmp_path):
    (ddp, exact), (sharded,) = (
        on_ranks(2, fit_all, runs, tmp_path)[0]
        for runs in (
            [replace(MIXED, strategy="DDP"), replace(PLAIN, strategy="DDP")],
            [replace(MIXED, strategy="FSDP2", callbacks=mixed)],
        )
    )
    for name in ("train/nll", "train/grad_norm"):
        curves = [[metrics[name] for metrics in fitted.metrics] for fitted in (sharded, ddp, exact)]
        assert curves[0] == pytest.approx(curves[1], rel=1e-2)
        assert curves[0] == pytest.approx(curves[2], rel=1e-2)
        assert curves[0] != curves[2]


def test_true_bfloat16_trains_and_saves_in_shards(tmp_path):
    run = replace(TRUE, strategy="FSDP2", save=tmp_path / "saved", export=tmp_path / "exported")
    exact, alone = on_ranks(1, fit_all, [PLAIN, replace(TRUE, callbacks=list)], tmp_path)[0]
    ((whole,), _) = on_ranks(2, fit_all, [run], tmp_path)
    curves = [[metrics["train/nll"] for metrics in fitted.metrics] for fitted in (whole, alone, exact)]
    assert curves[0] == pytest.approx(curves[1], rel=3e-2)
    assert curves[0] == pytest.approx(curves[2], rel=3e-2)
    rest = replace(run, resume=tmp_path / "saved" / "4.ckpt", save=None)
    for (fitted,) in on_ranks(2, fit_all, [rest], tmp_path):
        assert fitted.metrics == whole.metrics[4:]
