"""What a method minimises, as parts: frozen objects with one contract."""

from typing import TYPE_CHECKING

from rewarm.lazy import public_names

if TYPE_CHECKING:
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
