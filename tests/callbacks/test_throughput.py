"""Speeds of real fits on a clock that the tests move."""

import re

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from rewarm.callbacks.throughput import Throughput
from rewarm.datamodules.loader import collate_rows
from rewarm.text.encoding import Tokens
from tests.distributed.ranks import on_ranks

pytestmark = [
    # lightning 2.6 with torch 2.13.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    # Workers would only slow these fits down, and the epochs are short.
    pytest.mark.filterwarnings("ignore:The '(train|val)_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

FETCH, TRAIN, VALIDATE, SAVE = 0.25, 1.0, 100.0, 1000.0


class Clock:
    """Stands still unless moved."""

    def __init__(self):
        self.now = 5.0

    def __call__(self):
        return self.now


class Net(LightningModule):
    """Trains a vector on whatever comes, and moves the clock."""

    def __init__(self, clock, model=None):
        super().__init__()
        self.clock = clock
        self.weight = nn.Parameter(torch.ones(2))
        self.model = model

    def training_step(self, batch, batch_idx):
        self.clock.now += TRAIN
        return self.weight.square().sum()

    def validation_step(self, batch, batch_idx):
        self.clock.now += VALIDATE

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=0.1)


class Keep(DummyLogger):
    """Keeps what is logged, by step (Lightning counts them from 0)."""

    def __init__(self):
        super().__init__()
        self.rows = {}

    def log_metrics(self, metrics, step=None):
        found = {k: v for k, v in metrics.items() if k.startswith("throughput/")}
        if found:
            self.rows[step + 1] = found

    def __getitem__(self, name):
        return {
            step: row[f"throughput/{name}"] for step, row in self.rows.items() if f"throughput/{name}" in row
        }


class SlowSaving(TorchCheckpointIO):
    """Moves the clock while a checkpoint is written."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def save_checkpoint(self, *args, **kwargs):
        self.clock.now += SAVE
        super().save_checkpoint(*args, **kwargs)


def batches(number=8):
    """Rows of 6 positions: packed documents, then padding; some tokens without a target."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(number):
        lengths = [[2, 1 + i % 3], [3, 3]]
        sequence_ids = torch.full((2, 6), -1)
        position_ids = torch.zeros((2, 6), dtype=torch.long)
        for row, documents in enumerate(lengths):
            start = 0
            for document, length in enumerate(documents):
                sequence_ids[row, start : start + length] = 2 * row + document
                position_ids[row, start : start + length] = torch.arange(length)
                start += length
        targets = torch.where(sequence_ids < 0, -100, 3)
        targets[:, i % 2] = -100
        made.append(
            {
                "input_ids": torch.randint(0, 9, (2, 6), generator=generator),
                "sequence_ids": sequence_ids,
                "position_ids": position_ids,
                "targets": targets,
                "lengths": lengths,
            }
        )
    return made


def real_tokens(made):
    return sum(length for batch in made for row in batch["lengths"] for length in row)


def target_tokens(made):
    return sum(int((batch["targets"] != -100).sum()) for batch in made)


def fit(throughput, made, net=None, *callbacks, ckpt_path=None, **settings):
    clock = throughput.clock

    def fetch(rows):
        clock.now += FETCH
        return rows[0]

    logger = Keep()
    quiet = {
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "max_epochs": 1,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 1,
    }
    run = Trainer(callbacks=[throughput, *callbacks], logger=logger, **quiet | settings)
    data = DataLoader(made, batch_size=1, collate_fn=fetch)
    validation = DataLoader([0, 1], batch_size=1) if "val_check_interval" in settings else None
    run.fit(net or Net(clock), data, validation, ckpt_path=ckpt_path)
    return logger, run


def near(expected):
    return pytest.approx(expected, rel=1e-5)  # Lightning logs float32


# --- rates --------------------------------------------------------------------------------------------------


def test_rates_are_tokens_and_seconds_of_the_step():
    made = batches()
    logger, _ = fit(Throughput(window=1, clock=Clock()), made)
    seconds = FETCH + TRAIN
    assert logger["step_s"] == near(dict.fromkeys(range(2, 9), seconds))
    for step, batch in enumerate(made[1:], 2):
        tokens = real_tokens([batch])
        assert logger["tokens_per_s"][step] == near(tokens / seconds)
        assert logger["target_tokens_per_s"][step] == near(target_tokens([batch]) / seconds)
        assert logger["padding_frac"][step] == near(1 - tokens / 12)
        assert logger["total_tokens"][step] == near(real_tokens(made[:step]))


@pytest.mark.parametrize(
    ("window", "every", "spans"),
    [
        (3, 1, {2: (1, 2), 3: (1, 3), 4: (1, 4), 5: (2, 5), 8: (5, 8)}),
        (3, 2, {2: (1, 2), 4: (1, 4), 6: (2, 6), 8: (4, 8)}),
        (50, 4, {4: (1, 4), 8: (1, 8)}),
    ],
)
def test_a_window_covers_at_least_its_steps_rounded_to_logging_points(window, every, spans):
    made = batches()
    logger, _ = fit(Throughput(window=window, clock=Clock()), made, log_every_n_steps=every)
    for step, (first, last) in spans.items():
        seconds = (last - first) * (FETCH + TRAIN)
        assert logger["tokens_per_s"][step] == near(real_tokens(made[first:last]) / seconds)


def test_a_step_takes_all_its_micro_batches():
    made = batches()
    throughput = Throughput(window=1, clock=Clock())
    logger, _ = fit(throughput, made, accumulate_grad_batches=3)
    assert logger["step_s"] == near({2: 3 * (FETCH + TRAIN), 3: 2 * (FETCH + TRAIN)})
    assert logger["tokens_per_s"][2] == near(real_tokens(made[3:6]) / (3 * (FETCH + TRAIN)))
    assert throughput.total_tokens == real_tokens(made)
    assert throughput.total_target_tokens == target_tokens(made)


def test_validation_is_not_timed():
    logger, _ = fit(Throughput(window=1, clock=Clock()), batches(), val_check_interval=2)
    # The batch after validation is fetched while the clock stands.
    expected = {step: TRAIN + (0 if step % 2 else FETCH) for step in range(2, 9)}
    assert logger["step_s"] == near(expected)


class SlowState(Net):
    """Moves the clock also while its state is gathered, which comes before any hook."""

    def state_dict(self, *args, **kwargs):
        self.clock.now += SAVE
        return super().state_dict(*args, **kwargs)


def test_saving_is_not_timed(tmp_path):
    clock = Clock()
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=3)
    logger, _ = fit(
        Throughput(window=1, clock=clock), batches(), SlowState(clock), saver, plugins=[SlowSaving(clock)]
    )
    assert clock.now > 4 * SAVE
    # The batch after a save is fetched while the clock stands.
    expected = {step: TRAIN + (0 if step in (4, 7) else FETCH) for step in range(2, 9)}
    assert logger["step_s"] == near(expected)


