"""What a pipeline's stages leave when nothing comes between, without starting Python for each of them."""

from pathlib import Path

from rewarm.cli import main
from rewarm.pipelines.pipeline import read_pipeline
from rewarm.pipelines.stages import write_overlay
from tests.distributed.ranks import on_ranks


def fit_stages(pipeline: str, output: Path, ranks: int = 1, *more: str) -> None:
    """Fit each stage of a pipeline as `rewarm run` does, but in processes that have imported everything.

    Args:
        pipeline: Its file, all of whose stages fit.
        output: Folder for everything.
        ranks: How many of them.
        more: Further arguments of `rewarm fit`.
    """
    for stage in read_pipeline(pipeline, str(output), {}):
        folder = output / stage.name
        folder.mkdir(parents=True)
        write_overlay(folder, stage)
        configs = [str(path) for path in (*stage.configs, folder / "overlay.yaml")]
        on_ranks(ranks, main, ["fit", *(f"--config={path}" for path in configs), *more])
