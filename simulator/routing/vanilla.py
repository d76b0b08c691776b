"""The experts the model's own router chose. Source: the trace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from simulator.policy import Geometry, Selection, Trajectory
from simulator.selecting.reselect import recorded_selection
from tracer.trace import LayerTrace


@dataclass(frozen=True)
class Vanilla:
    """The recorded experts, untouched."""

    requires: ClassVar[frozenset[str]] = frozenset()

    def select(self, layer: LayerTrace, trajectory: Trajectory, geometry: Geometry) -> Selection:
        """Recorded ids and weights; rows the trajectory reuses compute nothing."""
        return recorded_selection(layer, trajectory)
