"""Hashes of the sources that figures follow from: this package's, and those of a policy of the user's own."""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
OURS = tuple(ROOT / name for name in ("simulator", "tracer"))


@cache
def package_sources() -> str:
    """A hash of every source of the simulator and of what reads traces."""
    return _hash(path for folder in OURS for path in folder.rglob("*.py"))


def policy_sources(module: ModuleType) -> str:
    """A hash of a module and of all it imports that is neither installed nor this package's."""
    found: set[Path] = set()
    waiting = [module]
    while waiting:
        path = Path(str(waiting.pop().__file__)).resolve()
        if path not in found:
            found.add(path)
            waiting += [other for other in _imported(path) if _is_users(other)]
    return _hash(found)


def _imported(path: Path) -> Iterator[ModuleType]:
    """Modules that a file names in its imports, among those that are loaded."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (sys.modules[name] for name in names if name in sys.modules)


def _is_users(module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    if file is None or not file.endswith(".py"):
        return False
    path = Path(file).resolve()
    installed = (Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve(), *OURS)
    return not any(path.is_relative_to(folder) for folder in installed)


def _hash(paths: Iterable[Path]) -> str:
    hashes = sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)
    return hashlib.sha256("".join(hashes).encode()).hexdigest()
