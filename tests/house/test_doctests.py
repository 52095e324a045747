"""Every example in a docstring runs."""

import doctest
import importlib
import pkgutil

import pytest

import rewarm

PACKAGES = ["functional", "rollouts", "lightning_modules", "datamodules", "callbacks"]


def modules():
    for package in PACKAGES:
        folder = importlib.import_module(f"rewarm.{package}")
        for module in pkgutil.iter_modules(folder.__path__):
            yield f"rewarm.{package}.{module.name}"


@pytest.mark.parametrize("name", sorted(modules()))
def test_docstring_examples_run(name):
    module = importlib.import_module(name)
    names = vars(module) | {"torch": importlib.import_module("torch")}
    failures, _ = doctest.testmod(module, extraglobs=names)
    assert failures == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    found = [t for name in modules() for t in finder.find(importlib.import_module(name)) if t.examples]
    assert len(found) > 20
    assert rewarm.__doc__
