"""Segments of a stored trace: a range of calls with its tokens and routing, read when asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from tracer.errors import TraceError
from tracer.files.forwards import StoredForwards, checked_forwards
from tracer.files.layers import read_layer
from tracer.files.parts import open_part
from tracer.files.routing import LayerTable
from tracer.files.tokens import StoredTokens, token_faults, token_table
from tracer.schema import PADDING
from tracer.trace import LayerTrace, Segment, TokenTable, TraceMeta

# decisions (row x layer x slot) and bytes of scores a segment holds at most where blocks allow a cut
SEGMENT_DECISIONS = 1 << 26
SEGMENT_SCORE_BYTES = 1 << 28
# parts kept open: those of all tables of a segment and its neighbours
OPEN_PARTS = 24


def segment_rows(meta: TraceMeta) -> int:
    """Token rows a segment may hold, so that a replay of it stays well under 1 GiB."""
    layers = len(meta.model.moe_layers)
    rows = SEGMENT_DECISIONS // (layers * meta.model.top_k)
    if meta.capture_level != "ids":
        rows = min(rows, SEGMENT_SCORE_BYTES // (4 * layers * meta.model.num_experts))
    return max(1, rows)


class StoredTables:
    """The tables of a trace, opened when first needed. Safe to use from several threads."""

    def __init__(self, path: Path, meta: TraceMeta) -> None:
        self.path, self.meta = path, meta
        self.part = lru_cache(maxsize=OPEN_PARTS)(lambda table, name: open_part(path, table, name, meta))
        self._lock = Lock()
        self._tables: dict[str, LayerTable] = {}

    @cached_property
    def forwards(self) -> StoredForwards:
        """The checked ``forwards`` table, whole; a TraceError with its first fault."""
        return checked_forwards(self.path, self.meta)

    @cached_property
    def tokens(self) -> StoredTokens:
        """The ``tokens`` table."""
        return StoredTokens(self.forwards, self.part)

    def layers(self, table: str) -> LayerTable:
        """``routing`` or ``scores``, by layer."""
        with self._lock:
            if table not in self._tables:
                self._tables[table] = LayerTable(table, self.forwards, self.part)
            return self._tables[table]

    def token_rows(self, first: int, last: int) -> TokenTable:
        """Token rows of calls ``first`` to ``last - 1``; a TraceError with the first fault."""
        rows = self.tokens.read(first, last)
        for fault in token_faults(self.forwards, first, last, rows):
            raise TraceError(fault)
        return token_table(rows.columns)

    def padding(self, first: int, last: int) -> np.ndarray | None:
        """bool [T]: which rows of calls ``first`` to ``last - 1`` are padding, None for none; reads one column."""
        padding = self.tokens.read(first, last, ("state",)).columns["state"] == PADDING
        return padding if padding.any() else None

    def layer(self, layer: int, first: int, last: int, with_scores: bool, with_weights: bool) -> LayerTrace:
        """One layer of calls ``first`` to ``last - 1``; a TraceError with the first fault."""
        active = (lambda: self.layers("scores")) if self.meta.capture_level == "active" else None
        table = self.layers("routing")
        return read_layer(self.forwards, table, active, layer, (first, last), with_weights, with_scores)

    def segment(self, first: int, last: int) -> Segment:
        """Calls ``first`` to ``last - 1`` as a Segment whose tokens and layers are read when asked for."""
        more = last < self.forwards.num_calls
        return StoredSegment(
            forwards=self.forwards.table(first, last),
            tokens=(lambda: self.token_rows(first, last)) if "tokens" in self.meta.tables else None,
            padding=(lambda: self.padding(first, last)) if "tokens" in self.meta.tables else None,
            layers=self.meta.model.moe_layers,
            load=lambda layer, scores, weights: self.layer(layer, first, last, scores, weights),
            following=lambda: self.segment(last, last + 1) if more else None,
        )


class StoredSegment(Segment):
    """A Segment whose tokens are read, and checked, when first asked for; padding is known without them."""

    _values: dict[str, Any]
    _lock: Lock

    def __init__(
        self,
        tokens: Callable[[], TokenTable] | None,
        padding: Callable[[], np.ndarray | None] | None,
        **given: Any,
    ) -> None:
        # the base is frozen
        for name, value in {**given, "_values": {"tokens": tokens, "padding": padding}, "_lock": Lock()}.items():
            object.__setattr__(self, name, value)

    def _read(self, name: str) -> Any:
        with self._lock:
            if callable(self._values[name]):
                self._values[name] = self._values[name]()
            return self._values[name]

    @property
    def tokens(self) -> TokenTable | None:
        """The token rows; a TraceError with their first fault."""
        return self._read("tokens")

    @property
    def padding(self) -> np.ndarray | None:
        """bool [T]: rows that are padding; None where there are none."""
        return self._read("padding")
