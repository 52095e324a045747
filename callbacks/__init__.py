"""Lightning callbacks that work with any LightningModule."""

from typing import TYPE_CHECKING

from rewarm.lazy import public_names

if TYPE_CHECKING:
    from rewarm.callbacks.checkpoint import Checkpoint as Checkpoint
    from rewarm.callbacks.checkpoint_averaging import CheckpointAveraging as CheckpointAveraging
    from rewarm.callbacks.difficulty_filter import DifficultyFilter as DifficultyFilter
    from rewarm.callbacks.exact_resume import ExactResume as ExactResume
    from rewarm.callbacks.forgetting import Forgetting as Forgetting
    from rewarm.callbacks.hugging_face_export import HuggingFaceExport as HuggingFaceExport
    from rewarm.callbacks.lr_schedule import LRSchedule as LRSchedule
    from rewarm.callbacks.pass_rate_monitor import PassRateMonitor as PassRateMonitor
    from rewarm.callbacks.preemption import Preemption as Preemption
    from rewarm.callbacks.sample_table import SampleTable as SampleTable
    from rewarm.callbacks.throughput import Throughput as Throughput
else:
    __all__, __getattr__, __dir__ = public_names(__spec__)
