"""The rules that hold the tree together."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ORDER = (
    ("functional", "curriculum", "schedules", "text", "checkpoints"),
    ("objectives",),
    ("rollouts",),
    ("lightning_modules", "datamodules", "callbacks"),
    ("scoring", "costs", "pipelines"),
    ("commands",),
)
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
OF_THE_FACE = ("checks", "lazy")  # what rooms may take from beside them
AT_THE_TOP = ("lightning_modules", "datamodules", "callbacks")
PURE = ("functional", "objectives", "curriculum", "schedules")
SOURCES = sorted(path for folder in ("rewarm", *AT_THE_TOP) for path in (ROOT / folder).rglob("*.py"))


def room_of(path):
    """The room that a source file is in; the face has none."""
    parts = path.relative_to(ROOT).parts
    inner = parts[1:] if parts[0] == "rewarm" else parts
    return inner[0] if len(inner) > 1 else None


def folder_of(room):
    return ROOT / room if room in AT_THE_TOP else ROOT / "rewarm" / room


def imports(path):
    """(name, whether at module level) of every import of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    here = room_of(path)
    for name in imports(path):
        parts = name.split(".")
        assert parts[0] not in RANK, f"{name}: import it as rewarm.{name}"
        if here and parts[0] == "rewarm" and len(parts) > 1 and parts[1] in RANK and parts[1] != here:
            assert RANK[parts[1]] < RANK[here], f"{here} imports {name}"
        if here and parts[0] == "rewarm" and len(parts) > 1 and parts[1] not in RANK:
            assert parts[1] in OF_THE_FACE, f"{here} imports {name}, which is above all rooms"


@pytest.mark.parametrize("room", PURE)
def test_rooms_of_mathematics_need_only_torch_and_the_standard_library(room):
    import sys

    # Each is imported inside the one function that is there for it: the kernels of a backend, the files of
    # a logger.
    exceptions = {"logprob.py": {"liger_kernel"}, "logs.py": {"tensorboard"}}
    for path in folder_of(room).glob("*.py"):
        used = {name.split(".")[0] for name in imports(path)}
        allowed = {*sys.stdlib_module_names, "torch", "rewarm", *exceptions.get(path.name, ())}
        assert used <= allowed, f"{path.name}: {used - allowed}"


def test_folders_stay_flat():
    nested = [p for room in RANK for p in folder_of(room).iterdir() if p.is_dir() and p.name != "__pycache__"]
    assert nested == []
    rooms = {p.name for p in (ROOT / "rewarm").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert rooms == RANK.keys() - set(AT_THE_TOP)


def test_every_source_file_has_a_test_file_of_its_name():
    missing = []
    for path in SOURCES:
        room = room_of(path)
        name = "test_init.py" if path.name == "__init__.py" else f"test_{path.name}"
        if path.name == "__main__.py" or (path.name == "__init__.py" and room):
            continue
        if not (ROOT / "tests" / (room or "rewarm") / name).is_file():
            missing.append(str(path.relative_to(ROOT)))
    assert missing == []


def test_each_method_has_one_stem_across_the_tree():
    for method in ("continual_pretraining", "curriculum_sft", "dpo", "grpo"):
        for place in (
            f"lightning_modules/{method}.py",
            f"configs/{method}.yaml",
            f"configs/tiny/{method}.yaml",
        ):
            assert (ROOT / place).is_file(), place


def test_the_installed_packages_are_the_folders():
    listed = (ROOT / "setup.cfg").read_text()
    for room in RANK:
        assert re.search(rf"^    rewarm\.{room}$", listed, re.M), room
        mapped = re.search(rf"^    rewarm\.{room} = {room}$", listed, re.M)
        assert bool(mapped) == (room in AT_THE_TOP), room


def public_definitions():
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            overload = any(
                getattr(decorator, "id", "") == "overload"
                for decorator in getattr(node, "decorator_list", [])
            )
            if (
                isinstance(node, ast.FunctionDef | ast.ClassDef)
                and not node.name.startswith("_")
                and not overload
            ):
                yield path, node


def test_every_public_name_has_a_docstring():
    assert [
        f"{path.name}: {node.name}" for path, node in public_definitions() if not ast.get_docstring(node)
    ] == []


CARD = ("Idea:", "Objective:", "Source:", "Defaults:", "Watch:", "Cost:", "Not for:")


def method_cards():
    for method in ("continual_pretraining", "curriculum_sft", "dpo", "grpo"):
        for node in ast.parse((ROOT / f"lightning_modules/{method}.py").read_text()).body:
            if isinstance(node, ast.ClassDef):
                yield method, node.name, ast.get_docstring(node)


def test_each_method_card_has_its_seven_fields_in_order():
    for _, name, card in method_cards():
        places = [card.find(field) for field in CARD]
        assert -1 not in places, f"{name} lacks {CARD[places.index(-1)]}"
        assert places == sorted(places), name


def test_the_readme_lists_each_method_with_its_idea():
    readme = " ".join((ROOT / "README.md").read_text().split())
    for method, name, card in method_cards():
        sentence = " ".join(card.splitlines()[0].split())
        assert f"`{name}`" in readme
        assert sentence.rstrip(".") in readme, f"README's table does not say: {sentence}"
        assert f"configs/{method}.yaml" in readme


def test_nothing_names_a_path_of_a_machine():
    bad = re.compile(r"/(work|root|home)/\w|\.\./shared")
    for path in [
        *SOURCES,
        *ROOT.glob("*.md"),
        *(ROOT / "configs").rglob("*.yaml"),
        *(ROOT / "docs").rglob("*.md"),
    ]:
        assert not bad.search(path.read_text()), path
