"""PyTorch Lightning modules for training language models along a curriculum.

Every public name can be imported from here; nothing heavy is loaded before it is used.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "lightning_modules.continual_pretraining": ["ContinualPretraining"],
    "lightning_modules.curriculum_sft": ["CurriculumSFT"],
    "lightning_modules.dpo": ["DPO"],
    "lightning_modules.grpo": ["GRPO"],
    "lightning_modules.base": ["LanguageModule"],
    "lightning_modules.policy": ["Policy"],
    "lightning_modules.fsdp2_strategy": ["FSDP2Strategy"],
    "datamodules.corpora": ["CorpusData"],
    "datamodules.instructions": ["InstructionData"],
    "datamodules.preferences": ["PreferenceData"],
    "datamodules.prompts": ["PromptData"],
    "datamodules.loader": ["WindowLoader"],
    "datamodules.samplers": ["CurriculumSampler", "MixtureSampler"],
    "datamodules.score_table": ["ScoreTable", "join_scores"],
    "callbacks.lr_schedule": ["LRSchedule"],
    "callbacks.difficulty_filter": ["DifficultyFilter"],
    "callbacks.checkpoint": ["Checkpoint"],
    "callbacks.checkpoint_averaging": ["CheckpointAveraging"],
    "callbacks.sample_table": ["SampleTable"],
    "callbacks.pass_rate_monitor": ["PassRateMonitor"],
    "callbacks.throughput": ["Throughput"],
    "callbacks.exact_resume": ["ExactResume"],
    "callbacks.forgetting": ["Forgetting"],
    "callbacks.preemption": ["Preemption"],
    "callbacks.hugging_face_export": ["HuggingFaceExport"],
    "curriculum.curriculum": ["Curriculum"],
    "curriculum.gates": ["AtLeast", "Band", "TopShare"],
    "curriculum.live_scores": ["Ability", "RunningScore", "ScoreChange"],
    "curriculum.pacing": [
        "CyclicalPacing",
        "ExponentialStepPacing",
        "GeometricPacing",
        "LinearPacing",
        "OnePassPacing",
        "RootPacing",
        "SingleStepPacing",
        "StagedPacing",
    ],
    "curriculum.pacing_windows": ["GaussianWindow", "SigmoidWindow"],
    "text.sft_transforms": ["EraseSystemPrompt", "RTuning", "Spectrum"],
    "curriculum.ordering": ["Blocked", "EasyToHard", "Folded", "Interleaved", "Staged"],
    "curriculum.packing": ["Packer"],
    "schedules.phases": ["Phase", "Schedule"],
    "schedules.published": [
        "branch",
        "constant",
        "cosine",
        "cosine_power",
        "infinite",
        "linear",
        "power",
        "rewarmed",
        "rex",
        "uba",
        "wsd",
        "wsdc",
        "wsds",
    ],
    "schedules.refined": ["refined"],
    "schedules.loss_laws": ["AnnealingLaw", "MultiPowerLaw"],
    "schedules.law_fits": ["Curve", "fit_annealing_law", "fit_multi_power_law", "predict_loss"],
    "schedules.rules": ["sft_share", "split_budget", "step_law_batch_tokens", "step_law_lr"],
    "commands.plan": ["read_curve", "refined_from_log"],
    "functional.gradients": ["clip_gradients_", "gradient_norm"],
    "functional.logprob": ["token_logprobs"],
    "objectives.token_losses": [
        "DFT",
        "DITTO",
        "Distillation",
        "EntropySFT",
        "LabelSmoothing",
        "MultiTask",
        "NLL",
        "ZLoss",
    ],
    "functional.preference": ["dpo_loss", "nca_pair_loss"],
    "functional.policy_gradient": ["clipped_policy_loss", "group_advantages", "kl_estimate"],
    "rollouts.engine": ["TransformersEngine"],
    "rollouts.rewards": ["exact_number", "gsm8k", "math_verify", "reasoning_gym"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *_HOME_OF]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOME_OF:
        classes = ", ".join(sorted(known for known in _HOME_OF if known[0].isupper()))
        raise AttributeError(f"rewarm has no {name!r}; its classes are {classes}")
    return getattr(importlib.import_module(f"rewarm.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
