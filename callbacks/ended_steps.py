"""Which optimizer steps have ended since somebody last looked."""

from lightning.pytorch import Trainer


class EndedSteps:
    """Follows `trainer.global_step`, for callbacks that act at the end of optimizer steps.

    `on_train_batch_end` comes after every micro-batch, and only some of them end an optimizer step.

    Attributes:
        before: The step at the look before the last one.
        now: The step at the last look.

    Example:
        >>> from types import SimpleNamespace
        >>> steps = EndedSteps()
        >>> steps.begin(SimpleNamespace(global_step=4))
        >>> steps.look(SimpleNamespace(global_step=4)), steps.look(SimpleNamespace(global_step=5))
        (False, True)
        >>> steps.reached(every=5), steps.reached(every=3)
        (1, 0)
    """

    def __init__(self) -> None:
        self.before = self.now = 0

    def begin(self, trainer: Trainer) -> None:
        """Count from the present step; what ended earlier, in another fit say, is not told."""
        self.before = self.now = trainer.global_step

    def look(self, trainer: Trainer) -> bool:
        """Return whether a step has ended since the last look."""
        self.before, self.now = self.now, trainer.global_step
        return self.now != self.before

    def reached(self, every: int, start: int = 0) -> int:
        """Return how many of the steps `start`, `start + every`, `start + 2 every`, ... the last look found.

        A remainder would miss some: `global_step` counts the steps of all optimizers, and with several of
        them it moves by more than one.

        Args:
            every: Steps from one to the next, >= 1.
            start: The first of them, >= 0.

        Returns:
            Their number, above 1 if steps passed without a look.
        """
        before, now = (max(0, (step - start) // every + 1) for step in (self.before, self.now))
        return now - before
