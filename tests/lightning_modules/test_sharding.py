"""Models in shards against the same models whole: losses, gradients, buffers, and what each rank holds."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import rewarm
from rewarm.datamodules.loader import collate_rows
from rewarm.lightning_modules.policy import Policy, build_empty, build_model
from rewarm.lightning_modules.sharding import shard
from tests import fits, tiny
from tests.distributed.ranks import on_ranks
from tests.distributed.runs import files_in, whole, wholes
from tests.lightning_modules.test_policy import (
    COHERE,
    GEMMA2,
    GRANITE,
    PHI,
    QWEN3,
    documents,
    model,
    policy_logprobs,
)

# Sizes that two ranks don't divide.
ODD = {**tiny.LLAMA, "vocab_size": 65, "intermediate_size": 67, "hidden_size": 30, "head_dim": 10}
MIXTURE = {
    **tiny.LLAMA,
    "model_type": "mixtral",
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
}
GEMMA3 = {**GEMMA2, "model_type": "gemma3_text", "final_logit_softcapping": None}
TIED = {"tie_word_embeddings": True}
MODELS = {
    "llama": (tiny.LLAMA, {}),
    "tied llama": ({**tiny.LLAMA, **TIED}, {}),
    "odd llama": (ODD, {}),
    "odd, tied and checkpointed llama": ({**ODD, **TIED}, {"gradient_checkpointing": True}),
    "checkpointed llama": (tiny.LLAMA, {"gradient_checkpointing": True}),
    "llama with eager attention": (tiny.LLAMA, {"attention": "eager"}),
    "qwen3": (QWEN3, {"attention": "sdpa"}),
    "tied gemma2": ({**GEMMA2, **TIED}, {"attention": "eager"}),
    "gemma3": (GEMMA3, {"attention": "eager"}),
    "granite": (GRANITE, {}),
    "tied cohere": ({**COHERE, **TIED}, {}),
    "phi, with a bias in its head": (PHI, {}),
    "mixtral": (MIXTURE, {}),
}


def mesh(ways=1):
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    ranks = torch.distributed.get_world_size()
    return init_device_mesh("cpu", (ranks // ways, ways), mesh_dim_names=("data_parallel", "tensor_parallel"))


def sharded(fields, source, ways=1, **options):
    """A policy in shards with the weights that rank 0 has."""
    module = rewarm.CurriculumSFT(fields, **options)
    empty = module.equip(build_empty(fields, module.attention))
    policy = Policy(empty)
    source = source if torch.distributed.get_rank() == 0 else None
    shard(policy, empty, source, mesh(ways), torch.device("cpu"))
    return policy


def step(policy, rank=0, ranks=1):
    """Loss and gradients of a packed row for every rank."""
    rows = [documents(9, 14, 6, seed=seed) for seed in range(4)][rank::ranks]
    batch = collate_rows(rows, 0, restart=True)
    loss = -policy_logprobs(policy, batch).sum()
    # FSDP takes the mean of the gradients over ranks.
    (ranks * loss).backward()
    return loss.detach(), wholes(fits.gradients(policy))


def compare(models, ways=1):
    """On a rank: by how much loss, gradients and buffers of a sharded model differ from the whole one's."""
    places = mesh(ways)["data_parallel"]
    found = {}
    for name, (fields, options) in models.items():
        source = model(fields)
        expected_loss, expected = step(Policy(source))
        policy = sharded(fields, source, ways, **options)
        loss, gradients = step(policy, places.get_local_rank(), places.size())
        torch.distributed.all_reduce(loss, group=places.get_group())
        buffers = dict(source.named_buffers())
        head, embedding = policy.model.get_output_embeddings(), policy.model.get_input_embeddings()
        found[name] = {
            "loss": abs(float(loss / expected_loss) - 1.0),
            "gradients": fits.distance(gradients, expected),
            "weights": max(
                float((whole(p) - q).abs().max())
                for p, q in zip(policy.model.parameters(), source.parameters(), strict=True)
            ),
            "buffers": all(torch.equal(b, buffers.pop(n)) for n, b in policy.model.named_buffers())
            and not buffers,
            "tied": (head.weight is embedding.weight)
            == (source.get_output_embeddings().weight is source.get_input_embeddings().weight),
            "sharded": all(isinstance(p, DTensor) for p in policy.parameters()),
        }
    return found


def assert_same(ranks, tolerance=1e-6):
    for found in ranks:
        for name, measured in found.items():
            assert measured["loss"] < tolerance, name
            assert measured["gradients"] < 1e-5, name
            assert measured["weights"] == 0.0, name
            assert measured["buffers"], name
            assert measured["tied"], name
            assert measured["sharded"], name


