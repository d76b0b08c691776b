"""Least frequently used: as lru, but the experts needed by the fewest batches so far are evicted first.

Source: BigMoeOnEdge's replay (github Helldez/BigMoeOnEdge): a use is one batch that needs the expert, uses are not forgotten
unless asked to be, ties go to the least recently used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from simulator.budget import Budgeted
from simulator.caching.demand import capacity_and_sizes, demand_placement
from simulator.caching.heap import Ranked, empty, serve
from simulator.policy import ExpertStream, Geometry, Placement
from tracer.trace import ForwardTable


@dataclass(frozen=True)
class Lfu(Budgeted):
    """Load on demand, evict the least frequently used.

    Parameters
    ----------
    scope : str
        "layer": each layer has a cache of its own, counted in experts; "global": one cache over all layers, in bytes.
    forget : bool
        Whether an evicted expert's uses are forgotten, as in the caches of libCacheSim (github 1a1a11a/libCacheSim).
    """

    scope: Literal["layer", "global"] = "layer"
    forget: bool = False

    requires: ClassVar[frozenset[str]] = frozenset()
    on_demand: ClassVar[bool] = True
    passes: ClassVar[int] = 1
    together: ClassVar[bool] = True

    def start(self, geometry: Geometry, layer: int | None) -> tuple[Ranked, np.ndarray, np.ndarray, int]:
        """Empty caches, their capacities and the sizes of experts in the same unit, and the lookups so far."""
        capacity, sizes = capacity_and_sizes(self, geometry, layer, self.scope == "global")
        return empty(len(capacity), geometry.num_experts * len(sizes)), capacity, sizes, 0

    def place(
        self, stream: ExpertStream, forwards: ForwardTable, geometry: Geometry, state: Any
    ) -> tuple[Placement, Any]:
        """Serve the cells in order; each is one batch."""
        cache, (capacity, sizes, lookups) = Ranked(*(a.copy() for a in state[0])), state[1:]
        about = stream.last_touch, self.forget, lookups, capacity, cache
        placement = demand_placement(serve, stream, self.scope == "global", sizes, *about)
        return placement, (cache, capacity, sizes, lookups + len(stream.experts))