def test_a_save_before_our_hook_keeps_the_time_of_its_step(tmp_path):
    class SaveFirst(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "four.ckpt")

        def setup(self, trainer, *args, **kwargs):
            trainer.callbacks.sort(key=lambda callback: callback is not self)

    clock = Clock()
    throughput = Throughput(window=1, clock=clock)
    logger, _ = fit(throughput, batches(), None, SaveFirst(), plugins=[SlowSaving(clock)])
    expected = {step: TRAIN + (0 if step == 5 else FETCH) for step in range(2, 9)}
    assert logger["step_s"] == near(expected)


def test_the_device_is_waited_for_only_when_logging():
    class Counts(Throughput):
        collected = 0

        def _collect(self):
            self.collected += 1
            super()._collect()

    throughput = Counts(clock=Clock())
    fit(throughput, batches(), log_every_n_steps=4)
    # The first step starts the clock; steps 4 and 8 log; the end.
    assert throughput.collected == 4
    assert throughput.total_tokens == real_tokens(batches())


def test_every_logged_name_is_documented_and_the_other_way_round():
    logger, _ = fit(
        Throughput(peak_flops=1e9, flops_per_token=10.0, clock=Clock()), batches(), log_every_n_steps=4
    )
    documented = set(re.findall(r"^\s+(throughput/\w+):", Throughput.__doc__, re.M))
    assert set(logger.rows[8]) == documented


