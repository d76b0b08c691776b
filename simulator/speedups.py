"""What a run is compared with, like with like: what must be replayed along for it, and the ratios.

Never across machines. A speed-up is against vanilla routing on the recorded forwards under the same residency policy, machine
and kernel; what residency adds is against the better of LRU and a static placement of the same bytes, under the same routing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from simulator.budget import Budgeted
from simulator.cost import CostModel
from simulator.experiment import Branch, Experiment
from simulator.policy import Geometry
from simulator.presets import BAND
from simulator.registry import load_policy
from simulator.residency.all_resident import AllResident
from simulator.residency.lru import Lru
from simulator.residency.static import Static
from simulator.tallies.placement_tally import PlacementTally
from simulator.tallies.summary import RoutingTally

ROUTING_NOTE = (
    "Speed-up: against vanilla routing on the recorded forwards under the same residency policy, machine and kernel; lowest to "
    f"highest over the kernels {' and '.join(BAND)}, placements as they are."
)
RESIDENCY_NOTE = (
    "Over lru and static: against the better of lru and static of the same bytes under the same routing; static knows the "
    "popularity of the replayed run itself, its best case."
)


def vanilla_of(one: Experiment) -> Experiment:
    """What an experiment's speed-up is against: the same but for routing and acceptance."""
    return replace(one, acceptance=load_policy("acceptance", "recorded"), routing=load_policy("routing", "vanilla"))


def rivals_of(one: Experiment, geometry: Geometry) -> list[Experiment]:
    """LRU and static with the budget of an experiment's residency policy; none where that has none, or holds everything."""
    policy = one.residency
    if not isinstance(policy, Budgeted) or not policy.limited or isinstance(policy, AllResident):
        return []
    budget = {field.name: getattr(policy, field.name) for field in fields(Budgeted)}
    if geometry.loads is None:
        # A policy fitted elsewhere shares its budget out by loads that these two do not know.
        budget["split"] = None
    machine = replace(one.machine, band=())
    return [replace(one, residency=kind(**budget), machine=machine) for kind in (Lru, Static)]


def replayed_along(experiments: Sequence[Experiment], geometry: Geometry) -> list[Experiment]:
    """What experiments that have a latency are compared with; some of it may be among them."""
    priced = [one for one in experiments if one.machine.cost is not None]
    return [other for one in priced for other in (vanilla_of(one), *rivals_of(one, geometry))]


class Speedups:
    """Ratios of the experiments of a walk. ``routed`` and ``placed`` as of :func:`simulator.runs.make_runs`."""

    def __init__(
        self,
        geometry: Geometry,
        routed: Mapping[Branch, RoutingTally],
        placed: Mapping[tuple[Any, ...], PlacementTally],
    ) -> None:
        self._geometry, self._routed, self._placed = geometry, routed, placed

    def of(self, one: Experiment) -> tuple[dict[str, Any], list[str]]:
        """``speedup``: value, and low and high over the kernels of the band; ``speedup_residency``; null without latencies.

        Beside them the notes that say what they are against.
        """
        machine = one.machine
        if machine.cost is None:
            return {"speedup": None, "speedup_residency": None}, []
        vanilla, rivals = vanilla_of(one), rivals_of(one, self._geometry)
        value, *band = (self._ratio(vanilla, one, cost) for cost in (machine.cost, *machine.band))
        known = [ratio for ratio in band if ratio is not None]
        against = [self._ratio(rival, one, machine.cost) for rival in rivals]
        ratios = {
            "speedup": None if value is None else {"value": value, "low": min(known), "high": max(known)},
            "speedup_residency": min((ratio for ratio in against if ratio is not None), default=None),
        }
        return ratios, [ROUTING_NOTE, *([RESIDENCY_NOTE] if rivals else [])]

    def _ratio(self, first: Experiment, other: Experiment, cost: CostModel) -> float | None:
        """Accepted tokens a second over the first's, or its latency over the other's where no token was accepted."""
        (seconds, tokens), (other_seconds, other_tokens) = (self._speed(one, cost) for one in (first, other))
        if not seconds or not other_seconds:
            return None
        return other_tokens / tokens if tokens and other_tokens else seconds / other_seconds

    def _speed(self, one: Experiment, cost: CostModel) -> tuple[float | None, float | None]:
        branch = one.acceptance, one.routing
        latency = self._placed[(*branch, one.residency)].latency(cost, self._routed[branch].all_accepted)
        return latency["latency_s"], latency["tokens_per_s"]
