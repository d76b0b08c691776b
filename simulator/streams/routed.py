"""A segment's layers under every routing policy: gathered, selected, built into streams, and kept where a trace is small."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from simulator.plan import Plan
from simulator.policy import ExpertStream, Selection, Trajectory
from simulator.registry import answer_of, describe
from simulator.streams.gather import check_trajectory, current_block_rows, gather_layer, recorded_layer
from simulator.streams.stream import build_stream, merge_streams
from tracer.trace import LayerTrace, Segment, without_rows

BLIND = "Rows whose scores were not recorded keep their recorded experts where a policy chooses again."


@dataclass(frozen=True, slots=True)
class View:
    """A segment as one acceptance policy runs it."""

    trajectory: Trajectory
    forward_ids: np.ndarray  # uint32 [F]
    block_rows: np.ndarray | None  # bool [R]


@dataclass(frozen=True, slots=True)
class RoutedLayer:
    """A layer under one routing policy; ``layer`` is gathered to its trajectory's rows."""

    layer: LayerTrace
    selection: Selection
    stream: ExpertStream


@dataclass(slots=True)
class RoutedSegment:
    """A segment, its views by acceptance policy, and where they are kept its layers, [L][routing policies]."""

    segment: Segment
    views: list[View]
    kept: list[list[RoutedLayer]] | None = None
    _merged: dict[int, ExpertStream] = field(default_factory=dict)

    def merged(self, routing: int) -> ExpertStream:
        """The kept layers' streams of a routing policy as one; may not be called from several threads at once."""
        if routing not in self._merged:
            self._merged[routing] = merge_streams([layer[routing].stream for layer in self.kept or ()])
        return self._merged[routing]


class Router:
    """Acceptance and routing policies of a replay, segment after segment."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.names = [describe(policy)["name"] for policy in plan.routings]
        # Seconds are added up in the order of entries, and another order rounds them otherwise.
        self.ordered = bool(plan.costs) or any(getattr(policy, "ordered", True) for policy in plan.residencies)
        self.next_id = [0] * len(plan.acceptances)
        # whether a policy met rows without scores
        self.blind = False

    def begin(self, segment: Segment) -> RoutedSegment:
        """Run the acceptance policies on a segment; simulated forwards are numbered on from the segment before."""
        geometry, views = self.plan.geometry, []
        for a, policy in enumerate(self.plan.acceptances):
            trajectory = policy.unroll(segment, geometry)
            check_trajectory(trajectory, segment, describe(policy)["name"])
            ids = trajectory.forwards.forward_id
            if not trajectory.recorded:
                ids = np.arange(self.next_id[a], self.next_id[a] + len(ids), dtype=np.uint32)
            self.next_id[a] += len(ids)
            views.append(View(trajectory, ids, current_block_rows(trajectory, geometry.block_length)))
        return RoutedSegment(segment, views)

    def layers(self, routed: RoutedSegment, at: int) -> Iterator[RoutedLayer]:
        """A layer under every routing policy in turn; ``at`` is an index into ``Geometry.layers``."""
        if routed.kept is not None:
            yield from routed.kept[at]
            return
        geometry, segment = self.plan.geometry, routed.segment
        recorded = recorded_layer(segment, at, geometry, self.plan.with_scores)
        gathered: dict[int, LayerTrace] = {}
        for r, policy in enumerate(self.plan.routings):
            a = self.plan.acceptance_of[r]
            trajectory = routed.views[a].trajectory
            if a not in gathered:
                gathered[a] = gather_layer(recorded, segment.forwards, trajectory)
            layer = gathered[a]
            if layer.present.any():
                selection = self._select(policy, layer, trajectory)
            else:
                selection = Selection(layer.expert_ids, layer.count, None)
            offsets = trajectory.forwards.row_offsets
            stream = build_stream(
                selection, offsets, at, geometry.num_experts, layer.present, self.names[r], ordered=self.ordered
            )
            yield RoutedLayer(layer, selection, stream)

    def _select(self, policy: Any, layer: LayerTrace, trajectory: Trajectory) -> Selection:
        """What a policy selects; rows whose scores were not recorded take no part and stay as they are (trace-format.md)."""
        blind = unscored_rows(layer) if {"scores", "active"} & set(policy.requires) else None
        if blind is None:
            return answer_of(policy, "select", layer, trajectory, self.plan.geometry)
        self.blind = True
        found: Selection = answer_of(policy, "select", without_rows(layer, blind), trajectory, self.plan.geometry)
        if trajectory.reused is not None:
            blind &= ~trajectory.reused
        ids, count, weights = found.expert_ids.copy(), found.count.copy(), found.gate_weights
        ids[blind], count[blind] = layer.expert_ids[blind], layer.count[blind]
        if weights is not None and layer.gate_weights is not None:
            weights = weights.copy()
            weights[blind] = layer.gate_weights[blind]
        return Selection(ids, count, weights)


def unscored_rows(layer: LayerTrace) -> np.ndarray | None:
    """bool [R]: routed rows whose scores were not recorded; None where there are none."""
    if layer.router_scores is None or not len(layer.count):
        return None
    own = layer.router_scores[np.arange(len(layer.count)), layer.expert_ids[:, 0]]
    blind = np.isnan(own) & (layer.count > 0)
    return blind if blind.any() else None
