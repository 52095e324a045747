"""Three parts of rewarm in a Lightning project of another kind: a classifier of points, easy to hard.

Run: python examples/plug_into_your_project.py
"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset

import rewarm


class Classifier(LightningModule):
    """A plain module: nothing here knows of rewarm."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Cross entropy."""
        points, labels = batch
        return torch.nn.functional.cross_entropy(self.net(points), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The peak learning rate; the schedule is LRSchedule's business."""
        return torch.optim.AdamW(self.parameters(), lr=0.02)


def main() -> float:
    """Train and return the accuracy."""
    seed_everything(0)
    points = torch.randn(2000, 2)
    labels = (points.prod(dim=1) > 0).long()
    margin = points.abs().amin(dim=1)  # far from both axes is easy

    curriculum = rewarm.Curriculum(
        len(points), scores=(-margin).tolist(), order="ascending", pacing=rewarm.LinearPacing(200, start=0.2)
    )
    sampler = rewarm.CurriculumSampler(curriculum, batch_size=64)
    loader = DataLoader(TensorDataset(points, labels), batch_sampler=sampler)

    model = Classifier()
    callbacks = [
        rewarm.LRSchedule(rewarm.wsd(warmup=20, decay=0.2, end=0.3)),
        rewarm.CheckpointAveraging(mode="last_k", k=5, every_n_steps=10),
    ]
    trainer = Trainer(
        max_steps=300, accelerator="cpu", callbacks=callbacks, logger=False, enable_checkpointing=False
    )
    trainer.fit(model, loader)
    accuracy = (model.net(points).argmax(1) == labels).float().mean().item()
    print(f"accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
