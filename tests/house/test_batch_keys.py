"""The batch is declared: every key that is read has a shape, a type, a writer and a reader."""

import ast
import re

import pytest

from rewarm.objectives import batch as declared
from tests.house.test_architecture import ROOT, SOURCES

KINDS = (declared.Batch, declared.PairBatch, declared.RolloutBatch, declared.Counts, declared.ForeignBatch)
KEYS = {key for kind in KINDS for key in kind.__annotations__}
TREES = {path: ast.parse(path.read_text()) for path in SOURCES}
NAMES = {"batch", "counts"}
"""What the code calls a batch and its counts."""


def reads(tree):
    """Literal keys that are read of a batch: `batch["x"]`, `batch.get("x")`, `"x" in batch`."""
    for node in ast.walk(tree):
        key = None
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            key = named(node.value) and node.slice
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            key = named(node.func.value) and node.args[0]
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
            key = named(node.comparators[0]) and node.left
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            yield key.value


def named(node):
    """Whether an expression is a batch or its counts."""
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        return node.slice.value == "counts"
    return isinstance(node, ast.Name) and node.id in NAMES


def test_every_key_that_is_read_is_declared():
    unknown = {
        f"{path.relative_to(ROOT)}: {key}"
        for path, tree in TREES.items()
        for key in reads(tree)
        if key not in KEYS and path.name != "whole.py"
    }
    assert unknown == set()


@pytest.mark.parametrize("key", sorted(KEYS))
def test_every_declared_key_is_read_somewhere(key):
    assert any(key in reads(tree) for tree in TREES.values()), key


def attributes(kind):
    """(key, what its docstring says of it)."""
    section = re.search(r"Attributes:\n(.*)", kind.__doc__, re.S)[1]
    entries = re.findall(r"^        (\w+): (.*?)(?=^        \w+: |\Z)", section, re.M | re.S)
    return {key: " ".join(text.split()) for key, text in entries}


def source_of(name):
    """The file in which a class or function is defined."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                return path.read_text()
    raise AssertionError(f"nothing is called {name}")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_key_says_its_shape_or_type_and_its_writer_writes_it(kind):
    inherited = {} if kind in KINDS[3:] else declared.Batch.__annotations__
    said = attributes(kind)
    assert said.keys() == kind.__annotations__.keys() - (set() if kind is declared.Batch else inherited)
    for key, text in said.items():
        if kind is not declared.Counts:
            assert re.search(r"[Ss]hape|an? int\b|a str|a list|a tuple|a dict|a float|: `\w+`", text), key
        if kind is not declared.ForeignBatch:
            for writer in re.findall(r"`(\w+)`", text.split("Written by")[1]):
                assert re.search(rf'"{key}"|{key}=', source_of(writer)), f"{writer} does not write {key}"
