"""From files to tokens: formats, chat templates, tokenisation, and what of it is learnt."""

from typing import TYPE_CHECKING

from rewarm.lazy import public_names

if TYPE_CHECKING:
    from rewarm.text.sft_transforms import EraseSystemPrompt as EraseSystemPrompt
    from rewarm.text.sft_transforms import RTuning as RTuning
    from rewarm.text.sft_transforms import Spectrum as Spectrum
else:
    __all__, __getattr__, __dir__ = public_names(__spec__)
