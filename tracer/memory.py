"""A trace kept in memory: takes what :class:`tracer.parquet.TraceWriter` takes, for short runs and for looking at one call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tracer.trace import CallRouting


@dataclass(frozen=True, slots=True)
class HeldCall:
    """One model call: rows of ``forwards`` (without forward_id), columns of ``tokens``, routing of all layers."""

    parts: list[dict[str, Any]]
    tokens: dict[str, np.ndarray] | None
    routing: CallRouting


@dataclass(slots=True)
class MemoryWriter:
    """Keeps every call and request in lists; nothing bounds its size."""

    meta: dict[str, Any]
    calls: list[HeldCall] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    complete: bool = False

    def add_call(
        self,
        parts: list[dict[str, Any]],
        tokens: dict[str, np.ndarray] | None,
        routing: CallRouting,
    ) -> int:
        """Keep a call; returns its forward id."""
        self.calls.append(HeldCall(parts, tokens, routing))
        return len(self.calls) - 1

    def add_request(self, row: dict[str, Any]) -> None:
        """Keep a request's row."""
        self.requests.append(row)

    def close(self, complete: bool = True) -> None:
        """Mark the end."""
        self.complete = complete
