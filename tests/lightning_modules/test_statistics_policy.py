"""Statistics of a policy against the logits of transformers."""

import pytest
import torch

from rewarm.datamodules.loader import collate_rows
from rewarm.functional.logprob import IGNORE_INDEX
from rewarm.lightning_modules.policy import Policy
from rewarm.lightning_modules.statistics_policy import StatisticsPolicy
from tests.lightning_modules.test_policy import MODELS, documents, model


@pytest.mark.parametrize("name", MODELS)
def test_statistics_are_those_of_transformers_own_logits(name):
    built = model(MODELS[name]).eval()
    batch = collate_rows([[d] for d in documents(9, 14, 6)], 0, restart=False)
    names = ["logsumexp", "candidates", "entropy"] + ["mean_logprobs"] * (name != "gemma2")
    candidates = torch.randint(64, (3, 13, 4), generator=torch.Generator().manual_seed(1))
    inputs = (batch["input_ids"], batch["position_ids"], batch["targets"])
    with torch.no_grad():
        logits = built(input_ids=batch["input_ids"], use_cache=False).logits.double() / 2.0
        values = StatisticsPolicy(built)(*inputs, 2.0, names, candidates)
        plain = Policy(built)(*inputs, 2.0)
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


def test_without_statistics_it_is_a_policy():
    built = model(MODELS["llama"])
    batch = collate_rows([[d] for d in documents(9, 14)], 0, restart=False)
    inputs = (batch["input_ids"], batch["position_ids"], batch["targets"])
    torch.testing.assert_close(StatisticsPolicy(built)(*inputs), Policy(built)(*inputs))
