"""Cells of a segment in stored order, by (forward, layer), and binary Arrow columns of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from tracer.files.buffer import OpenSegment
from tracer.files.cells import split_planes


class Layout(NamedTuple):
    """Cells in stored order. ``call`` counts calls of the segment; ``starts`` [M + 1] is where a cell's rows begin among all
    cells' rows; ``order`` [M] gives each cell's place when cells are listed layer by layer, as segments keep them."""

    call: np.ndarray  # int64 [M]
    layer: np.ndarray  # int64 [M]
    rows: np.ndarray  # int64 [M]
    starts: np.ndarray  # int64 [M + 1]
    order: np.ndarray  # int64 [M]

    def listed(self, cells: Mapping[int, Sequence[Any]]) -> list[Any]:
        """Per-layer lists with one entry a cell, as one list in stored order; empty when the lists are."""
        flat = [cell for own in cells.values() for cell in own]
        return [flat[i] for i in self.order] if flat else []

    def objects(self, cells: Mapping[int, Mapping[int, Any]]) -> list[Any]:
        """What few cells have, by layer and call, as one list in stored order with None for the others."""
        if not any(cells.values()):
            return [None] * len(self.call)
        return [cells[layer].get(call) for layer, call in zip(self.layer.tolist(), self.call.tolist(), strict=True)]

    def flags(self, cells: Mapping[int, Sequence[int]]) -> np.ndarray:
        """bool [M]: cells whose call is in its layer's list."""
        found = np.zeros(len(self.call), np.bool_)
        for layer, calls in cells.items():
            if len(calls):
                found |= (self.layer == layer) & np.isin(self.call, calls)
        return found


def layout_of(segment: OpenSegment) -> Layout:
    """Where the cells of a segment go."""
    pieces = [np.array(own.calls, np.int64) for own in segment.layers.values()]
    call = np.concatenate(pieces) if pieces else np.empty(0, np.int64)
    layer = np.repeat(np.array(list(segment.layers), np.int64), [len(piece) for piece in pieces])
    order = np.lexsort((layer, call))
    rows = np.diff(np.array([0, *segment.row_ends], np.int64))[call[order]]
    return Layout(call[order], layer[order], rows, np.concatenate(([0], np.cumsum(rows))), order)


def cell_column(cells: Sequence[np.ndarray | None], encoding: str | None) -> pa.Array:
    """A binary column out of one array a cell; None is null."""
    missing = np.array([cell is None for cell in cells], np.bool_)
    sizes = np.array([0 if cell is None else cell.size for cell in cells], np.int64)
    there = [cell.reshape(-1) for cell in cells if cell is not None]
    numbers = np.concatenate(there) if there else np.empty(0, np.uint8)
    return binary_column(numbers, np.concatenate(([0], np.cumsum(sizes))), missing, encoding)


def binary_column(
    numbers: np.ndarray, bounds: np.ndarray, missing: np.ndarray | None, encoding: str | None
) -> pa.Array:
    """A binary column over ``numbers``, copied only to be encoded; cell i is numbers ``bounds[i]`` to ``bounds[i + 1] - 1``."""
    content = np.ascontiguousarray(numbers).reshape(-1).view(np.uint8)
    offsets = bounds * numbers.itemsize
    if encoding == "byte_planes" and numbers.itemsize > 1:
        planes = np.empty_like(content)
        split_planes(content.view(np.uint16) if numbers.itemsize == 2 else content, offsets, planes, numbers.itemsize)
        content = planes
    validity = None
    if missing is not None and missing.any():
        validity = pa.py_buffer(np.packbits(~missing, bitorder="little"))
    buffers = [validity, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(content)]
    return pa.Array.from_buffers(pa.binary(), len(bounds) - 1, buffers)
