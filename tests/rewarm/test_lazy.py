"""Packages that list their names for type checkers, and import them when they are used."""

import importlib
import subprocess
import sys

import pytest

NAMES = """
from typing import TYPE_CHECKING

from rewarm.lazy import public_names

if TYPE_CHECKING:
    {names}
else:
    __all__, __getattr__, __dir__ = public_names(__spec__)
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Two packages in a place of their own: `inner` lists a class, `outer` all of it and a function."""
    for name, names in {
        "inner": "from inner.shapes import Circle as Circle",
        "outer": "from inner import *\n    from outer.areas import area as area",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(NAMES.format(names=names))
    (tmp_path / "inner" / "shapes.py").write_text("class Circle: ...\nclass Square: ...\n")
    (tmp_path / "outer" / "areas.py").write_text("def area(shape): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("outer")
    for name in [name for name in sys.modules if name.split(".")[0] in ("inner", "outer")]:
        del sys.modules[name]


def test_names_are_imported_when_they_are_used(package):
    assert "inner.shapes" not in sys.modules
    assert "outer.areas" not in sys.modules
    assert package.Circle.__module__ == "inner.shapes"
    assert "outer.areas" not in sys.modules
    assert package.area.__module__ == "outer.areas"


def test_a_star_stands_for_all_names_of_another_package(package):
    assert package.__all__ == ["Circle", "area"]
    assert dir(package) == ["Circle", "area"]
    assert package.Circle is importlib.import_module("inner").Circle


def test_a_name_that_is_not_listed_is_unknown_and_the_classes_are_told(package):
    with pytest.raises(AttributeError, match="outer has no 'Square'; its classes are Circle"):
        package.Square  # noqa: B018


def test_a_star_import_takes_the_public_names_only(package):
    taken = {}
    exec("from outer import *", taken)
    assert {name for name in taken if not name.startswith("__")} == {"Circle", "area"}


def test_names_are_found_without_a_source_file_too(package, tmp_path):
    """As in a zip archive, where only the loader knows the source."""
    import zipfile

    archive = tmp_path / "packages.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in [*(tmp_path / "inner").glob("*.py"), *(tmp_path / "outer").glob("*.py")]:
            file.write(path, path.relative_to(tmp_path))
    script = (
        f"import sys; sys.path.insert(0, {str(archive)!r}); import outer; print(outer.Circle, outer.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "inner.shapes.Circle" in done.stdout
    assert "packages.zip" in done.stdout
