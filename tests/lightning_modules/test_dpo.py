"""Preference optimisation against a float64 loop over pairs, and its reference in both forms."""

import copy
import math

import pytest
import torch

import rewarm
from rewarm.text.encoding import Tokens
from tests import fits, tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings(
        "ignore:Found .* in eval mode at the start of training"
    ),  # the frozen reference
]

PAIRS = list(zip(fits.sequences(6), fits.sequences(6, seed=50), strict=True))


def after(prompt, sequence):
    """The sequence after another's prompt instead of its own."""
    begin, cut = int(prompt.learn.int().argmax()), int(sequence.learn.int().argmax())
    tokens = torch.cat([prompt.tokens[:begin], sequence.tokens[cut:]])
    return Tokens(tokens, torch.arange(len(tokens)) >= begin)


WITH_NLL = rewarm.Sum([rewarm.Sigmoid(), rewarm.ChosenNLL()], [1.0, 0.1])
ONE_PROMPT = [(chosen, after(chosen, rejected)) for chosen, rejected in PAIRS]


def fit(data, steps, seed=0, lr=0.1, **options):
    torch.manual_seed(seed)
    module, record = rewarm.DPO(tiny.LLAMA, fits.sgd(lr), **options), fits.Record()
    trainer = fits.trainer(max_steps=steps, callbacks=[record])
    if isinstance(data, rewarm.PreferenceData):
        trainer.fit(module, datamodule=data)
    else:
        trainer.fit(module, rewarm.WindowLoader(data, 1))
    return module, record


def summed_logprob(model, sequence):
    """Of the tokens to learn, in float64, from transformers' own logits."""
    logprobs = model(input_ids=sequence.tokens[None]).logits[0, :-1].log_softmax(-1)
    chosen = logprobs[range(len(logprobs)), sequence.tokens[1:]]
    return chosen[sequence.learn[1:]].sum()


def reference_objective(model, reference, pairs, *, kind, beta, smoothing=0.0, nll_weight=0.0):
    total, nll, tokens = 0.0, 0.0, 0
    for chosen, rejected in pairs:
        w, l = summed_logprob(model, chosen), summed_logprob(model, rejected)
        with torch.no_grad():
            r_w, r_l = w - summed_logprob(reference, chosen), l - summed_logprob(reference, rejected)
        # Written with the reference's part as a number, so that the gradient is the policy's alone.
        w_ratio, l_ratio = w - (w.detach() - r_w), l - (l.detach() - r_l)
        if kind == "sigmoid":
            z = beta * (w_ratio - l_ratio)
            pair = (1 - smoothing) * torch.log1p(torch.exp(-z)) + smoothing * torch.log1p(torch.exp(z))
        elif kind.startswith("ipo"):
            lengths = [int(s.learn[1:].sum()) if kind == "ipo" else 1 for s in (chosen, rejected)]
            pair = (w_ratio / lengths[0] - l_ratio / lengths[1] - 0.5 / beta) ** 2
        else:
            a, b = beta * w_ratio, beta * l_ratio
            pair = torch.log1p(torch.exp(-a)) + torch.log1p(torch.exp(a)) / 2 + torch.log1p(torch.exp(b)) / 2
        total, nll, tokens = total + pair, nll - w, tokens + int(chosen.learn[1:].sum())
    return total / len(pairs) + nll_weight * nll / tokens


@pytest.mark.parametrize("pairs", [PAIRS, ONE_PROMPT], ids=["two prompts", "one prompt"])
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (rewarm.Sigmoid(beta=0.3), {"kind": "sigmoid", "beta": 0.3}),
        (
            rewarm.Sum([rewarm.Sigmoid(beta=0.3, label_smoothing=0.2), rewarm.ChosenNLL()], [1.0, 0.5]),
            {"kind": "sigmoid", "beta": 0.3, "smoothing": 0.2, "nll_weight": 0.5},
        ),
        (rewarm.NCA(beta=0.3), {"kind": "nca", "beta": 0.3}),
        (
            rewarm.Sum([rewarm.NCA(beta=0.05), rewarm.ChosenNLL()], [1.0, 2.0]),
            {"kind": "nca", "beta": 0.05, "nll_weight": 2.0},
        ),
        (rewarm.IPO(tau=0.3), {"kind": "ipo", "beta": 0.3}),
        (rewarm.IPO(tau=0.3, average=False), {"kind": "ipo summed", "beta": 0.3}),
    ],
)
def test_loss_and_gradient_equal_a_float64_loop_over_pairs(loss, options, pairs):
    torch.manual_seed(0)
    start = copy.deepcopy(rewarm.DPO(tiny.LLAMA))
    start.configure_model()
    batch = fits.pair_batch(pairs, list(range(6)))
    assert batch["documents"].branched == (pairs is ONE_PROMPT)
    lr = 0.02 if "ipo" in options["kind"] else 0.2  # a square is steep
    _, record = fit([batch] * 2, steps=2, lr=lr, reference="frozen", loss=loss)

    reference = start.policy.model.double()
    model = copy.deepcopy(reference)
    model.load_state_dict(
        {
            n.removeprefix("policy.model."): w.double()
            for n, w in record.weights[0].items()
            if n.startswith("policy")
        }
    )
    objective = reference_objective(model, reference, pairs, **options)
    objective.backward()
    # The second step: policy and reference differ by now.
    assert record.metrics[1]["train/loss"] == pytest.approx(objective.item(), rel=1e-5)
    assert record.metrics[1]["train/margin"] > 0.05
    gradients = {
        f"policy.model.{n}": p.grad.float() for n, p in model.named_parameters() if p.grad is not None
    }
    assert fits.distance(record.gradients[1], gradients) < 1e-5


