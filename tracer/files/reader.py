"""``open_trace``: a stored trace, read lazily and by segment."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tracer.errors import TraceError, UserError
from tracer.files.columns import CellColumn, Piece
from tracer.files.forwards import StoredForwards, checked_forwards, segment_bounds
from tracer.files.parts import PartFile, open_part, part_path
from tracer.files.routing import KindLayers
from tracer.files.segments import read_segment, segment_rows
from tracer.meta import read_meta
from tracer.schema import TABLES
from tracer.trace import Segment, TraceMeta

if TYPE_CHECKING:
    import polars as pl

REQUIREMENTS = ("weights", "active", "scores", "confidence", "branches", "tokens")


class Trace:
    """A stored trace. Opening reads ``meta.json`` alone; everything else is read, and checked, when asked for.

    Attributes
    ----------
    path : Path
    meta : TraceMeta
    """

    def __init__(self, path: Path, meta: TraceMeta) -> None:
        self.path = path
        self.meta = meta
        self._kinds = KindLayers()

    def __repr__(self) -> str:
        return f"Trace({str(self.path)!r})"

    @cached_property
    def forwards(self) -> StoredForwards:
        """The checked ``forwards`` table, whole; a TraceError with its first fault."""
        return checked_forwards(self.path)

    @cached_property
    def requests(self) -> pl.DataFrame:
        """The ``requests`` table as a polars frame, by request_id.

        A request that has forwards and no row gets one: stop_reason "interrupted", its smallest block >= 0 (or -1) as
        first_block, null elsewhere.
        """
        from tracer.files.tidy import requests_frame

        return requests_frame(self.path, self.forwards)

    @cached_property
    def first_block(self) -> dict[int, int]:
        """Absolute index of each request's first block, -1 without blocks."""
        return dict(zip(self.requests["request_id"], self.requests["first_block"], strict=True))

    @property
    def num_forwards(self) -> int:
        """Model calls."""
        return self.forwards.num_calls

    @property
    def num_rows(self) -> int:
        """Token rows of all calls."""
        return int(self.forwards.row_offsets[-1])

    @cached_property
    def num_decisions(self) -> int:
        """Ids recorded: rows that were routed, times K, over all calls and layers."""
        return sum(decisions(part) for part in self.parts("routing")) * self.meta.model.top_k

    @cached_property
    def _bounds(self) -> np.ndarray:
        return segment_bounds(self.forwards, segment_rows(self.meta))

    @property
    def num_segments(self) -> int:
        """How many segments :meth:`segments` yields."""
        return len(self._bounds) - 1

    def segments(self) -> Iterator[Segment]:
        """The trace from its beginning in segments, none of which splits a block of a request.

        Raises
        ------
        TraceError
            With the first fault met, here or when a layer of a segment is read.
        """
        for first, last in zip(self._bounds[:-1], self._bounds[1:], strict=True):
            yield read_segment(self.forwards, self.meta, self._kinds, int(first), int(last))

    def parts(self, table: str) -> Iterator[PartFile]:
        """The committed parts of a table, opened one by one."""
        for number in range(self.forwards.num_parts):
            yield open_part(self.path, table, number)

    def bytes_on_disk(self) -> dict[str, int]:
        """Bytes of the committed parts of each table."""
        return {
            table: sum(part_path(self.path, table, part.number).stat().st_size for part in self.parts(table))
            for table in self.meta.tables
        }

    def scan(self, table: str) -> pl.LazyFrame:
        """A table as a polars LazyFrame.

        Parameters
        ----------
        table : str
            ``requests``, ``forwards``, ``tokens``; ``routing`` for the tidy view with one row per (forward_id, layer, row,
            slot), expert_id and gate_weight; ``cells`` for the routing table as stored.

        Raises
        ------
        UserError
            When the trace has no such table.
        """
        from tracer.files.tidy import scan_parts, scan_routing

        if table == "requests":
            return self.requests.lazy()
        if table == "routing":
            return scan_routing(self.segments, self.meta.model.num_experts)
        stored = "routing" if table == "cells" else table
        if stored not in TABLES:
            raise UserError(f"there is no table {table!r}: choose one of {', '.join((*TABLES, 'cells'))}.")
        if stored not in self.meta.tables:
            raise UserError(f"{self.path} has no {stored} table.")
        return scan_parts(partial(self.parts, stored), stored)

    def has(self, requirement: str) -> bool:
        """Whether the trace holds what a policy or metric requires.

        Parameters
        ----------
        requirement : str
            "weights" (every cell has gate_weights), "active" (scores of the active columns at least), "scores" (all scores),
            "tokens" (the tokens table), "confidence" (a predicted token somewhere in it), "branches" (some speculative call).
        """
        if requirement not in REQUIREMENTS:
            raise UserError(f"there is no requirement {requirement!r}: choose one of {', '.join(REQUIREMENTS)}.")
        if requirement == "scores":
            return self.meta.capture_level == "scores"
        if requirement == "active":
            return self.meta.capture_level in ("active", "scores")
        if requirement == "tokens":
            return "tokens" in self.meta.tables
        return bool(getattr(self, f"_has_{requirement}"))

    @cached_property
    def _has_weights(self) -> bool:
        return all(part.null_count("gate_weights") == 0 for part in self.parts("routing"))

    @cached_property
    def _has_confidence(self) -> bool:
        return self.has("tokens") and any(part.largest("predicted_id") >= 0 for part in self.parts("tokens"))

    @cached_property
    def _has_branches(self) -> bool:
        return bool((self.forwards.columns["branches"] > 1).any())


def decisions(part: PartFile) -> int:
    """(row, layer) pairs of a routing part that were routed."""
    rows = part.arrays(["num_tokens"])["num_tokens"].astype(np.int64)
    column = CellColumn("routed", (Piece(part, 0, part.num_rows, 0),), "plain")
    total = int(rows.sum())
    for chunk in column.chunks():
        given = np.arange(len(chunk)) if chunk.valid is None else np.flatnonzero(chunk.valid)
        for cell in given:
            bitmap = chunk.data[chunk.offsets[cell] : chunk.offsets[cell + 1]]
            own = int(rows[chunk.first + cell])
            total += int(np.unpackbits(bitmap, count=own, bitorder="little").sum()) - own
    return total


def open_trace(path: str | Path) -> Trace:
    """Open a trace.

    Parameters
    ----------
    path : str or Path
        The trace's folder.

    Raises
    ------
    TraceError
        When there is no trace, or its ``meta.json`` is not valid, or of a higher schema version.
    """
    folder = Path(path)
    if not folder.exists():
        raise TraceError(f"there is no trace at {folder}.")
    return Trace(folder, read_meta(folder))
