"""Least recently used: a missing expert is fetched and runs on the GPU; after the batch the experts unused longest are evicted.

Source: Mixtral-Offload (arXiv 2312.17238), a cache of B experts a layer. Experts rank by their latest batch, then by their last
touch in it: a repeat only makes an expert more recent. What a batch leaves behind: ``caching/demand.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from simulator.caching.demand import DemandCache
from simulator.policy import ExpertStream, Geometry, Placement
from simulator.walk import Watcher
from tracer.jit import njit
from tracer.trace import ForwardTable


class Recency(NamedTuple):
    """Touches of keys (expert, or layer * E + expert) in a queue a cache, oldest first; of a key only the latest one counts."""

    queue: np.ndarray  # int64 [4 * keys], the key of each touch; one cache's queue after the other's
    latest: np.ndarray  # int64 [keys], where the key's latest touch is in its cache's queue
    inside: np.ndarray  # bool [keys]
    held: np.ndarray  # int64 [C, 4]: size held, experts held, first and end of the queue


@dataclass(frozen=True)
class Lru(DemandCache):
    """Load on demand, evict the least recently used."""

    passes: ClassVar[int] = 1

    def many(self) -> type[Watcher] | None:
        """What serves many budgets in one pass, where each layer has a cache of its own."""
        from simulator.caching.lru_curve import LruCurve

        return LruCurve if self.scope == "layer" and self.hold == "budget" else None

    def start(self, geometry: Geometry, layer: int | None) -> tuple[Recency, np.ndarray, np.ndarray]:
        """Empty caches, their capacities in experts (scope "layer") or bytes, and the sizes of experts likewise."""
        capacity, sizes = self.capacity_and_sizes(geometry, layer)
        keys, caches = geometry.num_experts * len(sizes), len(capacity)
        cache = Recency(
            queue=np.zeros(4 * keys, np.int64),
            latest=np.full(keys, -1, np.int64),
            inside=np.zeros(keys, bool),
            held=np.zeros((caches, 4), np.int64),
        )
        return cache, capacity, sizes

    def place(
        self, stream: ExpertStream, forwards: ForwardTable, geometry: Geometry, state: Any
    ) -> tuple[Placement, Any]:
        """Serve the cells in order; each is one batch."""
        cache, capacity, sizes = Recency(*(a.copy() for a in state[0])), state[1], state[2]
        placement = self.served(_serve, stream, sizes, stream.last_touch, capacity, cache)
        return placement, (cache, capacity, sizes)


@njit
def _pack(queue, latest, base, first, end):
    """Move the touches that count to the start of the queue at ``base``; how many there are."""
    # Which touches count is as good as random to a branch predictor, so there is no branch, here and where keys are evicted.
    kept = np.uint64(0)
    for at in range(np.uint64(first), np.uint64(end)):
        key = np.uint64(queue[base + at])
        counts = np.uint64(latest[key]) == at
        queue[base + kept] = np.int64(key)
        latest[key] = np.int64(kept) if counts else latest[key]
        kept += np.uint64(counts)
    return np.int64(kept)


@njit
def _serve(offsets, experts, cell_layer, sizes, whole, last_touch, capacity, cache, hit, promoted, demoted, peak):
    queue, latest, inside, held = cache
    room = len(queue) // len(held)
    num_experts = np.uint64(len(inside) // len(sizes))
    for c in range(len(offsets) - 1):
        start, stop = offsets[c], offsets[c + 1]
        layer = cell_layer[c] if len(sizes) > 1 else 0
        own = layer if len(held) > 1 else 0
        base = np.uint64(own * room)
        first, size = np.uint64(layer) * num_experts, sizes[layer]
        oldest, end = held[own, 2], held[own, 3]
        # Every key counts once, so at least three quarters are free after packing.
        if end + stop - start > room:
            oldest, end = 0, _pack(queue, latest, base, oldest, end)
        missed = 0
        # Unsigned indices spare the test for negative ones.
        for i in range(np.uint64(start), np.uint64(stop)):
            key = first + np.uint64(experts[i])
            hit[i] = inside[key]
            missed += not inside[key]
            inside[key] = True
            at = np.uint64(end + np.int64(last_touch[i]))
            latest[key] = at
            queue[base + at] = key
        size_held = held[own, 0] + missed * size
        promoted[c] = missed
        before, number = held[own, 1], held[own, 1] + missed
        peak[0, c], peak[1, c] = number, size_held
        gone, newest = 0, end + stop - start
        # Where the queue ends before the batch, nothing it touched can be evicted.
        last = end if whole else newest
        while size_held > capacity[own] and oldest < last:
            key = np.uint64(queue[base + np.uint64(oldest)])
            counts = latest[key] == oldest
            inside[key] &= not counts
            size_held -= np.int64(counts) * (sizes[key // num_experts] if len(sizes) > 1 else size)
            gone += counts
            oldest += 1
        demoted[c] = gone
        if not whole:
            peak[0, c], peak[1, c] = max(before, number - gone), max(held[own, 0], size_held)
        held[own, 0], held[own, 1], held[own, 2], held[own, 3] = size_held, number - gone, oldest, newest
