"""What README and the guides show in Python runs."""

import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

import rewarm
from tests import tiny

ROOT = Path(__file__).parents[2]


def blocks(file, word):
    """The Python blocks of a guide that hold a word."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(), re.DOTALL)
    return [block for block in found if word in block]


@pytest.mark.parametrize("file", ["README.md", "docs/objectives.md"])
def test_the_objectives_that_are_shown_can_be_made(file):
    (block,) = blocks(file, "rewarm.GRPO(")
    exec(block, {"rewarm": rewarm, "model": dict(tiny.LLAMA)})


@pytest.mark.parametrize("file", ["README.md", "docs/objectives.md"])
def test_three_lines_give_a_module_exact_steps_and_clipping(file):
    (block,) = blocks(file, "StepCounts")
    made, loss, clip = block.splitlines()
    run = {}
    exec(
        "def make(self):\n"
        f"    {made}\n"
        "def step(self, losses, batch, batch_idx):\n"
        f"    {loss}\n"
        "def clip(self, optimizer, gradient_clip_val, gradient_clip_algorithm):\n"
        f"    {clip}\n",
        {"rewarm": rewarm},
        run,
    )

    class Regression(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(3, 1)
            torch.nn.init.constant_(self.net.weight, 0.5)
            torch.nn.init.constant_(self.net.bias, 0.0)
            run["make"](self)

        def training_step(self, batch, batch_idx):
            return run["step"](self, (self.net(batch["x"])[:, 0] - 1.0).square(), batch, batch_idx)

        def configure_gradient_clipping(
            self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
        ):
            run["clip"](self, optimizer, gradient_clip_val, gradient_clip_algorithm)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    torch.manual_seed(0)
    rows = torch.randn(7, 3)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    weights = []
    for size, accumulate in ((7, 1), (3, 3)):  # micro-batches of 3, 3 and 1 rows
        batches = [{"x": part, "counts": {"rows": len(part)}} for part in rows.split(size)]
        loader = DataLoader(batches, batch_size=None)
        model = Regression()
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=0.5,
            enable_model_summary=False,
            **quiet,
        )
        trainer.fit(model, rewarm.WindowLoader(loader, accumulate))
        weights.append(model.net.weight.detach().clone())
    torch.testing.assert_close(weights[0], weights[1])
    start = torch.full((1, 3), 0.5)
    assert 0.0 < (weights[0] - start).norm() <= 0.05 + 1e-6  # the learning rate times the clipped norm


MOVED = {
    name
    for row in (ROOT / "CHANGELOG.md").read_text().splitlines()
    if row.startswith("| ")
    for name in re.findall(r"rewarm\.([A-Z]\w+)", row)
}


def test_what_the_change_log_says_to_write_is_there():
    assert {"Sigmoid", "NCA", "Sum", "Clipped", "FSDP2Strategy"} <= MOVED
    assert set(rewarm.__all__) >= MOVED
