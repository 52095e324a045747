"""A folder made from a checkpoint against one made by the module itself."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rewarm
from rewarm.export import export, load_checkpoint
from tests import fits, tiny

TIED = {**tiny.LLAMA, "tie_word_embeddings": True}


def fit(
    tmp_path, kind=rewarm.CurriculumSFT, data=fits.instructions, model=tiny.LLAMA, callbacks=(), **options
):
    """A checkpoint after four steps, and what was recorded on the way."""
    files, record = fits.Files(tmp_path), fits.Record()
    tiny.save_tokenizer(files.folder / "tokenizer", tiny.CHAT_TEMPLATE)
    torch.manual_seed(0)
    module = kind(model, fits.adamw(), **options)
    trainer = fits.trainer(max_steps=4, callbacks=[record, *callbacks])
    trainer.fit(module, datamodule=data(files))
    trainer.save_checkpoint(tmp_path / "4.ckpt")
    return module, record


def read(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("model", [tiny.LLAMA, TIED], ids=["untied", "tied"])
def test_it_equals_the_modules_own_folder(tmp_path, model):
    module, _ = fit(tmp_path, model=model)
    module.save_pretrained(tmp_path / "own", tiny.build_tokenizer(tiny.CHAT_TEMPLATE))
    export(str(tmp_path / "4.ckpt"), str(tmp_path / "new" / "hf"))
    own, exported = read(tmp_path / "own"), read(tmp_path / "new" / "hf")
    assert own.state_dict().keys() == exported.state_dict().keys()
    assert all(torch.equal(weight, exported.state_dict()[name]) for name, weight in own.state_dict().items())
    tied = exported.get_output_embeddings().weight is exported.get_input_embeddings().weight
    assert tied == model.get("tie_word_embeddings", False)
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("own", "new/hf")]
    assert configs[0] == configs[1]
    assert {path.name for path in (tmp_path / "own").iterdir()} == {
        p.name for p in (tmp_path / "new/hf").iterdir()
    }
    assert AutoTokenizer.from_pretrained(tmp_path / "new/hf").chat_template == tiny.CHAT_TEMPLATE
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["hf"]  # nothing half-written is left


@pytest.mark.parametrize(
    ("kind", "data", "options"),
    [
        (rewarm.DPO, fits.preferences, {"reference": "frozen"}),
        (rewarm.GRPO, fits.prompts, {"beta": 0.1}),
    ],
)
@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
def test_of_a_policy_and_its_reference_it_writes_the_policy(tmp_path, kind, data, options):
    module, _ = fit(tmp_path, kind, data, **options)
    export(str(tmp_path / "4.ckpt"), str(tmp_path / "hf"))
    expected = module.policy.model.state_dict()
    assert all(
        torch.equal(weight, expected[name]) for name, weight in read(tmp_path / "hf").state_dict().items()
    )
    assert not all(
        torch.equal(weight, expected[name]) for name, weight in module.reference.model.state_dict().items()
    )


@pytest.mark.parametrize("model", [tiny.LLAMA, TIED], ids=["untied", "tied"])
def test_the_average_is_the_mean_of_the_snapshots(tmp_path, model):
    averaging = rewarm.CheckpointAveraging(k=3, every_n_steps=1)
    _, record = fit(tmp_path, model=model, callbacks=[averaging])
    export(str(tmp_path / "4.ckpt"), str(tmp_path / "average"), average=True)
    averaged = read(tmp_path / "average").state_dict()
    snapshots = [{n.removeprefix("policy.model."): w for n, w in one.items()} for one in record.weights[-3:]]
    for name, weight in averaged.items():
        source = name if name in snapshots[0] else "model.embed_tokens.weight"  # a tied head is recorded once
        mean = sum(one[source].double() for one in snapshots) / 3
        torch.testing.assert_close(weight.double(), mean, rtol=1e-6, atol=1e-7)
    export(str(tmp_path / "4.ckpt"), str(tmp_path / "live"))
    live = read(tmp_path / "live").state_dict()
    assert all(torch.equal(live[name], weight) for name, weight in snapshots[-1].items())
    assert (live["lm_head.weight"] - averaged["lm_head.weight"]).abs().max() > 1e-4


def test_another_tokenizer_may_be_named(tmp_path):
    fit(tmp_path)
    other = tiny.save_tokenizer(tmp_path / "other", "{{ messages }}")
    export(str(tmp_path / "4.ckpt"), str(tmp_path / "hf"), other)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template == "{{ messages }}"


def test_a_killed_export_leaves_nothing_in_the_next_one(tmp_path):
    fit(tmp_path)
    (tmp_path / ".hf.partial").mkdir()
    (tmp_path / ".hf.partial" / "stale.bin").write_text("")
    export(str(tmp_path / "4.ckpt"), str(tmp_path / "hf"))
    assert not (tmp_path / "hf" / "stale.bin").exists()


# --- errors ---------------------------------------------------------------------------------------------


def test_an_output_that_is_there_is_kept(tmp_path):
    (tmp_path / "hf").mkdir()
    with pytest.raises(ValueError, match="output .*hf is there already: remove it or name another"):
        export(str(tmp_path / "4.ckpt"), str(tmp_path / "hf"))


def test_a_missing_checkpoint_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"4\.ckpt: no such checkpoint file"):
        export(str(tmp_path / "4.ckpt"), str(tmp_path / "hf"))


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_checkpoint_is_an_error(tmp_path, keep):
    fit(tmp_path)
    whole = (tmp_path / "4.ckpt").read_bytes()
    (tmp_path / "4.ckpt").write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(ValueError, match=r"4\.ckpt: the checkpoint is damaged"):
        export(str(tmp_path / "4.ckpt"), str(tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()


def test_a_file_of_another_kind_is_an_error(tmp_path):
    (tmp_path / "notes.ckpt").write_text("not a checkpoint\n")
    with pytest.raises(ValueError, match=r"notes\.ckpt: the checkpoint is damaged"):
        load_checkpoint(tmp_path / "notes.ckpt")


@pytest.mark.parametrize(
    "content", [{"state_dict": {}}, torch.zeros(3), [1, 2]], ids=["lightning", "tensor", "list"]
)
def test_a_checkpoint_of_another_project_is_an_error(tmp_path, content):
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.ckpt: not a checkpoint of a rewarm module"):
        export(str(tmp_path / "other.ckpt"), str(tmp_path / "hf"))


@pytest.mark.parametrize(
    "callbacks", [[], [rewarm.CheckpointAveraging(every_n_steps=50, apply_at_end=False)]]
)
def test_without_a_snapshot_there_is_no_average(tmp_path, callbacks):
    fit(tmp_path, callbacks=callbacks)
    with pytest.raises(
        ValueError, match="CheckpointAveraging took no snapshot, so there is no average to export"
    ):
        export(str(tmp_path / "4.ckpt"), str(tmp_path / "hf"), average=True)


def test_a_tokenizer_that_is_gone_is_an_error_before_anything_is_written(tmp_path):
    fit(tmp_path)
    with pytest.raises(ValueError, match="tokenizer '.*gone' cannot be loaded: give --tokenizer"):
        export(str(tmp_path / "4.ckpt"), str(tmp_path / "hf"), str(tmp_path / "gone"))
    assert not list(tmp_path.glob(".hf*"))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_a_module_without_a_data_module_exports_without_a_tokenizer(tmp_path):
    torch.manual_seed(0)
    module = rewarm.CurriculumSFT(tiny.LLAMA, fits.adamw())
    loader = rewarm.WindowLoader(fits.cut(fits.sequences(4), 2, fits.text_batch), 1)
    trainer = fits.trainer(max_epochs=1)
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    export(str(tmp_path / "plain.ckpt"), str(tmp_path / "hf"))
    assert not (tmp_path / "hf" / "tokenizer.json").exists()
    expected = module.policy.model.state_dict()
    assert all(
        torch.equal(weight, expected[name]) for name, weight in read(tmp_path / "hf").state_dict().items()
    )
