"""LightningCLI with this project's defaults."""

import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from rewarm.callbacks.lr_schedule import LRSchedule
from rewarm.schedule_plot import draw


class _SaveConfig(SaveConfigCallback):
    """Saves the config beside the logs; without a logger Lightning would write it where the user stands."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


def run_lightning(arguments: list[str]) -> None:
    """Run `fit`, `validate`, `test` or `predict`.

    Args:
        arguments: The subcommand and its options.
    """
    # LightningCLI reads the command line itself, and starts other ranks with it.
    sys.argv = [sys.argv[0], *arguments]
    # No validation data is a choice, not a mistake.
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
    # Then our main shows a wrong option in one line, as all other mistakes.
    options = {"exit_on_error": False}
    LightningCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=_SaveConfig,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        parser_kwargs={"prog": "rewarm", **options, **dict.fromkeys(LightningCLI.subcommands(), options)},
        auto_configure_optimizers=False,
    )


def write_schedules(configs: list[str], steps: int | None, plot: str | None, csv: str | None) -> None:
    """Draw or tabulate the learning rate of some configs.

    Args:
        configs: Config files of `rewarm fit`.
        steps: Optimizer steps; None takes each config's `trainer.max_steps`.
        plot: PNG file to write.
        csv: CSV file to write; without either the table goes to stdout.

    Raises:
        ValueError: If a config has no `LRSchedule`, no learning rate or no number of steps.
    """
    curves = {Path(config).stem: _curve(config, steps) for config in configs}
    if plot is None and csv is None:
        for name, curve in curves.items():
            sys.stdout.write("".join(f"{name},{step},{lr:.6g}\n" for step, lr in enumerate(curve, 1)))
        return
    draw(curves, None if plot is None else Path(plot), None if csv is None else Path(csv))


def _curve(config: str, steps: int | None) -> list[float]:
    if not Path(config).is_file():
        raise ValueError(f"{config}: no such file")
    parsed: Any = config_parser().parse_path(config)
    callbacks = parsed.trainer.callbacks or []
    schedules = [c for c in callbacks if c.class_path.rsplit(".", 1)[-1] == LRSchedule.__name__]
    if not schedules:
        raise ValueError(f"{config}: trainer.callbacks has no rewarm.LRSchedule")
    lr = parsed.model.init_args.optimizer.init_args.lr
    total = steps or schedules[0].init_args.total_steps or parsed.trainer.max_steps
    if total is None or total < 1:
        raise ValueError(f"{config}: trainer.max_steps is not set, so give --steps")
    schedule = _instantiate(schedules[0].init_args.schedule)
    return [lr * schedule(step, total) for step in range(1, total + 1)]


def _instantiate(section: Any) -> Any:
    module, name = section.class_path.rsplit(".", 1)
    return getattr(import_module(module), name)(**section.init_args.as_dict())


def config_parser() -> LightningArgumentParser:
    """A parser of the same files that doesn't run anything."""
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    parser.add_argument("--seed_everything", type=bool | int)
    parser.add_argument("--ckpt_path", type=str | None)
    return parser
