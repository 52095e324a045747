"""Order, pacing, gates, live scores and packing: which example comes when."""

from typing import TYPE_CHECKING

from rewarm.lazy import public_names

if TYPE_CHECKING:
    from rewarm.curriculum.curriculum import Curriculum as Curriculum
    from rewarm.curriculum.gates import AtLeast as AtLeast
    from rewarm.curriculum.gates import Band as Band
    from rewarm.curriculum.gates import TopShare as TopShare
    from rewarm.curriculum.live_scores import Ability as Ability
    from rewarm.curriculum.live_scores import RunningScore as RunningScore
    from rewarm.curriculum.live_scores import ScoreChange as ScoreChange
    from rewarm.curriculum.ordering import Blocked as Blocked
    from rewarm.curriculum.ordering import EasyToHard as EasyToHard
    from rewarm.curriculum.ordering import Folded as Folded
    from rewarm.curriculum.ordering import Interleaved as Interleaved
    from rewarm.curriculum.ordering import Staged as Staged
    from rewarm.curriculum.pacing import CyclicalPacing as CyclicalPacing
    from rewarm.curriculum.pacing import ExponentialStepPacing as ExponentialStepPacing
    from rewarm.curriculum.pacing import GeometricPacing as GeometricPacing
    from rewarm.curriculum.pacing import LinearPacing as LinearPacing
    from rewarm.curriculum.pacing import OnePassPacing as OnePassPacing
    from rewarm.curriculum.pacing import RootPacing as RootPacing
    from rewarm.curriculum.pacing import SingleStepPacing as SingleStepPacing
    from rewarm.curriculum.pacing import StagedPacing as StagedPacing
    from rewarm.curriculum.pacing_windows import GaussianWindow as GaussianWindow
    from rewarm.curriculum.pacing_windows import SigmoidWindow as SigmoidWindow
    from rewarm.curriculum.packing import Packer as Packer
else:
    __all__, __getattr__, __dir__ = public_names(__spec__)
