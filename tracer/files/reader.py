"""``open_trace``: a stored trace, read lazily and by segment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache, partial
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

import numpy as np

from tracer.errors import TraceError, UserError
from tracer.files.folder import earlier_trace
from tracer.files.forwards import StoredForwards, checked_forwards, segment_bounds
from tracer.files.layers import read_layer
from tracer.files.parts import PartFile, part_names
from tracer.files.rows import NO_LAYER, Rows, RowTable
from tracer.files.tokens import TOKEN_COLUMNS, token_faults, token_table
from tracer.meta import read_meta
from tracer.schema import PADDING, TABLES
from tracer.trace import LayerTrace, Segment, TokenTable, TraceMeta

if TYPE_CHECKING:
    import polars as pl

UNKNOWN = {
    "kv_tokens": "how long the cached prefixes were: attention to them costs nothing here",
    "num_accepted": "how many tokens each call gained: no figure counts tokens",
}
REQUIREMENTS = ("weights", "active", "scores", "confidence", "branches", "tokens")
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


class Trace:
    """A stored trace. Opening reads ``meta.json`` alone; everything else is read, and checked, when asked for.

    Safe to use from several threads.

    Attributes
    ----------
    path : Path
    meta : TraceMeta
    """

    def __init__(self, path: Path, meta: TraceMeta) -> None:
        self.path = path
        self.meta = meta
        self.part = lru_cache(maxsize=OPEN_PARTS)(lambda table, name: PartFile(path, table, name, meta))
        self._rows: dict[str, RowTable] = {}
        self._lock = RLock()

    def __repr__(self) -> str:
        return f"Trace({str(self.path)!r})"

    @cached_property
    def forwards(self) -> StoredForwards:
        """The checked ``forwards`` table, whole; a TraceError with its first fault, or where the trace holds counts only."""
        if "forwards" not in self.meta.tables:
            raise UserError(
                f"{self.path} holds counts only (table loads), no model calls; this needs a recording of calls."
            )
        return checked_forwards(self.path, self.meta)

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

        A TraceError with the first fault; also where the trace holds calls.
        """
        from tracer.files.loads import read_loads

        return read_loads(self.path, self.meta)

    @cached_property
    def notes(self) -> list[str]:
        """Sentences that every figure needs: that the trace was not finished, what padding is left out, what is unknown.

        A TraceError with the first fault of the tables requests, forwards and tokens: no figure is made from a trace that has
        one. Routing is held against the format as it is read.
        """
        from tracer.checking import first_fault
        from tracer.padding import padding_note

        fault = first_fault(self)
        if fault:
            raise TraceError(fault)
        unknown = [what for name, what in UNKNOWN.items() if (self.forwards.columns[name] < 0).any()]
        sentences = [self.unfinished, padding_note(self), *(f"This trace does not say {what}." for what in unknown)]
        return [sentence for sentence in sentences if sentence]

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
            offsets = self.rows("routing").offsets
            return self.meta.model.top_k * sum(int(rows[-1]) for rows in offsets.values())
        return sum(
            int(segment.layer(layer, with_weights=False).count.sum(dtype=np.int64))
            for segment in self.segments()
            for layer in segment.layers
        )

    @cached_property
    def padding_rows(self) -> int:
        """Token rows that are padding, which no figure counts."""
        return sum(int(segment.padding.sum()) for segment in self.segments() if segment.padding is not None)

    @cached_property
    def bounds(self) -> list[int]:
        """The calls at which segments begin, and the number of calls."""
        return segment_bounds(self.forwards, segment_rows(self.meta)).tolist()

    @property
    def num_segments(self) -> int:
        """How many segments :meth:`segments` yields."""
        return len(self.bounds) - 1

    def segments(self) -> Iterator[Segment]:
        """The trace from its beginning in segments, none of which splits a block of a request.

        A TraceError with the first fault met, here or when a layer of a segment is read.
        """
        for first, last in zip(self.bounds[:-1], self.bounds[1:], strict=True):
            yield self._segment(first, last)

    def _segment(self, first: int, last: int) -> Segment:
        has_tokens = "tokens" in self.meta.tables
        return StoredSegment(
            forwards=self.forwards.table(first, last),
            layers=self.meta.model.moe_layers,
            load=lambda layer, scores, weights: self.layer(layer, first, last, scores, weights),
            following=lambda: self._segment(last, last + 1) if last < self.forwards.num_calls else None,
            read_tokens=lambda: self._tokens(first, last) if has_tokens else None,
            read_padding=lambda: self._padding(first, last) if has_tokens else None,
        )

    def rows(self, table: str) -> RowTable:
        """Table ``tokens``, ``routing`` or ``scores``; a TraceError when it has not the rows that ``forwards`` counts."""
        with self._lock:
            if table not in self._rows:
                self._rows[table] = RowTable(table, self.forwards, self.part)
            return self._rows[table]

    def token_rows(self, first: int, last: int, names: list[str] = TOKEN_COLUMNS) -> tuple[Rows, dict[str, np.ndarray]]:
        """Token rows of calls ``first`` to ``last - 1`` and their columns, [T] each; keys are checked, values are not."""
        rows = self.rows("tokens").read(NO_LAYER, first, last, names)
        return rows, {name: rows.numbers(name) for name in names}

    def _tokens(self, first: int, last: int) -> TokenTable:
        rows, columns = self.token_rows(first, last)
        for fault in token_faults(rows, columns):
            raise TraceError(fault)
        return token_table(columns)

    def _padding(self, first: int, last: int) -> np.ndarray | None:
        padding = self.token_rows(first, last, ["state"])[1]["state"] == PADDING
        return padding if padding.any() else None

    def layer(self, layer: int, first: int, last: int, with_scores: bool, with_weights: bool) -> LayerTrace:
        """One layer of calls ``first`` to ``last - 1``, padding too; a TraceError with the first fault."""
        active = partial(self.rows, "scores")
        return read_layer(self.rows("routing"), active, layer, (first, last), with_weights, with_scores)

    def parts(self, table: str) -> Iterator[PartFile]:
        """The parts of a table, opened one by one."""
        for name in part_names(self.path, table):
            yield self.part(table, name)

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
        if requirement == "tokens":
            return requirement in self.meta.tables
        if requirement in ("scores", "active"):
            return self.meta.capture_level in ("scores", requirement)
        return bool(getattr(self, f"_has_{requirement}"))

    @cached_property
    def _has_weights(self) -> bool:
        return all(
            "gate_weights" in part.present
            and not (part.schema.field("gate_weights").nullable and part.null_count("gate_weights"))
            for part in self.parts("routing")
        )

    @cached_property
    def _has_confidence(self) -> bool:
        return self.has("tokens") and any(
            (part.arrays(["predicted_id"])["predicted_id"] >= 0).any() for part in self.parts("tokens")
        )

    @cached_property
    def _has_branches(self) -> bool:
        return bool((self.forwards.columns["branches"] > 1).any())


class StoredSegment(Segment):
    """A Segment whose tokens are read, and checked, when first asked for; padding is known without them."""

    _given: dict[str, Callable[[], Any]]

    def __init__(self, read_tokens: Callable[[], Any], read_padding: Callable[[], Any], **given: Any) -> None:
        # the base is frozen
        for name, value in {**given, "_given": {"tokens": read_tokens, "padding": read_padding}}.items():
            object.__setattr__(self, name, value)

    @cached_property
    def tokens(self) -> TokenTable | None:
        """The token rows; a TraceError with their first fault."""
        return self._given["tokens"]()

    @cached_property
    def padding(self) -> np.ndarray | None:
        """bool [T]: rows that are padding; None where there are none."""
        return self._given["padding"]()


def open_trace(path: str | Path) -> Trace:
    """Open a trace.

    Parameters
    ----------
    path : str or Path
        The trace's folder. A TraceError when there is no trace, or its ``meta.json`` is not valid, or of another version.
    """
    folder = Path(path)
    if not folder.exists():
        earlier = earlier_trace(folder)
        more = "" if earlier is None else f"; replacing it was cut short, and the one before is whole at {earlier}"
        raise TraceError(f"there is no trace at {folder}{more}.")
    return Trace(folder, read_meta(folder))
