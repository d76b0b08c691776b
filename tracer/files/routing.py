"""Keys of the ``routing`` table: which cell belongs to which call and layer, held against ``forwards``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from threading import Lock

import numpy as np

from tracer.files.forwards import StoredForwards
from tracer.files.parts import PartFile, open_part
from tracer.schema import KINDS
from tracer.trace import TraceMeta


@dataclass(slots=True)
class KindLayers:
    """The layers that calls of each kind run: learned from the first call of a kind, demanded of the others."""

    _layers: dict[int, np.ndarray] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def of(self, kind: int, found: np.ndarray) -> np.ndarray:
        """Layers of the kind; ``found`` if this is its first call."""
        with self._lock:
            return self._layers.setdefault(kind, found)


@dataclass(frozen=True, slots=True)
class PartCells:
    """Cells of one routing part: ``call`` int64 (counted over the trace) and ``layer`` int64, [cells] each."""

    part: PartFile
    call: np.ndarray
    layer: np.ndarray


def read_cells(stored: StoredForwards, number: int) -> tuple[PartCells, np.ndarray, np.ndarray]:
    """Keys of a routing part as stored, with ``forward_id`` and ``num_tokens`` int64 [cells]; nothing compared yet."""
    part = open_part(stored.path, "routing", number)
    keys = part.arrays(["forward_id", "layer", "num_tokens"])
    forward = keys["forward_id"].astype(np.int64)
    first, last = stored.part_calls[number], stored.part_calls[number + 1]
    ids = stored.call_ids[first:last].astype(np.int64)
    call = first + np.searchsorted(ids, forward)
    return PartCells(part, call, keys["layer"].astype(np.int64)), forward, keys["num_tokens"].astype(np.int64)


def key_faults(
    stored: StoredForwards,
    number: int,
    meta: TraceMeta,
    kinds: KindLayers,
    cells: PartCells,
    forward: np.ndarray,
    num_tokens: np.ndarray,
) -> Iterator[str]:
    """Faults of a part's keys: order, calls, layers, row counts. The first makes the part unusable."""
    part, layer = cells.part, cells.layer
    first, last = int(stored.part_calls[number]), int(stored.part_calls[number + 1])
    ids = stored.call_ids[first:last].astype(np.int64)

    def at(wrong: np.ndarray, message: Callable[[int], str]) -> Iterator[str]:
        if wrong.any():
            row = int(np.argmax(wrong))
            yield str(part.fault(row, message(row) + "."))

    place = np.searchsorted(ids, forward)
    unknown = np.append(ids, -1)[place] != forward
    yield from at(unknown, lambda i: f"forward {forward[i]} is not in the forwards part of the segment")
    if unknown.any():
        return
    call = cells.call
    same = np.concatenate(([False], call[1:] == call[:-1]))
    unsorted = np.concatenate(([False], call[1:] < call[:-1])) | (same & np.concatenate(([False], np.diff(layer) <= 0)))
    yield from at(
        unsorted, lambda i: f"forward {forward[i]} layer {layer[i]} is out of order, rows go by (forward_id, layer)"
    )
    known = np.zeros(1 << 16, np.bool_)
    known[list(meta.model.moe_layers)] = True
    strange = ~known[layer]
    yield from at(strange, lambda i: f"layer {layer[i]} is not among model.moe_layers of meta.json")
    rows = np.diff(stored.row_offsets)[call]
    yield from at(
        num_tokens != rows,
        lambda i: f"num_tokens is {num_tokens[i]} where forwards has {rows[i]} rows for forward {forward[i]}",
    )
    if unsorted.any() or strange.any():
        return
    counts = np.bincount(call - first, minlength=last - first)
    begins = np.concatenate(([0], np.cumsum(counts)))
    kinds_of_calls = stored.call_kinds[first:last]
    for kind in np.unique(kinds_of_calls):
        calls = np.flatnonzero(kinds_of_calls == kind)
        for own in calls[counts[calls] == 0][:1]:
            yield str(part.fault(None, f"forward {ids[own]} has no rows."))
            return
        layers = kinds.of(int(kind), layer[begins[calls[0]] : begins[calls[0] + 1]].copy())
        odd = calls[counts[calls] != len(layers)]
        if len(odd) == 0:
            found = layer[begins[calls][:, None] + np.arange(len(layers))]
            odd = calls[(found != layers).any(axis=1)]
        for own in odd[:1]:
            message = f"forward {ids[own]} has not the layers that {KINDS[kind]} forwards have elsewhere."
            yield str(part.fault(int(begins[own]), message))
