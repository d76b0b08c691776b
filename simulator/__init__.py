"""Replay traces under other policies, budgets and machines. The names a user needs, each imported when first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "replay": "simulator.replaying",
    "sweep": "simulator.sweeping",
    "find_interval": "simulator.interval",
    "parallel_runs": "simulator.parallel",
    "load_policy": "simulator.registry",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