@pytest.mark.dist
def test_any_model_in_shards_has_the_loss_and_gradients_of_the_whole_one():
    assert_same(on_ranks(2, compare, MODELS))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_layers_in_shards_have_the_loss_and_gradients_of_the_whole_model():
    one_layer = {**tiny.LLAMA, "num_hidden_layers": 1}
    assert_same(on_ranks(2, compare, {"compiled": (one_layer, {"compile": True})}), tolerance=1e-5)


TWO_HEADS = {"num_key_value_heads": 2}
SPLIT = {
    "llama": ({**tiny.LLAMA, **TWO_HEADS}, {}),
    # The halves of its layers have sizes that two ranks don't divide.
    "odd and tied llama": (
        {**ODD, **TWO_HEADS, **TIED, "num_attention_heads": 2, "intermediate_size": 66},
        {},
    ),
    "checkpointed qwen3": ({**QWEN3, **TWO_HEADS}, {"gradient_checkpointing": True}),
    "gemma2": ({**GEMMA2, **TWO_HEADS}, {"attention": "eager"}),
    "cohere": ({**COHERE, **TWO_HEADS}, {}),
}


@pytest.mark.dist
@pytest.mark.parametrize("size", [2, 4])
def test_any_model_with_split_layers_has_the_loss_and_gradients_of_the_whole_one(size):
    assert_same(on_ranks(size, compare, SPLIT, 2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_type": "gpt2", "n_embd": 32, "n_head": 2, "n_layer": 2, "vocab_size": 64},
            "tensor_parallel_size is 2, but transformers has no tensor parallel plan for 'gpt2': set it to 1",
        ),
        (MIXTURE, "tensor_parallel_size is 2, but the plan of 'mixtral' has the steps .*: set it to 1"),
        (tiny.LLAMA, "tensor_parallel_size is 2, which does not divide num_key_value_heads 1"),
        (
            {**tiny.LLAMA, **TWO_HEADS, "intermediate_size": 67},
            "tensor_parallel_size is 2, which does not divide intermediate_size 67",
        ),
    ],
)
def test_a_model_that_cannot_be_split_says_why(fields, message):
    class Two:
        def size(self):
            return 2

    empty = build_empty(fields)
    with pytest.raises(ValueError, match=message):
        shard(Policy(empty), empty, None, {"tensor_parallel": Two()}, torch.device("cpu"))


# --- memory ---------------------------------------------------------------------------------------------

LARGE = {
    **tiny.LLAMA,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 10,
    "vocab_size": 8192,
}


class Peak(Callback):
    """The most main memory that a process took between `setup` and `on_fit_start`, in bytes."""

    def setup(self, trainer, pl_module, stage):
        Path("/proc/self/clear_refs").write_text("5")
        self.before = self.most()

    def on_fit_start(self, trainer, pl_module):
        self.taken = self.most() - self.before

    def most(self):
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def load_in_shards(folder):
    """On a rank: how much memory loading took, and some loaded weights."""
    module, peak = rewarm.CurriculumSFT(str(folder)), Peak()
    trainer = fits.trainer(max_steps=0, devices=2, strategy=rewarm.FSDP2Strategy(), callbacks=[peak])
    trainer.fit(module, datamodule=fits.instructions(files_in(folder)))
    module.save_pretrained(folder / "exported")
    parameters = dict(module.policy.model.named_parameters())
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    return peak.taken, {name: whole(parameters[name]) for name in SOME}


SOME = ["model.embed_tokens.weight", "model.layers.9.mlp.down_proj.weight", "model.norm.weight"]


@pytest.mark.dist
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peaks of memory from Linux")
def test_only_rank_0_holds_a_whole_model_while_a_folder_is_loaded(tmp_path):
    torch.manual_seed(0)
    source = build_model(LARGE).to(torch.bfloat16)
    source.save_pretrained(tmp_path, max_shard_size="25MB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    bytes_in_float32 = 4 * sum(p.numel() for p in source.parameters())
    (first, weights), (second, _) = on_ranks(2, load_in_shards, tmp_path)
    assert bytes_in_float32 > 150e6
    # Its half, and a tensor or two on their way.
    assert 0.4 < second / bytes_in_float32 < 0.75
    assert first / bytes_in_float32 > 0.9
    for name, weight in weights.items():
        assert torch.equal(weight, source.state_dict()[name].float())
    exported = build_model(str(tmp_path / "exported"), dtype="auto")
    assert exported.dtype == torch.float32
    for name, weight in exported.state_dict().items():
        assert torch.equal(weight, source.state_dict()[name].float())
    config = exported.config.to_dict() | {"dtype": None, "_name_or_path": None}
    assert config == build_model(str(tmp_path)).config.to_dict() | {"dtype": None, "_name_or_path": None}
