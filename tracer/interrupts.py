"""Ctrl-C held back where half of what is under way would spoil what comes after it."""

from __future__ import annotations

# what the module signal wraps in enums; a writer holds interrupts back for every call
import _signal
import threading
from typing import Any

_waiting: list[tuple[Any, ...]] = []
_held = False


class undisturbed:
    """Let the block finish before an interrupt is raised. Only the main thread gets interrupts; elsewhere nothing changes.

    Blocks may be nested: the interrupt is raised after the outermost one.
    """

    __slots__ = ("_handler",)

    def __enter__(self) -> None:
        global _held
        self._handler = None
        if _held or threading.current_thread() is not threading.main_thread():
            return
        handler = _signal.getsignal(_signal.SIGINT)
        if callable(handler):
            _signal.signal(_signal.SIGINT, _wait)
            _held, self._handler = True, handler

    def __exit__(self, *_: object) -> None:
        global _held
        handler = self._handler
        if handler is None:
            return
        _held = False
        _signal.signal(_signal.SIGINT, handler)
        if _waiting:
            told = _waiting[0]
            _waiting.clear()
            handler(*told)


def _wait(*told: Any) -> None:
    _waiting.append(told)
