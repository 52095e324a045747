"""Predicted parts and operations against a fit that really runs, and against counts by hand."""

import re

import pytest

from rewarm.commands.plan_memory import work_of
from rewarm.costs.cost_step import work_cost
from tests import fits, tiny
from tests.cost_configs import FSDP, SHAPE, SHORT, config


def cost(tmp_path, method="curriculum_sft", devices=None, **sections):
    return work_cost(work_of(config(tmp_path, method, **sections), devices=devices, prompt_length=32))


@pytest.mark.parametrize("method", fits.METHODS)
def test_weights_and_optimizer_state_are_those_of_a_real_fit(tmp_path, method):
    files = fits.Files(tmp_path / "files")
    module = fits.METHODS[method].module(tiny.LLAMA, fits.adamw())
    fits.trainer(max_steps=1).fit(module, datamodule=fits.METHODS[method].data(files))
    parameters = list(module.policy.parameters())
    state = module.optimizers().optimizer.state
    stem = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", method).lower()
    sections = {"model": {"model": tiny.LLAMA}, "trainer": {"accumulate_grad_batches": 2}}
    made = cost(tmp_path, stem, **sections)
    assert made.parts["weights"] == sum(p.nbytes for p in parameters)
    moments = sum(value.nbytes for entry in state.values() for value in entry.values() if value.ndim)
    assert made.parts["optimizer"] == pytest.approx(moments, abs=4 * len(parameters))


def test_fsdp2_divides_weights_gradients_and_state_but_not_activations(tmp_path):
    one, many = (
        cost(tmp_path, devices=n, trainer=FSDP | {"accumulate_grad_batches": 2}, data=SHORT) for n in (1, 4)
    )
    for part in ("weights", "gradients", "optimizer"):
        assert many.parts[part] == pytest.approx(one.parts[part] / 4, rel=0.01), part
    for part in ("activations", "gathered"):
        assert many.parts[part] == one.parts[part], part


def test_tensor_parallelism_halves_what_layers_hold(tmp_path):
    sections = {"model": {"model": {**SHAPE, "vocab_size": 8}}, "data": SHORT}
    whole, halved = (
        cost(
            tmp_path,
            devices=2,
            trainer={"strategy": {**FSDP["strategy"], "init_args": {"tensor_parallel_size": ways}}},
            **sections,
        )
        for ways in (1, 2)
    )
    # Two shards of the whole against the halves of each matrix: only the norms are not divided.
    assert halved.parts["weights"] == pytest.approx(whole.parts["weights"], rel=0.05)
    flops = [made.flops for made in (whole, halved)]
    assert flops[1] == pytest.approx(flops[0] / 2, rel=0.05)
    strategy = {**FSDP["strategy"], "init_args": {"tensor_parallel_size": 3}}
    with pytest.raises(ValueError, match="is 3, which does not divide num_attention_heads 4"):
        cost(tmp_path, devices=3, trainer={"strategy": strategy})


def test_ddp_takes_a_copy_of_the_gradients_more(tmp_path):
    alone, together = (cost(tmp_path, devices=n, trainer={"strategy": "ddp"}, data=SHORT) for n in (1, 2))
    assert together.total_bytes - alone.total_bytes == alone.parts["weights"]


def test_checkpointing_keeps_less_and_computes_more(tmp_path):
    kept, recomputed = (
        cost(tmp_path, model={"gradient_checkpointing": on}, data=SHORT) for on in (False, True)
    )
    assert recomputed.parts["activations"] < 0.5 * kept.parts["activations"]
    assert recomputed.flops > 1.1 * kept.flops


def test_copies_of_the_weights_are_counted(tmp_path):
    averaging = {"class_path": "rewarm.CheckpointAveraging", "init_args": {"k": 3}}
    made = cost(tmp_path, trainer={"callbacks": [averaging]}, data=SHORT)
    assert made.parts["averages"] == 3 * made.parts["weights"]
    made = cost(tmp_path, "dpo", model={"reference": "frozen"}, data=SHORT)
    assert made.parts["reference"] == made.parts["weights"]
    assert "reference" not in cost(tmp_path, "dpo", data=SHORT).parts


def test_the_cache_holds_keys_and_values_of_every_completion(tmp_path):
    data = {"prompts_per_rollout": 16, "completions_per_prompt": 8, "max_new_tokens": 64}
    made = cost(tmp_path, "grpo", data=data, trainer={"accumulate_grad_batches": 16})
    layers, heads, size = SHAPE["num_hidden_layers"], SHAPE["num_key_value_heads"], 8
    whole = 16 * 8 * (32 + 64) * layers * heads * size * 2 * 4
    # The layer that is being extended is there twice.
    assert made.parts["cache"] == pytest.approx(whole, rel=0.05)
    assert len(made.sampling) == 2


def test_a_rollout_holds_gradients_once_and_no_chunks_of_the_head(tmp_path):
    data = {"prompts_per_rollout": 16, "completions_per_prompt": 8, "max_new_tokens": 64}
    made = cost(tmp_path, "grpo", devices=2, data=data, trainer=FSDP | {"accumulate_grad_batches": 64})
    assert "cache" in made.parts
    assert made.parts["gradients"] == made.parts["weights"]
    gpu = cost(tmp_path, "grpo", data=data, trainer={"accelerator": "gpu", "devices": 1})
    assert gpu.parts["working"] == cost(tmp_path, "grpo", data=data).parts["working"]