@pytest.mark.parametrize("reference", ["cached", "frozen"])
@pytest.mark.parametrize(("options", "loss"), [({}, math.log(2)), ({"loss": rewarm.NCA()}, 2 * math.log(2))])
def test_before_the_first_step_policy_and_reference_agree(tmp_path, reference, options, loss):
    data = fits.preferences(fits.Files(tmp_path), batch_size=8)
    _, record = fit(data, steps=1, reference=reference, **options)
    assert record.metrics[0]["train/loss"] == pytest.approx(loss, abs=1e-5)
    assert record.metrics[0]["train/margin"] == pytest.approx(0.0, abs=1e-4)
    assert record.metrics[0]["train/chosen_logratio"] == pytest.approx(0.0, abs=1e-4)


def test_a_cached_reference_is_a_frozen_one(tmp_path):
    files = fits.Files(tmp_path)
    runs = {}
    for reference in ("cached", "frozen"):
        data = fits.preferences(files, batch_size=5, val=files.pairs)
        module, record = fit(data, steps=8, reference=reference, loss=WITH_NLL)
        policy = {n: w for n, w in record.weights[-1].items() if n.startswith("policy")}
        trainer = fits.trainer()
        (validated,) = trainer.validate(module, datamodule=data, verbose=False)
        runs[reference] = policy, [*record.metrics, validated]
    assert fits.distance(runs["cached"][0], runs["frozen"][0]) < 1e-5
    for one, other in zip(runs["cached"][1], runs["frozen"][1], strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_the_cache_holds_every_pair_under_its_id(tmp_path):
    files = fits.Files(tmp_path)
    data = fits.preferences(files, batch_size=5, val=files.pairs)
    module, _ = fit(data, steps=1, lr=0.0)
    for split in ("train", "val"):
        expected = [
            [summed_logprob(module.policy.model, s).item() for s in e.sequences]
            for e in data._examples[split]
        ]
        torch.testing.assert_close(module.cached.tables[split], torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_validation_is_the_mean_over_all_pairs(tmp_path):
    files = fits.Files(tmp_path)
    data = fits.preferences(files, batch_size=5, val=files.pairs)
    module, _ = fit(data, steps=6, lr=0.3)
    (metrics,) = fits.trainer().validate(module, datamodule=data, verbose=False)
    losses, margins = [], []
    for example, reference in zip(data._examples["val"], module.cached.tables["val"].tolist(), strict=True):
        with torch.no_grad():
            w, l = (summed_logprob(module.policy.model, s).item() for s in example.sequences)
        margins.append((w - reference[0]) - (l - reference[1]))
        losses.append(math.log1p(math.exp(-0.1 * margins[-1])))
    assert metrics["val/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert metrics["val/margin"] == pytest.approx(sum(margins) / len(margins), rel=1e-3)
    assert metrics["val/accuracy"] == pytest.approx(sum(m > 0 for m in margins) / len(margins))


def test_a_resumed_run_keeps_the_reference_of_the_first(tmp_path):
    files = fits.Files(tmp_path)
    module, _ = fit(fits.preferences(files), steps=3)
    module.trainer.save_checkpoint(tmp_path / "3.ckpt")
    resumed, record = rewarm.DPO(tiny.LLAMA, fits.sgd(0.1)), fits.Record()
    trainer = fits.trainer(max_steps=4, callbacks=[record])
    trainer.fit(resumed, datamodule=fits.preferences(files), ckpt_path=str(tmp_path / "3.ckpt"))
    assert len(record.weights) == 1
    assert torch.equal(resumed.cached.tables["train"], module.cached.tables["train"])


def test_each_pairs_margin_is_its_score():
    seen = {}

    class Watch(rewarm.DPO):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            seen[batch_idx] = (
                outputs["ids"],
                outputs["scores"].tolist(),
                self.trainer.logged_metrics["train/margin"],
            )

    torch.manual_seed(0)
    loader = rewarm.WindowLoader([fits.pair_batch(PAIRS[:4], [9, 3, 7, 5])] * 3, 1)
    fits.trainer(max_steps=3).fit(Watch(tiny.LLAMA, fits.sgd(0.3), reference="frozen"), loader)
    ids, scores, mean = seen[2]
    assert ids == [9, 3, 7, 5]
    assert sum(scores) / 4 == pytest.approx(float(mean), rel=1e-5)
    assert len({round(score, 4) for score in scores}) == 4


def test_training_separates_the_pairs_and_nca_also_raises_the_chosen(tmp_path):
    files = fits.Files(tmp_path)
    for loss in (rewarm.Sigmoid(), rewarm.NCA()):
        torch.manual_seed(0)
        module, record = rewarm.DPO(tiny.LLAMA, fits.adamw(3e-3), loss=loss), fits.Record()
        trainer = fits.trainer(max_steps=30, callbacks=[record])
        trainer.fit(module, datamodule=fits.preferences(files, batch_size=8))
        assert record.metrics[-1]["train/accuracy"] == 1.0
        assert record.metrics[-1]["train/margin"] > 5.0
        if isinstance(loss, rewarm.NCA):
            assert record.metrics[-1]["train/chosen_logratio"] > 0.5


def test_the_cache_needs_a_data_module_that_can_be_read_once():
    with pytest.raises(
        ValueError, match="which NoneType does not have: use PreferenceData, or reference 'frozen'"
    ):
        fit([fits.pair_batch(PAIRS, list(range(6)))], steps=1)


def test_the_checkpoint_of_another_method_is_an_error(tmp_path):
    files = fits.Files(tmp_path)
    trainer = fits.trainer(max_steps=1)
    trainer.fit(rewarm.CurriculumSFT(tiny.LLAMA, fits.sgd()), datamodule=fits.instructions(files))
    trainer.save_checkpoint(tmp_path / "sft.ckpt")
    with pytest.raises(ValueError, match="the checkpoint is of CurriculumSFT, this run trains DPO"):
        fits.trainer(max_steps=2).fit(
            rewarm.DPO(tiny.LLAMA, fits.sgd()),
            datamodule=fits.preferences(files),
            ckpt_path=str(tmp_path / "sft.ckpt"),
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.1}, r"DPO has no argument 'beta' any more; write loss=rewarm.Sigmoid\(beta=...\)"),
        ({"label_smoothing": 0.1}, "write loss=rewarm.Sigmoid"),
        ({"nll_weight": 1.0}, "write loss=rewarm.Sum"),
    ],
)
def test_an_argument_that_became_a_part_is_refused_with_the_part(options, message):
    with pytest.raises(TypeError, match=message):
        rewarm.DPO(tiny.LLAMA, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "nca_pair"}, r"loss is 'nca_pair'; it must be a part, such as rewarm.Sigmoid\(\)"),
        ({"reference": "none"}, "reference is 'none'; it must be one of 'cached', 'frozen'"),
    ],
)
def test_wrong_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        rewarm.DPO(tiny.LLAMA, **options)


