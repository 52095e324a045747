"""What a method logs is what its docstring says it logs."""

import re

import pytest
from lightning.pytorch.loggers.logger import DummyLogger

import rewarm
from tests import fits, tiny


class Names(DummyLogger):
    """Remembers the names of all scalars."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def log_metrics(self, metrics, step=None):
        self.seen |= {name for name in metrics if name != "epoch"}


METHODS = {
    "ContinualPretraining": (fits.corpus, {}),
    "CurriculumSFT": (fits.instructions, {}),
    "DPO": (fits.preferences, {}),
    "GRPO": (fits.prompts, {"kl": 0.1}),
}


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")  # the frozen reference
@pytest.mark.parametrize("method", METHODS)
def test_the_docstring_lists_every_scalar_and_no_other(tmp_path, method):
    make, options = METHODS[method]
    files, names = fits.Files(tmp_path), Names()
    data = make(files)
    if method == "ContinualPretraining":
        data.val = {"somewhere": files.new}
    else:
        data.val = getattr(data, "train", None)
    module = getattr(rewarm, method)(tiny.LLAMA, fits.adamw(), **options)
    fits.trainer(
        max_steps=2, log_every_n_steps=1, logger=names, val_check_interval=1, check_val_every_n_epoch=None
    ).fit(module, datamodule=data)
    section = re.search(r"Logs:\n(.*)", type(module).__doc__, re.S)[1]
    listed = set(re.findall(r"^\s+([\w/<>]+): ", section, re.M))
    assert {name.replace("somewhere", "<domain>") for name in names.seen} == listed
