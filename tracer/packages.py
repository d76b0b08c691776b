"""What a package offers: names that are imported when they are asked for, and files that are a registry."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any


def modules_in(folder: Path) -> tuple[str, ...]:
    """Names of the modules in a package's folder, sorted; those with a leading underscore are the package's own."""
    return tuple(sorted(path.stem for path in folder.glob("[!_]*.py")))


def offered(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's ``__getattr__`` (PEP 562).

    Parameters
    ----------
    package : str
        Its ``__name__``.
    homes : mapping
        Of each name the module that defines it, which is imported when the name is first asked for. No module of the package
        may bear such a name: once imported, it would stand in the name's place.
    """

    def look_up(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(homes[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return look_up
