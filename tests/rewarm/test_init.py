"""The public names."""

import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import rewarm

ROOMS = sorted({getattr(rewarm, name).__module__.split(".")[1] for name in rewarm.__all__})


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


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_gives_its_public_names_as_the_face_does(room):
    package = importlib.import_module(f"rewarm.{room}")
    assert set(package.__all__) <= set(rewarm.__all__)
    for name in package.__all__:
        found = getattr(package, name)
        assert found is getattr(rewarm, name)
        assert found.__module__.startswith(f"rewarm.{room}.")
    with pytest.raises(AttributeError, match=f"rewarm.{room} has no 'Nothing'; its classes are "):
        package.Nothing  # noqa: B018


def test_no_public_name_is_that_of_a_file_beside_it():
    """Importing the file would put it in place of what has its name."""
    for package in (rewarm, *(importlib.import_module(f"rewarm.{room}") for room in ROOMS)):
        files = {module.name for module in pkgutil.iter_modules(package.__path__)}
        assert not files & {*package.__all__}, package.__name__


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
