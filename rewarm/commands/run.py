"""`rewarm run`: the stages of a pipeline in a row."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path

from rewarm.pipelines.pipeline import read_pipeline
from rewarm.pipelines.processes import answering, ignore, launched_as, leave, say, signals, when_parent_ends
from rewarm.pipelines.stages import read_marker, run_stage


def run(pipeline: str, *, output: str, set: Mapping[str, str] | None = None) -> None:
    """Run the stages of a pipeline in a row; go on where it was interrupted.

    Each is a process of its own; when all are finished, a report compares them.

    Under torchrun or SLURM every rank runs this: stages that train run on all ranks with the launcher's
    environment, commands run on rank 0 while the others wait for them in the shared folder.

    A stage that was interrupted goes on from its newest whole checkpoint; damaged ones are renamed to
    `NAME.damaged`. SIGTERM goes on to the stage, which saves a checkpoint; then this ends with exit code 143.

    Args:
        pipeline: Pipeline file, such as configs/pipelines/tiny.yaml.
        output: Folder for everything that the stages write; the same folder again goes on.
        set: Values for variables of the pipeline, as YAML.

    Raises:
        ValueError: If the file is wrong, a variable is unknown or missing, a stage was finished with other
            settings, its folder is somebody else's, or a stage fails.
        SystemExit: With code 143, after SIGTERM.
    """
    stages = read_pipeline(pipeline, output, set or {})
    rank, ranks = launched_as()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        when_parent_ends(signal.SIGTERM)  # the agent on this node; then there is time for a checkpoint
    with answering({**dict.fromkeys(signals(), ignore), signal.SIGTERM: leave}):
        for number, stage in enumerate(stages, 1):
            marker = read_marker(Path(output) / stage.name, stage)
            if marker.get("finished"):
                seconds = marker["seconds"]
                say(rank, f"[{number}/{len(stages)}] {stage.name}: finished before, {seconds:.0f} s")
                continue
            say(rank, f"[{number}/{len(stages)}] {stage.name}")
            run_stage(Path(output) / stage.name, stage, rank, ranks, marker)
    if rank == 0:
        from rewarm.pipelines.report import write_report

        write_report(Path(output), [stage.name for stage in stages if not stage.command])
