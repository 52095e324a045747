"""What a module leaves behind, and which checkpoints it refuses."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import rewarm
from rewarm.lightning_modules.saving import check_weights
from tests import fits, tiny


def test_a_folder_holds_the_weights_and_the_tokenizer_and_replaces_one_that_is_there(tmp_path):
    module = rewarm.CurriculumSFT(tiny.LLAMA)
    module.configure_model()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "old").write_text("old")
    module.save_pretrained(tmp_path / "hf", tiny.build_tokenizer())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    for name, weight in module.policy.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    assert not (tmp_path / "hf" / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"weight": (2, 3)}, "p: the checkpoint lacks bias, which this run's model has"),
        (
            {"weight": (2, 3), "bias": (2,), "more": (1,)},
            "the checkpoint has more, which this run's model lacks",
        ),
        (
            {"weight": (2, 4), "bias": (2,)},
            r"weight has shape \(2, 4\) in the checkpoint, \(2, 3\) in this run",
        ),
    ],
)
def test_other_weights_are_refused_by_name(shapes, message):
    shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        check_weights("p", shapes, torch.nn.Linear(3, 2))


def test_names_may_differ_where_loading_is_not_strict():
    check_weights("p", {"weight": torch.Size((2, 3))}, torch.nn.Linear(3, 2), strict=False)
    with pytest.raises(ValueError, match="weight has shape"):
        check_weights("p", {"weight": torch.Size((2, 9))}, torch.nn.Linear(3, 2), strict=False)


def test_a_checkpoint_of_another_kind_of_model_is_refused(tmp_path):
    files, trainer = fits.Files(tmp_path), fits.trainer(max_steps=1)
    trainer.fit(rewarm.CurriculumSFT(tiny.LLAMA, fits.sgd()), datamodule=fits.instructions(files))
    trainer.save_checkpoint(tmp_path / "1.ckpt")
    other = {**tiny.LLAMA, "model_type": "qwen2"}
    with pytest.raises(ValueError, match="the checkpoint is of llama, this run's model is qwen2"):
        fits.trainer(max_steps=2).fit(
            rewarm.CurriculumSFT(other, fits.sgd()),
            datamodule=fits.instructions(files),
            ckpt_path=str(tmp_path / "1.ckpt"),
        )
