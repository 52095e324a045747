"""Pure functions on tensors and numbers. Imports torch and the standard library only.

Shapes, one legend for the whole project:

**B** sequences (or rows of a batch), **T** token positions, **V** vocabulary, **D** hidden size, **P**
preference pairs, **Q** prompts, **G** completions per prompt (B = Q * G), **N** items in a flat list (tokens,
examples), **K** checkpoints.
"""

from typing import TYPE_CHECKING

from rewarm.lazy import public_names

if TYPE_CHECKING:
    from rewarm.functional.gradients import clip_gradients_ as clip_gradients_
    from rewarm.functional.gradients import gradient_norm as gradient_norm
    from rewarm.functional.logprob import token_logprobs as token_logprobs
    from rewarm.functional.policy_gradient import clipped_policy_loss as clipped_policy_loss
    from rewarm.functional.policy_gradient import group_advantages as group_advantages
    from rewarm.functional.policy_gradient import kl_estimate as kl_estimate
    from rewarm.functional.policy_gradient import sequence_logratios as sequence_logratios
    from rewarm.functional.preference import dpo_loss as dpo_loss
    from rewarm.functional.preference import ipo_loss as ipo_loss
    from rewarm.functional.preference import nca_pair_loss as nca_pair_loss
else:
    __all__, __getattr__, __dir__ = public_names(__spec__)
