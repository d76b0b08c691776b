"""A segment as one branch of a walk runs it: its forwards, and layer by layer the experts a routing policy selects.

Selections and streams are made when first asked for, so a watcher of the recorded rows alone costs neither.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any

import numpy as np

from simulator.policy import ACTIVE, SCORES, ExpertStream, Geometry, Selection, Trajectory
from simulator.registry import answer_of, name_of
from simulator.streams.stream import build_stream, merge_streams
from tracer.trace import LayerTrace, Segment, without_rows

BLIND = "Rows whose scores were not recorded keep their recorded experts where a policy chooses again."


@dataclass(slots=True)
class View:
    """A segment under an acceptance and a routing policy. F forwards, R rows, L layers.

    ``ordered``: whether the entries of streams need an order. ``kept`` holds its layers where a first pass kept them.
    ``blind``: a policy that chooses again met rows whose scores were not recorded.
    """

    segment: Segment
    trajectory: Trajectory
    forward_ids: np.ndarray  # uint32 [F]
    block_rows: np.ndarray | None  # bool [R], rows of the current block; None where that is every row
    geometry: Geometry
    ordered: bool
    kept: list[RoutedLayer] = field(default_factory=list)
    blind: bool = False
    _streams: dict[int, ExpertStream] = field(default_factory=dict)
    _merged: ExpertStream | None = None
    _lock: Any = field(default_factory=Lock)

    def merged(self) -> ExpertStream:
        """The streams of all layers as one, once every layer has made its own."""
        with self._lock:
            if self._merged is None:
                made = self._streams
                self._merged = merge_streams([made[at] for at in sorted(made)])
            return self._merged


class RoutedLayer:
    """A layer under one branch; ``layer`` is gathered to the trajectory's rows. Used by one thread at a time."""

    __slots__ = ("_selection", "_stream", "at", "layer", "routing", "view")

    def __init__(self, at: int, layer: LayerTrace, view: View, routing: Any) -> None:
        self.at, self.layer, self.view, self.routing = at, layer, view, routing
        self._selection: Selection | None = None
        self._stream: ExpertStream | None = None

    @property
    def selection(self) -> Selection:
        """What the routing policy selects; the recorded experts where the layer did not run."""
        if self._selection is None:
            ran = bool(self.layer.present.any())
            self._selection = self._select() if ran else Selection(self.layer.expert_ids, self.layer.count, None)
        return self._selection

    @property
    def stream(self) -> ExpertStream:
        """The distinct experts of each forward."""
        if self._stream is None:
            self._stream = build_stream(
                self.selection,
                self.view.trajectory.forwards.row_offsets,
                self.at,
                self.view.geometry.num_experts,
                self.layer.present,
                name_of(self.routing),
                ordered=self.view.ordered,
            )
            self.view._streams[self.at] = self._stream
        return self._stream

    def settled(self) -> RoutedLayer:
        """This layer with everything made, so that router scores, which nothing that watches reads, can be let go."""
        assert self.stream is not None
        self.layer = replace(self.layer, router_scores=None)
        return self

    def _select(self) -> Selection:
        """What a policy selects; rows whose scores were not recorded take no part and stay as they are (trace-format.md)."""
        layer, trajectory, geometry = self.layer, self.view.trajectory, self.view.geometry
        blind = unscored_rows(layer) if {SCORES, ACTIVE} & set(self.routing.requires) else None
        if blind is None:
            return answer_of(self.routing, "select", layer, trajectory, geometry)
        self.view.blind = True
        seen: Selection = answer_of(self.routing, "select", without_rows(layer, blind), trajectory, geometry)
        if trajectory.reused is not None:
            blind &= ~trajectory.reused
        ids, count, weights = seen.expert_ids.copy(), seen.count.copy(), seen.gate_weights
        ids[blind], count[blind] = layer.expert_ids[blind], layer.count[blind]
        if weights is not None and layer.gate_weights is not None:
            weights = weights.copy()
            weights[blind] = layer.gate_weights[blind]
        return Selection(ids, count, weights)


def unscored_rows(layer: LayerTrace) -> np.ndarray | None:
    """bool [R]: routed rows whose scores were not recorded; None where there are none."""
    if layer.router_scores is None or not len(layer.count):
        return None
    scores = layer.router_scores[np.arange(len(layer.count)), layer.expert_ids[:, 0]]
    blind = np.isnan(scores) & (layer.count > 0)
    return blind if blind.any() else None
