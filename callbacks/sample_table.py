"""Shows what the model writes."""

from operator import attrgetter
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rewarm.callbacks.ended_steps import EndedSteps
from rewarm.checks import at_least
from rewarm.rollouts.rewards import Reward
from rewarm.rollouts.sampling import Group, encoder_for, read_prompts, sample_from, sample_groups
from rewarm.rollouts.sharded import call_unsharded


class SampleTable(Callback):
    """Prints a table of prompts with the model's completions, and keeps it in TensorBoard as text.

    The callback works with any LightningModule that holds a transformers model. It shows a table every
    `every_n_steps` optimizer steps and when training ends.

    Args:
        prompts: File, list of files, saved data set or Hub id with `prompt`, `messages` or `question`.
        num_prompts: Number of rows of the table, >= 1.
        reward: Reward function for a third column; None leaves it out.
        every_n_steps: Number of optimizer steps between tables, >= 1; None shows only the last table.
        max_new_tokens: Largest number of tokens per completion, >= 1.
        temperature: Temperature of the sampling, >= 0; 0 is greedy.
        max_tokens_in_flight: Largest number of positions of the cache (sequences times their longest length)
            that are held at once, >= 1, to bound the memory; None sets no limit.
        tokenizer: Hugging Face folder or id of the tokenizer; None is the data module's.
        model: Name of the module's attribute that is its transformers model, with dots.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> table = SampleTable("held_out.jsonl", num_prompts=2, every_n_steps=100)
        >>> table.num_prompts, table.every_n_steps
        (2, 100)
    """

    def __init__(
        self,
        prompts: str | list[str],
        num_prompts: int = 4,
        *,
        reward: Reward | None = None,
        every_n_steps: int | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        max_tokens_in_flight: int | None = None,
        tokenizer: str | None = None,
        model: str = "policy.model",
    ) -> None:
        at_least(1, num_prompts=num_prompts, max_new_tokens=max_new_tokens)
        at_least(0, temperature=temperature)
        if every_n_steps is not None:
            at_least(1, every_n_steps=every_n_steps)
        self.path, self.num_prompts, self.reward = prompts, num_prompts, reward
        self.every_n_steps = every_n_steps
        self.max_new_tokens, self.temperature, self.tokenizer = max_new_tokens, temperature, tokenizer
        self.max_tokens_in_flight = max_tokens_in_flight
        self.model = attrgetter(model)
        self._steps = EndedSteps()
        self._shown_at = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the prompts before anything is trained."""
        self._encoder = encoder_for(self.tokenizer, trainer.datamodule)  # type: ignore[attr-defined]
        self._prompts = read_prompts(self.path, self._encoder, self.num_prompts)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from where the run goes on."""
        self._steps.begin(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Show a table after every n-th optimizer step."""
        ended = self._steps.look(trainer)
        if ended and self.every_n_steps is not None and self._steps.reached(self.every_n_steps):
            self.show(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what the finished model writes."""
        if trainer.global_step != self._shown_at:
            self.show(trainer, pl_module)

    def show(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample on every rank, print on the first."""
        self._shown_at = trainer.global_step
        reward = self.reward or (lambda prompts, completions, **columns: [0.0] * len(prompts))
        model = self.model(pl_module)
        with trainer.precision_plugin.forward_context():
            groups = call_unsharded(
                trainer,
                model,
                lambda: sample_groups(
                    self._prompts,
                    range(len(self._prompts)),
                    1,
                    0,
                    generate=sample_from(
                        model,
                        self._encoder,
                        self.max_new_tokens,
                        self.temperature,
                        max_tokens_in_flight=self.max_tokens_in_flight,
                    ),
                    reward=reward,
                    tokenizer=self._encoder.tokenizer,
                ),
            )
        if not trainer.is_global_zero:
            return
        Console().print(self._table(groups, trainer.global_step))
        for logger in trainer.loggers:
            writer: Any = getattr(logger, "experiment", None)
            if hasattr(writer, "add_text"):
                writer.add_text("samples", self._markdown(groups), trainer.global_step)

    def _cells(self, group: Group) -> list[str]:
        cells = [self._prompts.texts[group.prompt], group.texts[0]]
        return cells if self.reward is None else [*cells, f"{group.rewards[0]:g}"]

    def _table(self, groups: list[Group], step: int) -> Table:
        table = Table(title=f"samples at step {step}", show_lines=True)
        for heading in ["prompt", "completion", "reward"][: 2 if self.reward is None else 3]:
            table.add_column(heading, overflow="fold")
        for group in groups:
            # Strings would be read as markup: brackets in a sample are text.
            table.add_row(*(Text(cell) for cell in self._cells(group)))
        return table

    def _markdown(self, groups: list[Group]) -> str:
        rows = [["prompt", "completion", "reward"][: 2 if self.reward is None else 3]]
        rows += [["---"] * len(rows[0])] + [self._cells(group) for group in groups]
        escaped = [[cell.replace("|", r"\|").replace("\n", "<br>") for cell in row] for row in rows]
        return "\n".join(f"| {' | '.join(row)} |" for row in escaped)
