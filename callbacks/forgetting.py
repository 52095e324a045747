"""What a run forgets: validation losses by domain, before, at their best and now."""

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rewarm.functional.forgetting import loss_history

log = logging.getLogger(__name__)


class Forgetting(Callback):
    """Follows the validation loss of every domain, and says how much of the best one was lost.

    The callback reads what the module logs in validation under a common prefix (`val/loss/<domain>` of
    rewarm's modules with `CorpusData(val=...)`), so that it works with any LightningModule that logs a loss
    per domain. When training ends it prints a table (before, best, now, forgotten = now - best) and draws the
    losses. Checkpoints hold the losses so far, with which a resumed run goes on.

    What the losses are before training is measured only if the whole validation data are the sanity check:
    `Trainer(num_sanity_val_steps=-1)`, or `trainer.validate(...)` before `trainer.fit(...)`. Otherwise
    "before" is the first validation, and the table tells its step.

    Logs:
        forgetting/<domain>: Loss above the lowest so far, in nats, >= 0; at every validation.
        val/loss/<domain>: Loss of the sanity check, in nats, at step 0, if the check is the whole validation;
            Lightning does not log it.

    Args:
        prefix: Beginning of the names of the losses; the rest of a name is the domain.
        plot: Path of the picture to write, whose suffix is the format (.png, .svg, .pdf). None is
            `forgetting.png` beside the logs, or no picture if there is no logger.

    Raises:
        ValueError: If the prefix is empty, or a validation logs nothing that begins with it.

    Example:
        >>> options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
        >>> trainer = Trainer(callbacks=[Forgetting()], num_sanity_val_steps=-1, **options)
        >>> trainer.callbacks[0].losses
        {}

    Source: `rewarm.functional.forgetting`.
    """

    def __init__(self, prefix: str = "val/loss/", plot: str | None = None) -> None:
        if not prefix:
            raise ValueError("prefix is empty; it must tell the losses of domains from other metrics")
        self.prefix = prefix
        self.plot = plot
        self.losses: dict[str, dict[int, float]] = {}
        """Loss by domain and optimizer step."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take down the losses, and log what is forgotten."""
        if trainer.sanity_checking and trainer.num_sanity_val_batches != trainer.num_val_batches:
            return
        step = trainer.global_step
        found = {
            name.removeprefix(self.prefix): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith(self.prefix)
        }
        if not found:
            names = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            raise ValueError(f"prefix is {self.prefix!r}, but no logged metric begins with it: {names}")
        for domain, loss in found.items():
            self.losses.setdefault(domain, {})[step] = loss
        metrics = {f"forgetting/{domain}": self._history(domain).forgotten for domain in found}
        if trainer.sanity_checking:
            metrics |= {f"{self.prefix}{domain}": loss for domain, loss in found.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what another fit measured later than here; say what is missing."""
        for domain, points in self.losses.items():
            self.losses[domain] = {step: loss for step, loss in points.items() if step <= trainer.global_step}
        if not self.losses and trainer.is_global_zero:
            log.info("losses before training are not known: set num_sanity_val_steps to -1 to measure them")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table and draw the losses."""
        folder = trainer.log_dir  # on all ranks: they agree on it
        if not self.losses:
            rank_zero_warn("Forgetting saw no validation, so there is nothing to tell")
        elif trainer.is_global_zero:
            Console().print(self._table())
            if self.plot is not None:
                self._draw(Path(self.plot))
            elif trainer.loggers and folder is not None:
                self._draw(Path(folder, "forgetting.png"))

    def state_dict(self) -> dict[str, Any]:
        """Return the losses so far."""
        return {"losses": {domain: dict(points) for domain, points in self.losses.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the losses of the checkpoint."""
        self.losses = state_dict["losses"]

    def _history(self, domain: str) -> Any:
        return loss_history(sorted(self.losses[domain].items()))

    def _table(self) -> Table:
        table = Table(title="validation loss by domain, nats (at step)")
        for heading in ("domain", "before", "best", "now", "forgotten"):
            table.add_column(heading, justify="left" if heading == "domain" else "right")
        for domain in self.losses:
            history = self._history(domain)
            points = [f"{loss:.3f} ({step})" for step, loss in (history.before, history.best, history.now)]
            table.add_row(Text(domain), *points, f"{history.forgotten:.3f}")
        return table

    def _draw(self, path: Path) -> None:
        # A figure without pyplot leaves the windows and settings of the caller alone, and needs no display.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8.0, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for domain, points in self.losses.items():
            history = self._history(domain)
            (line,) = axes.plot(*zip(*sorted(points.items()), strict=True), "o-", markersize=3, label=domain)
            axes.axhline(history.best[1], color=line.get_color(), linestyle=":", linewidth=1)
        axes.set(xlabel="optimizer step", ylabel="validation loss (nats); dotted: the best")
        axes.grid(alpha=0.3)
        figure.legend(loc="outside upper center", ncols=min(len(self.losses), 4), frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
