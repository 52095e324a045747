"""The policy against transformers' own logits, and what every module shares."""

import re
import shutil

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import rewarm
from rewarm.datamodules.loader import collate_rows
from rewarm.functional.logprob import IGNORE_INDEX
from rewarm.lightning_modules.base import LanguageModule
from rewarm.lightning_modules.policy import Policy
from rewarm.lightning_modules.sharding import decoder_layers
from tests import fits, tiny
from tests.lightning_modules.test_policy import MODELS, documents, model, save


def module(fields=tiny.LLAMA, seed=0, **options):
    torch.manual_seed(seed)
    built = LanguageModule(fields, **options)
    built.configure_model()
    return built


def test_matrices_decay_and_vectors_do_not():
    built = module(
        {**tiny.LLAMA, "attention_bias": True}, optimizer=lambda p: torch.optim.AdamW(p, weight_decay=0.1)
    )
    names = {parameter: name for name, parameter in built.named_parameters()}
    decay, no_decay = built.configure_optimizers().param_groups
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0.0)
    spared = {names[p] for p in no_decay["params"]}
    assert spared == {name for name in names.values() if "norm" in name or name.endswith("bias")}
    assert spared | {names[p] for p in decay["params"]} == set(names.values())


def test_a_tied_weight_is_optimised_once():
    built = module({**tiny.LLAMA, "tie_word_embeddings": True})
    parameters = [p for group in built.configure_optimizers().param_groups for p in group["params"]]
    assert len(parameters) == len(set(parameters)) == len(list(built.parameters()))


@pytest.mark.parametrize("source", ["config", "folder"])
def test_gradient_checkpointing_recomputes_the_layers_for_equal_gradients(tmp_path, source):
    fields = tiny.LLAMA if source == "config" else save(tmp_path)
    batch = collate_rows([documents(9, 14, 6)], 0, restart=True)
    gradients, calls = [], []
    for checkpointing in (False, True):
        built = module(fields, gradient_checkpointing=checkpointing)
        count = []
        attention = decoder_layers(built.policy.model)[0].self_attn
        attention.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        built.logprobs(batch).sum().backward()
        gradients.append(fits.gradients(built))
        calls.append(len(count))
    assert calls == [1, 2]
    assert fits.distance(gradients[1], gradients[0]) < 1e-6


def test_a_model_from_a_folder_trains_in_train_mode(tmp_path):
    built = module(save(tmp_path, {**tiny.LLAMA, "attention_dropout": 0.5}))
    assert all(part.training for part in built.modules())
    batch = collate_rows([documents(9)], 0, restart=True)
    assert not torch.equal(built.logprobs(batch), built.logprobs(batch))


def test_the_reference_never_trains_and_keeps_its_values():
    built = rewarm.GRPO({**tiny.LLAMA, "attention_dropout": 0.5}, beta=0.1)
    built.configure_model()
    copy = built.reference
    assert not any(p.requires_grad for p in copy.parameters())
    assert not any(part.training for part in copy.modules())
    before = fits.weights(copy)
    with torch.no_grad():
        for parameter in built.policy.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in fits.weights(copy).items())