def other_pairs(folder, count):
    rows = [{"prompt": f"{n}-1=", "chosen": f"{n}", "rejected": f"{n} no"} for n in range(1, count + 1)]
    return tiny.write_jsonl(folder / f"other{count}.jsonl", rows)


@pytest.mark.parametrize("count", [5, 80])
def test_a_checkpoints_reference_of_other_validation_pairs_is_refused_by_name(tmp_path, count):
    files = fits.Files(tmp_path)
    module, _ = fit(fits.preferences(files, val=files.pairs), steps=2)
    module.trainer.save_checkpoint(tmp_path / "2.ckpt")
    data = fits.preferences(files, val=other_pairs(tmp_path, count))
    with pytest.raises(
        ValueError, match=rf"reference of 'val' was made from 48 examples .*, now there are {count} examples"
    ):
        fits.trainer(max_steps=4).fit(
            rewarm.DPO(tiny.LLAMA, fits.sgd(0.1)), datamodule=data, ckpt_path=str(tmp_path / "2.ckpt")
        )


def test_validation_of_other_pairs_after_a_fit_is_refused(tmp_path):
    files = fits.Files(tmp_path)
    module, _ = fit(fits.preferences(files, val=files.pairs), steps=1)
    data = rewarm.PreferenceData(other_pairs(tmp_path, 7), files.tokenizer, val=other_pairs(tmp_path, 9))
    with pytest.raises(ValueError, match=r"reference of 'train' was made from 48 examples .* 7 examples"):
        fits.trainer().validate(module, datamodule=data, verbose=False)


