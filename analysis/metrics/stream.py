"""One pass over a trace's segments: every family of figures sees each layer of each segment once.

A family keeps sums per bootstrap unit and nothing that grows with the trace. L = MoE layers, E = experts, W = 64-bit
words of an expert set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import polars as pl

from analysis.metrics.kernels import row_bits, shared_bits, shared_words
from analysis.metrics.load_kernels import block_loads, load_ranks, part_loads
from analysis.metrics.timeline import Timeline, Units, timeline
from tracer.trace import LayerTrace, Segment, TraceMeta


class Trace(Protocol):
    """What the figures need of a trace; :func:`tracer.parquet.open_trace` returns one."""

    @property
    def meta(self) -> TraceMeta: ...

    @property
    def requests(self) -> pl.DataFrame: ...

    def segments(self) -> Iterator[Segment]: ...


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a trace: ``layers`` as numbered in the model, E of the widest layer, K by layer, block length (0
    without)."""

    layers: tuple[int, ...]
    experts: int
    top_k: tuple[int, ...]
    block_length: int

    @property
    def words(self) -> int:
        return (self.experts + 63) // 64

    @property
    def labels(self) -> list[int | None]:
        """Layers, and None for all of them together."""
        return [*self.layers, None]


def shape_of(meta: TraceMeta) -> Shape:
    """Sizes from the trace's own description."""
    layers = tuple(meta.model.moe_layers)
    routers = [meta.routers.get(layer) for layer in layers]
    experts = [meta.model.num_experts if spec is None else spec.num_experts for spec in routers]
    top_k = [meta.model.top_k if spec is None else spec.top_k for spec in routers]
    return Shape(layers, max(experts, default=1), tuple(top_k), meta.block_length)


class LayerView:
    """One layer over one segment, with what several families need computed once and only when asked for."""

    def __init__(self, times: Timeline, index: int, routing: LayerTrace, shape: Shape) -> None:
        self.times = times
        self.index = index
        self.ids = np.ascontiguousarray(routing.expert_ids)
        self.count = routing.count
        self._shape = shape

    @cached_property
    def _sets(self) -> tuple[np.ndarray, np.ndarray]:
        return row_bits(self.ids, self.count, self.times.grid, self._shape.words)

    @property
    def bits(self) -> np.ndarray:
        """uint64 [P, S, W]: the K-sets of the block rows."""
        return self._sets[0]

    @property
    def size(self) -> np.ndarray:
        """int64 [P, S]: experts in each set, 0 where the row is absent or was not routed."""
        return self._sets[1]

    @cached_property
    def _words(self) -> np.ndarray | None:
        """uint64 [P, S]: the ids of each block row as one word, where they are eight bytes and no row uses fewer."""
        width = self.ids.shape[1]
        if self.ids.dtype != np.uint8 or width != 8 or not ((self.count == 0) | (self.count == width)).all():
            return None
        # Absent positions read the last row; their size of 0 keeps every sum from looking at it.
        return self.ids.view(np.uint64)[:, 0][self.times.grid] if len(self.ids) else None

    def shared(self, distance: int) -> np.ndarray:
        """uint8 [P - distance, S]: experts the sets of a position share, ``distance`` parts apart (whatever their
        blocks)."""
        parts, width = self.times.grid.shape
        shared = np.zeros((max(parts - distance, 0), width), np.uint8)
        if self._words is not None:
            shared_words(self._words[distance:].reshape(-1), self._words[:-distance].reshape(-1), shared.reshape(-1))
        else:
            bits = self.bits.reshape(parts, width, -1)
            later, earlier = (part.reshape(-1, bits.shape[2]) for part in (bits[distance:], bits[: parts - distance]))
            shared_bits(later, earlier[: len(later)], shared.reshape(-1))
        return shared

    @cached_property
    def block_loads(self) -> np.ndarray:
        """int64 [P, E]: block rows that use each expert."""
        return block_loads(self.ids, self.count, self.times.grid, self._shape.experts)

    @cached_property
    def forward_loads(self) -> np.ndarray:
        """int64 [P, E]: rows of the whole part, every branch, that use each expert."""
        if self.times.block_only:
            return self.block_loads
        return part_loads(self.ids, self.count, self.times.first, self.times.last, self._shape.experts)

    def loads(self, scope: str) -> np.ndarray:
        """Loads of a scope, "block" or "forward"."""
        return self.block_loads if scope == "block" else self.forward_loads

    @cached_property
    def _ranks(self) -> dict[str, np.ndarray]:
        return {}

    def ranks(self, scope: str) -> np.ndarray:
        """int64 [P, E]: place of each expert by load in its part, UNWANTED without load."""
        kept = "block" if self.times.block_only else scope
        if kept not in self._ranks:
            self._ranks[kept] = load_ranks(self.loads(scope))
        return self._ranks[kept]


class Family(Protocol):
    """A group of figures that are gathered together."""

    def begin(self, times: Timeline) -> None:
        """A segment starts."""
        ...

    def add(self, view: LayerView) -> None:
        """One layer of the segment; layers come in ascending order."""
        ...

    def end(self) -> None:
        """The segment's last layer has been seen."""
        ...


class Totals:
    """How much of the trace there is: the family every other reads its units and sizes from."""

    def __init__(self) -> None:
        self.segments = self.forwards = self.denoise = self.blocks = self.accepted = self.block_rows = 0
        self.decisions = self.forward_rows = 0
        self.has_tokens, self.accepted_known = False, True

    def begin(self, times: Timeline) -> None:
        self.segments += 1
        self.forwards += times.segment.forwards.num_forwards
        self.denoise += times.parts
        self.blocks += times.runs
        self.accepted += int(times.accepted.sum())
        self.accepted_known &= bool((times.accepted >= 0).all())
        self.block_rows += int((times.grid >= 0).sum())
        self.forward_rows += times.rows
        self.has_tokens |= times.segment.tokens is not None

    def add(self, view: LayerView) -> None:
        self.decisions += int(view.count.sum(dtype=np.int64))

    def end(self) -> None:
        pass


def sweep(
    trace: Trace, shape: Shape, units: Units, families: Sequence[Family], progress: Callable[[int], Any] | None
) -> None:
    """Show every layer of every segment to every family; ``progress`` hears how many model calls have been read."""
    places = {layer: index for index, layer in enumerate(shape.layers)}
    read = 0
    for segment in trace.segments():
        times = timeline(segment, shape.block_length, units)
        for family in families:
            family.begin(times)
        for layer in sorted(set(segment.layers) & set(places)):
            view = LayerView(times, places[layer], segment.layer(layer, with_weights=False), shape)
            for family in families:
                family.add(view)
        for family in families:
            family.end()
        read += segment.forwards.num_forwards
        if progress is not None:
            progress(read)


def mean_rows(totals: Totals, scope: str) -> int:
    """Rows of a denoise forward, rounded; at least 1."""
    rows = totals.block_rows if scope == "block" else totals.forward_rows
    return max(1, round(rows / totals.denoise)) if totals.denoise else 1
