"""Every example in a docstring runs."""

import doctest
import importlib
import pkgutil

import pytest

import rewarm
from tests.house.test_architecture import AT_THE_TOP


def modules():
    for module in pkgutil.walk_packages(rewarm.__path__, "rewarm."):
        if not module.name.endswith("__main__"):
            yield module.name
    for room in AT_THE_TOP:  # in an editable install these are elsewhere
        folder = importlib.import_module(f"rewarm.{room}")
        yield from (f"rewarm.{room}.{module.name}" for module in pkgutil.iter_modules(folder.__path__))


@pytest.mark.parametrize("name", sorted({*modules()}))
def test_docstring_examples_run(name):
    module = importlib.import_module(name)
    names = vars(module) | {"torch": importlib.import_module("torch")}
    failures, _ = doctest.testmod(module, extraglobs=names)
    assert failures == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    found = [t for name in {*modules()} for t in finder.find(importlib.import_module(name)) if t.examples]
    assert len(found) > 20
    assert rewarm.__doc__
