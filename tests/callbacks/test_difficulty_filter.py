"""What the filter lets in, counted from outside."""

from collections import Counter

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

import rewarm
from rewarm.curriculum.curriculum import Curriculum
from tests import fits, tiny


class Watch(Callback):
    """Keeps the ids of each step, and the loss of each example when it was last seen."""

    def __init__(self):
        self.steps, self.scores, self.refused, self.metrics = [], {}, [], []
        self._step, self._ids = 0, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._ids += batch["ids"]
        if "scores" in outputs:
            self.scores.update(zip(outputs["ids"], outputs["scores"].tolist(), strict=True))
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self.steps.append(self._ids)
            self.metrics.append({name: float(value) for name, value in trainer.logged_metrics.items()})
            self.refused.append(self.metrics[-1]["data/refused"])
            self._ids = []


def fit(module, data, band, steps, accumulate=1, **options):
    watch = Watch()
    callbacks = [rewarm.DifficultyFilter(*band, **options), watch]
    trainer = fits.trainer(max_steps=steps, accumulate_grad_batches=accumulate, callbacks=callbacks)
    trainer.fit(module, datamodule=data)
    return watch


@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_example_outside_the_band_is_passed_over_once_and_then_tried_again(tmp_path, accumulate):
    torch.manual_seed(0)
    # Nothing is learnt, so every example keeps its loss; the band cuts through the middle of them.
    module, files = rewarm.CurriculumSFT(tiny.LLAMA, fits.sgd(0.0)), fits.Files(tmp_path)
    first = fit(module, fits.instructions(files, batch_size=4), (0.0, 100.0), 12)
    assert sorted(example for step in first.steps for example in step) == list(range(48))
    middle = sorted(first.scores.values())[24]
    outside = {example for example, loss in first.scores.items() if loss > middle}
    assert 20 <= len(outside) <= 24

    torch.manual_seed(0)
    module = rewarm.CurriculumSFT(tiny.LLAMA, fits.sgd(0.0))
    data = fits.instructions(files, batch_size=4)
    # Three passes: all 48, the 48 - n inside, all 48 again.
    steps = (48 + 48 - len(outside) + 48) // (4 * accumulate)
    watch = fit(module, data, (0.0, middle), steps, accumulate)
    drawn = [example for step in watch.steps for example in step]
    assert sorted(drawn[:48]) == list(range(48))
    second = drawn[48 : 96 - len(outside)]
    assert sorted(second) == sorted(set(range(48)) - outside)
    assert max(Counter(drawn[96 - len(outside) :]).values()) == 1
    assert outside & set(drawn[96 - len(outside) :])
    assert watch.refused[-1] == len(outside)
    assert watch.refused == sorted(watch.refused)


def test_the_scores_of_one_step_decide_about_the_next(tmp_path):
    torch.manual_seed(0)
    module, data = rewarm.CurriculumSFT(tiny.LLAMA, fits.sgd(0.0)), fits.instructions(fits.Files(tmp_path))
    fit(module, data, (0.0, 100.0), 5, 2)
    seen = {
        example for example in range(48) if data.curriculum.score(example) == data.curriculum.score(example)
    }
    assert len(seen) == 20


def right_for_small_answers(prompts, completions, answer, **columns):
    """An even answer: all samples of its prompt pass. A multiple of three: none. Else about half."""
    return [
        1.0 if a % 2 == 0 else 0.0 if a % 3 == 0 else float(number % 2) for number, a in enumerate(answer)
    ]


