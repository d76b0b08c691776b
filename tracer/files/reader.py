"""``open_trace``: a stored trace, read lazily and by segment."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tracer.errors import TraceError, UserError
from tracer.files.folder import earlier_trace
from tracer.files.forwards import StoredForwards, segment_bounds
from tracer.files.parts import PartFile, part_names
from tracer.files.segments import StoredTables, segment_rows
from tracer.meta import read_meta
from tracer.schema import TABLES
from tracer.trace import Segment, TraceMeta

if TYPE_CHECKING:
    import polars as pl

UNKNOWN = {
    "kv_tokens": "how long the cached prefixes were: attention to them costs nothing here",
    "num_accepted": "how many tokens each call gained: no figure counts tokens",
}
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
        self._tables = StoredTables(path, meta)

    def __repr__(self) -> str:
        return f"Trace({str(self.path)!r})"

    @property
    def forwards(self) -> StoredForwards:
        """The checked ``forwards`` table, whole; a TraceError with its first fault, or where the trace holds counts only."""
        if "forwards" not in self.meta.tables:
            raise UserError(
                f"{self.path} holds counts only (table loads), no model calls; this needs a recording of calls."
            )
        return self._tables.forwards

    @cached_property
    def requests(self) -> pl.DataFrame:
        """The ``requests`` table as a polars frame, by request_id.

        A request that has forwards and no row gets one: stop_reason "interrupted", its smallest block >= 0 (or -1) as
        first_block, null elsewhere.
        """
        from tracer.files.tidy import requests_frame

        return requests_frame(self.forwards)

    @cached_property
    def first_block(self) -> dict[int, int]:
        """Absolute index of each request's first block, -1 without blocks."""
        return dict(zip(self.requests["request_id"], self.requests["first_block"], strict=True))

    @cached_property
    def loads(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps uint32 [S] and tokens of each expert uint32 [S, L, E] of a trace that holds counts only.

        Raises
        ------
        TraceError
            With the first fault; also where the trace holds calls.
        """
        from tracer.files.loads import read_loads

        return read_loads(self.path, self.meta)

    @cached_property
    def notes(self) -> list[str]:
        """Sentences that every figure needs: that the trace was not finished, what padding is left out, what is unknown.

        Raises
        ------
        TraceError
            With the first fault of the tables requests, forwards and tokens: no figure is made from a trace that has one.
            Routing is held against the format as it is read.
        """
        from tracer.checking import first_fault
        from tracer.padding import padding_note

        fault = first_fault(self)
        if fault:
            raise TraceError(fault)
        unknown = [name for name in ("kv_tokens", "num_accepted") if (self.forwards.columns[name] < 0).any()]
        told = [f"This trace does not say {UNKNOWN[name]}." for name in unknown]
        return [note for note in (self.unfinished, padding_note(self), *told) if note]

    @property
    def unfinished(self) -> str | None:
        """One sentence, with how much there is, when the trace was not finished; every figure of it needs that note."""
        if self.meta.complete:
            return None
        from tracer.files.tidy import not_finished

        return not_finished(self.path, self.requests)

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
        """Ids recorded: the real ones of all rows, over all calls and layers; padding, which counts for nothing, left out."""
        if not self.padding_rows and not any("count" in part.present for part in self.parts("routing")):
            offsets = self._tables.layers("routing").offsets
            return self.meta.model.top_k * sum(int(own[-1]) for own in offsets.values())
        return sum(
            int(segment.layer(layer, with_weights=False).count.sum(dtype=np.int64))
            for segment in self.segments()
            for layer in segment.layers
        )

    @cached_property
    def padding_rows(self) -> int:
        """Token rows that are padding, which no figure counts."""
        found = (segment.padding for segment in self.segments())
        return sum(int(padding.sum()) for padding in found if padding is not None)

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
            yield self._tables.segment(int(first), int(last))

    def parts(self, table: str) -> Iterator[PartFile]:
        """The parts of a table, opened one by one."""
        for name in part_names(self.path, table):
            yield self._tables.part(table, name)

    def bytes_on_disk(self) -> dict[str, int]:
        """Bytes of the parts of each table."""
        return {table: sum(part.file.stat().st_size for part in self.parts(table)) for table in self.meta.tables}

    def scan(self, table: str) -> pl.LazyFrame:
        """A table as a polars LazyFrame.

        Parameters
        ----------
        table : str
            ``requests``, ``forwards``, ``tokens``; ``routing`` for the tidy view with one row per (forward_id, layer, row,
            slot), expert_id and gate_weight; ``rows`` for the routing table as stored.

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
        stored = "routing" if table == "rows" else table
        if stored not in TABLES:
            raise UserError(f"there is no table {table!r}: choose one of {', '.join((*TABLES, 'rows'))}.")
        if stored not in self.meta.tables:
            raise UserError(f"{self.path} has no {stored} table.")
        return scan_parts(partial(self.parts, stored), stored)

    def has(self, requirement: str) -> bool:
        """Whether the trace holds what a policy or metric requires.

        Parameters
        ----------
        requirement : str
            "weights" (every row has gate_weights), "active" (scores of the active experts at least), "scores" (all scores),
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
        for part in self.parts("routing"):
            if "gate_weights" not in part.present:
                return False
            if part.schema.field("gate_weights").nullable:
                groups = range(len(part.groups) - 1)
                if any(part.read(["gate_weights"], group).column(0).null_count for group in groups):
                    return False
        return True

    @cached_property
    def _has_confidence(self) -> bool:
        return self.has("tokens") and any(
            (part.arrays(["predicted_id"])["predicted_id"] >= 0).any() for part in self.parts("tokens")
        )

    @cached_property
    def _has_branches(self) -> bool:
        return bool((self.forwards.columns["branches"] > 1).any())


def open_trace(path: str | Path) -> Trace:
    """Open a trace.

    Parameters
    ----------
    path : str or Path
        The trace's folder.

    Raises
    ------
    TraceError
        When there is no trace, or its ``meta.json`` is not valid, or of another schema version.
    """
    folder = Path(path)
    if not folder.exists():
        earlier = earlier_trace(folder)
        found = "" if earlier is None else f"; replacing it was cut short, and the one before is whole at {earlier}"
        raise TraceError(f"there is no trace at {folder}{found}.")
    return Trace(folder, read_meta(folder))
