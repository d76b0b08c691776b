"""Where the rows of each layer stand in the parts of ``routing`` (and of ``scores``), and whether their keys agree.

Within a layer rows go by (forward_id, row) through all parts, so the n-th row of a layer belongs to the call and row that
``forwards`` says: positions lead to the rows, and the stored keys must agree. Whatever the row groups hold, one layer or all,
a layer is found as runs of consecutive rows.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np

from tracer.errors import TraceError
from tracer.files.columns import COLUMNS, binaries, fixed, numbers
from tracer.files.forwards import StoredForwards
from tracer.files.parts import PartFile, part_names
from tracer.schema import KINDS

# decoded columns of row groups that hold several layers, kept for the layers to come
CACHE_BYTES = 256 << 20
# runs whose keys are known to be right, those of the layers of a segment or two
MOST_RIGHT = 8


@dataclass(frozen=True, slots=True)
class Run:
    """Rows of one layer in one row group: ``rows`` are their places in it, in order; ``first`` counts rows of the layer asked
    for."""

    part: PartFile
    group: int
    rows: slice | np.ndarray
    first: int
    count: int

    def place(self, row: int) -> int:
        """Row of the part that holds row ``row`` of those asked for."""
        own = row - self.first
        inside = self.rows.start + own if isinstance(self.rows, slice) else int(self.rows[own])
        return int(self.part.groups[self.group]) + inside


class LayerTable:
    """Rows of ``routing``, one a token row, or of ``scores``, one a call, by layer.

    Raises
    ------
    TraceError
        When a part cannot be opened, a layer is unknown or the layers have not the rows that ``forwards`` counts.
    """

    def __init__(self, table: str, stored: StoredForwards, open_part: Callable[[str, str], PartFile]) -> None:
        self.table, self._stored, self._open = table, stored, open_part
        self._names = part_names(stored.path, table)
        self._cache: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._cached_bytes = 0
        # keys found right: where they stand among the calls, and the arrays themselves, so that they stay what they are
        self._right: OrderedDict[tuple[Any, ...], tuple[np.ndarray, ...]] = OrderedDict()
        self._lock = Lock()
        call_rows = np.diff(stored.row_offsets) if table == "routing" else np.ones(stored.num_calls, np.int64)
        runs = self._find_runs()
        # by layer: part, row group, first row in the group, rows
        self._runs: dict[int, np.ndarray] = {}
        self._bounds: dict[int, np.ndarray] = {}
        # by layer: rows of the layer before each call, int64 [F + 1]; whether its calls of a kind have the layer
        self.offsets: dict[int, np.ndarray] = {}
        self.kinds: dict[int, np.ndarray] = {}
        for layer in stored.meta.model.moe_layers:
            own = runs[runs[:, 0] == layer, 1:]
            self._runs[layer] = own
            self._bounds[layer] = np.concatenate(([0], np.cumsum(own[:, 3])))
            self.kinds[layer] = self._kinds_of(layer, call_rows)
            counted = np.where(self.kinds[layer][stored.call_kinds], call_rows, 0)
            self.offsets[layer] = np.concatenate(([0], np.cumsum(counted)))
        self._check_totals()

    @property
    def names(self) -> list[str]:
        """Files of the table, in order."""
        return self._names

    def _find_runs(self) -> np.ndarray:
        """int64 [runs, 5]: layer, part, row group, first row in it and rows of every run."""
        known = set(self._stored.meta.model.moe_layers)
        found: list[np.ndarray] = [np.empty((0, 5), np.int64)]
        for number, name in enumerate(self._names):
            part = self._open(self.table, name)
            for group, rows in enumerate(np.diff(part.groups).tolist()):
                if rows == 0:
                    continue
                hint = part.constant("layer", group)
                if hint is not None and hint in known:
                    # held against the column itself when the rows are read
                    found.append(np.array([[hint, number, group, 0, rows]], np.int64))
                    continue
                layers = part.arrays(["layer"], group)["layer"].astype(np.int64)
                begins = np.flatnonzero(np.concatenate(([True], layers[1:] != layers[:-1])))
                strange = ~np.isin(layers[begins], list(known))
                if strange.any():
                    at = int(begins[np.argmax(strange)])
                    message = f"layer {layers[at]} is not among model.moe_layers of meta.json."
                    raise part.fault(int(part.groups[group]) + at, message)
                lengths = np.diff(np.append(begins, rows))
                same = np.full(len(begins), 1, np.int64)
                found.append(np.stack((layers[begins], same * number, same * group, begins, lengths), axis=1))
        return np.concatenate(found)

    def _kinds_of(self, layer: int, call_rows: np.ndarray) -> np.ndarray:
        """bool [kinds]: whether calls of a kind run the layer, learned from the first call of each."""
        kinds = self._stored.call_kinds
        found = np.zeros(len(KINDS), np.bool_)
        firsts = sorted((int(np.argmax(kinds == kind)), kind) for kind in np.unique(kinds))
        for call, kind in firsts:
            before = int(call_rows[:call][found[kinds[:call]]].sum())
            if before < self._bounds[layer][-1]:
                (run,) = self.runs(layer, before, before + 1)
                row = self._stored_keys(run, "forward_id")[run.rows]
                found[kind] = int(row[0]) == int(self._stored.call_ids[call])
        return found

    def _check_totals(self) -> None:
        stored = self._stored
        for kind in np.unique(stored.call_kinds):
            if not any(found[kind] for found in self.kinds.values()):
                call = int(np.argmax(stored.call_kinds == kind))
                raise TraceError(f"{stored.path}: {self.table}: forward {stored.call_ids[call]} has no rows.")
        for layer, offsets in self.offsets.items():
            found, wanted = int(self._bounds[layer][-1]), int(offsets[-1])
            if found == wanted or (found > wanted and not stored.meta.complete):
                continue
            fault = self._first_gap(layer)
            raise fault or TraceError(
                f"{stored.path}: {self.table}: layer {layer} has {found} rows where forwards counts {wanted}."
            )

    def _first_gap(self, layer: int) -> TraceError | None:
        """The first row of a layer that is not the one that must stand there."""
        total = min(int(self._bounds[layer][-1]), int(self.offsets[layer][-1]))
        for fault in self.key_faults(layer, self.runs(layer, 0, total)):
            return TraceError(fault)
        return None

    def runs(self, layer: int, low: int, high: int) -> list[Run]:
        """Where rows ``low`` to ``high - 1`` of a layer stand, joined by row group."""
        bounds, table = self._bounds[layer], self._runs[layer]
        if low >= high:
            return []
        one, other = int(np.searchsorted(bounds, low, "right")) - 1, int(np.searchsorted(bounds, high, "left"))
        own = table[one:other].copy()
        own[0, 2] += low - bounds[one]
        own[0, 3] -= low - bounds[one]
        own[-1, 3] -= bounds[other] - high
        edges = np.flatnonzero(np.diff(own[:, 0] << 32 | own[:, 1])) + 1
        found, first = [], 0
        for begin, end in itertools.pairwise([0, *edges.tolist(), len(own)]):
            number, group, start, count = own[begin].tolist()
            rows: slice | np.ndarray = slice(start, start + count)
            if end - begin > 1:
                starts, counts = own[begin:end, 2], own[begin:end, 3]
                count = int(counts.sum())
                rows = np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(count)
            found.append(Run(self._open(self.table, self._names[number]), group, rows, first, count))
            first += count
        return found

    def key_faults(self, layer: int, runs: list[Run], first: int = 0) -> Iterator[str]:
        """The first key, forward_id or row, of the runs (the layer's rows from ``first`` on) that is wrong."""
        names = ("forward_id", "row") if self.table == "routing" else ("forward_id",)
        for run in runs:
            begin = first + run.first
            found = [self._stored_keys(run, name) for name in names]
            place = (run.rows.start, run.rows.stop) if isinstance(run.rows, slice) else None
            seen = (*map(id, found), place, begin, run.count, self.kinds[layer].tobytes())
            if place is not None and seen in self._right:
                continue
            wrong: list[tuple[int, str]] = []
            for name, stored, expected in zip(names, found, self._expected(layer, begin, run.count), strict=False):
                own = stored[run.rows]
                if not np.array_equal(own, expected):
                    at = int(np.argmax(own != expected))
                    wrong.append((at, f"{name} is {own[at]} and must be {expected[at]}"))
            if wrong:
                at, what = min(wrong)
                where = f"in layer {layer}, whose rows go by (forward_id, row)"
                yield str(run.part.fault(run.place(run.first + at), f"{what} {where}."))
                return
            with self._lock:
                self._right[seen] = tuple(found)
                while len(self._right) > MOST_RIGHT:
                    self._right.popitem(last=False)

    def _expected(self, layer: int, begin: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """forward_id and row of ``count`` rows of a layer from row ``begin`` on."""
        offsets = self.offsets[layer]
        call = int(np.searchsorted(offsets, begin, "right")) - 1
        last = int(np.searchsorted(offsets, begin + count, "left"))
        rows = np.diff(offsets[call : last + 1])
        rows[0] -= begin - offsets[call]
        rows[-1] -= offsets[last] - begin - count
        starts = np.where(np.arange(call, last) == call, begin - offsets[call], 0)
        row = np.repeat(starts - (np.cumsum(rows) - rows), rows) + np.arange(count)
        return np.repeat(self._stored.call_ids[call:last], rows), row

    def _stored_keys(self, run: Run, name: str) -> np.ndarray:
        """A key of a whole row group.

        Keys repeat from layer to layer, down to the bytes on disk: what was decoded once is not decoded again.
        """
        stored = run.part.stored(name, run.group)
        kept = self._recall(stored) if stored is not None else None
        if kept is None:
            kept = run.part.arrays([name], run.group)[name]
            if stored is not None:
                self._keep(stored, kept)
        return kept

    def columns(self, run: Run, names: list[str], layer: int) -> dict[str, Any]:
        """Columns of a run's rows: fixed binaries as (uint8 [rows, width], nulls or None), ``count`` as numbers.

        ``experts`` and ``values`` come as lists of uint8 arrays. Missing columns are left out; the layer is held against
        ``layer``.
        """
        part = run.part
        # a sealed footer has said already which layer it is
        wanted = [name for name in names if name in part.present] + ([] if part.sealed else ["layer"])
        shared = not isinstance(run.rows, slice) or run.count < np.diff(part.groups)[run.group]
        found: dict[str, Any] = {}
        if shared:
            for name in wanted:
                key = (part.name, run.group, name)
                kept = self._recall(key)
                if kept is None:
                    kept = _decode(part, [name], run.group)[name]
                    self._keep(key, kept)
                found[name] = kept
        else:
            found = _decode(part, wanted, run.group)
        if "layer" in found:
            layers = found.pop("layer")[run.rows]
            if layers.min() != layer or layers.max() != layer:
                at = int(np.argmax(layers != layer))
                what = f"layer is {layers[at]} where its row group's footer says {layer}."
                raise part.fault(run.place(run.first + at), what)
        return {name: _taken(values, run.rows) for name, values in found.items()}

    def _recall(self, key: tuple[Any, ...]) -> Any:
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        return None

    def _keep(self, key: tuple[Any, ...], values: Any) -> None:
        with self._lock:
            if key in self._cache:
                return
            self._cache[key] = values
            self._cached_bytes += _size(values)
            while self._cached_bytes > CACHE_BYTES and len(self._cache) > 1:
                self._cached_bytes -= _size(self._cache.popitem(last=False)[1])


def _decode(part: PartFile, names: list[str], group: int) -> dict[str, Any]:
    table, first = part.read(names, group), int(part.groups[group])
    found: dict[str, Any] = {}
    for name in names:
        kind = COLUMNS[part.table][name].type
        if kind in part.widths:
            found[name] = fixed(part, name, table, first)
        elif kind == "binary":
            values = table.column(name)
            if values.null_count:
                raise part.fault(first + int(np.argmax(values.is_null())), f"{name} is null.")
            found[name] = binaries(values.combine_chunks())
        else:
            found[name] = numbers(part, name, table, first)
    return found


def _taken(values: Any, rows: slice | np.ndarray) -> Any:
    if not isinstance(values, tuple):
        return values[rows]
    data, other = values
    if data.ndim == 1:
        places = range(len(other) - 1)[rows] if isinstance(rows, slice) else rows.tolist()
        return [data[other[at] : other[at + 1]] for at in places]
    return data[rows], None if other is None else other[rows]


def _size(values: Any) -> int:
    pieces = values if isinstance(values, tuple) else (values,)
    return sum(piece.nbytes for piece in pieces if piece is not None)
