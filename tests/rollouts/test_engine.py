import itertools
import math

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rewarm.rollouts import engine as engine_module
from rewarm.rollouts.engine import Completion, TransformersEngine, sample

EOS, PAD, VOCAB = 1, 0, 40
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17], [18], [5, 6, 7, 8, 9, 10, 12], [20, 21, 22]]
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # far from uniform, so that the tokens depend on the prompt
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def qwen3():
    return Qwen3ForCausalLM(Qwen3Config(**SIZES))


def gemma2():
    # The window of 6 is shorter than the prompts and completions, so the cache slides.
    return Gemma2ForCausalLM(
        Gemma2Config(
            **SIZES,
            sliding_window=6,
            query_pre_attn_scalar=8,
            attn_implementation="eager",
            final_logit_softcapping=5.0,
        )
    )


def build(builder=llama, seed=0):
    torch.manual_seed(seed)
    return builder().eval()


def engine(max_new_tokens=12, **options):
    return TransformersEngine(max_new_tokens, **{"eos_token_id": EOS, "pad_token_id": PAD} | options)


def reference_logprobs(model, prompt, completion, temperature=1.0, top_k=0, top_p=1.0):
    """One full forward per sequence, no cache and no padding; truncation written out token by token."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion.tokens]), use_cache=False).logits[0].double()
    result = []
    for position, token in enumerate(completion.tokens, start=len(prompt) - 1):
        probs = (logits[position] / (temperature or 1.0)).softmax(-1).tolist()
        ranked = sorted(range(VOCAB), key=lambda i: -probs[i])[: top_k or VOCAB]
        total, mass, kept = sum(probs[i] for i in ranked), 0.0, []
        for i in ranked:
            if mass >= top_p * total:
                break
            kept.append(i)
            mass += probs[i]
        assert token in kept
        result.append(math.log(probs[token] / mass))
    return result


def spoken(model):
    """Two tokens of the greedy completions: as end tokens they cut some of them and not others."""
    unended = engine(temperature=0, eos_token_id=VOCAB).generate(model, PROMPTS, 1, seed=0)
    return [unended[0][0].tokens[4], unended[2][0].tokens[7]]


@pytest.mark.parametrize("builder", [llama, qwen3, gemma2])
def test_greedy_equals_generate_token_for_token(builder):
    model = build(builder)
    ends = spoken(model)
    width = max(map(len, PROMPTS))
    output = model.generate(
        torch.tensor([[PAD] * (width - len(p)) + p for p in PROMPTS]),
        attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS]),
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=ends,
        pad_token_id=PAD,
    )[:, width:].tolist()
    completions = engine(temperature=0, eos_token_id=ends).generate(model, PROMPTS, 2, seed=0)
    assert {c.finished for group in completions for c in group} == {True, False}
    for row, group in zip(output, completions, strict=True):
        stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        expected = Completion(row[:stop], [0.0] * stop, row[stop - 1] in ends)
        assert group == [expected, expected]


def biased_towards_the_end(model):
    """The end-of-sequence token gets a fair share at every step, so that some rows end and some do not."""
    with torch.no_grad():
        model.lm_head.weight[[EOS, 2, 3]] *= 2.0
    return model


@pytest.mark.parametrize("builder", [llama, qwen3, gemma2])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 0.7, "top_k": 12, "top_p": 0.9}],
    ids=str,
)
def test_logprobs_equal_a_teacher_forced_forward(builder, options):
    model = biased_towards_the_end(build(builder))
    rollouts = engine(**options).generate(model, PROMPTS, 3, seed=1)
    for prompt, group in zip(PROMPTS, rollouts, strict=True):
        for completion in group:
            expected = reference_logprobs(model, prompt, completion, **options)
            torch.testing.assert_close(completion.logprobs, expected, rtol=0, atol=1e-5)


def test_completions_stop_at_the_first_end_token_and_only_there():
    model = biased_towards_the_end(build())
    completions = list(itertools.chain(*engine(eos_token_id=[EOS, 2]).generate(model, PROMPTS, 8, seed=0)))
    assert {c.finished for c in completions} == {True, False}
    for c in completions:
        assert len(c.tokens) == len(c.logprobs)
        assert c.finished == (c.tokens[-1] in (EOS, 2))
        assert not {EOS, 2} & set(c.tokens[:-1])
        assert c.finished or len(c.tokens) == 12


@pytest.mark.parametrize("builder", [llama, qwen3, gemma2])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_neither_padding_nor_batching_nor_compaction_changes_the_tokens(builder, temperature, monkeypatch):
    model = build(builder)
    options = {"temperature": temperature, "eos_token_id": spoken(model)}
    together = engine(**options).generate(model, PROMPTS, 4, seed=3)
    assert {c.finished for group in together for c in group} == {True, False}

    def check(rollouts):
        for expected, actual in zip(itertools.chain(*together), itertools.chain(*rollouts), strict=True):
            assert actual.tokens == expected.tokens
            torch.testing.assert_close(actual.logprobs, expected.logprobs, rtol=0, atol=2e-5)

    check(engine(**options, max_tokens_in_flight=160).generate(model, PROMPTS, 4, seed=3))
    monkeypatch.setattr(engine_module, "COMPACT_FRAC", 1.0)
    check(engine(**options).generate(model, PROMPTS, 4, seed=3))
    if temperature == 0:
        check([engine(**options).generate(model, [prompt], 4, seed=9)[0] for prompt in PROMPTS])


def test_finished_rows_leave_the_batch_and_the_loop_ends_with_the_last():
    model = biased_towards_the_end(build())
    widths = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    rollouts = engine(40, eos_token_id=[EOS, 2, 3]).generate(model, PROMPTS, 4, seed=0)
    longest = max(len(c.tokens) for group in rollouts for c in group)
    assert longest < 40
    assert widths[0] == (6, 7)  # each prompt once
    assert widths[1][0] <= 24
    assert widths[-1][0] < 12
    assert len(widths) == longest


def test_a_cache_with_room_holds_what_one_without_holds_and_copies_it_once_in_a_while():
    model = build()
    generator = torch.Generator().manual_seed(0)
    plain, roomy = DynamicCache(config=model.config), engine_module.rollout_cache(model)
    buffers = set()

    def states(rows, length):
        return [torch.randn(rows, 2, length, 8, generator=generator) for _ in range(2)]

    def grow(rows, length):
        new = states(rows, length)
        for layer in range(2):
            expected, found = plain.update(*new, layer), roomy.update(*new, layer)
            assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))
        buffers.add(roomy.layers[0].keys.untyped_storage().data_ptr())

    grow(3, 5)
    for cache in (plain, roomy):
        cache.batch_repeat_interleave(2)
    for _ in range(2 * engine_module.CPU_ROOM):
        grow(6, 1)
    assert len(buffers) <= 3
    for cache in (plain, roomy):
        cache.batch_select_indices(torch.tensor([4, 0, 1]))
    for length in (1, 1, engine_module.CPU_ROOM + 3, 1):
        grow(3, length)
    assert (
        plain.get_seq_length()
        == roomy.get_seq_length()
        == 5 + 2 * engine_module.CPU_ROOM + 6 + engine_module.CPU_ROOM
    )


def test_under_autocast_the_cache_is_narrow_and_the_completions_are_those_of_a_wide_one(monkeypatch):
    model, engine = build(), engine_module.TransformersEngine(12, eos_token_id=1, pad_token_id=0)
    caches = []

    def keep(made):
        caches.append(made)
        return made

    cache = engine_module.rollout_cache
    found = []
    for make in (cache, lambda model: DynamicCache(config=model.config)):
        monkeypatch.setattr(engine_module, "rollout_cache", lambda model, make=make: keep(make(model)))
        with torch.autocast("cpu", torch.bfloat16):
            found.append(engine.generate(model, [[5, 6, 7], [8, 9]], num_samples=3, seed=0))
    assert found[0] == found[1]
    assert [one.layers[0].keys.dtype for one in caches] == [torch.bfloat16, torch.float32]


def test_batches_hold_prompts_of_similar_length_within_the_limit():
    batches = engine(4, max_tokens_in_flight=40)._batches([2, 9, 3, 16, 10, 2, 2], num_samples=2)
    assert batches == [[3], [4], [1], [2, 0], [5, 6]]
    assert engine(4)._batches([1, 3, 2], num_samples=2) == [[1, 2, 0]]


def test_first_token_frequencies_match_the_softmax():
    model = build()
    count = 4000
    with torch.no_grad():
        probs = model(torch.tensor([PROMPTS[2]])).logits[0, -1].softmax(-1)
    (group,) = engine(1).generate(model, [PROMPTS[2]], count, seed=0)
    observed = torch.bincount(torch.tensor([c.tokens[0] for c in group]), minlength=VOCAB)
    likely = probs * count >= 5
    expected = torch.cat([probs[likely], probs[~likely].sum()[None]]) * count
    observed = torch.cat([observed[likely], observed[~likely].sum()[None]])
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    freedom = len(expected) - 1
    assert freedom > 5
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_sample_takes_the_first_token_whose_cumulative_probability_exceeds_the_draw():
    logits = torch.tensor([0.2, 0.5, 0.3]).log().expand(6, 3)
    draws = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 1 - 2**-53], dtype=torch.float64)
    tokens, logprobs = sample(logits, draws)
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.2, 0.2, 0.5, 0.5, 0.3, 0.3]))


def test_sample_never_draws_a_token_that_was_cut():
    logits = torch.tensor([0.1, 0.4, 0.1, 0.3, 0.1]).log().expand(4, 5)
    draws = torch.tensor([0.0, 0.57, 0.58, 1 - 2**-53], dtype=torch.float64)
    for options in ({"top_k": 2}, {"top_p": 0.65}):
        tokens, logprobs = sample(logits, draws, **options)
        assert tokens.tolist() == [1, 1, 3, 3]
        torch.testing.assert_close(logprobs.exp(), torch.tensor([4 / 7, 4 / 7, 3 / 7, 3 / 7]))


def test_the_most_probable_token_survives_any_top_p():
    tokens, logprobs = sample(
        torch.tensor([[0.0, 3.0]]), torch.tensor([0.99], dtype=torch.float64), top_p=1e-9
    )
    assert tokens.tolist() == [1]
    assert logprobs.tolist() == [0.0]


def test_the_same_seed_gives_the_same_completions_and_another_seed_others():
    model = build()
    first, again, other = (engine().generate(model, PROMPTS, 2, seed=seed) for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_samples_of_a_prompt_and_equal_prompts_are_drawn_independently():
    rollouts = engine().generate(build(), [PROMPTS[0]] * 2, 4, seed=0)
    assert len({tuple(c.tokens) for group in rollouts for c in group}) == 8


def test_the_global_generator_is_not_touched():
    model = build()
    before = torch.get_rng_state()
    engine().generate(model, PROMPTS, 2, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_is_off_and_each_modules_mode_comes_back():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_dropout=0.9))
    expected = engine().generate(model.eval(), PROMPTS, 2, seed=0)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    assert engine().generate(model, PROMPTS, 2, seed=0) == expected
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(IndexError):
        engine().generate(model, [[VOCAB]], 2, seed=0)
    assert [module.training for module in model.modules()] == modes


def test_a_rollout_builds_no_graph_and_the_model_can_be_trained_after_it():
    model = build().train()
    graphs = []
    hook = model.lm_head.register_forward_hook(lambda *call: graphs.append(call[2].requires_grad))
    engine().generate(model, PROMPTS, 2, seed=0)
    hook.remove()
    assert set(graphs) == {False}
    assert torch.is_grad_enabled()
    model(torch.tensor([PROMPTS[0]])).logits.sum().backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_broken_logits_are_an_error(temperature):
    model = build()
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    with pytest.raises(RuntimeError, match="NaN or infinite"):
        engine(temperature=temperature).generate(model, PROMPTS, 1, seed=0)


def test_no_prompts_give_no_completions():
    assert engine().generate(build(), [], 3, seed=0) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"eos_token_id": []}, r"eos_token_id is \[\]"),
        ({"eos_token_id": -1}, "eos_token_id is -1"),
        ({"pad_token_id": -1}, "pad_token_id is -1"),
        ({"max_tokens_in_flight": 0}, "max_tokens_in_flight is 0"),
    ],
)
def test_an_argument_out_of_range_is_an_error_that_names_it(options, message):
    with pytest.raises(ValueError, match=message):
        engine(**options)


@pytest.mark.parametrize(
    ("options", "prompts", "num_samples", "message"),
    [
        ({}, [[1], []], 1, r"prompts\[1\] is empty"),
        ({}, [[1], [2] * 53], 1, r"prompts\[1\] has 53 tokens; at most 52 fit"),
        ({}, [[1]], 0, "num_samples is 0"),
        ({"top_k": 41}, [[1]], 1, r"top_k is 41; it must be in \[0, 40\]"),
        ({"max_tokens_in_flight": 50}, [[1, 2]], 4, "max_tokens_in_flight is 50; it must be at least 56"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_an_error_that_names_it(options, prompts, num_samples, message):
    with pytest.raises(ValueError, match=message):
        engine(**options).generate(build(), prompts, num_samples, seed=0)


def test_a_prompt_that_just_fits_the_context_is_continued():
    (group,) = engine().generate(build(), [[2] * 52], 1, seed=0)
    assert group[0].tokens
