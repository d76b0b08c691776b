"""What caches that load on demand share: their capacity, their keys, and the placement of a stream they served.

A cell, one (forward, layer), is a batch with one lookup per distinct expert. Experts held before it hit; every other is fetched
once, in stream order. What is held after it is the cache's rule to say (``hold``):

* "budget": each missing expert passes through one staging slot, which all layers share and which lies outside the budget. At
  the cell's end the cache keeps, of what it held before or the cell needed, the first by rank, until the next does not fit the
  budget. So the budget is never exceeded, and one of 0 hits nothing.
* "batch": the batch rules of BigMoeOnEdge's replay (github Helldez/BigMoeOnEdge): missing experts are loaded into the cache,
  eviction runs after the batch and never evicts what it touched, so a batch larger than the budget stays whole until the next.

Example: LRU with a budget of 2, batches {a, b, c} and {a, d}, touched in this order. "budget" keeps {b, c}, fetches a again and
d, and keeps {a, d}: 5 fetches, 2 held at most. "batch" keeps {a, b, c}, fetches d, and keeps {a, d}: 4 fetches, 4 held at most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from simulator.budget import Budgeted
from simulator.policy import ExpertStream, Geometry, Placement


@dataclass(frozen=True)
class DemandCache(Budgeted):
    """The parameters and the part of a policy that all caches that load on demand have.

    Parameters
    ----------
    scope : str
        "layer": each layer has a cache of its own, counted in experts; "global": one cache over all layers, in bytes.
    hold : str
        "budget": what a cell leaves behind fits the budget; "batch": a cell's experts stay until the next one, so that a budget
        below a batch's unique experts acts like a larger one.
    """

    scope: Literal["layer", "global"] = "layer"
    hold: Literal["budget", "batch"] = "budget"

    requires: ClassVar[frozenset[str]] = frozenset()
    on_demand: ClassVar[bool] = True
    together: ClassVar[bool] = True

    @property
    def staged(self) -> bool:
        """Whether what is missing passes through a staging slot beside the budget."""
        return self.hold == "budget"

    def capacity_and_sizes(self, geometry: Geometry, layer: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Capacity of each cache, int64 [C], and the size of an expert of each layer they hold, int64 [layers].

        A layer's own cache counts experts (sizes 1): that of ``layer``, or every layer's where it is None. One cache that all
        layers share counts bytes.
        """
        if self.scope == "global":
            sizes = np.array([geometry.expert_bytes[one] for one in geometry.layers], np.int64)
            return np.array([self.total_bytes(geometry)], np.int64), sizes
        capacity = np.array(self.experts_by_layer(geometry), np.int64)[slice(None) if layer is None else [layer]]
        return capacity, np.ones(len(capacity), np.int64)

    def served(self, serve: Callable[..., None], stream: ExpertStream, sizes: np.ndarray, *arguments: Any) -> Placement:
        """Let a kernel serve a stream; everything runs on the GPU, and nothing is copied back (weights are read-only).

        Parameters
        ----------
        serve : callable
            ``serve(offsets, experts, cell_layer, sizes, whole, *arguments, hit, promoted, demoted, peak)``; a key is the
            expert, or layer * E + expert where there are several sizes, ``whole`` says that a batch stays whole, ``peak``
            int64 [2, cells] takes number and size of those held at most.
        stream : ExpertStream
            Of one layer, or of all where ``sizes`` has more than one.
        sizes : np.ndarray
            int64 [layers].
        arguments : Any
            Passed on.
        """
        cells = len(stream.cell_forward)
        hit = np.empty(len(stream.experts), bool)
        # One array cut up: small streams are many, one a segment, layer and budget.
        counts = np.zeros((5, cells), np.int64)
        promoted, demoted, copied_back, resident, resident_bytes = counts
        cell = stream.offsets, stream.experts, stream.cell_layer, sizes, self.hold == "batch"
        serve(*cell, *arguments, hit, promoted, demoted, counts[3:])
        return Placement(
            hit=hit,
            on_gpu=np.ones(len(hit), bool),
            promotions=promoted,
            demotions=demoted,
            copied_back=copied_back,
            resident=resident,
            resident_bytes=resident_bytes if self.scope == "global" else None,
        )
