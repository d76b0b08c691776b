"""Belady's clairvoyant cache: as lru, but the experts whose next use is farthest away are evicted first.

Source: L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966; the
bound for caches that load on demand. Experts that are never needed again go first, ties to the lowest layer and id. With
batches that cannot be evicted and layers of unequal bytes it is a bound in practice, not a proven one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from simulator.budget import Budgeted
from simulator.caching.demand import capacity_and_sizes, demand_placement
from simulator.caching.heap import Ranked, Rule, empty, serve
from simulator.policy import ExpertStream, Geometry, Placement
from tracer.jit import njit
from tracer.trace import ForwardTable

NEVER = np.iinfo(np.uint32).max


@dataclass(frozen=True)
class Belady(Budgeted):
    """Load on demand, evict what is needed again last (two passes over the trace).

    Parameters
    ----------
    scope : str
        "layer": each layer has a cache of its own, counted in experts; "global": one cache over all layers, in bytes.
    """

    scope: Literal["layer", "global"] = "layer"

    requires: ClassVar[frozenset[str]] = frozenset()
    passes: ClassVar[int] = 2
    notes: ClassVar[tuple[str, ...]] = ("belady knows the future: a bound, not something to run.",)

    def start(self, geometry: Geometry, layer: int | None) -> Any:
        """State of a run that needs nothing."""
        return self.fit((), geometry, layer)

    def fit(
        self, streams: Iterable[ExpertStream], geometry: Geometry, layer: int | None
    ) -> tuple[Ranked, int, np.ndarray, np.ndarray]:
        """An empty cache, its capacity, the sizes of experts, and for every lookup of the run the cell of the next one.

        Takes four bytes a lookup.
        """
        capacity, sizes = capacity_and_sizes(self, geometry, layer)
        keys = geometry.num_experts * len(sizes)
        last_entry = np.full(keys, -1, np.int64)
        cells = entries = 0
        room = np.zeros(0, np.uint32)
        for stream in streams:
            if entries + len(stream.experts) > len(room):
                room = np.concatenate((room, np.full(max(len(room), len(stream.experts)), NEVER, np.uint32)))
            several = geometry.num_experts if layer is None else 0
            _note_next(stream.offsets, stream.experts, stream.cell_layer, several, cells, entries, last_entry, room)
            cells += len(stream.cell_forward)
            entries += len(stream.experts)
        return empty(keys), capacity, sizes, room[:entries]

    def place(
        self, stream: ExpertStream, forwards: ForwardTable, geometry: Geometry, state: Any
    ) -> tuple[Placement, Any]:
        """Serve the cells in order; each is one batch."""
        cache, (capacity, sizes, next_use) = Ranked(*(a.copy() for a in state[0])), state[1:]
        keys, number = len(cache.inside), len(stream.experts)
        if len(next_use) < number:
            raise ValueError(f"The state knows the next use of {len(next_use)} lookups, the stream has {number}.")
        rule = Rule(of_use=0, of_lookup=0, of_rank=-keys, of_key=1, grows=False, forget=False)
        placement = demand_placement(serve, stream, sizes, next_use[:number], rule, 0, capacity, cache)
        return placement, (cache, capacity, sizes, next_use[number:])


@njit
def _note_next(offsets, experts, cell_layer, several, cells, entries, last_entry, next_use):
    for c in range(len(offsets) - 1):
        first = np.uint64(cell_layer[c] * several)
        for i in range(offsets[c], offsets[c + 1]):
            key = first + np.uint64(experts[i])
            if last_entry[key] >= 0:
                next_use[last_entry[key]] = cells + c
            last_entry[key] = entries + i
