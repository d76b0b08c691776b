"""Least frequently used: as lru, but the experts needed by the fewest batches so far are evicted first.

Source: BigMoeOnEdge's replay (github Helldez/BigMoeOnEdge): a use is one batch that needs the expert, uses are not forgotten
unless asked to be, ties go to the least recently used. What a batch leaves behind: ``caching/demand.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from simulator.caching.demand import DemandCache
from simulator.caching.heap import Ranked, empty, serve
from simulator.policy import ExpertStream, Geometry, Placement
from tracer.trace import ForwardTable


@dataclass(frozen=True)
class Lfu(DemandCache):
    """Load on demand, evict the least frequently used.

    Parameters
    ----------
    forget : bool
        Whether an evicted expert's uses are forgotten, as in the caches of libCacheSim (github 1a1a11a/libCacheSim).
    """

    forget: bool = False

    passes: ClassVar[int] = 1

    def start(self, geometry: Geometry, layer: int | None) -> tuple[Ranked, np.ndarray, np.ndarray, int]:
        """Empty caches, their capacities and the sizes of experts in the same unit, and the lookups so far."""
        capacity, sizes = self.capacity_and_sizes(geometry, layer)
        return empty(len(capacity), geometry.num_experts * len(sizes)), capacity, sizes, 0

    def place(
        self, stream: ExpertStream, forwards: ForwardTable, geometry: Geometry, state: Any
    ) -> tuple[Placement, Any]:
        """Serve the cells in order; each is one batch."""
        cache, (capacity, sizes, lookups) = Ranked(*(a.copy() for a in state[0])), state[1:]
        about = stream.last_touch, self.forget, lookups, capacity, cache
        placement = self.served(serve, stream, sizes, *about)
        return placement, (cache, capacity, sizes, lookups + len(stream.experts))
