"""`rewarm fit`, `validate`, `test` and `predict`: LightningCLI with this project's defaults."""

import os
import pickle
import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from rewarm.checkpoints.whole import is_sharded, newest_whole, read_metadata, verify
from rewarm.checks import refuse_replaced

# What Lightning looks up by itself.
_NAMED = ("best", "last", "hpc", "registry")


class _SaveConfig(SaveConfigCallback):
    """Saves the config beside the logs; without a logger Lightning would write it where the user stands."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


class _CLI(LightningCLI):
    """LightningCLI that loads whole checkpoints only, and finds the newest one of a folder."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        command = self.config.subcommand
        given = self.config[command].get("ckpt_path")
        if given is not None and str(given).split(":")[0] not in _NAMED and "://" not in str(given):
            self.config[command].ckpt_path = checkpoint_to_load(Path(given), command)

    def before_instantiate_classes(self) -> None:
        # Lightning raises RuntimeError for what is a mistake in the job script.
        if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
            try:
                SLURMEnvironment()
            except RuntimeError as error:
                raise ValueError(str(error)) from error

    def after_instantiate_classes(self) -> None:
        strategy = self.trainer.strategy
        if isinstance(strategy, ModelParallelStrategy):
            _check_sizes(strategy, self.trainer.num_nodes)


def _check_sizes(strategy: ModelParallelStrategy, nodes: int) -> None:
    """Refuse sizes that don't fit the number of processes, before any of them waits for the others."""
    from rewarm.lightning_modules.fsdp2_strategy import parallel_sizes

    data, tensor = parallel_sizes(strategy)
    processes = nodes * strategy.num_processes
    if data != "auto" and tensor != "auto" and data * tensor != processes:
        raise ValueError(
            f"data_parallel_size is {data} and tensor_parallel_size {tensor}, which makes {data * tensor}"
            f" processes, but trainer.devices and trainer.num_nodes make {processes}"
        )


def checkpoint_to_load(path: Path, command: str) -> str | None:
    """Return the checkpoint that `--ckpt_path` means.

    Args:
        path: A checkpoint; or a folder of checkpoints, of which it is the newest whole one. Damaged ones that
            are passed over are told. A folder need not be there yet.
        command: `fit` goes on from it, and starts from the beginning if a folder has none; the others need
            one.

    Returns:
        Its path, or None for the beginning.

    Raises:
        ValueError: If it is missing, damaged, or has weights alone and is to be gone on from.
    """
    is_folder = path.is_dir() if path.exists() else path.suffix != ".ckpt"
    if is_folder and not is_sharded(path):
        found = newest_whole(path, rank_zero_info)
        if found is None and command != "fit":
            raise ValueError(f"ckpt_path {path}: no whole checkpoint in this folder")
        rank_zero_info(
            f"ckpt_path {path}: no whole checkpoint yet, so this starts from the beginning"
            if found is None
            else f"ckpt_path {path}: {found.name} is the newest whole checkpoint"
        )
        return None if found is None else str(found)
    if getattr(rank_zero_only, "rank", 0) == 0:  # to read it once is enough
        _check(path, command)
    elif path.is_dir():
        read_metadata(path)  # each rank has torch unpickle it
    return str(path)


def _check(path: Path, command: str) -> None:
    try:
        verify(path)
    except ValueError as error:
        whole = newest_whole(path.parent, lambda _: None)
        beside = "there is no whole one beside it" if whole is None else f"the newest whole one is {whole}"
        raise ValueError(f"ckpt_path {error}; {beside}") from error
    content = path / "meta.pt" if path.is_dir() else path
    if command == "fit" and content.is_file():
        try:
            state = torch.load(content, mmap=True, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            return  # objects of a foreign module: Lightning asks for `weights_only`
        if "lr_schedulers" not in state:
            raise ValueError(
                f"ckpt_path {path} has weights alone (save_weights_only); fit needs all of the state"
            )


def run_lightning(arguments: list[str]) -> None:
    """Run `fit`, `validate`, `test` or `predict`.

    Args:
        arguments: The subcommand and its options.
    """
    # LightningCLI reads the command line itself, and starts other ranks with it. By `python -m rewarm` they
    # would take a folder `rewarm` where the user stands for the package.
    sys.argv = [sys.argv[0], *arguments]
    os.environ["PYTHONSAFEPATH"] = "1"
    # No validation data is a choice, not a mistake.
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
    # Then our main shows a wrong option in one line, as all other mistakes.
    options = {"exit_on_error": False}
    with _replaced_arguments_named():
        _CLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=_SaveConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_kwargs={"prog": "rewarm", **options, **dict.fromkeys(_CLI.subcommands(), options)},
            auto_configure_optimizers=False,
        )


@contextmanager
def _replaced_arguments_named() -> Iterator[None]:
    """Say what to write now where the parser knows only that an option is not accepted."""
    try:
        yield
    except ArgumentError as error:
        # The innermost class is the one that does not accept the option.
        refused = r"class_path '([^']+)':(?:(?!class_path).)*?Option '([^']+)' is not accepted"
        for path, option in re.findall(refused, str(error), re.DOTALL):
            module, _, name = path.rpartition(".")
            refuse_replaced(getattr(import_module(module), name), option)
        raise


def config_parser() -> LightningArgumentParser:
    """Return a parser of the same files that doesn't run anything."""
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    parser.add_argument("--seed_everything", type=bool | int)
    parser.add_argument("--ckpt_path", type=str | None)
    return parser


def read_config(file: str, overlays: Sequence[str] = ()) -> Any:
    """Parse a config without making what it describes.

    Args:
        file: Config file.
        overlays: Further config files, each on top of those before it.

    Returns:
        The sections `trainer`, `model` and `data`, with all defaults.

    Raises:
        ValueError: If a file is missing, or is no config.
        ReplacedArgumentError: If it has an argument that is gone; says what to write now.
    """
    parser: Any = config_parser()
    parsed: Any = None
    for name in (file, *overlays):
        if not Path(name).is_file():
            raise ValueError(f"{name}: no such file")
        try:
            with _replaced_arguments_named():
                if parsed is None:
                    parsed = parser.parse_path(name)
                else:
                    parsed = parser.parse_object(yaml.safe_load(Path(name).read_text()), namespace=parsed)
        except ArgumentError as error:
            raise ValueError(f"{name} is no config of `rewarm fit`: {error}") from error
    return parsed


def made_model(parsed: Any) -> LightningModule:
    """Make the module of a parsed config alone: the trainer and the data would look for devices and files."""
    parser: Any = config_parser()
    # Versions of jsonargparse differ in the name.
    make = getattr(parser, "instantiate", parser.instantiate_classes)
    made: LightningModule = make(Namespace(model=parsed.model)).model
    return made
