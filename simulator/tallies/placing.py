"""A residency policy at work: a watcher that places every stream of its branch, and adds up what that does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from simulator.cost import CostModel
from simulator.policy import ExpertStream, Geometry
from simulator.registry import answer_of, name_of
from simulator.result import cell_columns
from simulator.streams.routed import RoutedLayer, View
from simulator.streams.spool import Spool
from simulator.tallies.placement_tally import PlacementTally
from simulator.tallies.summary import RoutingTally
from simulator.walk import SIDE_BY_SIDE, Watcher


class Placing(Watcher):
    """One policy on a branch.

    Parameters
    ----------
    policy
        The residency policy.
    geometry : Geometry
        Of the trace.
    costs : sequence of CostModel
        Of the machines that price it.
    routed : RoutingTally
        Of the same branch; it watches before this.
    tables : Spool, optional
        Where the cells go, under ``key``; without they are not kept.
    """

    def __init__(
        self,
        policy: Any,
        geometry: Geometry,
        costs: Sequence[CostModel],
        routed: RoutingTally,
        tables: tuple[Spool, Any] | None,
    ) -> None:
        self.policy, self.geometry, self.routed, self.tables = policy, geometry, routed, tables
        self.name = name_of(policy)
        self.passes = policy.passes
        # Seconds are added up in the order of entries, and another order rounds them otherwise.
        self.ordered = bool(costs) or getattr(policy, "ordered", True)
        self.tally = PlacementTally(geometry, policy.scope, costs, getattr(policy, "staged", False))
        # One state for all layers, or one each.
        self.together = policy.scope == "global"
        self._states: dict[int | None, Any] = {}

    def scopes(self, layers: int, slots: int) -> Sequence[int | None]:
        """All layers together where the policy has one cache, or can and they are too small for threads; else each."""
        self.together |= slots < SIDE_BY_SIDE and getattr(self.policy, "together", False)
        return [None] if self.together else range(layers)

    def prepare(self, at: int | None, streams: Iterable[ExpertStream]) -> None:
        """The policy's first state."""
        fits = self.policy.passes == 2
        state = self.policy.fit(streams, self.geometry, at) if fits else self.policy.start(self.geometry, at)
        self._states[at] = state

    def begin(self, view: View) -> None:
        """Make room for a segment."""
        self._view = view
        self.tally.begin(view.trajectory.forwards, self.tables is not None)

    def layer(self, at: int, routed: RoutedLayer) -> None:
        """Place a layer's stream; it is only made where all layers are placed together."""
        stream = routed.stream
        if not self.together:
            self._place(at, stream)

    def end(self) -> None:
        """Place all layers' streams as one where they go together; close the segment."""
        if self.together:
            self._place(None, self._view.merged())
        self.tally.end()
        if self.tables is not None and self.tally.cells is not None:
            spool, key = self.tables
            layers = self.geometry.layers
            spool.put(key, cell_columns(self._view.forward_ids, layers, self.routed.cells, self.tally.cells))

    def _place(self, at: int | None, stream: ExpertStream) -> None:
        asked = stream, self._view.trajectory.forwards, self.geometry, self._states[at]
        placement, self._states[at] = answer_of(self.policy, "place", *asked)
        self.tally.serve(stream, placement, self.name)

    def result(self) -> dict[Any, PlacementTally]:
        """The tally by policy."""
        return {self.policy: self.tally}
