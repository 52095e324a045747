"""The policy against transformers' own logits, and what every module shares."""

import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
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


def text_loader(steps):
    batches = fits.cut(fits.sequences(2 * steps), 2, fits.text_batch)
    return rewarm.WindowLoader(batches, 1)


class Broken(Callback):
    """A gradient of the third step is no number; keeps what the optimizer had before that step and after."""

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == 2:
            pl_module.policy.model.lm_head.weight.grad[3, 1] = torch.nan

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2:
            self.before = self.held(trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 2:
            self.after = self.held(trainer)

    def held(self, trainer):
        (optimizer,) = trainer.optimizers
        states = [[p, *optimizer.state[p].values()] for g in optimizer.param_groups for p in g["params"]]
        return [tensor.detach().clone() for state in states for tensor in state]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("log_every", "told_at"), [(1, 3), (5, 5), (50, 6)])
def test_a_step_without_a_finite_norm_changes_nothing_and_is_counted_and_told_of(
    tmp_path, fused, log_every, told_at
):
    torch.manual_seed(0)
    broken = Broken()
    built = LanguageModuleWithLoss(tiny.LLAMA, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, fused=fused))
    trainer = fits.trainer(
        max_steps=6, callbacks=[broken], gradient_clip_val=0.5, log_every_n_steps=log_every
    )
    told = f"step {told_at + (told_at == 6)}: 1 left out since"
    with pytest.warns(UserWarning, match=told) as warned:
        trainer.fit(built, text_loader(6), [])
    assert len([w for w in warned if "left out" in str(w.message)]) == 1
    assert len(broken.before) == 4 * len(list(built.parameters()))
    assert all(torch.equal(*pair) for pair in zip(broken.before, broken.after, strict=True))
    assert not torch.equal(broken.held(trainer)[0], broken.after[0])
    assert {float(state["step"]) for state in trainer.optimizers[0].state.values()} == {5.0}
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    assert torch.load(tmp_path / "saved.ckpt")["rewarm_skipped_steps"] == built.skipped_steps == 1


class LanguageModuleWithLoss(LanguageModule):
    def training_step(self, batch, batch_idx):
        return self.counts.loss(-self.logprobs(batch).sum() / self.counts.of(batch, batch_idx)["tokens"])


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_float16_clips_what_a_fused_optimizer_has_not_unscaled_yet(algorithm):
    weights = []
    for fused in (False, True):
        torch.manual_seed(0)
        built = LanguageModuleWithLoss(
            tiny.LLAMA, optimizer=lambda p, fused=fused: torch.optim.AdamW(p, lr=1e-3, fused=fused)
        )
        record, scaler = fits.Record(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
        trainer = fits.trainer(
            max_steps=4,
            callbacks=[record],
            gradient_clip_val={"norm": 0.1, "value": 0.01}[algorithm],
            gradient_clip_algorithm=algorithm,
            plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        )
        trainer.fit(built, text_loader(4), [])
        assert record.metrics[0]["train/grad_norm"] > 0.5
        largest = max(float(gradient.abs().max()) for gradient in record.gradients[0].values())
        assert (largest > 100) == fused  # before clipping, still scaled
        weights.append(record.weights[-1])
    assert fits.distance(*weights) < 1e-4


@pytest.mark.parametrize("saved_with", [True, False])
def test_a_run_resumed_with_or_without_a_fused_optimizer_goes_on_as_it_was_saved(tmp_path, saved_with):
    weights = []
    for fused, path in ((saved_with, None), (not saved_with, tmp_path / "saved.ckpt")):
        torch.manual_seed(0)
        built = LanguageModuleWithLoss(
            tiny.LLAMA, optimizer=lambda p, fused=fused: torch.optim.AdamW(p, lr=1e-3, fused=fused)
        )
        record = fits.Record()
        trainer = fits.trainer(max_steps=6, callbacks=[record], gradient_clip_val=0.5)
        if path is None:
            trainer.fit_loop.epoch_loop.max_steps = 3
            trainer.fit(built, text_loader(6), [])
            trainer.save_checkpoint(tmp_path / "saved.ckpt")
            trainer.fit_loop.epoch_loop.max_steps = 6
            trainer.fit(built, text_loader(6), [], ckpt_path=tmp_path / "saved.ckpt")
        else:
            trainer.fit(built, text_loader(6), [], ckpt_path=path)
        assert trainer.optimizers[0].param_groups[0]["fused"] is saved_with
        weights.append(record.weights[-1])
    assert fits.distance(*weights) == 0.0


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
    built = rewarm.GRPO({**tiny.LLAMA, "attention_dropout": 0.5}, kl=0.1)
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
    statistics = torch._dynamo.utils.counters["stats"]
    for compiled in (False, True):
        built = module({**tiny.LLAMA, "num_hidden_layers": 1}, compile=compiled)
        logprobs = built.logprobs(batch)
        logprobs.sum().backward()
        results.append((logprobs.detach(), fits.gradients(built)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)
    assert fits.distance(results[1][1], results[0][1]) < 1e-5
    before = statistics["unique_graphs"]
    assert before > 0
    built.logprobs(collate_rows([documents(20, 3, 6)], 0, restart=True)).sum().backward()
    assert statistics["unique_graphs"] == before  # other documents in a row of the same length


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


def test_the_older_kind_of_sharding_is_refused_with_what_takes_its_place():
    built = LanguageModuleWithLoss(tiny.LLAMA)
    built.trainer = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(ValueError, match="strategy is FSDPStrategy, .* use rewarm.FSDP2Strategy"):
        built.configure_model()


def test_layer_kernels_follow_the_trainers_device_and_not_the_machines(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    torch.manual_seed(0)
    built = LanguageModuleWithLoss(tiny.LLAMA, fits.sgd())
    fits.trainer(max_steps=1).fit(built, text_loader(1), [])
    assert {type(part).__module__.split(".")[0] for part in built.policy.modules()} <= {
        "torch",
        "rewarm",
        "transformers",
    }
