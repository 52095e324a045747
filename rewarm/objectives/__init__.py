"""What a method minimises, as parts: frozen objects with one contract."""

from typing import TYPE_CHECKING

from rewarm.lazy import public_names

if TYPE_CHECKING:
    from rewarm.objectives.advantages import GroupAdvantage as GroupAdvantage
    from rewarm.objectives.batch import as_batch as as_batch
    from rewarm.objectives.pair_losses import IPO as IPO
    from rewarm.objectives.pair_losses import NCA as NCA
    from rewarm.objectives.pair_losses import ChosenNLL as ChosenNLL
    from rewarm.objectives.pair_losses import Sigmoid as Sigmoid
    from rewarm.objectives.policy_losses import GSPO as GSPO
    from rewarm.objectives.policy_losses import Clipped as Clipped
    from rewarm.objectives.policy_losses import PerConstant as PerConstant
    from rewarm.objectives.policy_losses import PerSequence as PerSequence
    from rewarm.objectives.policy_losses import PerToken as PerToken
    from rewarm.objectives.sums import Sum as Sum
    from rewarm.objectives.token_losses import DFT as DFT
    from rewarm.objectives.token_losses import DITTO as DITTO
    from rewarm.objectives.token_losses import NLL as NLL
    from rewarm.objectives.token_losses import Distillation as Distillation
    from rewarm.objectives.token_losses import EntropySFT as EntropySFT
    from rewarm.objectives.token_losses import LabelSmoothing as LabelSmoothing
    from rewarm.objectives.token_losses import MultiTask as MultiTask
    from rewarm.objectives.token_losses import ZLoss as ZLoss
else:
    __all__, __getattr__, __dir__ = public_names(__spec__)
