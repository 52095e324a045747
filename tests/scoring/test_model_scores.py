"""Scores under a model, against one example at a time through transformers."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from rewarm.lightning_modules.policy import build_model
from rewarm.rollouts.pass_rate import wilson_interval
from rewarm.scoring.model_scores import (
    angle,
    loss,
    pass_rate,
    perplexity_ratio,
    perplexity_score,
    prototype_distance,
)
from rewarm.scoring.prototypes import fit_prototypes
from rewarm.scoring.score_job import Job
from rewarm.scoring.scored_data import ScoredData
from tests import tiny

EOS = 1


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of two models, with a tokenizer and a chat template."""
    folders = []
    for seed in range(2):
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp(f"model{seed}")
        model = build_model(tiny.LLAMA)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3.0)  # else all losses are about log V
        model.save_pretrained(folder)
        tiny.build_tokenizer(tiny.CHAT_TEMPLATE).save_pretrained(folder)
        folders.append(str(folder))
    return folders


@pytest.fixture
def make(tmp_path, models):
    """Makes a job on some rows, in a folder of its own."""
    numbers = itertools.count()

    def job(rows, by="test", folder=None, **options):
        path = tiny.write_jsonl(tmp_path / f"{next(numbers)}.jsonl", rows)
        folder = folder or tmp_path / f"work{next(numbers)}"
        return Job(ScoredData(path), folder, {"by": by}, **{"model": models[0]} | options)

    return job


ROWS = [
    {"prompt": f"{n}+{n}=" + "a" * (n % 3), "completion": "xyz"[n % 3] * (1 + 2 * n % 5), "n": n}
    for n in range(14)
]


def ids(text):
    return tiny.build_tokenizer()(text)["input_ids"]


