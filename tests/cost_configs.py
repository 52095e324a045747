"""Configs to predict the costs of."""

from pathlib import Path

import yaml

from tests import tiny

ROOT = Path(__file__).parents[1]
SHAPE = {**tiny.LLAMA, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192}


def config(tmp_path, method="curriculum_sft", name="made", **sections):
    """A shipped config with some of its values changed."""
    made = yaml.safe_load((ROOT / "configs" / f"{method}.yaml").read_text())
    made["model"]["init_args"] |= {"model": SHAPE} | sections.get("model", {})
    made["data"]["init_args"] |= sections.get("data", {})
    made["trainer"] |= {"accelerator": "cpu", "callbacks": []} | sections.get("trainer", {})
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(made))
    return str(path)


FSDP = {"strategy": {"class_path": "rewarm.FSDP2Strategy"}}
SHORT = {"max_length": 128, "batch_size": 2}
