"""What `rewarm plan memory` says of the shipped configs."""

import re

import pytest
import torch
import yaml

from rewarm.cli import main
from tests.cost_configs import ROOT, SHAPE, SHORT, config

METHODS = ("continual_pretraining", "curriculum_sft", "dpo", "grpo")


@pytest.mark.parametrize("overlay", ["gpu", "ddp", "fsdp"])
def test_every_shipped_config_has_a_prediction(tmp_path, capsys, overlay):
    model = tmp_path / "model.yaml"
    model.write_text(yaml.safe_dump(SHAPE))
    arguments = [str(ROOT / "configs" / f"{method}.yaml") for method in METHODS]
    arguments += ["--model", str(model), "--prompt-length", "64", "--memory", "80", "--device", "H200"]
    arguments += ["--devices", "1" if overlay == "gpu" else "2"]
    arguments += ["--overlay", str(ROOT / "configs" / "trainer" / f"{overlay}.yaml")]
    main(["plan", "memory", *arguments])
    out = capsys.readouterr().out
    assert out.split("\n")[0].split() == list(METHODS)
    for label in ("weights", "optimizer", "cache", "peak memory", "seconds per step"):
        assert re.search(rf"^{label} ", out, re.M), label
    assert re.search(r"^fits( +yes){4}$", out, re.M)
    assert bool(re.search("^gathered ", out, re.M)) == (overlay == "fsdp")
    assert bool(re.search("^buckets ", out, re.M)) == (overlay == "ddp")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--memory", "0"], "memory is 0.0; it must be above 0"),
        (["--device", "Abacus"], "device is 'Abacus', whose peak is not known here"),
        (["--devices", "0"], "devices is 0; it must be at least 1"),
        (["--overlay", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--model", "nowhere.yaml"], "model is 'nowhere.yaml': no such file"),
        (["--model", "nowhere"], "model is 'nowhere': no such folder, and not on the Hub or no network"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="defaults are this machine's device")
def test_a_wrong_argument_is_one_line_that_names_it(tmp_path, capsys, arguments, said):
    with pytest.raises(SystemExit):
        main(["plan", "memory", config(tmp_path, data=SHORT), *arguments])
    assert capsys.readouterr().err == f"rewarm: error: {said}\n"
