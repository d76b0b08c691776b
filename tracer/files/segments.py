"""Segments of a stored trace: a range of calls with its tokens and routing, read when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Lock

import numpy as np

from tracer.errors import TraceError
from tracer.files.columns import CellColumn, Piece
from tracer.files.forwards import StoredForwards
from tracer.files.layers import SegmentCells, read_layer
from tracer.files.links import LINKED, Links, link_rows
from tracer.files.routing import KindLayers, PartCells, key_faults, read_cells
from tracer.files.tokens import read_tokens, token_faults, token_table
from tracer.schema import COMPANIONS
from tracer.trace import ForwardTable, LayerTrace, Segment, TokenTable, TraceMeta

CELL_COLUMNS = ("expert_ids", "gate_weights", *COMPANIONS.values(), "router_scores", "score_experts", "routed")
# decisions (row x layer x slot) and bytes of scores a segment holds at most where blocks allow a cut
SEGMENT_DECISIONS = 1 << 26
SEGMENT_SCORE_BYTES = 1 << 28


def segment_rows(meta: TraceMeta) -> int:
    """Token rows a segment may hold, so that a replay of it stays well under 1 GiB."""
    layers = len(meta.model.moe_layers)
    rows = SEGMENT_DECISIONS // (layers * meta.model.top_k)
    if meta.capture_level != "ids":
        rows = min(rows, SEGMENT_SCORE_BYTES // (4 * layers * meta.model.num_experts))
    return max(1, rows)


def parts_of(stored: StoredForwards, first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """Parts that hold calls ``first`` to ``last - 1``: part number and the range of those calls in it."""
    number = int(np.searchsorted(stored.part_calls, first, "right")) - 1
    while number < stored.num_parts and stored.part_calls[number] < last:
        low, high = max(first, int(stored.part_calls[number])), min(last, int(stored.part_calls[number + 1]))
        if low < high:
            yield number, low, high
        number += 1


def segment_tokens(stored: StoredForwards, first: int, last: int) -> TokenTable:
    """Token rows of calls ``first`` to ``last - 1``; a TraceError with the first fault."""
    pieces = []
    for number, low, high in parts_of(stored, first, last):
        part, row, columns = read_tokens(stored, number, low, high)
        for fault in token_faults(stored, low, high, part, row, columns):
            raise TraceError(fault)
        pieces.append(columns)
    return token_table(pieces)


def segment_cells(stored: StoredForwards, meta: TraceMeta, kinds: KindLayers, first: int, last: int) -> SegmentCells:
    """Routing cells of calls ``first`` to ``last - 1``, keys checked, contents not read yet."""
    linked = any(meta.encodings.get(name) == "changes" for name in COMPANIONS)
    lead_first = first
    pieces, calls, layers, groups = [], [], [], []
    cells_before = 0
    for number, low, high in parts_of(stored, first, last):
        cells, forward, num_tokens = read_cells(stored, number)
        for fault in key_faults(stored, number, meta, kinds, cells, forward, num_tokens):
            raise TraceError(fault)
        if linked:
            begins = _group_calls(cells)
            if low == first:
                # a row group is decoded from its beginning
                low = lead_first = int(begins[np.searchsorted(begins, low, "right") - 1])
            groups.append(begins[(begins >= low) & (begins < high)])
        begin, end = (int(n) for n in np.searchsorted(cells.call, (low, high)))
        pieces.append(Piece(cells.part, begin, end, cells_before))
        calls.append(cells.call[begin:end] - lead_first)
        layers.append(cells.layer[begin:end])
        cells_before += end - begin
    columns = {name: CellColumn(name, tuple(pieces), meta.encodings.get(name, "plain")) for name in CELL_COLUMNS}
    row_offsets = stored.row_offsets[lead_first : last + 1] - stored.row_offsets[lead_first]
    return SegmentCells(
        call=np.concatenate(calls),
        layer=np.concatenate(layers),
        row_offsets=row_offsets,
        forward_id=stored.call_ids[lead_first:last],
        columns=columns,
        meta=meta,
        lead=first - lead_first,
        links=_links(stored, lead_first, last, row_offsets, np.concatenate(groups)) if linked else None,
    )


def _group_calls(cells: PartCells) -> np.ndarray:
    """int64: the calls that the row groups of a part begin with; a TraceError where one begins inside a call."""
    begins = [begin for _, begin in cells.part.row_groups(0, cells.part.num_rows)]
    for row in begins[1:]:
        if cells.call[row] == cells.call[row - 1]:
            raise cells.part.fault(row, "a row group begins inside a forward, which encoding changes does not allow.")
    return cells.call[begins]


def _links(stored: StoredForwards, first: int, last: int, row_offsets: np.ndarray, groups: np.ndarray) -> Links:
    parts = slice(stored.call_parts[first], stored.call_parts[last])
    columns = {name: stored.columns[name][parts] for name in LINKED}
    group = groups[np.searchsorted(groups, np.arange(first, last), "right") - 1]
    call_parts = stored.call_parts[first : last + 1] - stored.call_parts[first]
    return link_rows(columns, call_parts, row_offsets[group - first])


class StoredSegment(Segment):
    """A Segment whose tokens are read, and checked, when first asked for: most figures need none."""

    _tokens: TokenTable | Callable[[], TokenTable] | None
    _lock: Lock

    def __init__(
        self,
        forwards: ForwardTable,
        tokens: TokenTable | Callable[[], TokenTable] | None,
        layers: tuple[int, ...],
        load: Callable[[int, bool], LayerTrace],
        load_ids: Callable[[int], LayerTrace] | None = None,
        following: Callable[[], Segment | None] | None = None,
    ) -> None:
        values = {"forwards": forwards, "layers": layers, "load": load, "load_ids": load_ids, "following": following}
        # the base is frozen
        for name, value in {**values, "_tokens": tokens, "_lock": Lock()}.items():
            object.__setattr__(self, name, value)

    @property
    def tokens(self) -> TokenTable | None:
        """The token rows; a TraceError with their first fault."""
        with self._lock:
            tokens = self._tokens() if callable(self._tokens) else self._tokens
            object.__setattr__(self, "_tokens", tokens)
        return tokens


def read_segment(stored: StoredForwards, meta: TraceMeta, kinds: KindLayers, first: int, last: int) -> Segment:
    """Calls ``first`` to ``last - 1`` as a Segment whose layers are read when asked for.

    Raises
    ------
    TraceError
        Here for faults of keys, from ``Segment.tokens`` and ``Segment.layer`` for faults of rows and cells.
    """
    cells = segment_cells(stored, meta, kinds, first, last)
    more = last < stored.num_calls
    return StoredSegment(
        forwards=stored.table(first, last),
        tokens=(lambda: segment_tokens(stored, first, last)) if "tokens" in meta.tables else None,
        layers=meta.model.moe_layers,
        load=lambda layer, with_scores: read_layer(cells, layer, True, with_scores),
        load_ids=lambda layer: read_layer(cells, layer, False, False),
        following=lambda: read_segment(stored, meta, kinds, last, last + 1) if more else None,
    )
