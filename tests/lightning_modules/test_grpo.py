"""The policy gradient against a float64 loop over tokens, and end to end with the engine that samples."""

import copy
import math
import statistics

import pytest
import torch

import rewarm
from rewarm.functional.logprob import IGNORE_INDEX
from tests import fits, tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings(
        "ignore:Found .* in eval mode at the start of training"
    ),  # the frozen reference
]

SAMPLED = fits.sampled(3)
WEIGHTS = [rewarm.PerToken(), rewarm.PerSequence(), rewarm.PerConstant(17)]
LOSSES = [rewarm.Clipped(low=0.2, high=0.28), rewarm.GSPO(low=0.05, high=0.08)]


def named(part):
    return type(part).__name__


def objective(model, reference, sampled, temperature, *, loss, weights, kl, std):
    """Loss and metrics, one token after the other."""
    total, tokens, clipped, gap, entropy, kl_sum = 0.0, 0, 0, 0.0, 0.0, 0.0
    for one in sampled:
        rewards = one.rewards
        advantage = rewards[one.place] - statistics.fmean(rewards)
        if std:
            advantage /= statistics.stdev(rewards) + 1e-4
        ids = one.sequence.tokens
        rows = [m(input_ids=ids[None]).logits[0].div(temperature).log_softmax(-1) for m in (model, reference)]
        learnt = [place for place in range(1, len(ids)) if one.sequence.learn[place]]
        said = [rows[0][place - 1, ids[place]] for place in learnt]
        whole = math.fsum(one.logprobs.tolist()) / len(said)
        of_sequence = []
        for place, policy, sampled_at in zip(learnt, said, one.logprobs.tolist(), strict=True):
            ratio = torch.exp(policy - sampled_at)
            if isinstance(loss, rewarm.GSPO):  # one ratio for all tokens, the geometric mean of theirs
                ratio = torch.exp(sum(said) / len(said) - whole)
            unclipped, bounded = ratio * advantage, ratio.clamp(1 - loss.low, 1 + loss.high) * advantage
            d = rows[1][place - 1, ids[place]].item() - policy
            divergence = torch.exp(d) - d - 1
            of_sequence.append(-min(unclipped, bounded) + kl * divergence)
            clipped += bool(bounded < unclipped)
            gap, entropy, kl_sum = (
                gap + abs(policy.item() - sampled_at),
                entropy - policy.item(),
                kl_sum + divergence.item(),
            )
        tokens += len(of_sequence)
        mean = isinstance(weights, rewarm.PerSequence)
        total = total + (sum(of_sequence) / len(of_sequence) if mean else sum(of_sequence))
    divisor = {
        rewarm.PerToken: tokens,
        rewarm.PerSequence: len(sampled),
        rewarm.PerConstant: len(sampled) * getattr(weights, "tokens", 0),
    }[type(weights)]
    metrics = {"clip_frac": clipped, "sampler_gap": gap, "entropy": entropy, "kl": kl_sum}
    metrics = {f"train/{name}": value / tokens for name, value in metrics.items()}
    return total / divisor, metrics | {"train/completion_tokens": tokens / len(sampled)}


