"""Ctrl-C held back where half of what is under way would spoil what comes after it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# without the detour through enums, where this Python says how: a writer holds interrupts back for every call
_get: Any = getattr(signal.getsignal, "__wrapped__", signal.getsignal)
_set: Any = getattr(signal.signal, "__wrapped__", signal.signal)
_waiting: list[tuple[Any, ...]] = []
_held = False


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let the block finish before an interrupt is raised. Only the main thread gets interrupts; elsewhere nothing changes.

    Blocks may be nested: the interrupt is raised after the outermost one.
    """
    global _held
    if _held or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = _get(signal.SIGINT)
    if not callable(handler):
        yield
        return
    _set(signal.SIGINT, lambda *told: _waiting.append(told))
    _held = True
    try:
        yield
    finally:
        _held = False
        _set(signal.SIGINT, handler)
        if _waiting:
            told = _waiting[0]
            _waiting.clear()
            handler(*told)
