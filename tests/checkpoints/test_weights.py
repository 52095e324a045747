"""What is read of a saved model against the model that was saved."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from rewarm.checkpoints.weights import empty_model, load_tokenizer, open_weights, tied_names
from tests import tiny
from tests.checkpoints.saved_models import KINDS, build, save

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_what_was_saved(tmp_path, kind, dtype):
    model = build(0, dtype)
    opened = open_weights(save(model, tmp_path / "model.ckpt", kind))
    expected = model.state_dict()
    assert opened.like.keys() == expected.keys()
    for name, weight in expected.items():
        assert opened.like[name].device.type == "meta"
        assert (opened.like[name].shape, opened.like[name].dtype) == (weight.shape, weight.dtype)
        assert torch.equal(opened.read(name), weight)
    assert opened.made_with["config"]["hidden_size"] == tiny.LLAMA["hidden_size"]


@pytest.mark.parametrize("kind", ["file", "shards"])
def test_the_weights_of_a_reference_are_not_the_models(tmp_path, kind):
    extra = {"reference.model.model.norm.weight": torch.zeros(32), "policy.head": torch.zeros(3)}
    path = save(build(0), tmp_path / "model.ckpt", kind, extra=extra)
    assert open_weights(path).like.keys() == build(0).state_dict().keys()


def test_views_and_transposed_weights_are_read_from_a_file_as_they_were(tmp_path):
    model = build(0)
    both = torch.randn(2, 32)
    model.model.norm.weight.data = both[1]  # the second half of a storage
    model.model.layers[0].self_attn.q_proj.weight.data = torch.randn(32, 32).T
    opened = open_weights(save(model, tmp_path / "model.ckpt", "file"))
    assert all(torch.equal(opened.read(name), weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("kind", ["file", "shards"])
def test_snapshots_are_found_by_their_weights_names(tmp_path, kind):
    rows = [{f"policy.model.{n}": p.data for n, p in build(seed).named_parameters()} for seed in (1, 2, 3)]
    opened = open_weights(save(build(0), tmp_path / "model.ckpt", kind, averages=rows))
    assert {f"policy.model.{name}" for name in opened.averages} == rows[0].keys()
    assert opened.average_weights == [1 / 3] * 3
    for name, keys in opened.averages.items():
        for key, row in zip(keys, rows, strict=True):
            assert torch.equal(opened.read(key), row[f"policy.model.{name}"])


@pytest.mark.parametrize("kind", KINDS)
def test_without_snapshots_there_are_no_keys(tmp_path, kind):
    assert open_weights(save(build(0), tmp_path / "model.ckpt", kind)).averages == {}


@pytest.mark.parametrize("kind", KINDS)
def test_the_empty_model_is_the_saved_one_without_its_weights(tmp_path, kind):
    model = build(0, tie_word_embeddings=True)
    opened = open_weights(save(model, tmp_path / "model.ckpt", kind))
    empty = empty_model(opened.made_with)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert {n: p.shape for n, p in empty.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    assert [names for names in tied_names(empty) if len(names) > 1] == [
        ["model.embed_tokens.weight", "lm_head.weight"]
    ]


def test_a_tokenizer_is_found_where_there_is_one(tmp_path):
    folder = save(build(0), tmp_path / "folder", "folder")
    source = open_weights(folder).made_with["tokenizer"]
    assert load_tokenizer(source).chat_template == tiny.CHAT_TEMPLATE
    (folder / "tokenizer_config.json").unlink()
    assert load_tokenizer(open_weights(folder).made_with["tokenizer"]) is None
    with pytest.raises(ValueError, match="tokenizer 'gone' cannot be loaded"):
        load_tokenizer("gone")


# --- errors ---------------------------------------------------------------------------------------------


def refused(path):
    with pytest.raises(ValueError, match=path.name) as caught:
        open_weights(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_not_there_is_named(tmp_path):
    assert "no such checkpoint" in refused(tmp_path / "gone.ckpt")


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_file_is_named_before_anything_is_read(tmp_path, kind):
    path = save(build(0), tmp_path / "model.ckpt", kind)
    if kind in ("folder", "split"):
        path = max(path.glob("*.safetensors"))
    elif kind == "shards":
        path = path / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-100])
    assert "damaged" in refused(tmp_path / "model.ckpt")


def test_a_missing_part_of_a_split_folder_is_damage(tmp_path):
    folder = save(build(0), tmp_path / "split", "split")
    min(folder.glob("*.safetensors")).unlink()
    assert "damaged" in refused(folder)


def test_an_index_must_fit_its_files(tmp_path):
    folder = save(build(0), tmp_path / "split", "split")
    part = max(folder.glob("*.safetensors"))
    save_file(load_file(part) | {"model.extra": torch.zeros(2)}, part)
    assert "differ in model.extra" in refused(folder)


@pytest.mark.parametrize("content", ["", "{"])
def test_a_broken_config_is_damage(tmp_path, content):
    folder = save(build(0), tmp_path / "folder", "folder")
    (folder / "config.json").write_text(content)
    assert "damaged" in refused(folder)


def test_a_folder_without_config_or_weights_is_none(tmp_path):
    (tmp_path / "notes").mkdir()
    assert "no config.json" in refused(tmp_path / "notes")
    (tmp_path / "notes" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "no weights that can be read" in refused(tmp_path / "notes")


@pytest.mark.parametrize(
    "content", [{"state_dict": {}}, [1, 2], torch.zeros(3)], ids=["dict", "list", "tensor"]
)
def test_a_checkpoint_of_another_project_is_none(tmp_path, content):
    torch.save(content, tmp_path / "other.ckpt")
    assert "not a checkpoint of a rewarm module" in refused(tmp_path / "other.ckpt")
