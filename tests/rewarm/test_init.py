"""The public names."""

import inspect
import subprocess
import sys

import pytest

import rewarm


@pytest.mark.parametrize("name", rewarm.__all__)
def test_every_public_name_can_be_imported_and_says_what_it_is(name):
    found = getattr(rewarm, name)
    assert name in dir(rewarm)
    if inspect.isclass(found) or inspect.isfunction(found):
        assert found.__name__ == name
        assert found.__module__.startswith("rewarm.")  # never the bare folder, which would be a second class
        assert inspect.getdoc(found)


def test_a_public_name_is_the_same_object_as_in_its_module():
    from rewarm.lightning_modules.dpo import DPO

    assert rewarm.DPO is DPO


def test_names_of_the_design_are_there():
    modules = {"CurriculumSFT", "DPO", "GRPO", "ContinualPretraining"}
    data = {"InstructionData", "PreferenceData", "PromptData", "CorpusData"}
    callbacks = {
        "LRSchedule",
        "DifficultyFilter",
        "CheckpointAveraging",
        "SampleTable",
        "Throughput",
        "ExactResume",
    }
    assert modules | data | callbacks <= set(rewarm.__all__)


def test_an_unknown_name_lists_the_known_classes():
    with pytest.raises(
        AttributeError, match=r"rewarm has no 'GRPOO'; its classes are .*DPO, .*GRPO, .*Throughput"
    ):
        rewarm.GRPOO  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'dpo_los'"):
        from rewarm import dpo_los  # noqa: F401


@pytest.mark.dist
def test_importing_the_package_loads_nothing_heavy():
    script = (
        "import sys, rewarm; from rewarm import cli;"
        " heavy = {'torch', 'lightning', 'transformers', 'datasets', 'rich'};"
        " print(*(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout.strip()) == (0, ""), result.stderr
