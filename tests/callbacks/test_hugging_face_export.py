"""The folder that a finished fit leaves."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import rewarm
from tests import fits, tiny


def fit(tmp_path, callbacks):
    files = fits.Files(tmp_path)
    tiny.save_tokenizer(files.folder / "tokenizer", tiny.CHAT_TEMPLATE)
    torch.manual_seed(0)
    module = rewarm.CurriculumSFT(tiny.LLAMA, fits.adamw())
    trainer = fits.trainer(max_steps=4, callbacks=callbacks)
    trainer.fit(module, datamodule=fits.instructions(files))
    return module


def test_the_folder_holds_weights_config_tokenizer_and_template(tmp_path):
    module = fit(tmp_path, [rewarm.HuggingFaceExport(str(tmp_path / "out" / "hf"))])
    folder = tmp_path / "out" / "hf"
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    expected = module.policy.model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == tiny.CHAT_TEMPLATE
    assert tokenizer("1+2=")["input_ids"] == tiny.build_tokenizer()("1+2=")["input_ids"]
    assert [path.name for path in folder.parent.iterdir()] == ["hf"]


def test_an_older_folder_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "stale.bin").write_text("from an earlier run")
    fit(tmp_path, [rewarm.HuggingFaceExport(str(folder))])
    assert not (folder / "stale.bin").exists()
    assert (folder / "model.safetensors").exists()


def test_after_averaging_it_writes_the_average(tmp_path):
    record = fits.Record()
    averaging = rewarm.CheckpointAveraging(k=2, every_n_steps=1)
    fit(tmp_path, [record, averaging, rewarm.HuggingFaceExport(str(tmp_path / "hf"))])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    for name, weight in loaded.items():
        last, before = (record.weights[-n][f"policy.model.{name}"] for n in (1, 2))
        torch.testing.assert_close(weight, (last + before) / 2, rtol=1e-6, atol=1e-7)


class Plain(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        raise AssertionError("it must not come to training")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")
def test_a_module_that_cannot_be_written_is_an_error_before_training(tmp_path):
    data = fits.instructions(fits.Files(tmp_path))
    with pytest.raises(ValueError, match=r"Plain has no save_pretrained\(folder, tokenizer\)"):
        fits.trainer(max_steps=1, callbacks=[rewarm.HuggingFaceExport("hf")]).fit(Plain(), datamodule=data)