# What torch 2.13 itself does when it compiles.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_layers_have_the_same_logprobs_and_gradients():
    batch = collate_rows([documents(9, 14, 6)], 0, restart=True)
    results = []
    for compiled in (False, True):
        built = module({**tiny.LLAMA, "num_hidden_layers": 1}, compile=compiled)
        logprobs = built.logprobs(batch)
        logprobs.sum().backward()
        results.append((logprobs.detach(), fits.gradients(built)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)
    assert fits.distance(results[1][1], results[0][1]) < 1e-5


def test_bf16_mixed_trains_close_to_float32_and_keeps_optimizer_state_in_float32(tmp_path):
    files, losses = fits.Files(tmp_path), []
    for precision in ("32-true", "bf16-mixed"):
        torch.manual_seed(0)
        built = rewarm.CurriculumSFT(tiny.LLAMA, fits.adamw(1e-3))
        record = fits.Record()
        trainer = fits.trainer(precision=precision, max_steps=3, callbacks=[record])
        trainer.fit(built, datamodule=fits.instructions(files))
        losses.append([metrics["train/loss"] for metrics in record.metrics])
        assert {p.dtype for p in built.parameters()} == {torch.float32}
        state = trainer.optimizers[0].state.values()
        assert {entry[name].dtype for entry in state for name in ("exp_avg", "exp_avg_sq")} == {torch.float32}
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_an_exported_folder_has_the_same_logprobs_in_transformers(tmp_path, name, tied):
    built = LanguageModule("", attention="eager")
    built.policy = Policy(model({**MODELS[name], "tie_word_embeddings": tied}).eval())
    tokenizer = tiny.build_tokenizer(tiny.CHAT_TEMPLATE)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "stale.txt").write_text("from an earlier export")
    built.save_pretrained(tmp_path / "hf", tokenizer)
    assert not (tmp_path / "hf" / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]  # nothing half-written is left

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    batch = collate_rows([[d] for d in documents(9, 14)], 0, restart=False)
    with torch.no_grad():
        logprobs = built.logprobs(batch)
        expected = loaded(input_ids=batch["input_ids"]).logits.log_softmax(-1)
    mask = batch["targets"] != IGNORE_INDEX
    expected = expected.gather(-1, batch["targets"].clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(logprobs[mask], expected[mask], rtol=1e-5, atol=1e-5)
    again = module(str(tmp_path / "hf"))
    assert again.policy.model.dtype == torch.float32
    assert rewarm.InstructionData("", str(tmp_path / "hf")).tokenizer.chat_template == tiny.CHAT_TEMPLATE


# --- errors ---------------------------------------------------------------------------------------------


def test_liger_layers_without_cuda_are_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    built = LanguageModule(tiny.LLAMA, liger_layers=True)
    with pytest.raises(RuntimeError, match="liger_layers needs a CUDA device and the liger-kernel package"):
        built.configure_model()


def test_a_tokenizer_larger_than_the_vocabulary_is_an_error(tmp_path):
    files = fits.Files(tmp_path)
    built = rewarm.CurriculumSFT({**tiny.LLAMA, "vocab_size": 20})
    with pytest.raises(ValueError, match="the tokenizer has 51 tokens, the model embeds 20: set vocab_size"):
        fits.trainer(max_steps=1).fit(built, datamodule=fits.instructions(files))


# --- Lightning ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .train_dataloader. does not have many workers")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_a_plain_loader_of_plain_batches_will_do():
    batch = collate_rows([documents(9, 14, 6)], 0, restart=True)
    plain = [{name: batch[name] for name in ("input_ids", "position_ids", "targets")}] * 2
    built, record = rewarm.ContinualPretraining(tiny.LLAMA, fits.sgd()), fits.Record()
    fits.trainer(max_steps=2, callbacks=[record]).fit(built, DataLoader(plain, batch_size=None))
    again = module()
    again.load_state_dict(record.weights[0])
    tokens = (batch["targets"] != IGNORE_INDEX).sum()
    expected = -(again.logprobs(batch).sum() / tokens).item()
    assert record.metrics[1]["train/loss"] == pytest.approx(expected, rel=1e-6)


def test_barebones_and_unlogged_runs_train(tmp_path):
    files = fits.Files(tmp_path)
    bare = Trainer(accelerator="cpu", devices=1, max_steps=2, barebones=True)
    for trainer in (bare, fits.trainer(max_steps=2, log_every_n_steps=0)):
        built = rewarm.CurriculumSFT(tiny.LLAMA, fits.adamw())
        trainer.fit(built, datamodule=fits.instructions(files))
        assert trainer.global_step == 2


def test_metrics_are_logged_at_the_first_step_and_then_as_often_as_asked(tmp_path):
    logged = []

    class Logged(rewarm.CurriculumSFT):
        def log(self, name, value, **options):
            logged.append((self.trainer.global_step + 1, name))
            super().log(name, value, **options)

    files = fits.Files(tmp_path)
    trainer = fits.trainer(max_steps=7, log_every_n_steps=3, accumulate_grad_batches=2)
    trainer.fit(Logged(tiny.LLAMA, fits.adamw()), datamodule=fits.instructions(files))
    assert [step for step, name in logged if name == "train/loss"] == [1, 3, 6]


@pytest.mark.parametrize("name", fits.METHODS)
def test_every_scalar_that_a_method_card_names_is_logged(tmp_path, name):
    method, files = fits.METHODS[name], fits.Files(tmp_path)
    validation = {"CorpusData": {"val": {"new": files.new}}, "InstructionData": {"val": files.sft}}
    data = method.data(files)
    data = method.data(files, **validation.get(type(data).__name__, {}))
    torch.manual_seed(0)
    trainer = fits.trainer(max_steps=2, val_check_interval=1)
    trainer.fit(method.module(tiny.LLAMA, fits.adamw()), datamodule=data)
    card = method.module.__doc__.replace("<domain>", "new")
    watched = set(re.findall(r"`((?:train|val|rollout|data)/[\w/]+)`", card))
    assert "train/loss" in watched or name == "DPO"
    assert len(watched) >= 2
    assert watched <= set(trainer.logged_metrics) | set(trainer.callback_metrics)
