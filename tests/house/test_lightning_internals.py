"""Private names of Lightning are used where they are pinned, and nowhere else."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import lightning.fabric
import lightning.pytorch
import pytest

from tests.house.test_architecture import AT_THE_TOP, ROOT, SOURCES

PINNED = ("callbacks/lightning_internals.py", "lightning_modules/fsdp2_strategy.py: parallel_sizes")
"""Files and functions of which `tests/callbacks/test_lightning_internals.py` holds every private name."""

SET = re.compile(r"\.(_[a-z]\w*)(?:\s*:[^=\n]+)?\s*=[^=]|def (_[a-z]\w*)\(")


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def private_names(text):
    """Private attributes that a source sets, and private functions that it defines."""
    return {attribute or function for attribute, function in SET.findall(text)}


@pytest.fixture(scope="module")
def of_lightning():
    """Private names that Lightning gives its objects."""
    folders = [Path(package.__path__[0]) for package in (lightning.pytorch, lightning.fabric)]
    return set().union(*(private_names(p.read_text()) for folder in folders for p in folder.rglob("*.py")))


def uses(node):
    """(object, private name) of every private name that is looked up within a node, also by `getattr`."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and is_private(part.attr):
            yield ast.unparse(part.value), part.attr
        elif isinstance(part, ast.Call) and getattr(part.func, "id", "") in ("getattr", "setattr", "hasattr"):
            name = part.args[1].value if isinstance(part.args[1], ast.Constant) else ""
            if is_private(str(name)):
                yield ast.unparse(part.args[0]), name


def of_its_bases(path, name):
    """Private names that a class inherits from Lightning."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = importlib.import_module(".".join(["rewarm", *parts] if parts[0] in AT_THE_TOP else parts))
    bases = [base for base in getattr(module, name).__mro__ if base.__module__.startswith("lightning.")]
    return set().union(*(private_names(inspect.getsource(base)) for base in bases))


def test_the_names_that_are_looked_for_are_found(of_lightning):
    text = "trainer._signal_connector.received_sigterm; getattr(strategy, '_data_fetcher', 1); self._x"
    found = [("trainer", "_signal_connector"), ("strategy", "_data_fetcher"), ("self", "_x")]
    assert sorted(uses(ast.parse(text))) == sorted(found)
    assert {"_signal_connector", "_data_fetcher", "_can_stop_early", "_data_parallel_size"} <= of_lightning
    strategy = ROOT / "lightning_modules" / "fsdp2_strategy.py"
    assert {"_data_parallel_size", "_tensor_parallel_size"} <= of_its_bases(strategy, "FSDP2Strategy")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_private_names_of_lightning_are_used_where_they_are_pinned(path, of_lightning):
    file = str(path.relative_to(ROOT))
    if file in PINNED:
        return
    tree = ast.parse(path.read_text())
    pinned = [n for n in tree.body if f"{file}: {getattr(n, 'name', '')}" in PINNED]
    allowed = {(obj, name) for node in pinned for obj, name in uses(node)}
    others = {(obj, name) for obj, name in uses(tree) if obj not in ("self", "cls") and name in of_lightning}
    assert others <= allowed, others
    for node in tree.body:
        own = {name for obj, name in uses(node) if obj in ("self", "cls")}
        if isinstance(node, ast.ClassDef) and own:
            inherited = own & of_its_bases(path, node.name)
            assert not inherited, f"{node.name}: {inherited}"
