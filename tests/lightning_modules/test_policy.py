"""A policy's log-probabilities are those of transformers; packed rows, padding, and what cannot be built."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from rewarm.datamodules.loader import collate_rows
from rewarm.functional.logprob import IGNORE_INDEX
from rewarm.functional.sequences import sequence_sums
from rewarm.lightning_modules import policy as policy_module
from rewarm.lightning_modules.policy import DOCUMENTS, Policy, build_model
from rewarm.text.encoding import Tokens
from tests import fits, tiny

QWEN3 = {**tiny.LLAMA, "model_type": "qwen3", "head_dim": 16}
GEMMA2 = {
    **tiny.LLAMA,
    "model_type": "gemma2",
    "head_dim": 16,
    "final_logit_softcapping": 2.0,
    "attn_logit_softcapping": 5.0,
    "query_pre_attn_scalar": 16,
    "sliding_window": 64,
}
GRANITE = {**tiny.LLAMA, "model_type": "granite", "logits_scaling": 4.0, "residual_multiplier": 0.5}
COHERE = {**tiny.LLAMA, "model_type": "cohere", "logit_scale": 0.25}
PHI = {**tiny.LLAMA, "model_type": "phi", "num_key_value_heads": 2}  # its head has a bias
NEMOTRON = {**tiny.LLAMA, "model_type": "nemotron", "head_dim": 16}
MODELS = {
    "llama": tiny.LLAMA,
    "qwen3": QWEN3,
    "gemma2": GEMMA2,
    "granite": GRANITE,
    "cohere": COHERE,
    "phi": PHI,
}


def model(fields, seed=0):
    """A model whose weights are large enough for its log-probabilities to differ."""
    torch.manual_seed(seed)
    built = build_model(fields, "eager" if fields["model_type"] == "gemma2" else None)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else parameter.data.add_(
            0.1 * torch.randn_like(parameter)
        )
    return built


def documents(*lengths, seed=0):
    """Sequences of which the first two tokens are a prompt."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(3, 64, (length,), generator=generator) for length in lengths]
    return [Tokens(t, torch.arange(len(t)) >= 2) for t in tokens]


def policy_logprobs(policy, batch, temperature=1.0):
    return policy(batch["input_ids"], batch["position_ids"], batch["targets"], temperature=temperature)


def save(folder, fields=tiny.LLAMA, seed=0):
    model(fields, seed).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_logprobs_are_those_of_transformers_own_logits(name, tied):
    built = model({**MODELS[name], "tie_word_embeddings": tied}).eval()
    assert (built.get_output_embeddings().weight is built.get_input_embeddings().weight) == tied
    batch = collate_rows([[d] for d in documents(9, 14, 6)], 0, restart=False)
    with torch.no_grad():
        logits = built(input_ids=batch["input_ids"], use_cache=False).logits
        logprobs = policy_logprobs(Policy(built), batch)
        warm = policy_logprobs(Policy(built), batch, temperature=2.5)
    mask = batch["targets"] != IGNORE_INDEX
    places = batch["targets"].clamp(min=0)[..., None]
    for ours, temperature in ((logprobs, 1.0), (warm, 2.5)):
        expected = (logits.double() / temperature).log_softmax(-1).gather(-1, places)[..., 0]
        torch.testing.assert_close(ours[mask].double(), expected[mask], rtol=1e-5, atol=1e-5)
        assert (ours[~mask] == 0).all()
        assert ours.dtype == torch.float32


def per_sequence(built, rows, restart, order):
    """Summed log-probabilities by document, and the gradient of an uneven sum of them."""
    built.zero_grad()
    batch = collate_rows(rows, 0, restart=restart)
    logprobs = policy_logprobs(Policy(built), batch)
    sums = sequence_sums(logprobs, batch["sequence_ids"], len(order))[order]
    (sums * torch.arange(1.0, len(order) + 1)).sum().backward()
    return sums.detach(), fits.gradients(built)


