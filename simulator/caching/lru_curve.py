"""LRU at many budgets in one pass over a trace, each equal to a replay of ``residency/lru.py`` of its own.

Source: stack distances of Mattson et al. (IBM Systems Journal 9(2), 1970), see ``stack_distance.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from simulator.caching.stack_distance import empty_stack, serve_stack
from simulator.caching.tide_grid import lookups_by_kind
from simulator.policy import Geometry
from simulator.streams.routed import RoutedLayer, View
from simulator.tallies import placement_tally as tally
from simulator.tallies.placement_tally import PlacementTally
from simulator.walk import Watcher
from tracer.schema import KINDS


class LruCurve(Watcher):
    """LRU under many policies with a cache a layer. L layers, C distinct capacities, ascending.

    Parameters
    ----------
    policies : sequence of simulator.residency.lru.Lru
        Of scope "layer", hold "budget" and any budgets.
    geometry : Geometry
        Of the trace.
    """

    ordered = True

    def __init__(self, policies: Sequence[Any], geometry: Geometry) -> None:
        self.policies, self.geometry = policies, geometry
        self._budgets = np.array([policy.experts_by_layer(geometry) for policy in policies], np.int64)
        self._capacities = np.unique(self._budgets)
        layers, number = len(geometry.layers), len(self._capacities)
        self._stacks = [empty_stack(geometry.num_experts) for _ in range(layers)]
        # By the smallest capacity that hits, and last what none holds: tokens and experts.
        self._counts = np.zeros((layers, len(KINDS), number + 1, 2), np.int64)
        self._lookups = np.zeros((layers, len(KINDS)), np.int64)

    def begin(self, view: View) -> None:
        """A segment starts."""
        self._kind = view.trajectory.forwards.forward_kind

    def layer(self, at: int, routed: RoutedLayer) -> None:
        """Serve a layer's cells."""
        stream = routed.stream
        kinds = self._kind[stream.cell_forward]
        batches = stream.offsets, stream.experts, stream.tokens, stream.last_touch, kinds
        serve_stack(*batches, self._capacities, self._stacks[at], self._counts[at])
        self._lookups[at] += lookups_by_kind(stream, kinds)

    def result(self) -> dict[Any, PlacementTally]:
        """A tally a policy."""
        hits = np.cumsum(self._counts[:, :, :-1], axis=2)
        return {policy: self._tally(policy, n, hits) for n, policy in enumerate(self.policies)}

    def _tally(self, policy: Any, number: int, hits: np.ndarray) -> PlacementTally:
        made = PlacementTally(self.geometry, policy.scope, staged=policy.staged)
        for at, capacity in enumerate(self._budgets[number]):
            column = int(np.searchsorted(self._capacities, capacity))
            of_layer, hit = made.totals[at], hits[at, :, column]
            missed = int(self._lookups[at].sum() - hit[:, 1].sum())
            held = min(capacity, self._stacks[at].now[1])
            of_layer[0, tally.GPU_TOKENS] = self._counts[at, ..., 0].sum()
            of_layer[0, tally.HIT_TOKENS] = hit[:, 0].sum()
            of_layer[0, tally.PROMOTIONS] = missed
            # What was fetched is there still or was evicted.
            of_layer[0, tally.DEMOTIONS] = missed - held
            of_layer[:, tally.HIT_EXPERTS] = hit[:, 1]
            of_layer[:, tally.LOOKUPS] = self._lookups[at]
            made.held[at] = held * made.sizes[at]
        return made