# --- which tokens -------------------------------------------------------------------------------------------


def plain(names):
    return [{k: v for k, v in batch.items() if k in names} for batch in batches()]


def test_without_padding_and_targets_every_position_is_a_token():
    throughput = Throughput(clock=Clock())
    logger, _ = fit(throughput, plain({"input_ids"}))
    assert throughput.total_tokens == 8 * 12
    assert "throughput/tokens_per_s" in logger.rows[8]
    assert not {"throughput/padding_frac", "throughput/target_tokens_per_s"} & set(logger.rows[8])


def test_an_attention_mask_tells_padding_too():
    made = batches()
    masked = [{"input_ids": b["input_ids"], "attention_mask": (b["sequence_ids"] >= 0).long()} for b in made]
    throughput = Throughput(clock=Clock())
    logger, _ = fit(throughput, masked)
    assert throughput.total_tokens == real_tokens(made)
    assert logger["padding_frac"][8] == near(1 - real_tokens(made[1:]) / (7 * 12))


def test_foreign_batches_are_counted_by_the_callable_or_not_at_all():
    foreign = [torch.zeros(4, 7)] * 8
    counted = Throughput(count_tokens=lambda batch: batch.numel(), clock=Clock())
    logger, _ = fit(counted, foreign)
    assert counted.total_tokens == 8 * 28
    assert logger["tokens_per_s"][8] == near(28 / (FETCH + TRAIN))
    logger, _ = fit(Throughput(clock=Clock()), foreign)
    assert set(logger.rows[8]) == {"throughput/step_s"}


# --- MFU ----------------------------------------------------------------------------------------------------


def llama(**settings):
    sizes = {
        "vocab_size": 16,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes | settings))


END = [[7, 8], [9, 10, 11]]
MATMUL = 2 * (8 * 16 * 2 + 2 * 8 * 8 + 3 * 8 * 16) + 8 * 16


@pytest.mark.parametrize("known", ["documents", "rows"])
def test_mfu_is_the_palm_formula_over_the_peak(known):
    made = batches() if known == "documents" else plain({"input_ids", "sequence_ids"})
    clock = Clock()
    logger, _ = fit(Throughput(window=100, peak_flops=1e6, clock=clock), made, Net(clock, llama()))
    flops = 0
    for batch in batches()[1:]:
        for row in batch["lengths"]:
            flops += sum(row) * 6 * MATMUL
            for length in row:  # each token against its document, or against its row
                flops += 12 * 2 * 16 * length * (length if known == "documents" else 6)
    assert logger["mfu"][8] == near(flops / (7 * (FETCH + TRAIN)) / 1e6)


@pytest.mark.parametrize("attention", ["documents", "sdpa"])
def test_mfu_counts_a_prompt_that_rows_share_once_where_it_is_computed_once(attention):
    rows = [[Tokens(torch.tensor([3, 4, 5, 6, *end]), torch.arange(4 + len(end)) > 3)] for end in END]
    made = [collate_rows(rows, 0, restart=False) for _ in range(8)]
    clock, model = Clock(), llama()
    model.config._attn_implementation = attention
    logger, _ = fit(Throughput(window=100, peak_flops=1e6, clock=clock), made, Net(clock, model))
    if attention == "documents":
        # 5 positions of the first row; of the second 3 that follow the 3 it shares: its last 3 of 6.
        tokens, squares = 5 + 3, 5**2 + 6**2 - 3**2
    else:
        tokens, squares = 5 + 6, 5**2 + 6**2
    flops = tokens * 6 * MATMUL + 12 * 2 * 16 * squares
    assert logger["mfu"][8] == near(7 * flops / (7 * (FETCH + TRAIN)) / 1e6)
    assert logger["total_tokens"][8] == 8 * (5 + 6)


def test_mfu_from_given_flops_per_token():
    made = batches()
    logger, _ = fit(Throughput(peak_flops=1e6, flops_per_token=500.0, clock=Clock()), made)
    assert logger["mfu"][8] == near(500 * real_tokens(made[1:]) / (7 * (FETCH + TRAIN)) / 1e6)