def test_a_second_fit_on_other_data_measures_against_the_model_as_that_fit_found_it(tmp_path):
    files = fits.Files(tmp_path)
    module, _ = fit(fits.preferences(files), steps=3, lr=0.3)
    record = fits.Record()
    data = fits.preferences(files)
    data.train = other_pairs(tmp_path, 80)
    fits.trainer(max_steps=1, callbacks=[record]).fit(module, datamodule=data)
    assert len(module.cached.tables["train"]) == 80
    assert record.metrics[0]["train/margin"] == pytest.approx(0.0, abs=1e-4)
    assert record.metrics[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_a_loss_without_a_reference_computes_none():
    module, record = fit(
        [fits.pair_batch(PAIRS, list(range(6)))] * 2, steps=2, loss=rewarm.ChosenNLL(), reference="frozen"
    )
    assert module.reference is None
    assert record.metrics[1]["train/loss"] == record.metrics[1]["train/nll"]
    assert record.metrics[1]["train/nll"] < record.metrics[0]["train/nll"]


def test_rows_of_any_loader_are_chosen_and_rejected_in_turns():
    ours = fits.pair_batch(PAIRS, list(range(6)))
    rows = [sequence.tokens for pair in PAIRS for sequence in pair]
    learnt = [sequence.learn for pair in PAIRS for sequence in pair]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(
        [row.masked_fill(~learn, -100) for row, learn in zip(rows, learnt, strict=True)], True, -100
    )
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    records = []
    for batch in (ours, {"input_ids": ids, "labels": labels, "attention_mask": mask}):
        torch.manual_seed(0)
        module, record = rewarm.DPO(tiny.LLAMA, fits.sgd(0.1), reference="frozen"), fits.Record()
        fits.trainer(max_steps=2, callbacks=[record]).fit(
            module, torch.utils.data.DataLoader([batch] * 2, None)
        )
        records.append(record)
    assert records[1].metrics[1]["train/loss"] == pytest.approx(records[0].metrics[1]["train/loss"], rel=1e-5)
    assert fits.distance(records[1].gradients[1], records[0].gradients[1]) < 1e-5


def test_an_odd_number_of_rows_is_no_batch_of_pairs():
    batch = {"input_ids": torch.ones(3, 4).long(), "labels": torch.ones(3, 4).long()}
    with pytest.raises(ValueError, match="a batch has 3 rows; it must be pairs"):
        fits.trainer(max_steps=1).fit(
            rewarm.DPO(tiny.LLAMA, fits.sgd(), reference="frozen"), torch.utils.data.DataLoader([batch], None)
        )


def started_from_a_folder(tmp_path):
    """A folder with a model, the data of a fit from it, and its checkpoint after two steps."""
    files, start = fits.Files(tmp_path), rewarm.DPO(tiny.LLAMA)
    torch.manual_seed(0)
    start.configure_model()
    start.save_pretrained(tmp_path / "hf")
    module = rewarm.DPO(str(tmp_path / "hf"), fits.sgd(0.3))
    trainer = fits.trainer(max_steps=2)
    trainer.fit(module, datamodule=fits.preferences(files, val=files.pairs))
    trainer.save_checkpoint(tmp_path / "2.ckpt")
    return files, start, module


def test_other_validation_pairs_are_measured_against_the_model_in_the_folder(tmp_path):
    files, start, trained = started_from_a_folder(tmp_path)
    data = fits.preferences(files, val=other_pairs(tmp_path, 60))
    again = rewarm.DPO(str(tmp_path / "hf"))
    (metrics,) = fits.trainer().validate(
        again, datamodule=data, ckpt_path=str(tmp_path / "2.ckpt"), verbose=False
    )
    margins = []
    for example in data.examples("val"):
        with torch.no_grad():
            ratios = [
                (summed_logprob(trained.policy.model, s) - summed_logprob(start.policy.model, s)).item()
                for s in example.sequences
            ]
        margins.append(ratios[0] - ratios[1])
    assert metrics["val/margin"] == pytest.approx(sum(margins) / len(margins), rel=1e-3, abs=1e-4)
    assert abs(metrics["val/margin"]) > 0.01


def test_a_folder_that_holds_another_model_by_now_is_no_reference(tmp_path):
    files, _, trained = started_from_a_folder(tmp_path)
    trained.save_pretrained(tmp_path / "hf")
    data = fits.preferences(files, val=other_pairs(tmp_path, 60))
    with pytest.raises(ValueError, match=r"reference of 'val' was made from 48 examples .* 60 examples"):
        fits.trainer().validate(
            rewarm.DPO(str(tmp_path / "hf")),
            datamodule=data,
            ckpt_path=str(tmp_path / "2.ckpt"),
            verbose=False,
        )