@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("weights", WEIGHTS, ids=named)
@pytest.mark.parametrize("loss", LOSSES, ids=named)
def test_loss_gradient_and_metrics_equal_a_float64_loop_over_tokens(loss, weights, kl, std):
    parts = {"loss": loss, "weights": weights, "kl": kl}
    torch.manual_seed(0)
    module = rewarm.GRPO(tiny.LLAMA, fits.sgd(0.5), advantage=rewarm.GroupAdvantage(std), **parts)
    record = fits.Record()
    module.configure_model()
    reference = copy.deepcopy(module.policy.model).double()
    batch = fits.rollout_batch(SAMPLED, list(range(len(SAMPLED))), temperature=0.8)
    fits.trainer(max_epochs=1, callbacks=[record]).fit(module, rewarm.WindowLoader([batch] * 2, 1))

    model = copy.deepcopy(reference)
    moved = {
        n.removeprefix("policy.model."): w.double()
        for n, w in record.weights[0].items()
        if n.startswith("policy")
    }
    model.load_state_dict(moved)
    expected, metrics = objective(model, reference, SAMPLED, 0.8, std=std, **parts)
    expected.backward()
    # The second step: by now the policy is neither the sampler nor the reference.
    assert record.metrics[1]["train/loss"] == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    assert 0.1 < metrics["train/clip_frac"] < 0.9
    for name in metrics:
        if kl or name != "train/kl":
            assert record.metrics[1][name] == pytest.approx(metrics[name], rel=1e-4), name
    gradients = {
        f"policy.model.{n}": p.grad.float() for n, p in model.named_parameters() if p.grad is not None
    }
    assert fits.distance(record.gradients[1], gradients) < 1e-5


def test_equal_rewards_train_nothing():
    sampled = [fits.Sampled(one.sequence, one.logprobs, [0.3] * 4, one.place) for one in SAMPLED]
    torch.manual_seed(0)
    module, record = rewarm.GRPO(tiny.LLAMA, fits.sgd(0.5)), fits.Record()
    batch = fits.rollout_batch(sampled, list(range(len(sampled))))
    fits.trainer(max_epochs=1, callbacks=[record]).fit(module, rewarm.WindowLoader([batch], 1))
    assert all((gradient == 0).all() for gradient in record.gradients[0].values())


def test_padding_and_prompts_carry_no_loss():
    short = [one for one in SAMPLED if len(one.sequence.tokens) < 12][:2]
    alone, beside = (
        fits.rollout_batch(rows, list(range(len(rows)))) for rows in (short, [*short, SAMPLED[0]])
    )
    assert alone["input_ids"].shape[1] < beside["input_ids"].shape[1]
    beside["sampler_logprobs"][beside["targets"] == IGNORE_INDEX] = 7.0
    losses = []
    for batch in (alone, beside):
        torch.manual_seed(0)
        module, record = rewarm.GRPO(tiny.LLAMA, fits.sgd(0.0), weights=rewarm.PerSequence()), fits.Record()
        # The third row learns nothing.
        batch["targets"][2:] = IGNORE_INDEX
        batch["counts"]["sequences"], batch["num_targets"] = 2, int((batch["targets"] >= 0).sum())
        fits.trainer(max_epochs=1, callbacks=[record]).fit(module, rewarm.WindowLoader([batch], 1))
        losses.append(record)
    assert losses[0].metrics[0]["train/loss"] == pytest.approx(losses[1].metrics[0]["train/loss"], rel=1e-5)
    assert fits.distance(losses[0].gradients[0], losses[1].gradients[0]) < 1e-6


# --- end to end with the engine -------------------------------------------------------------------------


def share_of_a(prompts, completions, **columns):
    return [text.count("a") / max(len(text), 1) for text in completions]


def live(files, steps, module=None, **options):
    torch.manual_seed(0)
    record = fits.Record()
    module = module or rewarm.GRPO(tiny.LLAMA, fits.adamw(3e-3))
    trainer = fits.trainer(max_steps=steps, callbacks=[record], val_check_interval=1)
    trainer.fit(module, datamodule=fits.prompts(files, **options))
    return record, trainer


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_on_policy_sampler_and_trainer_agree(tmp_path, temperature):
    record, _ = live(fits.Files(tmp_path), 3, minibatches=1, temperature=temperature)
    for metrics in record.metrics:
        assert metrics["train/sampler_gap"] < 1e-5
        assert metrics["train/clip_frac"] == 0.0
        assert metrics["train/loss"] == pytest.approx(0.0, abs=0.3)


