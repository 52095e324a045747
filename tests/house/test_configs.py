"""Every shipped config parses, and resolves to what it did when somebody last looked at it."""

import json
from pathlib import Path

import pytest
import yaml

from rewarm.lightning_cli import config_parser

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
FIT = sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs" / "tiny").glob("*.yaml")])
FIT = [path for path in FIT if "class_path" in path.read_text()]
OVERLAYS = sorted((ROOT / "configs" / "trainer").glob("*.yaml"))


def resolved(path):
    """The model, data and callbacks with all defaults; the trainer's other keys are Lightning's."""
    parser = config_parser()
    parsed = yaml.safe_load(parser.dump(parser.parse_path(str(path)), skip_unset=False))
    return {"model": parsed["model"], "data": parsed["data"], "callbacks": parsed["trainer"]["callbacks"]}


@pytest.mark.parametrize("path", FIT, ids=lambda p: str(p.relative_to(ROOT)))
def test_config_resolves_to_its_golden_file(path):
    golden = GOLDEN / f"{path.parent.name}_{path.stem}.yaml"
    assert golden.is_file(), f"look at what {path.name} resolves to, then: python -m tests.house.test_configs"
    assert resolved(path) == yaml.safe_load(golden.read_text())


@pytest.mark.parametrize("path", FIT, ids=lambda p: str(p.relative_to(ROOT)))
def test_config_begins_with_four_lines_of_purpose_command_hardware_and_sign(path):
    assert [line[:2] for line in path.read_text().splitlines()[:4]] == ["# "] * 4


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda p: p.stem)
def test_overlay_sets_only_the_trainer(path):
    parsed = yaml.safe_load(path.read_text())
    assert set(parsed) == {"trainer"}
    parser = config_parser()
    base = parser.parse_path(str(ROOT / "configs" / "curriculum_sft.yaml"))
    merged = parser.parse_object(json.loads(json.dumps(parsed)), namespace=base)
    for key, value in parsed["trainer"].items():
        assert merged.trainer[key] == value


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for path in FIT:
        (GOLDEN / f"{path.parent.name}_{path.stem}.yaml").write_text(yaml.safe_dump(resolved(path)))
