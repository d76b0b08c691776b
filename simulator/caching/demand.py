"""What caches that load on demand share: their capacity, their keys, and the placement of a stream they served.

Source: batch rules of BigMoeOnEdge's replay (github Helldez/BigMoeOnEdge): one lookup per distinct expert of a (forward,
layer), hits are those resident before the batch, eviction runs after the batch and never evicts what it touched.
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
    """

    scope: Literal["layer", "global"] = "layer"

    requires: ClassVar[frozenset[str]] = frozenset()
    on_demand: ClassVar[bool] = True
    together: ClassVar[bool] = True

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
            ``serve(offsets, experts, cell_layer, sizes, *arguments, hit, promoted, demoted, peak)``; a key is the expert, or
            layer * E + expert where there are several sizes, ``peak`` int64 [2, cells] takes number and size of those held.
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
        serve(stream.offsets, stream.experts, stream.cell_layer, sizes, *arguments, hit, promoted, demoted, counts[3:])
        return Placement(
            hit=hit,
            on_gpu=np.ones(len(hit), bool),
            promotions=promoted,
            demotions=demoted,
            copied_back=copied_back,
            resident=resident,
            resident_bytes=resident_bytes if self.scope == "global" else None,
        )
