import pytest

from rewarm.rollouts import rewards
from tests.trust.completions import COSTLY, commands

# Those that hand answers to `eval` or to sympy's `parse_expr`, and one that does neither.
DATA_SETS = (
    "binary_matrix",
    "countdown",
    "intermediate_integration",
    "n_queens",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
    "spiral_matrix",
    "string_insertion",
    "chain_sum",
)


def test_there_are_a_hundred_hostile_completions(tmp_path):
    texts = COSTLY | commands(tmp_path)
    assert len(texts) == len(COSTLY) + len(commands(tmp_path)) >= 100
    assert len(set(texts.values())) == len(texts)


@pytest.mark.parametrize("name", DATA_SETS)
def test_an_answer_to_a_puzzle_is_never_run(name, tmp_path):
    gym = pytest.importorskip("reasoning_gym")
    puzzle = gym.create_dataset(name, size=1, seed=1)[0]
    mark = tmp_path / "ran"
    texts = [f"<answer>{text}</answer>" for text in commands(mark).values()]
    columns = {"dataset": [name] * len(texts), "entry": [puzzle] * len(texts)}
    values = rewards.score(rewards.reasoning_gym, [""] * len(texts), texts, columns)
    assert not mark.exists()
    assert all(0 <= value < 1 for value in values)


@pytest.mark.parametrize("reward", [rewards.exact_number, rewards.gsm8k, rewards.math_verify])
def test_an_answer_is_never_run(reward, tmp_path):
    pytest.importorskip("math_verify")
    mark = tmp_path / "ran"
    texts = list(commands(mark).values())
    assert rewards.score(reward, [""] * len(texts), texts, {"answer": ["42"] * len(texts)}) == [0.0] * len(
        texts
    )
    assert not mark.exists()


@pytest.mark.parametrize("reward", [rewards.exact_number, rewards.gsm8k])
def test_plain_rewards_have_a_score_for_any_text(reward):
    texts = list(COSTLY.values())
    values = rewards.score(reward, [""] * len(texts), texts, {"answer": ["43"] * len(texts)})
    assert values == [0.0] * len(texts)


@pytest.mark.parametrize("name", ["countdown", "string_insertion"])
def test_what_never_ends_costs_its_completion_alone(name, monkeypatch, caplog):
    gym = pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(rewards, "TIMEOUT_SECONDS", 0.3)
    puzzle = gym.create_dataset(name, size=1, seed=1)[0]
    right = puzzle["metadata"].get("expression") or puzzle["answer"]
    texts = [f"<answer>{text}</answer>" for text in (right, "9**9**9**9", right)]
    columns = {"dataset": [name] * 3, "entry": [puzzle] * 3}
    assert rewards.score(rewards.reasoning_gym, [""] * 3, texts, columns) == [1.0, 0.0, 1.0]
    assert "1 of 3 completions were given up and score 0 (1 for time)" in caplog.text


def test_mathematics_that_never_ends_costs_its_completion_alone(monkeypatch, caplog):
    pytest.importorskip("math_verify")
    texts = [r"\boxed{2}", r"\boxed{\prod_{n=1}^{10^7} n}", "2"]
    rewards.score(rewards.math_verify, [""] * 3, ["2"] * 3, {"answer": ["2"] * 3})
    monkeypatch.setattr(rewards, "TIMEOUT_SECONDS", 0.5)
    assert rewards.score(rewards.math_verify, [""] * 3, texts, {"answer": ["2"] * 3}) == [1.0, 0.0, 1.0]
    assert "1 for time" in caplog.text
