"""Public names of a package that are imported when they are first used, so that the package itself is light.

A package lists its public names once, as imports that type checkers and editors follow and that never run:

    if TYPE_CHECKING:
        from rewarm.callbacks.lr_schedule import LRSchedule as LRSchedule

    else:
        __all__, __getattr__, __dir__ = public_names(__spec__)
"""

import ast
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.machinery import ModuleSpec
from typing import Any, cast


def public_names(spec: ModuleSpec) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__all__`, `__getattr__` and `__dir__` of a package that lists its names for type checkers.

    Args:
        spec: The package's `__spec__`; its source is read for the imports under `if TYPE_CHECKING`. A star
            stands for all public names of another such package.

    Returns:
        The names in the order of the source, what imports one of them, and what lists them.
    """
    homes = dict(_homes(cast(Any, spec.loader).get_source(spec.name)))

    def find(name: str) -> Any:
        """Import a public name when it is first used."""
        if name not in homes:
            classes = ", ".join(sorted(known for known in homes if known[0].isupper())) or "none"
            raise AttributeError(f"{spec.name} has no {name!r}; its classes are {classes}")
        return getattr(import_module(homes[name]), name)

    return list(homes), find, lambda: sorted(homes)


def _homes(source: str) -> Iterator[tuple[str, str]]:
    """(name, module that it is imported from) for each name that the source lists."""
    for block in ast.parse(source).body:
        if not (isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"):
            continue
        for node in block.body:
            if not isinstance(node, ast.ImportFrom) or node.module is None:
                continue
            for alias in node.names:
                names = import_module(node.module).__all__ if alias.name == "*" else [alias.name]
                yield from ((name, node.module) for name in names)
