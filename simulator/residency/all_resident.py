"""Every expert in fast memory: nothing misses, nothing moves. The upper bound of every chart.

Source: bound of arXiv 2605.20179 (TIDE), B = E.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from simulator.budget import Budgeted
from simulator.caching.placement import fixed
from simulator.policy import ExpertStream, Geometry, Placement
from tracer.errors import UserError
from tracer.trace import ForwardTable


@dataclass(frozen=True)
class AllResident(Budgeted):
    """All experts live on the GPU; with a budget it only checks that they fit."""

    requires: ClassVar[frozenset[str]] = frozenset()
    passes: ClassVar[int] = 1
    scope: ClassVar[str] = "layer"
    ordered: ClassVar[bool] = False

    def start(self, geometry: Geometry, layer: int | None) -> np.ndarray:
        """bool [E], all True.

        Raises
        ------
        UserError
            A budget is given and holds fewer than E experts.
        """
        experts = geometry.num_experts
        if self.limited and self.experts_per_layer(geometry, layer or 0) < experts:
            fits = self.experts_per_layer(geometry, layer or 0)
            raise UserError(
                f"all_resident needs all {experts} experts of a layer in fast memory and the budget holds {fits}; "
                "raise the budget, or take lru, tide or static."
            )
        return np.ones(experts, bool)

    def place(
        self, stream: ExpertStream, forwards: ForwardTable, geometry: Geometry, state: Any
    ) -> tuple[Placement, Any]:
        """Everything hits and runs on the GPU."""
        return fixed(stream, state), state
