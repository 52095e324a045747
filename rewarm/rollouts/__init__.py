"""From prompts to scored completions: generation engines, sampling, rewards."""

from typing import TYPE_CHECKING

from rewarm.lazy import public_names

if TYPE_CHECKING:
    from rewarm.rollouts.engine import TransformersEngine as TransformersEngine
    from rewarm.rollouts.rewards import exact_number as exact_number
    from rewarm.rollouts.rewards import gsm8k as gsm8k
    from rewarm.rollouts.rewards import math_verify as math_verify
    from rewarm.rollouts.rewards import reasoning_gym as reasoning_gym
else:
    __all__, __getattr__, __dir__ = public_names(__spec__)
