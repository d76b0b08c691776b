"""One layer over one segment, as the metrics look at it. L = MoE layers, E = experts, W = 64-bit words of an expert set."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from analysis.metrics.kernels.loads import block_loads, load_ranks, part_loads
from analysis.metrics.kernels.sets import row_bits, shared_bits, shared_words
from analysis.metrics.shared.timeline import Timeline
from tracer.trace import LayerTrace, TraceMeta


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
        self._ranks: dict[str, np.ndarray] = {}

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

    def ranks(self, scope: str) -> np.ndarray:
        """int64 [P, E]: place of each expert by load in its part, UNWANTED without load."""
        scope = "block" if self.times.block_only else scope
        if scope not in self._ranks:
            self._ranks[scope] = load_ranks(self.loads(scope))
        return self._ranks[scope]

    @cached_property
    def routed_rows(self) -> np.ndarray:
        """int64 [P]: routed rows of the whole part, every branch."""
        bounds = np.concatenate(([0], np.cumsum(self.count > 0)))
        return bounds[self.times.last] - bounds[self.times.first]
