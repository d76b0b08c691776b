"""No expert in fast memory: every one runs on the CPU. The lower bound of every chart.

Source: bound of arXiv 2605.20179 (TIDE), B = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from simulator.budget import Budgeted
from simulator.caching.placement import fixed
from simulator.policy import ExpertStream, Geometry, Placement
from tracer.trace import ForwardTable


@dataclass(frozen=True)
class NoneResident(Budgeted):
    """No expert lives on the GPU, whatever the budget."""

    requires: ClassVar[frozenset[str]] = frozenset()
    passes: ClassVar[int] = 1
    scope: ClassVar[str] = "layer"
    ordered: ClassVar[bool] = False

    def start(self, geometry: Geometry, layer: int | None) -> np.ndarray:
        """bool [E], all False."""
        return np.zeros(geometry.num_experts, bool)

    def place(
        self, stream: ExpertStream, forwards: ForwardTable, geometry: Geometry, state: Any
    ) -> tuple[Placement, Any]:
        """Everything misses and runs on the CPU."""
        return fixed(stream, state), state
