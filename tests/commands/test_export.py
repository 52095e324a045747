"""A folder made from a checkpoint against one made by the module itself."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import rewarm
from rewarm.commands.export import export
from tests import fits, tiny
from tests.commands import rank_checkpoints
from tests.distributed.ranks import on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")

TIED = {**tiny.LLAMA, "tie_word_embeddings": True}
KINDS = ["file", "folder"]


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


def as_kind(kind, tmp_path):
    """The checkpoint as one file, or as the folder that a single rank would have written."""
    if kind == "file":
        return str(tmp_path / "4.ckpt")
    folder = tmp_path / "folder.ckpt"
    state = torch.load(tmp_path / "4.ckpt", weights_only=False)
    parts = {"state_dict": state.pop("state_dict"), "optimizer_0": state.pop("optimizer_states")[0]}
    for callback in state["callbacks"].values():
        if snapshots := callback.pop("averages", None):
            parts["optimizer_1"] = {
                f"averages.{number}.{name}": tensor
                for number, row in enumerate(snapshots)
                for name, tensor in zip(callback["names"], row, strict=True)
            }
            callback |= {"averages": [], "shards": ("optimizer_1", len(snapshots))}
    dcp.save(parts, checkpoint_id=folder, no_dist=True)
    torch.save(state, folder / "meta.pt")
    return str(folder)


def read(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def equal(folder, expected):
    """Whether a folder holds exactly these weights."""
    found = read(folder).state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", [tiny.LLAMA, TIED], ids=["untied", "tied"])
def test_it_equals_the_modules_own_folder(tmp_path, model, kind):
    module, _ = fit(tmp_path, model=model)
    module.save_pretrained(tmp_path / "own", tiny.build_tokenizer(tiny.CHAT_TEMPLATE))
    export(as_kind(kind, tmp_path), output=str(tmp_path / "new" / "hf"))
    assert equal(tmp_path / "new" / "hf", read(tmp_path / "own").state_dict())
    exported = read(tmp_path / "new" / "hf")
    tied = exported.get_output_embeddings().weight is exported.get_input_embeddings().weight
    assert tied == model.get("tie_word_embeddings", False)
    for name in ("config.json", "generation_config.json"):
        own, new = (json.loads((tmp_path / folder / name).read_text()) for folder in ("own", "new/hf"))
        assert own == new
    assert {path.name for path in (tmp_path / "own").iterdir()} == {
        p.name for p in (tmp_path / "new/hf").iterdir()
    }
    assert AutoTokenizer.from_pretrained(tmp_path / "new/hf").chat_template == tiny.CHAT_TEMPLATE
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["hf"]  # nothing half-written is left


def test_the_generation_settings_of_the_base_model_are_kept(tmp_path):
    base = rewarm.CurriculumSFT(tiny.LLAMA)
    base.configure_model()
    base.policy.model.generation_config = GenerationConfig(do_sample=True, top_k=7, eos_token_id=[1, 2])
    base.save_pretrained(tmp_path / "base")
    fit(tmp_path, model=str(tmp_path / "base"))
    export(str(tmp_path / "4.ckpt"), output=str(tmp_path / "hf"))
    kept = GenerationConfig.from_pretrained(tmp_path / "hf")
    assert (kept.do_sample, kept.top_k, kept.eos_token_id) == (True, 7, [1, 2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("method", "data", "options"),
    [
        (rewarm.DPO, fits.preferences, {"reference": "frozen"}),
        (rewarm.GRPO, fits.prompts, {"kl": 0.1}),
    ],
)
@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
def test_of_a_policy_and_its_reference_it_writes_the_policy(tmp_path, method, data, options, kind):
    module, _ = fit(tmp_path, method, data, **options)
    export(as_kind(kind, tmp_path), output=str(tmp_path / "hf"))
    assert equal(tmp_path / "hf", module.policy.model.state_dict())
    assert not equal(tmp_path / "hf", module.reference.model.state_dict())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", [tiny.LLAMA, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({"k": 3}, [0, 1 / 3, 1 / 3, 1 / 3]),
        ({"k": 3, "weights": [1.0, 0.0, 3.0]}, [0, 1 / 4, 0, 3 / 4]),
        ({"mode": "window", "k": 3}, [1 / 3, 1 / 3, 1 / 3, 0]),
        # An exponential average with bias correction.
        ({"mode": "ema", "decay": 0.5}, [1 / 15, 2 / 15, 4 / 15, 8 / 15]),
    ],
)
def test_the_average_is_the_one_of_the_snapshots(tmp_path, model, options, shares, kind):
    averaging = rewarm.CheckpointAveraging(every_n_steps=1, **options)
    _, record = fit(tmp_path, model=model, callbacks=[averaging])
    snapshots = [{n.removeprefix("policy.model."): w.double() for n, w in w.items()} for w in record.weights]
    checkpoint = as_kind(kind, tmp_path)
    export(checkpoint, output=str(tmp_path / "average"), average=True)
    averaged = dict(read(tmp_path / "average").named_parameters())
    assert averaged.keys() == snapshots[0].keys()
    for name, weight in averaged.items():
        mean = sum(share * one[name] for share, one in zip(shares, snapshots, strict=True))
        torch.testing.assert_close(weight.detach().double(), mean, rtol=1e-6, atol=1e-7)
    export(checkpoint, output=str(tmp_path / "live"))
    live = dict(read(tmp_path / "live").named_parameters())
    assert all(torch.equal(live[name].double(), weight) for name, weight in snapshots[-1].items())
    embedding = "model.embed_tokens.weight"
    assert (live[embedding] - averaged[embedding]).detach().abs().max() > 1e-4


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_dtype_is_that_of_the_checkpoint_or_the_one_asked_for(tmp_path, kind, average):
    fit(tmp_path, callbacks=[rewarm.CheckpointAveraging(k=2, every_n_steps=1)])
    checkpoint = as_kind(kind, tmp_path)
    folders = {None: tmp_path / "own", "bfloat16": tmp_path / "half"}
    for dtype, folder in folders.items():
        export(checkpoint, output=str(folder), dtype=dtype, average=average)
    own, half = (
        AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict() for folder in folders.values()
    )
    assert {weight.dtype for weight in own.values()} == {torch.float32}
    assert {weight.dtype for weight in half.values()} == {torch.bfloat16}
    assert all(torch.equal(half[name], weight.bfloat16()) for name, weight in own.items())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_another_tokenizer_may_be_named(tmp_path):
    fit(tmp_path)
    other = tiny.save_tokenizer(tmp_path / "other", "{{ messages }}")
    export(str(tmp_path / "4.ckpt"), output=str(tmp_path / "hf"), tokenizer=other)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template == "{{ messages }}"


def test_a_killed_export_leaves_nothing_in_the_next_one(tmp_path):
    fit(tmp_path)
    (tmp_path / ".hf.partial").mkdir()
    (tmp_path / ".hf.partial" / "stale.bin").write_text("")
    export(str(tmp_path / "4.ckpt"), output=str(tmp_path / "hf"))
    assert not (tmp_path / "hf" / "stale.bin").exists()


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_a_module_without_a_data_module_exports_without_a_tokenizer(tmp_path):
    torch.manual_seed(0)
    module = rewarm.CurriculumSFT(tiny.LLAMA, fits.adamw())
    loader = rewarm.WindowLoader(fits.cut(fits.sequences(4), 2, fits.text_batch), 1)
    trainer = fits.trainer(max_epochs=1)
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    export(str(tmp_path / "plain.ckpt"), output=str(tmp_path / "hf"))
    assert not (tmp_path / "hf" / "tokenizer.json").exists()
    assert equal(tmp_path / "hf", module.policy.model.state_dict())


# --- of several ranks -----------------------------------------------------------------------------------


@pytest.mark.dist
@pytest.mark.slow
def test_of_sharded_ranks_it_writes_the_whole_weights_and_their_average(tmp_path):
    on_ranks(2, rank_checkpoints.save_all, tmp_path)
    for name, is_folder in (("untied", True), ("tied", True), ("whole", False)):
        checkpoint, snapshots = tmp_path / f"{name}.ckpt", torch.load(tmp_path / f"{name}.pt")
        assert checkpoint.is_dir() == is_folder
        export(str(checkpoint), output=str(tmp_path / name))
        live = dict(read(tmp_path / name).named_parameters())
        assert live.keys() == snapshots[-1].keys()
        assert all(torch.equal(live[key], weight) for key, weight in snapshots[-1].items())
        if is_folder:
            export(str(checkpoint), output=str(tmp_path / f"{name}-average"), average=True)
            for key, weight in read(tmp_path / f"{name}-average").named_parameters():
                mean = sum(one[key].double() for one in snapshots[-3:]) / 3
                torch.testing.assert_close(weight.detach().double(), mean, rtol=1e-6, atol=1e-7)


# --- memory ---------------------------------------------------------------------------------------------

LARGE = {**tiny.LLAMA, "hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 8}


def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def taken(small, large, output, averaged):
    """In a process of its own: the memory that exporting took, in bytes."""
    export(small, output=output + " small", average=averaged)  # imports what it needs
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    export(large, output=output, average=averaged)
    return memory("VmHWM") - before


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of a process"
)
def test_the_weights_are_in_memory_once(tmp_path):
    checkpoints = {}
    for config in (tiny.LLAMA, LARGE):
        model = rewarm.CurriculumSFT(config)
        model.configure_model()
        weights = {f"policy.{name}": w for name, w in model.policy.state_dict().items()}
        size = sum(weight.nbytes for weight in weights.values())
        optimizer = {name: {"exp_avg": torch.ones_like(weight)} for name, weight in weights.items()}
        averaging = {
            "names": list(weights),
            "averages": [list(weights.values())] * 2,
            "weights": [0.5, 0.5],
        }
        state = {
            "rewarm_model": {"config": model.policy.model.config.to_dict(), "tokenizer": None},
            "state_dict": weights,
            "optimizer_states": [{"state": optimizer}],
            "callbacks": {"CheckpointAveraging": averaging},
        }
        folder = tmp_path / str(size)
        folder.mkdir()
        torch.save(state, folder / "4.ckpt")
        for kind in KINDS:
            checkpoints.setdefault(kind, []).append(as_kind(kind, folder))
    assert size > 150e6
    for kind, what in itertools.product(KINDS, ("live", "average")):
        output = str(tmp_path / f"{kind}-{what}")
        (found,) = on_ranks(1, taken, *checkpoints[kind], output, what == "average")
        assert found < 1.15 * size, f"{kind}, {what}: {found / size:.2f}"


# --- errors ---------------------------------------------------------------------------------------------


def test_an_output_that_is_there_is_kept(tmp_path):
    (tmp_path / "hf").mkdir()
    with pytest.raises(ValueError, match="output .*hf is there already: remove it or name another"):
        export(str(tmp_path / "4.ckpt"), output=str(tmp_path / "hf"))


def test_an_unknown_dtype_is_named(tmp_path):
    with pytest.raises(ValueError, match="dtype is 'int8'; it must be one of 'float32', 'bfloat16'"):
        export(str(tmp_path / "4.ckpt"), output=str(tmp_path / "hf"), dtype="int8")


def test_a_missing_checkpoint_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"4\.ckpt: no such checkpoint"):
        export(str(tmp_path / "4.ckpt"), output=str(tmp_path / "hf"))


def refused(checkpoint, folder):
    """The one line that an export says before it has written anything."""
    with pytest.raises(ValueError, match=Path(checkpoint).name) as caught:
        export(str(checkpoint), output=str(folder))
    assert "\n" not in str(caught.value)
    assert not list(folder.parent.glob(f"*{folder.name}*"))
    return str(caught.value)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_checkpoint_is_an_error(tmp_path, keep):
    fit(tmp_path)
    whole = (tmp_path / "4.ckpt").read_bytes()
    (tmp_path / "4.ckpt").write_bytes(whole[: int(keep * len(whole))])
    refused(tmp_path / "4.ckpt", tmp_path / "hf")


@pytest.mark.parametrize("name", [".metadata", "meta.pt", "__0_0.distcp"])
@pytest.mark.parametrize("keep", [None, 0.05])
def test_a_folder_in_which_a_file_is_missing_or_truncated_is_an_error(tmp_path, name, keep):
    fit(tmp_path)
    path = Path(as_kind("folder", tmp_path)) / name
    whole = path.read_bytes()
    path.unlink()
    if keep is not None:
        path.write_bytes(whole[: int(keep * len(whole))])
    refused(path.parent, tmp_path / "hf")


def test_a_file_of_another_kind_is_an_error(tmp_path):
    (tmp_path / "notes.ckpt").write_text("not a checkpoint\n")
    refused(tmp_path / "notes.ckpt", tmp_path / "hf")


@pytest.mark.parametrize(
    "content", [{"state_dict": {}}, torch.zeros(3), [1, 2]], ids=["lightning", "tensor", "list"]
)
def test_a_checkpoint_of_another_project_is_an_error(tmp_path, content):
    torch.save(content, tmp_path / "other.ckpt")
    assert "not a checkpoint of a rewarm module" in refused(tmp_path / "other.ckpt", tmp_path / "hf")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("gone", "more", "named"),
    [
        ("model.norm.weight", None, "the checkpoint lacks model.norm.weight"),
        (None, "extra", "the checkpoint has extra, which its model does not know"),
    ],
)
def test_weights_of_another_model_are_named(tmp_path, kind, gone, more, named):
    fit(tmp_path)
    state = torch.load(tmp_path / "4.ckpt", weights_only=False)
    weights = state["state_dict"]
    weights.pop(f"policy.model.{gone}", None)
    if more is not None:
        weights[f"policy.model.{more}"] = torch.zeros(2)
    torch.save(state, tmp_path / "4.ckpt")
    assert named in refused(as_kind(kind, tmp_path), tmp_path / "hf")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "callbacks", [[], [rewarm.CheckpointAveraging(every_n_steps=50, apply_at_end=False)]]
)
def test_without_a_snapshot_there_is_no_average(tmp_path, callbacks, kind):
    fit(tmp_path, callbacks=callbacks)
    with pytest.raises(
        ValueError, match="CheckpointAveraging took no snapshot, so there is no average to export"
    ):
        export(as_kind(kind, tmp_path), output=str(tmp_path / "hf"), average=True)


def test_a_tokenizer_that_is_gone_is_an_error_before_anything_is_written(tmp_path):
    fit(tmp_path)
    with pytest.raises(ValueError, match="tokenizer '.*gone' cannot be loaded: give --tokenizer"):
        export(str(tmp_path / "4.ckpt"), output=str(tmp_path / "hf"), tokenizer=str(tmp_path / "gone"))
    assert not list(tmp_path.glob(".hf*"))
