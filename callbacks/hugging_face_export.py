"""Writes the finished model as a Hugging Face folder."""

from lightning.pytorch import Callback, LightningModule, Trainer


class HuggingFaceExport(Callback):
    """Writes a Hugging Face folder when training ends, by the module's `save_pretrained(folder, tokenizer)`.

    Put it after `CheckpointAveraging` to write the average.

    Args:
        folder: Path of the folder; one that is there already is replaced.

    Raises:
        ValueError: When training starts, if the module has no `save_pretrained`.

    Example:
        >>> HuggingFaceExport("exported").setup(None, LightningModule(), "fit")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: LightningModule has no save_pretrained(folder, tokenizer), ...
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out before the training, not after it, whether the module can be written."""
        if not hasattr(pl_module, "save_pretrained"):
            raise ValueError(
                f"{type(pl_module).__name__} has no save_pretrained(folder, tokenizer), by which"
                " HuggingFaceExport writes"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder, the tokenizer of the data module beside the weights."""
        # On all ranks: gathering shards takes them all. The module writes on the first.
        pl_module.save_pretrained(self.folder, getattr(trainer.datamodule, "tokenizer", None))  # type: ignore[attr-defined, operator]
        trainer.strategy.barrier("export")
