"""Learning rates as functions of position: phases, published schedules, laws, rules of planning."""

from typing import TYPE_CHECKING

from rewarm.lazy import public_names

if TYPE_CHECKING:
    from rewarm.schedules.law_fits import Curve as Curve
    from rewarm.schedules.law_fits import fit_annealing_law as fit_annealing_law
    from rewarm.schedules.law_fits import fit_multi_power_law as fit_multi_power_law
    from rewarm.schedules.law_fits import predict_loss as predict_loss
    from rewarm.schedules.logs import read_curve as read_curve
    from rewarm.schedules.logs import refined_from_log as refined_from_log
    from rewarm.schedules.loss_laws import AnnealingLaw as AnnealingLaw
    from rewarm.schedules.loss_laws import MultiPowerLaw as MultiPowerLaw
    from rewarm.schedules.phases import Phase as Phase
    from rewarm.schedules.phases import Schedule as Schedule
    from rewarm.schedules.published import branch as branch
    from rewarm.schedules.published import constant as constant
    from rewarm.schedules.published import cosine as cosine
    from rewarm.schedules.published import cosine_power as cosine_power
    from rewarm.schedules.published import infinite as infinite
    from rewarm.schedules.published import linear as linear
    from rewarm.schedules.published import power as power
    from rewarm.schedules.published import rewarmed as rewarmed
    from rewarm.schedules.published import rex as rex
    from rewarm.schedules.published import uba as uba
    from rewarm.schedules.published import wsd as wsd
    from rewarm.schedules.published import wsdc as wsdc
    from rewarm.schedules.published import wsds as wsds
    from rewarm.schedules.refinement import refined as refined
    from rewarm.schedules.rules import sft_share as sft_share
    from rewarm.schedules.rules import split_budget as split_budget
    from rewarm.schedules.rules import step_law_batch_tokens as step_law_batch_tokens
    from rewarm.schedules.rules import step_law_lr as step_law_lr
else:
    __all__, __getattr__, __dir__ = public_names(__spec__)