@torch.no_grad()
def logprobs(folder, before, after):
    """Of each token that follows."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.tensor([[*before, *after]])
    all_of_them = model(tokens).logits[0].double().log_softmax(-1)
    places = range(len(before) - 1, len(before) + len(after) - 1)
    return torch.stack([all_of_them[place, tokens[0, place + 1]] for place in places])


def test_losses_are_those_of_each_example_alone(make, models):
    found = loss(make(ROWS, batch_tokens=40)).columns[""]
    for row, value in zip(ROWS, found, strict=True):
        alone = logprobs(models[0], ids(row["prompt"]), [*ids(row["completion"]), EOS])
        assert value == pytest.approx(-alone.mean().item(), rel=1e-5)
    perplexities = perplexity_score(make(ROWS)).columns[""]
    torch.testing.assert_close(torch.tensor(perplexities), torch.tensor(found).exp(), rtol=1e-4, atol=0)


def test_a_ratio_compares_with_the_same_tokens_after_a_beginning(make, models):
    rows = [*ROWS[:4], {"prompt": "", "completion": "abc", "n": 9}]
    found = perplexity_ratio(make(rows)).columns[""]
    for row, value in zip(rows[:4], found, strict=False):
        completion = [*ids(row["completion"]), EOS]
        given = logprobs(models[0], ids(row["prompt"]), completion).mean()
        alone = logprobs(models[0], [EOS], completion).mean()
        assert value == pytest.approx((alone - given).exp().item(), rel=1e-4)
    assert found[4] is None


def test_a_ratio_of_two_models_is_that_of_their_perplexities(make, models):
    ratio = perplexity_ratio(make(ROWS), other=models[1]).columns[""]
    one, other = (perplexity_score(make(ROWS, model=model)).columns[""] for model in models)
    torch.testing.assert_close(
        torch.tensor(ratio), torch.tensor(one) / torch.tensor(other), rtol=1e-5, atol=0
    )


def test_another_tokenizer_cannot_be_compared(make, models, tmp_path):
    tokenizer = tiny.build_tokenizer()
    tokenizer.add_tokens(["many"])
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="whose tokenizer is not the model's"):
        perplexity_ratio(make(ROWS), other=str(tmp_path / "other"))


def test_long_examples_are_what_was_asked_for(make, models):
    rows = [{"prompt": "1+1=", "completion": "x" * n} for n in (1, 20)]
    with pytest.raises(
        ValueError, match=r"jsonl, line 2: 24 positions, but max_length is 10: set --overlong"
    ):
        loss(make(rows), max_length=10)
    assert loss(make(rows), max_length=10, overlong="drop").columns[""][1] is None
    kept = loss(make(rows), max_length=10, overlong="keep_start").columns[""][1]
    assert kept == pytest.approx(-logprobs(models[0], ids("1+1="), ids("x" * 7)).mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match="max_length is 500; it must be in 1 to 128, the model's context"):
        loss(make(rows), max_length=500)
    with pytest.raises(ValueError, match="overlong is 'cut'"):
        loss(make(rows), overlong="cut")


# --- pass rates ---------------------------------------------------------------------------------------


def odd(prompts, completions, n, **columns):
    assert all(isinstance(value, int) for value in n)
    return [float(len(text) % 2) for text in completions]


REWARD = {"reward": "tests.scoring.test_model_scores.odd", "samples": 4, "max_new_tokens": 5}


def test_pass_rates_come_with_counts_and_intervals_and_do_not_depend_on_the_order(make):
    rows = [{"prompt": row["prompt"], "n": row["n"]} for row in ROWS]
    columns = pass_rate(make(rows, batch_tokens=100), **REWARD).columns
    for k, rate, low, high in zip(*(columns[c] for c in ("_passed", "", "_low", "_high")), strict=True):
        assert rate == k / 4
        assert (low, high) == wilson_interval(k, 4)
    assert columns["_samples"] == [4.0] * len(rows)
    assert len({*columns["_passed"]}) > 2
    assert (
        pass_rate(make(rows[::-1], batch_tokens=100), **REWARD).columns["_passed"] == columns["_passed"][::-1]
    )
    other = pass_rate(make(rows, batch_tokens=100), **REWARD, seed=1)
    assert other.columns["_passed"] != columns["_passed"]
    assert set(pass_rate(make(rows), **REWARD, passing=0.0).columns[""]) == {1.0}


def test_prompts_that_leave_no_room_are_named(make):
    rows = [{"prompt": "1", "n": 0}, {"prompt": "1" * 125, "n": 0}]
    with pytest.raises(ValueError, match="line 2: the prompt and 5 new tokens take 130 positions"):
        pass_rate(make(rows), **REWARD)
    with pytest.raises(ValueError, match="samples is 0"):
        pass_rate(make(rows), **{**REWARD, "samples": 0})


# --- hidden states ------------------------------------------------------------------------------------


def states(folder, tokens):
    """What enters the last `up_proj`, and the last hidden states, of one sequence."""
    model, seen = AutoModelForCausalLM.from_pretrained(folder), []
    model.model.layers[-1].mlp.up_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    with torch.no_grad():
        last = model.model(torch.tensor([tokens])).last_hidden_state[0]
    return seen[0], last


def mean_cosine(pairs, hidden):
    return sum(F.cosine_similarity(hidden[i], hidden[j], dim=0).item() for i, j in pairs) / len(pairs)


def test_angles_are_over_the_question_and_the_templates_true_prefix(make, models):
    questions = ["abc", "1+1=?", "zz yy xx", "q"]
    rows = [{"messages": [{"role": "user", "content": question}]} for question in questions]
    asked = [{**row, "messages": [*row["messages"], {"role": "assistant", "content": "no"}]} for row in rows]
    rows = [{"prompt": row["messages"]} for row in rows]
    found = angle(make(rows, batch_tokens=30), prefix_weight=2.0).columns[""]
    for question, value in zip(questions[:3], found, strict=False):
        tokens = ids(f"u:{question}\na:")
        hidden, _ = states(models[0], tokens)
        own = range(2, 2 + len(question))
        within = mean_cosine([(i, j) for i in own for j in own if j < i], hidden)
        across = mean_cosine([(i, j) for i in own for j in range(2)], hidden)
        assert value == pytest.approx(within + 2.0 * across, abs=1e-5)
    assert found[3] is None  # of one token
    answered = angle(make(asked), prefix_weight=2.0).columns[""]
    assert answered[:3] == pytest.approx(found[:3], abs=1e-5)


def test_a_prompt_of_text_is_all_question(make, models):
    (found,) = angle(make([{"prompt": "abcd", "n": 1}])).columns[""]
    hidden, _ = states(models[0], ids("abcd"))
    assert found == pytest.approx(mean_cosine([(i, j) for i in range(4) for j in range(i)], hidden), abs=1e-5)


def test_distances_are_from_prototypes_of_the_mean_states(make, models):
    job = make(ROWS, batch_tokens=50)
    found = prototype_distance(job, prototypes=3, passes=2).columns[""]
    means = torch.stack(
        [states(models[0], [*ids(r["prompt"] + r["completion"]), EOS])[1].mean(0) for r in ROWS]
    )
    order = sorted(range(len(ROWS)), key=job.data.ids.__getitem__)
    fitted = fit_prototypes([means[order]] * 2, 3)
    torch.testing.assert_close(torch.tensor(found), fitted.distance(means), rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="prototypes is 20; it must be in 1 to 14"):
        prototype_distance(make(ROWS), prototypes=20)
