"""The most used experts of the whole run stay on the GPU; a miss runs on the CPU and nothing ever moves.

Source: Fiddler (arXiv 2402.07033), placement by popularity, as arXiv 2605.20179 (TIDE) uses it: static, every miss on the CPU.
Fiddler itself counts popularity on a calibration set; here it is counted on the replayed run, so this is its best case.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from simulator.budget import Budgeted
from simulator.caching.placement import fixed
from simulator.policy import ExpertStream, Geometry, Placement
from tracer.trace import ForwardTable


@dataclass(frozen=True)
class Static(Budgeted):
    """The experts of most tokens over the run live on the GPU (two passes over the trace)."""

    requires: ClassVar[frozenset[str]] = frozenset()
    passes: ClassVar[int] = 2
    scope: ClassVar[str] = "layer"
    ordered: ClassVar[bool] = False
    notes: ClassVar[tuple[str, ...]] = ("static knows the popularity of the replayed run itself: its best case.",)

    def start(self, geometry: Geometry, layer: int | None) -> np.ndarray:
        """bool [E]: the first experts by index, where nothing is known of the run."""
        return np.arange(geometry.num_experts) < self.experts_per_layer(geometry, layer or 0)

    def fit(self, streams: Iterable[ExpertStream], geometry: Geometry, layer: int | None) -> np.ndarray:
        """bool [E]: the B experts of most tokens over all streams, ties to the lowest id."""
        load = np.zeros(geometry.num_experts, np.int64)
        for stream in streams:
            np.add.at(load, stream.experts, stream.tokens)
        resident = np.zeros(geometry.num_experts, bool)
        resident[np.argsort(-load, kind="stable")[: self.experts_per_layer(geometry, layer or 0)]] = True
        return resident

    def place(
        self, stream: ExpertStream, forwards: ForwardTable, geometry: Geometry, state: Any
    ) -> tuple[Placement, Any]:
        """Residents hit and run on the GPU, the others on the CPU."""
        return fixed(stream, state), state