@pytest.mark.parametrize("rows", [[[0, 1, 2, 3]], [[2, 0], [1, 3]]], ids=["one row", "two ragged rows"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_packed_documents_have_the_logprobs_and_gradients_of_separate_ones(name, rows, mode):
    built = model(MODELS[name])
    built.train(mode == "train")
    docs = documents(9, 14, 6, 4)
    alone, gradients_alone = per_sequence(built, [[d] for d in docs], False, [0, 1, 2, 3])
    flat = [number for row in rows for number in row]
    order = [flat.index(number) for number in range(4)]
    packed, gradients_packed = per_sequence(
        built, [[docs[number] for number in row] for row in rows], True, order
    )
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    assert fits.distance(gradients_packed, gradients_alone) < 1e-5


QWEN2 = {**tiny.LLAMA, "model_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 2}


def completions(prompt_length, *lengths, seed=0):
    """Sequences that begin with one prompt."""
    prompt, *rest = (d.tokens for d in documents(prompt_length, *lengths, seed=seed))
    tokens = [torch.cat([prompt, completion]) for completion in rest]
    return [Tokens(t, torch.arange(len(t)) >= prompt_length) for t in tokens]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fields", [tiny.LLAMA, QWEN3, QWEN2], ids=["llama", "qwen3", "qwen2"])
def test_without_padding_and_with_shared_prompts_nothing_changes(fields, checkpointing):
    built = model(fields)
    if checkpointing:
        enable = getattr(built, "activation_checkpointing_enable", built.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    one, other = completions(7, 9, 4), completions(3, 70, 1, 5, seed=1)
    rows = [one[0], other[0], one[1], other[1], *documents(12, seed=2), other[2]]
    batch = collate_rows([[row] for row in rows], 0, restart=False)
    results = []
    for implementation, given in (("eager", None), ("sdpa", None), (DOCUMENTS, batch["documents"])):
        built.set_attn_implementation(implementation)
        built.zero_grad()
        inputs = batch["input_ids"], batch["position_ids"], batch["targets"]
        logprobs = Policy(built)(*inputs, documents=given, num_targets=batch["num_targets"])
        (logprobs * torch.linspace(0.1, 1, logprobs.numel()).view_as(logprobs)).sum().backward()
        results.append((logprobs.detach(), fits.gradients(built)))
    for logprobs, gradients in results[:2]:
        torch.testing.assert_close(results[2][0], logprobs, rtol=1e-5, atol=1e-5)
        assert fits.distance(results[2][1], gradients) < 1e-5


def test_the_decoder_computes_no_padding_and_a_prompt_once():
    policy, seen = Policy(model(tiny.LLAMA)), []
    policy.model.base_model.register_forward_pre_hook(
        lambda module, args, options: seen.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    batch = collate_rows([[row] for row in completions(7, 9, 4)], 0, restart=False)
    policy(batch["input_ids"], batch["position_ids"], batch["targets"], documents=batch["documents"])
    assert seen == [(1, 15 + 4)]  # the prompt's last token is each completion's own
    policy(batch["input_ids"], batch["position_ids"], batch["targets"])
    assert seen[1:] == [(2, 15)]


def test_no_mask_is_made_for_documents():
    built = build_model(tiny.LLAMA)
    batch, shapes = collate_rows([documents(9, 14)], 0, restart=True), []
    built.model.layers[0].register_forward_pre_hook(
        lambda module, args, options: shapes.append(options["attention_mask"].shape), with_kwargs=True
    )
    policy_logprobs(Policy(built), batch)
    assert shapes == [(1, 1, 0, 0)]


def test_generation_is_that_of_transformers_own_attention():
    torch.manual_seed(0)
    prompts = torch.randint(3, 64, (3, 8))
    mask = torch.ones_like(prompts)
    mask[0, :5] = 0  # padded on the left
    tokens = []
    for implementation in ("sdpa", None):
        built = model(tiny.LLAMA).eval()
        built.set_attn_implementation(implementation or DOCUMENTS)
        generated = built.generate(prompts, attention_mask=mask, max_new_tokens=12, do_sample=False)
        tokens.append(generated)
    assert torch.equal(*tokens)


def test_an_exported_folder_does_not_name_the_attention(tmp_path):
    built = build_model(tiny.LLAMA)
    assert built.config._attn_implementation == DOCUMENTS
    built.save_pretrained(tmp_path)
    assert DOCUMENTS not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (GEMMA2, "the model has layers of sliding_attention"),
        ({**tiny.LLAMA, "model_type": "mistral", "sliding_window": 8}, "the model has a sliding_window of 8"),
        ({**tiny.LLAMA, "attention_dropout": 0.1}, "the model has attention_dropout 0.1"),
        ({"model_type": "bloom", "hidden_size": 32, "n_head": 2, "vocab_size": 64}, "BloomForCausalLM does"),
        (NEMOTRON, "NemotronForCausalLM does not"),
    ],
    ids=["sliding layers", "sliding window", "dropout", "alibi", "lost arguments"],
)
def test_a_model_that_cannot_attend_within_documents_keeps_its_attention(fields, problem, caplog):
    with caplog.at_level("INFO", logger="rewarm.lightning_modules.policy"):
        assert build_model(fields).config._attn_implementation != DOCUMENTS
    assert problem in caplog.text
    with pytest.raises(ValueError, match=f"attention is 'documents', but {problem}.*: set it to 'sdpa' or"):
        build_model(fields, DOCUMENTS)


def test_layers_that_lose_what_the_attention_needs_are_an_error(monkeypatch):
    monkeypatch.setattr(policy_module, "_DEAF", set())  # as for a model that is not known to be one of them
    batch = collate_rows([documents(9, 14)], 0, restart=True)
    with pytest.raises(ValueError, match="the layers around NemotronAttention do not hand on what it needs"):
        policy_logprobs(Policy(build_model(NEMOTRON)), batch)
    policy_logprobs(Policy(build_model(NEMOTRON, "sdpa")), batch)


def test_padding_and_neighbours_change_nothing():
    policy = Policy(model(tiny.LLAMA).eval())
    docs = documents(9, 14)
    alone = policy_logprobs(policy, collate_rows([[docs[0]]], 0, restart=False))
    beside = policy_logprobs(policy, collate_rows([[docs[0]], [docs[1]]], 0, restart=False, pad_to=30))
    torch.testing.assert_close(beside[:1, :8], alone, rtol=1e-5, atol=1e-5)
    assert (beside[0, 8:] == 0).all()


def test_a_batch_without_targets_has_gradients_of_zero_for_every_weight():
    policy = Policy(model(tiny.LLAMA))
    batch = collate_rows([], 0, restart=True)
    policy_logprobs(policy, batch).sum().backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in policy.parameters())


# --- errors ---------------------------------------------------------------------------------------------


def test_a_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"the folder has no config\.json, so it is no Hugging Face model"):
        build_model(str(tmp_path))


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(
        ValueError, match=r"model is '.*missing': no such folder, and not on the Hub or no network"
    ):
        build_model(str(tmp_path / "missing"))


def test_a_folder_without_weights_is_an_error_that_says_so(tmp_path):
    save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model is '.*': the folder cannot be loaded: .*model.safetensors"):
        build_model(str(tmp_path))


def test_truncated_weights_are_an_error_that_says_so(tmp_path):
    save(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="model is '.*': the folder cannot be loaded: "):
        build_model(str(tmp_path))


def test_a_config_needs_a_model_type():
    with pytest.raises(ValueError, match="config without model_type"):
        build_model({"hidden_size": 8})


def test_an_unknown_model_type_is_one_line():
    with pytest.raises(ValueError, match="^model_type is 'lama', which transformers does not know$"):
        build_model({**tiny.LLAMA, "model_type": "lama"})


def test_a_misspelt_field_is_an_error():
    with pytest.raises(
        ValueError, match="model has the field 'hiden_size', which model_type 'llama' does not"
    ):
        build_model({**tiny.LLAMA, "hiden_size": 8})


def test_older_names_of_fields_are_understood():
    config = build_model({**tiny.LLAMA, "rope_theta": 5000.0, "num_hidden_layers": 1}).config
    assert config.rope_parameters["rope_theta"] == 5000.0


@pytest.mark.parametrize("name", MODELS)
def test_statistics_are_those_of_transformers_own_logits(name):
    built = model(MODELS[name]).eval()
    batch = collate_rows([[d] for d in documents(9, 14, 6)], 0, restart=False)
    names = ["logsumexp", "candidates", "entropy"] + ["mean_logprobs"] * (name != "gemma2")
    candidates = torch.randint(64, (3, 13, 4), generator=torch.Generator().manual_seed(1))
    inputs = (batch["input_ids"], batch["position_ids"], batch["targets"])
    with torch.no_grad():
        logits = built(input_ids=batch["input_ids"], use_cache=False).logits.double() / 2.0
        values = Policy(built)(*inputs, temperature=2.0, statistics=names, candidates=candidates)
        plain = Policy(built)(*inputs, temperature=2.0)
    logprobs, known = logits.log_softmax(-1), batch["targets"] != IGNORE_INDEX
    expected = {
        "logsumexp": logits.logsumexp(-1),
        "mean_logprobs": logprobs.mean(-1),
        "entropy": -(logprobs.exp() * logprobs).sum(-1),
        "candidates": logprobs.gather(-1, candidates),
        "logprobs": logprobs.gather(-1, batch["targets"].clamp(min=0)[..., None])[..., 0],
    }
    assert values.keys() == {"logprobs", *names}
    torch.testing.assert_close(values["logprobs"], plain)
    for key, value in values.items():
        torch.testing.assert_close(value[known].double(), expected[key][known], rtol=2e-5, atol=2e-5)
        assert (value[~known] == 0).all()
