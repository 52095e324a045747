"""Type checkers of users know every public name: of the wheel, and of an editable install."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WHEEL = ROOT / "build" / "check"
USERS = """\
import rewarm
from rewarm.callbacks import LRSchedule

LRSchedule(rewarm.wsd(warmup=100, decay=0.2, end=0.3))
LRSchedule(rewarm.cosine(), schedul=1)
rewarm.wsd(warmup="many", decay=0.2)
rewarm.GRPOO
from rewarm.schedules import refine

rewarm.DPO("m", bta=0.3)
"""
SAID = [
    'user.py:5: error: Unexpected keyword argument "schedul" for "LRSchedule"; did you mean "schedule"?',
    'user.py:6: error: Argument "warmup" to "wsd" has incompatible type "str"; expected "int | float"',
    'user.py:7: error: Module has no attribute "GRPOO"; maybe "GRPO"?',
    'user.py:8: error: Module "rewarm.schedules" has no attribute "refine"; maybe "refined"?',
    'user.py:10: error: Unexpected keyword argument "bta" for "DPO"',
]


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """An environment without packages: to follow those of torch would take a minute."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    return str(folder / "bin" / "python")


def errors(folder, python, **environment):
    """What mypy says of the user's file."""
    (folder / "user.py").write_text(USERS)
    command = [sys.executable, "-m", "mypy", "--config-file", "", "--ignore-missing-imports"]
    command += ["--cache-dir", os.devnull, "--python-executable", python, "user.py"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=250, cwd=folder, env=os.environ | environment
    )
    return [
        line.rsplit("  [", 1)[0]
        for line in done.stdout.splitlines()
        if line.startswith("user.py:") and " error: " in line
    ]


@pytest.mark.skipif(
    not (WHEEL / "site").is_dir(), reason="`make check` installs the wheel that this looks at"
)
def test_mypy_knows_the_public_names_of_the_wheel(bare, tmp_path):
    assert errors(tmp_path, bare, MYPYPATH=str(WHEEL / "site")) == SAID


def test_mypy_knows_the_public_names_of_a_clone_that_is_installed_as_the_readme_says(bare, tmp_path):
    options = ["--config-settings", "editable_mode=strict", "-e"]
    assert f"pip install -c constraints.txt {' '.join(options)} ." in (ROOT / "README.md").read_text()
    clone = tmp_path / "clone"
    for name in ("rewarm", "lightning_modules", "datamodules", "callbacks"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    # The build's own packages come from here and are not fetched.
    here = os.pathsep.join(path for path in sys.path if "site-packages" in path)
    command = [sys.executable, "-m", "pip", "--python", bare, "install", "-q", "--no-deps"]
    command += ["--no-build-isolation", *options, str(clone)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": here})
    assert errors(tmp_path, bare) == SAID