def test_mfu_is_not_logged_on_a_cpu_without_a_peak():
    clock = Clock()
    logger, _ = fit(Throughput(flops_per_token=500.0, clock=clock), batches(), Net(clock, llama()))
    assert "throughput/mfu" not in logger.rows[8]


def frozen():
    model = llama()
    model.lm_head.weight.requires_grad_(False)
    return model


def with_convolution():
    model = llama()
    model.extra = nn.Conv1d(2, 2, 2)
    return model


def experts():
    model = llama()
    model.config.num_experts = 4
    return model


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: None, "no trained submodule has a transformers config"),
        (lambda: llama().requires_grad_(False), "no trained submodule has a transformers config"),
        (frozen, "some linear layers are frozen"),
        (with_convolution, "extra.weight has shape"),
        (experts, "the config has num_experts"),
    ],
)
def test_mfu_of_an_unknown_cost_is_not_logged_and_says_why(build, reason, caplog):
    clock = Clock()
    net = Net(clock, build())
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        logger, _ = fit(Throughput(peak_flops=1e6, clock=clock), batches(), net)
    assert "throughput/mfu" not in logger.rows[8]
    assert any("throughput/mfu is not logged" in m and reason in m for m in caplog.messages)


# --- totals -------------------------------------------------------------------------------------------------


def test_totals_survive_a_resume(tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "eight.ckpt")

    made = batches()
    fit(Throughput(clock=Clock()), made, None, Save())
    state = torch.load(tmp_path / "eight.ckpt")["callbacks"]["Throughput"]
    assert state == {"total_tokens": real_tokens(made), "total_target_tokens": target_tokens(made)}
    resumed = Throughput(window=1, clock=Clock())
    logger, _ = fit(resumed, made, max_epochs=2, ckpt_path=tmp_path / "eight.ckpt")
    assert resumed.total_tokens == 2 * real_tokens(made)
    assert resumed.total_target_tokens == 2 * target_tokens(made)
    assert min(logger.rows) == 10  # step 9 starts the clock
    assert logger["total_tokens"][10] == near(real_tokens(made) + real_tokens(made[:2]))
    assert logger["tokens_per_s"][10] == near(real_tokens(made[1:2]) / (FETCH + TRAIN))


def test_a_new_fit_counts_from_zero():
    throughput = Throughput(clock=Clock())
    for _ in range(2):
        fit(throughput, batches())
        assert throughput.total_tokens == real_tokens(batches())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window is 0"),
        ({"peak_flops": 0.0}, "peak_flops is 0.0"),
        ({"flops_per_token": -1.0}, "flops_per_token is -1.0"),
    ],
)
def test_bad_arguments_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Throughput(**settings)


def count_on_ranks(folder):
    """On a rank: rows of 3 tokens, or of 5, in steps that take a second."""
    clock, logger = Clock(), Keep()
    throughput = Throughput(peak_flops=100.0, flops_per_token=5.0, clock=clock)
    run = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        callbacks=[throughput],
        logger=logger,
        max_epochs=2,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    row = {"input_ids": torch.ones(3 + 2 * run.global_rank, dtype=torch.long)}
    run.fit(Net(clock), DataLoader([row] * 4, batch_size=2))
    run.save_checkpoint(folder / "two.ckpt")
    return throughput.total_tokens, logger.rows


@pytest.mark.dist
def test_two_ranks_are_counted_together(tmp_path):
    (tokens, rows), (other_tokens, _) = on_ranks(2, count_on_ranks, tmp_path)
    assert tokens == other_tokens == 2 * 4 * (3 + 5)
    saved = torch.load(tmp_path / "two.ckpt")["callbacks"]["Throughput"]
    assert saved["total_tokens"] == tokens
    rates = rows[2]
    assert rates["throughput/tokens_per_s"] == 16 / TRAIN
    assert rates["throughput/mfu"] == pytest.approx(16 * 5.0 / (TRAIN * 2 * 100.0))
