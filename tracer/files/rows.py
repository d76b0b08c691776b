"""Rows of ``tokens``, ``routing`` and ``scores``: found by where they stand, held to the keys that must stand there.

Within a layer rows go by (forward_id, row) through all parts, so the n-th row of a layer belongs to the call and row that
``forwards`` says: positions lead to the rows, and the stored keys must agree. Row groups may hold one layer or many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any

import numpy as np

from tracer.errors import TraceError
from tracer.files.forwards import StoredForwards
from tracer.files.parts import ColumnCache, PartFile, part_names
from tracer.schema import KINDS

# pieces whose keys are known to be right, those of the layers of a segment or two
MOST_RIGHT = 8
# what stands for the layer in a table that has none
NO_LAYER = -1


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of one layer in one row group: their ``places`` in it, and which of the rows asked for is the ``first``.

    ``columns`` are those of the whole row group, as :func:`tracer.files.columns.decode` gives them.
    """

    part: PartFile
    group: int
    places: range | np.ndarray
    first: int
    columns: dict[str, Any]

    @property
    def index(self) -> slice | np.ndarray:
        """What picks the rows out of a column of the row group."""
        places = self.places
        return slice(places.start, places.stop) if isinstance(places, range) else places

    @property
    def rows(self) -> slice:
        """Where they stand among the rows asked for."""
        return slice(self.first, self.first + len(self.places))


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a layer over calls ``first`` to ``last - 1``; ``present`` bool [calls] says which of them have the layer."""

    table: RowTable
    layer: int
    first: int
    last: int
    present: np.ndarray
    pieces: list[Piece]

    @property
    def offsets(self) -> np.ndarray:
        """int64 [calls + 1]: rows of the layer before each of the calls, counted from the first."""
        offsets = self.table.offsets[self.layer][self.first : self.last + 1]
        return offsets - offsets[0]

    @property
    def count(self) -> int:
        """How many rows there are."""
        return int(self.offsets[-1])

    def fault(self, row: int, message: str) -> TraceError:
        """A fault of one of the rows."""
        piece = next(piece for piece in reversed(self.pieces) if piece.first <= row)
        if self.layer != NO_LAYER:
            call = int(np.searchsorted(self.offsets, row, "right")) - 1
            forward = self.table.stored.call_ids[self.first + call]
            message = f"forward {forward}, layer {self.layer}, row {row - self.offsets[call]}: {message}"
        place = int(piece.part.groups[piece.group]) + int(piece.places[row - piece.first])
        return piece.part.fault(place, f"{message}.")

    def numbers(self, name: str) -> np.ndarray:
        """A number column."""
        pieces = [piece.columns[name][piece.index] for piece in self.pieces]
        return np.concatenate(pieces) if pieces else np.empty(0, np.uint8)

    def fixed(self, name: str, dtype: Any, width: int) -> tuple[np.ndarray, np.ndarray]:
        """A fixed binary column [rows, width] as a copy, and which rows are null or lack the column; these hold anything."""
        values, nulls = np.empty((self.count, width), dtype), np.zeros(self.count, np.bool_)
        for piece in self.pieces:
            stored, null = piece.columns.get(name, (None, True))
            if stored is not None:
                values[piece.rows] = np.ascontiguousarray(stored[piece.index]).view(dtype)
            if null is not None:
                nulls[piece.rows] = null if null is True else null[piece.index]
        return values, nulls

    def binaries(self, name: str) -> Iterator[np.ndarray]:
        """The bytes, uint8, of a binary column row by row."""
        for piece in self.pieces:
            content, bounds = piece.columns[name]
            for place in piece.places:
                yield content[bounds[place] : bounds[place + 1]]

    def spread(self, rows: np.ndarray, empty: Any) -> np.ndarray:
        """Rows of the layer as token rows of the calls, ``empty`` where a call has not the layer."""
        if self.present.all():
            return rows
        own = np.repeat(self.present, np.diff(self.table.stored.row_offsets)[self.first : self.last])
        whole = np.full((len(own), *rows.shape[1:]), empty, rows.dtype)
        whole[own] = rows
        return whole


class RowTable:
    """Rows of a table, one a token row (one a call in ``scores``), by layer, in ``tokens`` all of :data:`NO_LAYER`.

    ``offsets`` int64 [F + 1] are the rows of each layer before each call, ``kinds`` bool [kinds] whether calls of a kind have
    the layer.

    Raises
    ------
    TraceError
        When a part cannot be opened, a layer is unknown or the layers have not the rows that ``forwards`` counts.
    """

    def __init__(self, table: str, stored: StoredForwards, open_part: Callable[[str, str], PartFile]) -> None:
        self.table, self.stored, self._open = table, stored, open_part
        self.names = part_names(stored.path, table)
        self._keys = ("forward_id",) if table == "scores" else ("forward_id", "row")
        self._cache = ColumnCache()
        self._right: set[tuple[Any, ...]] = set()
        self._lock = Lock()
        layers = (NO_LAYER,) if table == "tokens" else stored.meta.model.moe_layers
        # by layer: part and row group of each group that has rows of it, and the rows before it
        self._groups: dict[int, list[tuple[str, int]]] = {layer: [] for layer in layers}
        counts: dict[int, list[int]] = {layer: [0] for layer in layers}
        for name in self.names:
            part = self._open(table, name)
            for group, rows in enumerate(np.diff(part.groups).tolist()):
                for layer, count in self._layer_counts(part, group, rows).items():
                    self._groups[layer].append((name, group))
                    counts[layer].append(count)
        self._bounds = {layer: np.cumsum(counts[layer]) for layer in layers}
        call_rows = np.ones(stored.num_calls, np.int64) if table == "scores" else np.diff(stored.row_offsets)
        self.kinds: dict[int, np.ndarray] = {}
        self.offsets: dict[int, np.ndarray] = {}
        for layer in layers:
            self.kinds[layer] = self._kinds_of(layer, call_rows)
            counted = np.where(self.kinds[layer][stored.call_kinds], call_rows, 0)
            self.offsets[layer] = np.concatenate(([0], np.cumsum(counted)))
        self._check_totals()

    def _layer_counts(self, part: PartFile, group: int, rows: int) -> dict[int, int]:
        """Rows of each layer in a row group."""
        if self.table == "tokens" or not rows:
            return {NO_LAYER: rows} if rows else {}
        # held against the column itself when the rows are read
        hint = part.constant("layer", group)
        if hint in self._groups:
            return {int(hint): rows}
        layers = part.arrays(["layer"], group)["layer"]
        strange = ~np.isin(layers, list(self._groups))
        if strange.any():
            at = int(np.argmax(strange))
            message = f"layer {layers[at]} is not among model.moe_layers of meta.json."
            raise part.fault(int(part.groups[group]) + at, message)
        return dict(zip(*(values.tolist() for values in np.unique(layers, return_counts=True)), strict=True))

    def _kinds_of(self, layer: int, call_rows: np.ndarray) -> np.ndarray:
        """bool [kinds]: whether calls of a kind run the layer, learned from the first call of each."""
        if layer == NO_LAYER:
            return np.ones(len(KINDS), np.bool_)
        kinds = self.stored.call_kinds
        run = np.zeros(len(KINDS), np.bool_)
        for call, kind in sorted((int(np.argmax(kinds == kind)), kind) for kind in np.unique(kinds)):
            before = int(call_rows[:call][run[kinds[:call]]].sum())
            for piece in self._pieces(layer, before, min(before + 1, int(self._bounds[layer][-1])), ["forward_id"]):
                run[kind] = piece.columns["forward_id"][piece.places[0]] == self.stored.call_ids[call]
        return run

    def _check_totals(self) -> None:
        stored = self.stored
        for kind in np.unique(stored.call_kinds):
            if not any(kinds[kind] for kinds in self.kinds.values()):
                call = int(np.argmax(stored.call_kinds == kind))
                raise TraceError(f"{stored.path}: {self.table}: forward {stored.call_ids[call]} has no rows.")
        for layer, offsets in self.offsets.items():
            rows, wanted = int(self._bounds[layer][-1]), int(offsets[-1])
            # an unfinished trace may hold rows of a segment whose forwards were never written
            if rows == wanted or (rows > wanted and not stored.meta.complete):
                continue
            if layer == NO_LAYER:
                name = " ".join([self.table, *(f"up to {part.removesuffix('.parquet')}" for part in self.names[-1:])])
            else:
                name = f"{self.table}: layer {layer}"
                # the first row that is not the one that must stand there tells more
                for piece in self._pieces(layer, 0, min(rows, wanted), []):
                    self._check_keys(layer, piece, 0)
            raise TraceError(f"{stored.path}: {name} has {rows} rows where forwards counts {wanted}.")

    def read(self, layer: int, first: int, last: int, names: list[str]) -> Rows:
        """Rows of a layer over calls ``first`` to ``last - 1``; a TraceError names the first whose keys are wrong."""
        if layer not in self.offsets:
            known = ", ".join(map(str, self.stored.meta.model.moe_layers))
            raise TraceError(f"layer {layer} is not an MoE layer of the trace, which has {known}.")
        low, high = int(self.offsets[layer][first]), int(self.offsets[layer][last])
        pieces = list(self._pieces(layer, low, high, names))
        for piece in pieces:
            self._check_keys(layer, piece, low)
        return Rows(self, layer, first, last, self.kinds[layer][self.stored.call_kinds[first:last]], pieces)

    def _pieces(self, layer: int, low: int, high: int, names: list[str]) -> Iterator[Piece]:
        """Rows ``low`` to ``high - 1`` of a layer, by row group, with columns ``names``."""
        bounds = self._bounds[layer]
        begin = int(np.searchsorted(bounds, low, "right")) - 1
        for number in range(begin, int(np.searchsorted(bounds, high, "left")) if low < high else begin):
            name, group = self._groups[layer][number]
            start, end = bounds[number : number + 2].tolist()
            part = self._open(self.table, name)
            places = self._places(part, group, layer, end - start)[max(low, start) - start : min(high, end) - start]
            yield Piece(part, group, places, max(low, start) - low, self._columns(part, group, names, len(places)))

    def _places(self, part: PartFile, group: int, layer: int, count: int) -> range | np.ndarray:
        """Where the rows of a layer, ``count`` of them, stand in a row group."""
        whole = range(int(np.diff(part.groups)[group]))
        # a sealed footer has said already which layer it is
        if layer == NO_LAYER or (part.sealed and count == len(whole)):
            return whole
        layers = self._columns(part, group, ["layer"], 0)["layer"]
        places = np.flatnonzero(layers == layer)
        if len(places) != count:
            at = int(np.argmax(layers != layer))
            message = f"layer is {layers[at]} where its row group's footer says {layer}."
            raise part.fault(int(part.groups[group]) + at, message)
        return whole if count == len(whole) else places

    def _columns(self, part: PartFile, group: int, names: Sequence[str], wanted: int) -> dict[str, Any]:
        """Columns of a whole row group, those that the part has; kept for the next piece unless all its rows are wanted now."""
        names = [name for name in names if name in part.present or self.table == "tokens"]
        if wanted == np.diff(part.groups)[group]:
            return part.arrays(names, group) if names else {}
        columns: dict[str, Any] = {}
        for name in names:
            # keys repeat from layer to layer, down to the bytes on disk
            stored = part.stored(name, group) if name in self._keys else None
            columns |= self._cache.get(stored or (part.name, group, name), partial(part.arrays, [name], group))
        return columns

    def _check_keys(self, layer: int, piece: Piece, low: int) -> None:
        """Raise the fault of the first key, forward_id or row, of a piece that is wrong; row 0 asked for is row ``low``.

        What was found right once, for another layer, is not looked at again.
        """
        part, places, begin = piece.part, piece.places, low + piece.first
        stored = tuple(part.stored(name, piece.group) for name in self._keys)
        right = (*stored, places, begin, self.kinds[layer].tobytes())
        known = isinstance(places, range) and None not in stored
        if known and right in self._right:
            return
        columns = self._columns(part, piece.group, self._keys, len(places))
        wrong = []
        for name, expected in zip(self._keys, self._expected(layer, begin, len(places)), strict=False):
            keys = columns[name][piece.index]
            if not np.array_equal(keys, expected):
                at = int(np.argmax(keys != expected))
                wrong.append((at, f"{name} is {keys[at]} and must be {expected[at]}"))
        if wrong:
            at, what = min(wrong)
            where = "" if layer == NO_LAYER else f" in layer {layer}, whose rows go by (forward_id, row)"
            raise part.fault(int(part.groups[piece.group]) + int(places[at]), f"{what}{where}.")
        if known:
            with self._lock:
                if len(self._right) >= MOST_RIGHT:
                    self._right.clear()
                self._right.add(right)

    def _expected(self, layer: int, begin: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """forward_id and row of ``count`` rows of a layer from row ``begin`` on."""
        offsets, rows = self.offsets[layer], np.arange(begin, begin + count)
        first, last = np.searchsorted(offsets, (begin, begin + count - 1), "right") - 1
        lengths = np.diff(np.clip(offsets[first : last + 2], begin, begin + count))
        return (
            np.repeat(self.stored.call_ids[first : last + 1], lengths),
            rows - np.repeat(offsets[first : last + 1], lengths),
        )