def test_groups_of_equal_rewards_are_counted_and_train_nothing(tmp_path):
    # 0.1 + 0.1 + 0.1 is not 3 * 0.1: their mean is off by a rounding.
    options = {"completions_per_prompt": 3, "minibatches": 1, "max_new_tokens": 3}
    reward = {"reward": lambda prompts, completions, **columns: [0.1] * len(prompts)}
    record, _ = live(fits.Files(tmp_path), 1, **options, **reward)
    assert record.metrics[0]["rollout/zero_std_frac"] == 1.0
    assert all((gradient == 0).all() for gradient in record.gradients[0].values())


def test_later_updates_of_a_rollout_are_off_policy(tmp_path):
    record, _ = live(fits.Files(tmp_path), 4, minibatches=2)
    gaps = [metrics["train/sampler_gap"] for metrics in record.metrics]
    assert max(gaps[0], gaps[2]) < 1e-5 < 1e-3 < min(gaps[1], gaps[3])


def test_agreement_holds_with_gradient_checkpointing_and_validation_between(tmp_path):
    torch.manual_seed(0)
    first = rewarm.GRPO(tiny.LLAMA)
    first.configure_model()
    first.save_pretrained(tmp_path / "hf")
    module = rewarm.GRPO(str(tmp_path / "hf"), fits.adamw(3e-3), gradient_checkpointing=True)
    files = fits.Files(tmp_path)
    record, trainer = live(files, 2, module, minibatches=1, val=files.prompts)
    assert "val/reward" in trainer.callback_metrics
    assert max(metrics["train/sampler_gap"] for metrics in record.metrics) < 1e-5


def test_a_learnable_reward_rises(tmp_path):
    options = {"reward": share_of_a, "prompts_per_rollout": 8, "completions_per_prompt": 8, "minibatches": 1}
    record, _ = live(fits.Files(tmp_path), 20, rewarm.GRPO(tiny.LLAMA, fits.adamw(2e-2)), **options)
    rewards = [metrics["rollout/reward"] for metrics in record.metrics]
    assert statistics.fmean(rewards[:3]) < 0.1
    assert statistics.fmean(rewards[-3:]) > 0.5


def test_the_divergence_term_holds_the_policy_back(tmp_path):
    options = {"reward": share_of_a, "prompts_per_rollout": 8, "completions_per_prompt": 8, "minibatches": 1}
    moved = []
    for kl in (0.01, 10.0):
        module = rewarm.GRPO(tiny.LLAMA, fits.adamw(2e-2), kl=kl)
        record, _ = live(fits.Files(tmp_path), 10, module, **options)
        assert record.metrics[0]["train/kl"] == pytest.approx(0.0, abs=1e-6)
        moved.append(record.metrics[-1]["train/kl"])
    assert 0.0 < moved[1] < 0.3 * moved[0]


def test_validation_reward_is_the_mean_over_all_samples(tmp_path):
    files, given = fits.Files(tmp_path), []

    def noted(prompts, completions, **columns):
        given.extend(len(text) % 3 for text in completions)
        return [float(len(text) % 3) for text in completions]

    torch.manual_seed(0)
    module = rewarm.GRPO(tiny.LLAMA)
    data = fits.prompts(files, reward=noted, val=files.prompts, val_samples=3, batch_size=10)
    (metrics,) = fits.trainer().validate(module, datamodule=data, verbose=False)
    assert len(given) == 3 * 48
    assert metrics["val/reward"] == pytest.approx(statistics.fmean(given))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_by_std": True}, "write advantage=rewarm.GroupAdvantage"),
        ({"clip_low": 0.1}, r"write loss=rewarm.Clipped\(low=...\)"),
        ({"clip_high": 0.1}, r"write loss=rewarm.Clipped\(high=...\)"),
        ({"beta": 0.1}, "GRPO has no argument 'beta' any more; write kl=..."),
        ({"normalise": "token"}, r"write weights=rewarm.PerToken\(\)"),
        ({"constant_tokens": 9}, r"write weights=rewarm.PerConstant\(tokens\)"),
    ],
)
def test_an_argument_that_became_a_part_is_refused_with_the_part(options, message):
    with pytest.raises(TypeError, match=message):
        rewarm.GRPO(tiny.LLAMA, **options)


