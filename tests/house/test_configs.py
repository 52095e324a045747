"""Every shipped config parses, and resolves to what it did when somebody last looked at it."""

from pathlib import Path

import pytest
import yaml

from rewarm.commands.fit import config_parser

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


def overlaid(path):
    """What an overlay makes of the keys that it sets, on top of a config; of callbacks their names."""
    overlay, parser = yaml.safe_load(path.read_text()), config_parser()
    base = parser.parse_path(str(ROOT / "configs" / "curriculum_sft.yaml"))
    merged = parser.parse_object(overlay, namespace=base)
    trainer = yaml.safe_load(parser.dump(merged, skip_unset=False))["trainer"]
    trainer["callbacks"] = [callback["class_path"] for callback in trainer["callbacks"]]
    return {key: trainer[key.removesuffix("+")] for key in overlay["trainer"]}


@pytest.mark.parametrize("path", FIT, ids=lambda p: str(p.relative_to(ROOT)))
def test_config_resolves_to_its_golden_file(path):
    golden = GOLDEN / f"{path.parent.name}_{path.stem}.yaml"
    assert golden.is_file(), f"look at what {path.name} resolves to, then: python -m tests.house.test_configs"
    assert resolved(path) == yaml.safe_load(golden.read_text())


@pytest.mark.parametrize("path", FIT, ids=lambda p: str(p.relative_to(ROOT)))
def test_config_begins_with_four_lines_of_purpose_command_hardware_and_sign(path):
    assert [line[:2] for line in path.read_text().splitlines()[:4]] == ["# "] * 4


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda p: p.stem)
def test_overlay_sets_only_the_trainer_and_resolves_to_its_golden_file(path):
    assert set(yaml.safe_load(path.read_text())) == {"trainer"}
    assert overlaid(path) == yaml.safe_load((GOLDEN / f"trainer_{path.stem}.yaml").read_text())


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for path in FIT:
        (GOLDEN / f"{path.parent.name}_{path.stem}.yaml").write_text(yaml.safe_dump(resolved(path)))
    for path in OVERLAYS:
        (GOLDEN / f"trainer_{path.stem}.yaml").write_text(yaml.safe_dump(overlaid(path)))
