"""One LightningModule per training method."""

from typing import TYPE_CHECKING

from rewarm.lazy import public_names

if TYPE_CHECKING:
    from rewarm.lightning_modules.base import LanguageModule as LanguageModule
    from rewarm.lightning_modules.continual_pretraining import ContinualPretraining as ContinualPretraining
    from rewarm.lightning_modules.curriculum_sft import CurriculumSFT as CurriculumSFT
    from rewarm.lightning_modules.dpo import DPO as DPO
    from rewarm.lightning_modules.exact_steps import StepCounts as StepCounts
    from rewarm.lightning_modules.fsdp2_strategy import FSDP2Strategy as FSDP2Strategy
    from rewarm.lightning_modules.gradient_steps import GradientSteps as GradientSteps
    from rewarm.lightning_modules.grpo import GRPO as GRPO
    from rewarm.lightning_modules.policy import Policy as Policy
else:
    __all__, __getattr__, __dir__ = public_names(__spec__)
