"""Peak memory of `rewarm average` on models of 1.1B parameters with random weights, made here.

Run: python -m benchmarks.average_memory --folder FOLDER. The checkpoints go to that folder and are removed in
the end: K + 1 times 2.2 GB in bfloat16. Linux only: the peak is the kernel's, of the whole process with
interpreter, libraries and mapped files.
"""

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from rewarm.checkpoints.weights import DTYPES

MODEL = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32_000,
}
KINDS = ("folder", "file", "shards")
AVERAGE = """
import sys
from rewarm.cli import main

main(["average", *sys.argv[1:]])
with open("/proc/self/status") as lines:
    print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")))
"""


def make(path: Path, kind: str, dtype: str, seed: int, fields: dict[str, Any]) -> None:
    """Save a model with random weights: a Hugging Face folder, or a checkpoint as file or shards."""
    config = AutoConfig.for_model(**fields)
    torch.manual_seed(seed)
    torch.set_default_dtype(DTYPES[dtype])
    model = AutoModelForCausalLM.from_config(config)
    if kind == "folder":
        model.save_pretrained(path)
        return
    weights = {f"policy.model.{name}": tensor for name, tensor in model.state_dict().items()}
    rest = {"rewarm_model": {"config": config.to_dict(), "tokenizer": None}, "callbacks": {}}
    if kind == "file":
        torch.save(rest | {"state_dict": weights}, path)
    else:
        dcp.save({"state_dict": weights}, checkpoint_id=path, no_dist=True)
        torch.save(rest, path / "meta.pt")


def main() -> None:
    """Make the checkpoints, average them, and print the peak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where there is room for the checkpoints")
    parser.add_argument("--k", type=int, default=6, help="checkpoints, in turns of every kind")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="of the weights")
    parser.add_argument("--layers", type=int, default=MODEL["num_hidden_layers"], help="of the model")
    parser.add_argument("--make", nargs=3, metavar=("PATH", "KIND", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    fields = MODEL | {"num_hidden_layers": options.layers}
    if options.make:
        path, kind, seed = options.make
        make(Path(path), kind, options.dtype, int(seed), fields)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        paths = [folder / f"{number}.ckpt" for number in range(options.k)]
        for number, path in enumerate(paths):
            again = [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "benchmarks.average_memory",
                *sys.argv[1:],
                "--make",
            ]
            subprocess.run([*again, str(path), KINDS[number % 3], str(number)], check=True)
        size = sum(file.stat().st_size for file in paths[0].glob("*.safetensors"))
        began = time.perf_counter()
        command = [sys.executable, "-W", "ignore", "-c", AVERAGE, *map(str, paths)]
        done = subprocess.run(
            [*command, "--output", str(folder / "mean")], stdout=subprocess.PIPE, text=True, check=True
        )
        seconds, peak = time.perf_counter() - began, int(done.stdout.split()[-1])
    parameters = size / DTYPES[options.dtype].itemsize / 1e9
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{platform.machine()}, {versions}; {options.k} checkpoints of {parameters:.2f}B parameters")
    print(f"one checkpoint {size / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB: {peak / size:.2f} times it")
    print(f"{seconds:.0f} s")


if __name__ == "__main__":
    main()
