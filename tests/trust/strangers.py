"""Checkpoints, models and data of a stranger, each of which would make a file if its code ran."""

import io
import json
import os
import pickle
import tarfile
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoConfig, AutoModelForCausalLM

from rewarm.checkpoints.whole import write_checksums
from tests import tiny


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def state(**more):
    return {"global_step": 4, "state_dict": {"policy.model.w": torch.zeros(2)}, "lr_schedulers": [], **more}


def checkpoints(folder: Path, mark: Path) -> dict[str, Path]:
    """Write checkpoints with code in each place where there is a pickle; by the name of the place."""
    paths = {
        place: folder / f"{place} step=4.ckpt" for place in ("file", "metadata", "sums", "rest", "outside")
    }
    torch.save(state(evil=Touch(mark)), paths["file"])
    for place in ("metadata", "sums", "rest", "outside"):
        path = paths[place]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            dcp.save(
                {"model": {"x": torch.zeros(3)}}, storage_writer=dcp.FileSystemWriter(path), no_dist=True
            )
        torch.save(state(evil=Touch(mark)) if place == "rest" else state(), path / "meta.pt")
        if place in ("metadata", "sums"):
            (path / ".metadata").write_bytes(pickle.dumps(Touch(mark)))
    write_checksums(paths["sums"])
    metadata = pickle.loads((paths["outside"] / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = f"../{info.relative_path}"
    (paths["outside"] / ".metadata").write_bytes(pickle.dumps(metadata))
    return paths


def models(folder: Path, mark: Path) -> dict[str, Path]:
    """Write Hugging Face folders with code of their own, for model types that are known and unknown."""
    code = f"open({str(mark)!r}, 'w')\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M\n"
    tokenizer = f"open({str(mark)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as T\n"
    paths = {kind: folder / kind for kind in ("known", "unknown", "tokenizer", "pickle")}
    config = dict(tiny.LLAMA)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    for kind, path in paths.items():
        model.save_pretrained(path)
        tiny.save_tokenizer(path)
        fields = json.loads((path / "config.json").read_text())
        if kind in ("known", "unknown"):
            fields["auto_map"] = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
            fields["model_type"] = "evil" if kind == "unknown" else fields["model_type"]
            (path / "evil.py").write_text(code)
            (path / "config.json").write_text(json.dumps(fields))
        elif kind == "tokenizer":
            named = json.loads((path / "tokenizer_config.json").read_text())
            named |= {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}
            (path / "tokenizer_config.json").write_text(json.dumps(named))
            (path / "evil.py").write_text(tokenizer)
        else:
            (path / "model.safetensors").unlink()
            torch.save({"x": Touch(mark)}, path / "pytorch_model.bin")
    return paths


def data(folder: Path, mark: Path) -> dict[str, Path]:
    """Write data folders with a loading script, with pickles, and with pickles in an archive."""
    paths = {kind: folder / kind for kind in ("script", "pickle", "archive")}
    for path in paths.values():
        path.mkdir()
    (paths["script"] / "script.py").write_text(
        f"open({str(mark)!r}, 'w')\nimport datasets\nclass D(datasets.GeneratorBasedBuilder):\n    pass\n"
    )
    (paths["pickle"] / "train.pkl").write_bytes(pickle.dumps(Touch(mark)))
    with tarfile.open(paths["archive"] / "train.tar", "w") as archive:
        for suffix in ("pickle", "pth", "pyd"):
            content = pickle.dumps(Touch(mark))
            entry = tarfile.TarInfo(f"0001.{suffix}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return paths
