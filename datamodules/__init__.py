"""LightningDataModules, and the samplers and loaders that own order and pacing."""

from typing import TYPE_CHECKING

from rewarm.lazy import public_names

if TYPE_CHECKING:
    from rewarm.datamodules.corpora import CorpusData as CorpusData
    from rewarm.datamodules.instructions import InstructionData as InstructionData
    from rewarm.datamodules.loader import WindowLoader as WindowLoader
    from rewarm.datamodules.preferences import PreferenceData as PreferenceData
    from rewarm.datamodules.prompts import PromptData as PromptData
    from rewarm.datamodules.samplers import CurriculumSampler as CurriculumSampler
    from rewarm.datamodules.samplers import MixtureSampler as MixtureSampler
    from rewarm.datamodules.score_table import ScoreTable as ScoreTable
    from rewarm.datamodules.score_table import join_scores as join_scores
else:
    __all__, __getattr__, __dir__ = public_names(__spec__)
