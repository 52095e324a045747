"""Every public function and class says what it takes, what it raises, how it is used and where it is from."""

import ast
import doctest
import re

import pytest

from tests.house.test_architecture import PURE, ROOT, SOURCES, public_definitions, room_of

CHECKS = ("above", "at_least", "in_range", "one_of")  # functions of `rewarm.checks`, which raise

# What a rule doesn't hold for, and why: "file:name".
WITHOUT_SHAPE: dict[str, str] = {
    "rewarm/costs/cost_model.py:trace_step": "to be written",
}
WITHOUT_RAISES: dict[str, str] = {
    "rewarm/lazy.py:public_names": "to be written",
    "rewarm/rollouts/math_scores.py:make_math_score": "to be written",
    "rewarm/rollouts/puzzle_scores.py:make_puzzle_score": "to be written",
    "rewarm/rollouts/sandbox.py:make_square": "to be written",
}
WITHOUT_EXAMPLE: dict[str, str] = {
    "lightning_modules/policy.py:compile_layers": "importing the compiler takes seconds",
    "rewarm/commands/average.py:average": "trains or reads a whole model",
    "rewarm/commands/average.py:write_average": "trains or reads a whole model",
    "rewarm/commands/average.py:write_greedy_average": "trains or reads a whole model",
    "rewarm/commands/export.py:export": "trains or reads a whole model",
    "rewarm/commands/fit.py:checkpoint_to_load": "to be written",
    "rewarm/commands/fit.py:config_parser": "to be written",
    "rewarm/commands/fit.py:made_model": "to be written",
    "rewarm/commands/fit.py:read_config": "to be written",
    "rewarm/commands/fit.py:run_lightning": "trains or reads a whole model",
    "rewarm/commands/init.py:init": "trains or reads a whole model",
    "rewarm/commands/mixture.py:mixture": "starts processes",
    "rewarm/commands/mixture.py:search_mixtures": "to be written",
    "rewarm/commands/pairs.py:pairs": "trains or reads a whole model",
    "rewarm/commands/plan.py:plan_loss": "reads the logs of finished runs",
    "rewarm/commands/plan_memory.py:plan_memory": "to be written",
    "rewarm/commands/plan_memory.py:work_of": "to be written",
    "rewarm/commands/preview.py:marked": "to be written",
    "rewarm/commands/preview.py:preview": "to be written",
    "rewarm/commands/run.py:run": "starts processes",
    "rewarm/commands/schedule.py:config_curves": "to be written",
    "rewarm/commands/schedule.py:schedule": "to be written",
    "rewarm/commands/score.py:score": "trains or reads a whole model",
    "rewarm/costs/cost_model.py:StepCost": "to be written",
    "rewarm/costs/cost_rates.py:measured": "measures for seconds",
    "rewarm/costs/cost_rates.py:measured_for": "measures for seconds",
    "rewarm/costs/cost_step.py:lay_out": "to be written",
    "rewarm/costs/cost_step.py:work_cost": "to be written",
    "rewarm/costs/cost_work.py:Work": "to be written",
    "rewarm/costs/cost_work.py:read_work": "to be written",
    "rewarm/lazy.py:public_names": "to be written",
    "rewarm/pipelines/processes.py:when_parent_ends": "asks the kernel to send signals",
    "rewarm/pipelines/report.py:write_report": "reads the logs of finished runs",
    "rewarm/pipelines/stages.py:run_stage": "starts processes",
    "rewarm/pipelines/stages.py:write_overlay": "to be written",
    "rewarm/rollouts/confinement.py:NoConfinementError": "to be written",
    "rewarm/rollouts/confinement.py:confine": "to be written",
    "rewarm/rollouts/confinement.py:filter_program": "to be written",
    "rewarm/rollouts/engine.py:rollout_cache": "to be written",
    "rewarm/rollouts/math_scores.py:make_math_score": "to be written",
    "rewarm/rollouts/puzzle_scores.py:make_puzzle_score": "to be written",
    "rewarm/rollouts/rewards.py:RewardError": "to be written",
    "rewarm/rollouts/rewards.py:load_reward": "to be written",
    "rewarm/rollouts/sampling.py:encoder_for": "to be written",
    "rewarm/rollouts/sampling.py:read_prompts": "to be written",
    "rewarm/rollouts/sampling.py:sample_from": "to be written",
    "rewarm/rollouts/sampling.py:sample_groups": "to be written",
    "rewarm/rollouts/sandbox.py:Outcome": "to be written",
    "rewarm/rollouts/sandbox.py:SandboxError": "to be written",
    "rewarm/rollouts/sandbox.py:make_square": "to be written",
    "rewarm/rollouts/sandbox_child.py:main": "to be written",
    "rewarm/rollouts/sharded.py:call_unsharded": "needs shards on several ranks",
    "rewarm/scoring/model_scores.py:angle": "trains or reads a whole model",
    "rewarm/scoring/model_scores.py:loss": "trains or reads a whole model",
    "rewarm/scoring/model_scores.py:pass_rate": "trains or reads a whole model",
    "rewarm/scoring/model_scores.py:perplexity_ratio": "trains or reads a whole model",
    "rewarm/scoring/model_scores.py:perplexity_score": "trains or reads a whole model",
    "rewarm/scoring/model_scores.py:prototype_distance": "trains or reads a whole model",
    "rewarm/scoring/score_job.py:Job": "trains or reads a whole model",
    "rewarm/scoring/text_scores.py:irt_difficulty": "to be written",
    "rewarm/scoring/text_scores.py:length": "to be written",
    "rewarm/scoring/text_scores.py:rarity": "to be written",
    "rewarm/sums.py:main": "to be written",
}
WITHOUT_SOURCE: dict[str, str] = {}


