"""PyTorch Lightning modules for training language models along a curriculum.

Every public name of the rooms can be imported from here; nothing heavy is loaded before it is used.
"""

from typing import TYPE_CHECKING

from rewarm.lazy import public_names

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rewarm.callbacks import *
    from rewarm.curriculum import *
    from rewarm.datamodules import *
    from rewarm.functional import *
    from rewarm.lightning_modules import *
    from rewarm.objectives import *
    from rewarm.rollouts import *
    from rewarm.schedules import *
    from rewarm.text import *
else:
    __all__, __getattr__, __dir__ = public_names(__spec__)
