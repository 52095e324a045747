"""What is read from configs."""

import re

import pytest

from rewarm.commands.plan_memory import work_of
from tests.cost_configs import SHORT, config


def test_rows_and_positions_are_those_of_the_data(tmp_path):
    def shape(method, **data):
        read = work_of(config(tmp_path, method, data=data), prompt_length=32)
        return read.rows, read.length, read.documents

    assert shape("curriculum_sft", **SHORT, packing=False) == (2, 128, 1)
    assert shape("curriculum_sft", **SHORT, packing=True) == (2, 128, 2)
    assert shape("curriculum_sft", **SHORT, packing="padding_free") == (1, 256, 2)
    assert shape("dpo", **SHORT) == (4, 128, 1)
    rollout = {"prompts_per_rollout": 16, "completions_per_prompt": 8, "max_new_tokens": 64}
    assert shape("grpo", **rollout) == (8, 32 + 64 - 1, 1)


def test_a_config_that_has_no_prediction_is_refused(tmp_path):
    for sections, said in (
        ({"trainer": {"precision": "transformer-engine"}}, "trainer.precision is 'transformer-engine'"),
        ({"trainer": {"strategy": "fsdp"}}, "strategy is 'fsdp'; known are 'auto', 'ddp' and FSDP2Strategy"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            work_of(config(tmp_path, **sections))
    with pytest.raises(ValueError, match="give --prompt-length"):
        work_of(config(tmp_path, "grpo"))
    with pytest.raises(ValueError, match="64 x 8 completions do not divide into 48 batches"):
        work_of(config(tmp_path, "grpo"), devices=3, prompt_length=8)
