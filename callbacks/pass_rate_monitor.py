"""How often the model's samples are verified right, during any kind of training."""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from rewarm.checks import at_least
from rewarm.rollouts.pass_rate import PassRate, pass_rate, pass_rate_by_group
from rewarm.rollouts.ranks import gather_in_turn, place
from rewarm.rollouts.rewards import Reward
from rewarm.rollouts.sampling import encoder_for, read_prompts, sample_from, sample_groups
from rewarm.rollouts.sharded import call_unsharded


class PassRateMonitor(Callback):
    """Samples completions of held-out prompts, verifies them, and logs the pass rate with its 95 % interval.

    The monitor works with any LightningModule that holds a transformers model, whatever its data. It measures
    when validation ends and when training ends. If `CheckpointAveraging` stands before it in the list of
    callbacks, it measures the average.

    Args:
        prompts: File, list of files, saved data set or Hub id with `prompt`, `messages` or `question`.
        reward: Reward function whose values are 0 or 1.
        group: Column that tells kinds of prompts apart, such as a difficulty; each gets its own pass rate.
        samples: Number of completions per prompt, >= 1.
        limit: Number of prompts that are taken, from the first on, >= 1; None takes all.
        max_new_tokens: Largest number of tokens per completion, >= 1.
        temperature: Temperature of the sampling, >= 0; 0 is greedy.
        max_tokens_in_flight: Largest number of positions of the cache (sequences times their longest length)
            that are held at once, >= 1, to bound the memory; None sets no limit.
        tokenizer: Hugging Face folder or id of the tokenizer; None is the data module's.
        model: Name of the module's attribute that is its transformers model, with dots.
        seed: Seed of the sampling, the same at every measurement, so that changes are the model's.
        name: Name of the rate in the logs, to tell several monitors apart.

    Logs `val/<name>`, `val/<name>_low`, `val/<name>_high` (shares in [0, 1]) and `val/<name>/<group>`.

    Raises:
        ValueError: If an argument is out of range, or the prompts have no column `group`.

    Example:
        >>> def is_four(prompts, completions, **columns):
        ...     return [float(completion.strip() == "4") for completion in completions]
        >>> monitor = PassRateMonitor("held_out.jsonl", is_four, samples=4, name="sums")
        >>> monitor.name, monitor.samples, monitor.last
        ('sums', 4, {})
    """

    def __init__(
        self,
        prompts: str | list[str],
        reward: Reward,
        *,
        group: str | None = None,
        samples: int = 1,
        limit: int | None = None,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        max_tokens_in_flight: int | None = None,
        tokenizer: str | None = None,
        model: str = "policy.model",
        seed: int = 0,
        name: str = "pass_rate",
    ) -> None:
        at_least(1, samples=samples, max_new_tokens=max_new_tokens)
        at_least(0, temperature=temperature)
        if limit is not None:
            at_least(1, limit=limit)
        self.path, self.reward, self.group, self.samples, self.limit = prompts, reward, group, samples, limit
        self.max_new_tokens, self.temperature, self.tokenizer = max_new_tokens, temperature, tokenizer
        self.max_tokens_in_flight = max_tokens_in_flight
        self.model, self.seed, self.name = attrgetter(model), seed, name
        self.last: dict[str, PassRate] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the prompts before anything is trained."""
        self._encoder = encoder_for(self.tokenizer, trainer.datamodule)  # type: ignore[attr-defined]
        self._prompts = read_prompts(self.path, self._encoder, self.limit)
        if self.group is not None and self.group not in self._prompts.columns:
            raise ValueError(
                f"{self.path}: no column {self.group!r} among {', '.join(self._prompts.columns)}"
            )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log with the other validation metrics."""
        if not trainer.sanity_checking:
            for name, value in self.measure(trainer, pl_module).items():
                pl_module.log(name, value, batch_size=1, prog_bar=name == f"val/{self.name}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the finished model."""
        metrics = self.measure(trainer, pl_module)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Sample, verify, and return what is logged. A collective call."""
        numbers = list(range(len(self._prompts)))
        model, among = self.model(pl_module), place(trainer)
        mine = numbers[among.rank :: among.size]
        with trainer.precision_plugin.forward_context():
            groups = call_unsharded(
                trainer,
                model,
                lambda: sample_groups(
                    self._prompts,
                    mine,
                    self.samples,
                    [self.seed + number for number in mine],
                    generate=sample_from(
                        model,
                        self._encoder,
                        self.max_new_tokens,
                        self.temperature,
                        max_tokens_in_flight=self.max_tokens_in_flight,
                    ),
                    reward=self.reward,
                    tokenizer=self._encoder.tokenizer,
                ),
            )
        for group in groups:
            if not set(group.rewards) <= {0.0, 1.0}:
                raise ValueError(
                    f"{self.path}, prompt {group.prompt}: the rewards are {group.rewards}, but a pass rate"
                    " needs 0 or 1"
                )
        fractions = gather_in_turn([group.mean for group in groups], among)
        self.last = {"": pass_rate(fractions, self.samples)}
        if self.group is not None:
            kinds: Sequence[Any] = self._prompts.columns[self.group]
            by_kind = pass_rate_by_group(fractions, kinds, self.samples)
            self.last |= {
                f"/{kind}": rate for kind, rate in sorted(by_kind.items(), key=lambda item: str(item[0]))
            }
        metrics = {f"val/{self.name}{kind}": rate.mean for kind, rate in self.last.items()}
        return metrics | {
            f"val/{self.name}_low": self.last[""].low,
            f"val/{self.name}_high": self.last[""].high,
        }
