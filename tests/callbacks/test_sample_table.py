"""What is printed, character by character."""

import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger

import rewarm
from rewarm.rollouts.engine import TransformersEngine
from rewarm.text.encoding import Encoder
from tests import fits, tiny

PROMPTS = [
    "1+2=",
    "[b]1[/b] [2] and a[0]",
    r"\[x^2\] \boxed{3}",
    "first line\nsecond line",
    "a | b",
    ":smile:",
]


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


class Logger(DummyLogger):
    """Keeps the text that TensorBoard would."""

    def __init__(self):
        super().__init__()
        self.texts = []

    @property
    def experiment(self):
        return self

    def add_text(self, name, text, step):
        self.texts.append((step, text))


def by_length(prompts, completions, **columns):
    return [0.5 * len(text) for text in completions]


def fit(tmp_path, steps=4, accumulate=1, logger=False, **options):
    files = fits.Files(tmp_path)
    prompts = tiny.write_jsonl(tmp_path / "shown.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    torch.manual_seed(0)
    table = rewarm.SampleTable(prompts, **{"num_prompts": len(PROMPTS), "max_new_tokens": 5} | options)
    module = rewarm.CurriculumSFT(tiny.LLAMA, fits.adamw())
    trainer = fits.trainer(
        max_steps=steps,
        callbacks=[table],
        accumulate_grad_batches=accumulate,
        logger=logger,
        log_every_n_steps=1,
    )
    trainer.fit(module, datamodule=fits.instructions(files))
    return module


def greedy(module, prompts):
    """What the model writes, sampled apart from the callback."""
    tokenizer = tiny.build_tokenizer()
    engine = TransformersEngine(5, eos_token_id=1, pad_token_id=0, temperature=0.0)
    tokens = [Encoder(tokenizer).prompt(prompt) for prompt in prompts]
    groups = engine.generate(module.policy.model, tokens, 1, 0)
    return tokenizer.batch_decode([group[0].tokens for group in groups], skip_special_tokens=True)


def test_prompts_completions_and_rewards_are_printed_as_they_are(tmp_path, capsys):
    module = fit(tmp_path, reward=by_length)
    printed = capsys.readouterr().out
    assert "samples at step 4" in printed
    rows = [[cell.strip() for cell in line.strip("│┃ \n").split("│")] for line in printed.splitlines()]
    for prompt, completion in zip(PROMPTS, greedy(module, PROMPTS), strict=True):
        first = prompt.splitlines()[0]
        (row,) = [row for row in rows if row[0] == first]
        assert row[1] == completion.splitlines()[0].strip()
        assert row[2] == f"{0.5 * len(completion):g}"
    assert [row[0] for row in rows if row[0].startswith("second")] == ["second line"]


def test_without_a_reward_there_is_no_third_column(tmp_path, capsys):
    fit(tmp_path, steps=1)
    printed = capsys.readouterr().out
    assert "completion" in printed
    assert "reward" not in printed


@pytest.mark.parametrize("accumulate", [1, 2])
def test_tables_come_every_so_many_steps_and_at_the_end_once(tmp_path, capsys, accumulate):
    fit(tmp_path, steps=5, accumulate=accumulate, every_n_steps=2)
    titles = [line.strip() for line in capsys.readouterr().out.splitlines() if "samples at" in line]
    assert titles == ["samples at step 2", "samples at step 4", "samples at step 5"]
    fit(tmp_path, steps=4, accumulate=accumulate, every_n_steps=2)
    titles = [line.strip() for line in capsys.readouterr().out.splitlines() if "samples at" in line]
    assert titles == ["samples at step 2", "samples at step 4"]


def test_the_logger_keeps_one_table_row_per_prompt(tmp_path):
    logger = Logger()
    fit(tmp_path, steps=2, logger=logger, reward=by_length)
    ((step, text),) = logger.texts
    assert step == 2
    lines = text.splitlines()
    assert lines[:2] == ["| prompt | completion | reward |", "| --- | --- | --- |"]
    assert len(lines) == 2 + len(PROMPTS)
    assert "| first line<br>second line |" in text
    assert r"| a \| b |" in text


def test_training_is_not_disturbed(tmp_path):
    one = fit(tmp_path, steps=3)
    torch.manual_seed(0)
    other = rewarm.CurriculumSFT(tiny.LLAMA, fits.adamw())
    fits.trainer(max_steps=3).fit(other, datamodule=fits.instructions(fits.Files(tmp_path)))
    assert all(torch.equal(weight, fits.weights(other)[name]) for name, weight in fits.weights(one).items())


@pytest.mark.parametrize("name", ["num_prompts", "every_n_steps"])
def test_numbers_must_be_at_least_one(name):
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        rewarm.SampleTable("prompts.jsonl", **{name: 0})
