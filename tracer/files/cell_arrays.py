"""Cells of a segment in stored order, by (forward, layer), and binary Arrow columns of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from tracer.files.buffer import OpenSegment
from tracer.files.cells import split_planes
from tracer.files.changes import fill_unrouted, split_changes, split_changes_of_eight, split_weights
from tracer.files.links import Links


class Layout(NamedTuple):
    """Cells in stored order: M cells of L layers in F calls, S rows in all.

    ``call`` counts calls of the segment, ``number`` layers of ``layers``; ``starts`` is where a cell's rows begin among all
    cells' rows; ``cell_of`` is -1 where a call lacks a layer.
    """

    layers: np.ndarray  # int64 [L], ascending
    call: np.ndarray  # int64 [M]
    number: np.ndarray  # int64 [M]
    rows: np.ndarray  # int64 [M]
    starts: np.ndarray  # int64 [M + 1]
    cell_of: np.ndarray  # int64 [L, F]
    row_offsets: np.ndarray  # int64 [F + 1], token rows of the calls

    @property
    def layer(self) -> np.ndarray:
        """int64 [M]: index in the model of each cell's layer."""
        return self.layers[self.number]

    def flags(self, cells: Sequence[int]) -> np.ndarray:
        """bool [M]: which cells are listed."""
        found = np.zeros(len(self.call), np.bool_)
        found[np.array(cells, np.int64)] = True
        return found


def layout_of(segment: OpenSegment) -> Layout:
    """Where the cells of a segment go."""
    row_offsets = np.array([0, *segment.row_ends], np.int64)
    counts = [len(layers) for layers in segment.layers]
    # few calls differ in their layers
    layers = np.array(sorted({n for own in set(segment.layers) for n in own}), np.int64)
    numbers = {own: np.searchsorted(layers, own) for own in set(segment.layers)}
    number = np.concatenate([np.empty(0, np.int64), *(numbers[own] for own in segment.layers)])
    call = np.repeat(np.arange(len(counts)), counts)
    rows = np.diff(row_offsets)[call]
    cell_of = np.full((len(layers), len(counts)), -1, np.int64)
    cell_of[number, call] = np.arange(len(call))
    starts = np.concatenate(([0], np.cumsum(rows)))
    return Layout(layers, call, number, rows, starts, cell_of, row_offsets)


class Cells(NamedTuple):
    """Numbers of a binary column over all cells; cell i is ``numbers[bounds[i] : bounds[i + 1]]``."""

    numbers: np.ndarray
    bounds: np.ndarray  # int64 [M + 1]
    missing: np.ndarray | None  # bool [M], cells that are null
    encoding: str

    def column(self, low: int, high: int, wide: bool) -> pa.Array:
        """The column of cells ``low`` to ``high - 1``."""
        bounds = self.bounds[low : high + 1]
        missing = None if self.missing is None else self.missing[low:high]
        return binary_column(self.numbers[bounds[0] : bounds[-1]], bounds - bounds[0], missing, self.encoding, wide)


def encoded_rows(
    ids: np.ndarray,
    weights: np.ndarray,
    routed: np.ndarray,
    unweighted: np.ndarray,
    layout: Layout,
    links: Links,
    encodings: Mapping[str, str],
) -> dict[str, Cells]:
    """The columns of ids and weights as they are stored.

    Parameters
    ----------
    ids : uint8 or uint16 [S, K]
    weights : float16 [S, K] or [0, K]
    routed : bool [S] or [0]
        Empty when every row was routed.
    unweighted : bool [M]
        Cells without weights.
    layout : Layout
    links : Links
    encodings : dict
        As in ``meta.json``.

    ``ids`` and ``weights`` may be changed.
    """
    whole = layout.starts * ids.shape[1]
    cells = layout.starts, layout.call, layout.number, layout.cell_of, layout.row_offsets, links.bounds, links.runs
    encoding = encodings.get("expert_ids", "plain")
    if encoding == "changes":
        if len(routed):
            fill_unrouted(ids, routed, *cells)
        starts = np.concatenate(([0], np.cumsum((np.diff(whole) + 7) // 8)))
        changed, kept = np.zeros(int(starts[-1]), np.uint8), np.empty(ids.size, ids.dtype)
        bounds = np.zeros(len(whole), np.int64)
        if ids.shape[1] == 8 and ids.dtype == np.uint8:
            split_changes_of_eight(ids.reshape(-1).view(np.uint64), *cells, starts, changed, kept, bounds)
        else:
            split_changes(ids, *cells, starts, changed, kept, bounds)
        found = {"changed": Cells(changed, starts, None, "plain"), "expert_ids": Cells(kept, bounds, None, "plain")}
    else:
        found = {"expert_ids": Cells(ids.reshape(-1), whole, None, encoding)}
    encoding = encodings.get("gate_weights", "plain")
    columns = {"gate_weights": weights.reshape(-1)}
    if encoding == "changes":
        if len(routed) and len(weights):
            fill_unrouted(weights.view(np.uint16), routed, *cells)
        low, high = np.empty(weights.size, np.uint8), np.empty(weights.size, np.uint8)
        if weights.size:
            split_weights(weights.reshape(-1).view(np.uint16), *cells, low, high)
        columns, encoding = {"gate_weights": low, "gate_weights_high": high}, "plain"
    missing = None
    if unweighted.any():
        missing = unweighted
        if weights.size:
            there = np.repeat(~unweighted, np.diff(whole))
            columns = {name: numbers[there] for name, numbers in columns.items()}
        whole = np.concatenate(([0], np.cumsum(np.where(unweighted, 0, np.diff(whole)))))
    return {**found, **{name: Cells(numbers, whole, missing, encoding) for name, numbers in columns.items()}}


def cell_column(cells: Sequence[np.ndarray | None], encoding: str | None, wide: bool) -> pa.Array:
    """A binary column out of one array a cell; None is null."""
    missing = np.array([cell is None for cell in cells], np.bool_)
    sizes = np.array([0 if cell is None else cell.size for cell in cells], np.int64)
    there = [cell.reshape(-1) for cell in cells if cell is not None]
    numbers = np.concatenate(there) if there else np.empty(0, np.uint8)
    return binary_column(numbers, np.concatenate(([0], np.cumsum(sizes))), missing, encoding, wide)


def binary_column(
    numbers: np.ndarray, bounds: np.ndarray, missing: np.ndarray | None, encoding: str | None, wide: bool
) -> pa.Array:
    """A binary column over ``numbers``, copied only for byte planes; cell i is numbers ``bounds[i]`` to ``bounds[i + 1] - 1``.

    ``wide`` asks for offsets that count beyond 2 GiB.
    """
    content = np.ascontiguousarray(numbers).reshape(-1).view(np.uint8)
    offsets = bounds * numbers.itemsize
    if encoding == "byte_planes" and numbers.itemsize > 1:
        planes = np.empty_like(content)
        split_planes(content.view(np.uint16) if numbers.itemsize == 2 else content, offsets, planes, numbers.itemsize)
        content = planes
    validity = None
    if missing is not None and missing.any():
        validity = pa.py_buffer(np.packbits(~missing, bitorder="little"))
    buffers = [validity, pa.py_buffer(offsets.astype(np.int64 if wide else np.int32)), pa.py_buffer(content)]
    return pa.Array.from_buffers(pa.large_binary() if wide else pa.binary(), len(bounds) - 1, buffers)