def signature(node):
    """The parameters and the result of a function, as they are written; nothing for a class."""
    if isinstance(node, ast.ClassDef):
        return ""
    return ast.unparse(node.args) + (f" -> {ast.unparse(node.returns)}" if node.returns else "")


def raises(node):
    """Whether a function, or a class while it is made, raises in its own lines."""
    made_by = ("__init__", "__post_init__", "__new__")
    functions = [node]
    if isinstance(node, ast.ClassDef):
        functions = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name in made_by]
    parts = [part for function in functions for part in ast.walk(function)]
    return any(
        isinstance(part, ast.Raise) or (isinstance(part, ast.Call) and getattr(part.func, "id", "") in CHECKS)
        for part in parts
    )


def lacks_shape(path, node, doc):
    """A Tensor in the signature, and no shape."""
    return re.search(r"\bTensor\b", signature(node)) and not re.search(r"[Ss]hape|\([A-Z](, [A-Z])*,?\)", doc)


def lacks_raises(path, node, doc):
    """Raises, and has no such section."""
    return raises(node) and not re.search(r"^Raises:$", doc, re.M)


def lacks_example(path, node, doc):
    """No example that runs."""
    examples = doctest.DocTestParser().get_examples(doc)
    return all(example.options.get(doctest.SKIP) for example in examples)


def lacks_source(path, node, doc):
    """Mathematics without a line that says which paper it is of, or that it is ours."""
    return room_of(path) in PURE and not re.search(r"^Source: \S", doc, re.M)


RULES = (
    (lacks_shape, WITHOUT_SHAPE),
    (lacks_raises, WITHOUT_RAISES),
    (lacks_example, WITHOUT_EXAMPLE),
    (lacks_source, WITHOUT_SOURCE),
)
IDS = [rule.__name__ for rule, _ in RULES]
DEFINITIONS = list(public_definitions())


def violations(rule, path):
    """The names of a file that break a rule: "file:name"."""
    file = str(path.relative_to(ROOT))
    return {
        f"{file}:{node.name}"
        for at, node in DEFINITIONS
        if at == path and rule(path, node, ast.get_docstring(node) or "")
    }


@pytest.mark.parametrize(("rule", "exceptions"), RULES, ids=IDS)
@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_docstrings_keep_the_rule_or_are_listed_with_a_reason(path, rule, exceptions):
    found = violations(rule, path)
    file = str(path.relative_to(ROOT))
    listed = {name for name in exceptions if name.startswith(f"{file}:")}
    assert found <= listed, f"{rule.__doc__} {sorted(found - listed)}"
    assert listed <= found, f"these need no exception any more; remove them: {sorted(listed - found)}"


@pytest.mark.parametrize(("rule", "exceptions"), RULES, ids=IDS)
def test_exceptions_are_sorted_of_files_that_exist_and_have_reasons(rule, exceptions):
    assert list(exceptions) == sorted(exceptions)
    assert all(exceptions.values())
    files = {str(path.relative_to(ROOT)) for path in SOURCES}
    assert {name.split(":")[0] for name in exceptions} <= files


def definition(text):
    return ast.parse(text).body[0]


def test_a_check_of_an_argument_counts_as_raising():
    assert raises(definition("def f(n):\n    at_least(1, n=n)"))
    assert raises(definition("class A:\n    def __post_init__(self):\n        raise ValueError"))
    assert not raises(definition("class A:\n    def late(self):\n        raise ValueError"))


def test_an_example_that_is_skipped_is_none():
    assert lacks_example(None, None, ">>> 1 + 1  # doctest: +SKIP\n2")
    assert not lacks_example(None, None, ">>> 1 + 1\n2")


def test_a_type_that_only_ends_in_tensor_needs_no_shape():
    assert lacks_shape(None, definition("def f(x: Tensor): ..."), "")
    assert not lacks_shape(None, definition("def f(x: Tensor): ..."), "Shape (B,).")
    assert not lacks_shape(None, definition("def f(x: DTensorSpec): ..."), "")