def test_groups_outside_the_band_are_refused_and_others_take_their_place(tmp_path):
    files = fits.Files(tmp_path)
    rows = tiny.sums(48)
    inside = {n for n, row in enumerate(rows) if row["answer"] % 2 and row["answer"] % 3}
    torch.manual_seed(0)
    data = fits.prompts(
        files, reward=right_for_small_answers, minibatches=1, prompts_per_rollout=4, max_rounds=20
    )
    watch = fit(rewarm.GRPO(tiny.LLAMA, fits.sgd(0.0)), data, (0.2, 0.8), 6)
    for step in watch.steps:
        assert len(step) == 4 * 4  # the rollout is full
        assert set(step) <= inside
    assert {metrics["rollout/filler_frac"] for metrics in watch.metrics} == {0.0}
    assert min(metrics["rollout/admitted_frac"] for metrics in watch.metrics) < 1.0


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")  # the reference
def test_without_the_filter_they_are_used(tmp_path):
    files, record = fits.Files(tmp_path), fits.Record()
    rows, watched = tiny.sums(48), []

    class Ids(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            watched.extend(batch["ids"])

    data = fits.prompts(files, reward=right_for_small_answers, minibatches=1)
    trainer = fits.trainer(max_steps=6, callbacks=[Ids(), record])
    # Without the reference nothing could be learnt of groups with equal rewards.
    trainer.fit(rewarm.GRPO(tiny.LLAMA, fits.sgd(0.0), kl=0.1), datamodule=data)
    assert any(rows[number]["answer"] % 2 == 0 for number in watched)
    assert record.metrics[-1]["rollout/admitted_frac"] == 1.0


def test_dpo_pairs_are_filtered_by_their_margin(tmp_path):
    torch.manual_seed(0)
    data = fits.preferences(fits.Files(tmp_path), batch_size=8)
    watch = fit(rewarm.DPO(tiny.LLAMA, fits.adamw(3e-3)), data, (-1.0, 1.0), 15)
    assert watch.refused[-1] > 0
    assert max(watch.scores.values()) > 1.0


def test_a_given_curriculum_is_the_one_that_is_filtered(tmp_path):
    curriculum = Curriculum(48)
    data = fits.instructions(fits.Files(tmp_path))
    fit(rewarm.CurriculumSFT(tiny.LLAMA, fits.sgd()), data, (0.0, 1.0), 1, curriculum=curriculum)
    assert curriculum.gate == rewarm.Band(0.0, 1.0)
    assert data.curriculum.gate is None
    assert sum(curriculum.score(n) == curriculum.score(n) for n in range(48)) == 2


def test_used_again_it_filters_the_new_data(tmp_path):
    files, callback = fits.Files(tmp_path), rewarm.DifficultyFilter(0.0, 1.0)
    for _ in range(2):
        data = fits.instructions(files)
        fits.trainer(max_steps=1, callbacks=[callback]).fit(
            rewarm.CurriculumSFT(tiny.LLAMA, fits.sgd()), datamodule=data
        )
        assert data.curriculum.gate == rewarm.Band(0.0, 1.0)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_without_a_curriculum_it_is_an_error(tmp_path):
    message = (
        r"DifficultyFilter found no curriculum: use a data module with one .*, or give it as `curriculum`"
    )
    module, callback = rewarm.ContinualPretraining(tiny.LLAMA), rewarm.DifficultyFilter()
    with pytest.raises(ValueError, match=message):
        fits.trainer(max_steps=1, callbacks=[callback]).fit(
            module, datamodule=fits.corpus(fits.Files(tmp_path))
        )
    with pytest.raises(ValueError, match=message):
        fits.trainer(max_steps=1, callbacks=[callback]).fit(module, DataLoader([0]))


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"gate": rewarm.TopShare(0.5), "live": rewarm.RunningScore(0.5)}, "RunningScore"),
        ({"gate": rewarm.AtLeast(rewarm.Band(0.5, 9.0), 8), "live": rewarm.ScoreChange()}, "ScoreChange"),
        (
            {
                "gate": rewarm.AtLeast(rewarm.Band(high=0.0), 8),
                "live": rewarm.Ability(rewarm.Band(high=3.9), start=4.0),
            },
            "Ability",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_gates_on_every_kind_of_live_score_resume_exactly(tmp_path, options, kinds):
    files = fits.Files(tmp_path)

    def start():
        torch.manual_seed(0)
        data = fits.instructions(files, batch_size=8, score="completion_tokens", order="ascending", window=48)
        return rewarm.CurriculumSFT(tiny.LLAMA, fits.adamw(1e-2)), data

    def run(steps, path=None, save=None):
        watch, (module, data) = Watch(), start()
        callbacks = [rewarm.DifficultyFilter(**options), watch]
        trainer = fits.trainer(max_steps=steps, callbacks=callbacks)
        trainer.fit(module, datamodule=data, ckpt_path=path)
        if save is not None:
            trainer.save_checkpoint(save)
        return watch, data

    whole, data = run(16)
    assert type(data.curriculum.live).__name__ == kinds
    assert whole.refused[-1] > 0
    first, _ = run(9, save=tmp_path / "ckpt")
    rest, resumed = run(16, path=tmp_path / "ckpt")
    assert [step for step in first.steps if step] + [step for step in rest.steps if step] == whole.steps
    assert resumed.curriculum.state_dict() == data.curriculum.state_dict()


def test_a_gate_and_a_band_are_not_both_given():
    with pytest.raises(ValueError, match="low is 0.1 and high is None, but a gate is given"):
        rewarm.DifficultyFilter(0.1, gate=rewarm.TopShare(0.5))


def test_the_band_is_checked():
    with pytest.raises(ValueError, match="low is 0.8 and high is 0.2; low must not be above high"):
        rewarm.DifficultyFilter(0.8, 0.2)