def test_a_weight_below_zero_is_an_error():
    with pytest.raises(ValueError, match="kl is -1.0; it must be at least 0"):
        rewarm.GRPO(tiny.LLAMA, kl=-1.0)


def test_a_batch_of_any_loader_lacks_what_only_sampling_knows():
    batch = {"input_ids": torch.ones(2, 4).long(), "labels": torch.ones(2, 4).long()}
    with pytest.raises(ValueError, match="a batch lacks 'sampler_logprobs', 'group_rewards'"):
        fits.trainer(max_steps=1).fit(
            rewarm.GRPO(tiny.LLAMA, fits.sgd()), torch.utils.data.DataLoader([batch], None)
        )


def test_the_log_probability_of_an_untrained_model_is_that_of_chance(tmp_path):
    record, _ = live(fits.Files(tmp_path), 1)
    assert record.metrics[0]["train/entropy"] == pytest.approx(math.log(64), rel=0.02)


class Unskipped(rewarm.GRPO):
    """The same objective, with every completion in its batches."""

    learns_from_equal_rewards = True


def half_equal(prompts, completions, **columns):
    """Equal rewards for every other group of eight."""
    return [float(len(text) % 3) if row // 8 % 2 else 0.3 for row, text in enumerate(completions)]


def all_equal(prompts, **columns):
    return [1.0] * len(prompts)


def nearly_all_equal(prompts, completions, **columns):
    """One of the first group differs: fewer completions are left than there are micro-batches."""
    return [float(number == 0) for number in range(len(prompts))]


@pytest.mark.parametrize("reward", [half_equal, nearly_all_equal])
@pytest.mark.parametrize("weights", WEIGHTS, ids=named)
def test_groups_of_equal_rewards_are_skipped_without_a_difference_in_the_gradient(tmp_path, weights, reward):
    records = []
    for kind in (Unskipped, rewarm.GRPO):
        torch.manual_seed(0)
        module, record = kind(tiny.LLAMA, fits.adamw(3e-3), weights=weights), Sizes()
        data = fits.prompts(fits.Files(tmp_path), reward=reward, minibatches=1, completions_per_prompt=8)
        fits.trainer(max_steps=1, accumulate_grad_batches=16, callbacks=[record]).fit(module, datamodule=data)
        records.append(record)
    everything, some = records
    assert sum(everything.rows) == 4 * 8
    assert 0 < sum(some.rows) < sum(everything.rows)
    assert len(some.rows) == 16
    assert (min(some.rows) == 0) == (reward is nearly_all_equal)
    assert fits.distance(some.gradients[0], everything.gradients[0]) < 1e-6
    for name in ("train/loss", "train/completion_tokens", "train/grad_norm"):
        assert some.metrics[0][name] == pytest.approx(everything.metrics[0][name], rel=1e-5, abs=1e-7)
    # Over what was computed; all of it is, a mean per token of an untrained model is much the same.
    assert some.metrics[0]["train/entropy"] == pytest.approx(everything.metrics[0]["train/entropy"], rel=0.05)


class Sizes(fits.Record):
    """Keeps how many completions each batch holds, too."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows.append(len(batch["ids"]))


def test_with_a_reference_nothing_is_skipped(tmp_path):
    torch.manual_seed(0)
    record = Sizes()
    module = rewarm.GRPO(tiny.LLAMA, fits.adamw(3e-3), kl=0.1)
    data = fits.prompts(fits.Files(tmp_path), reward=all_equal)
    fits.trainer(max_steps=1, callbacks=[record]).fit(module, datamodule=data)
    assert record.rows == [8]
