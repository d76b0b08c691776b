"""From tallies to runs: summaries put together, and the notes that say how far a figure may be trusted."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from simulator.budget import Budgeted
from simulator.cost import CostModel
from simulator.experiment import Branch, Experiment
from simulator.policy import Geometry
from simulator.registry import describe, name_of
from simulator.result import Run
from simulator.speedups import Speedups
from simulator.tallies.placement_tally import PlacementTally
from simulator.tallies.summary import RoutingTally

EXACT = "Exact: the recorded experts on the recorded forwards."
OPEN_LOOP = (
    "Estimate: exact on what was recorded of the routers, but open loop: other experts would change hidden states, and with "
    "them later routing and tokens, which a replay cannot see; nothing here measures accuracy."
)
SIMULATED = (
    "Estimate: the forwards are simulated from recorded ones, and open loop: other experts and other tokens would change "
    "hidden states, and with them later routing, which a replay cannot see; nothing here measures accuracy."
)
SPLIT = "The budget is shared out by the recorded loads of the replayed trace, which a server cannot know beforehand."
INTERVAL = "The interval unique_experts_ci95 (in the JSON and the files) is a normal approximation over requests."


def make_runs(
    geometry: Geometry,
    experiments: Sequence[Experiment],
    ran: Mapping[Any, tuple[bool, list[str]]],
    routed: Mapping[Branch, RoutingTally],
    placed: Mapping[tuple[Any, ...], PlacementTally],
) -> list[Run]:
    """The runs of experiments, in their order.

    Parameters
    ----------
    geometry, experiments
        What was replayed, without what was replayed along.
    ran : mapping
        Of each acceptance policy: whether any forward was not a recorded one, and what its trajectories say.
    routed, placed : mapping
        (acceptance, routing) and (acceptance, routing, residency) to their tallies, those replayed along too.
    """
    runs: list[Run] = []
    speedups = Speedups(geometry, routed, placed)
    summaries = {branch: tally.result() for branch, tally in routed.items()}
    for number, one in enumerate(experiments):
        branch = one.acceptance, one.routing
        simulated, trajectory_notes = ran[one.acceptance]
        tally, of_routing = placed[(*branch, one.residency)], summaries[branch]
        estimate, trust = trusted(one.routing, geometry, simulated)
        notes = [trust, *trajectory_notes]
        for policy in (one.routing, one.residency):
            notes += getattr(policy, "notes", ())
        notes += one.residency.notes_on(geometry) if hasattr(one.residency, "notes_on") else ()
        over_budget, of_budget = budget_notes(one.residency, geometry, tally.resident_bytes)
        notes += of_budget
        notes += [INTERVAL] if of_routing["unique_experts_ci95"] else []
        notes += [one.machine.note] if one.machine.note else []
        held = tally.resident_bytes + tally.staging_bytes
        notes += memory_notes(one.machine.cost, held) if one.machine.cost is not None else []
        compared, against = speedups.of(one)
        notes += against
        latency = tally.latency(one.machine.cost, routed[branch].all_accepted)
        runs.append(
            Run(
                run=number,
                acceptance=describe(one.acceptance),
                routing=describe(one.routing),
                residency=describe(one.residency),
                hardware=one.machine.spec,
                kernel=one.machine.kernel,
                summary={**of_routing, **tally.summary(of_routing["assignments"]), **latency, **compared},
                estimate=estimate,
                over_budget=over_budget,
                bounds=routed[branch].bounds(),
                notes=notes,
            )
        )
    return runs


def trusted(routing: Any, geometry: Geometry, simulated: bool) -> tuple[bool, str]:
    """Whether figures under a routing policy are estimates, and the note that says how far to trust them.

    Parameters
    ----------
    routing
        The policy.
    geometry : Geometry
        Of the replay.
    simulated : bool
        Whether any forward is not a recorded one.
    """
    other = name_of(routing) != "vanilla" or simulated
    estimate = other and not (hasattr(routing, "recorded_in") and routing.recorded_in(geometry))
    return estimate, SIMULATED if simulated else OPEN_LOOP if estimate else EXACT


def budget_notes(residency: Any, geometry: Geometry, resident_bytes: int) -> tuple[bool, list[str]]:
    """Whether a cache held more than its budget, and what there is to say of it: that, and what shared it out.

    Parameters
    ----------
    residency
        The policy.
    geometry : Geometry
        Of the replay.
    resident_bytes : int
        What it held at most.
    """
    limited = isinstance(residency, Budgeted) and residency.limited
    if not limited:
        return False, []
    known = residency.split is not None and getattr(residency, "fit_on", None) is None
    found = [SPLIT] if known else []
    if residency.scope == "global":
        allowed = residency.total_bytes(geometry)
    elif getattr(residency, "fit_on", None) is not None:
        return False, found
    else:
        sizes = (geometry.expert_bytes[layer] for layer in geometry.layers)
        allowed = sum(map(operator.mul, residency.experts_by_layer(geometry), sizes))
    device = residency.device_bytes
    empty = not allowed and device
    outgrown = getattr(residency, "on_demand", False) and resident_bytes > allowed
    name = name_of(residency) if empty or outgrown else ""
    if empty:
        found.append(
            f"A device of {device / 1e9:.4g} GB leaves {name} no room for experts after other weights"
            f"{', the staging slot' if residency.staged else ''} and the reserve."
        )
    if outgrown:
        found.append(
            f"Over budget: {name} held up to {resident_bytes / 1e6:.4g} MB, more than its budget of {allowed / 1e6:.4g} MB: "
            "under hold=batch all that a batch needs stays until the next one, so a budget below a batch's unique experts acts "
            "like a larger one."
        )
    return outgrown, found


def memory_notes(cost: CostModel, resident_bytes: int) -> list[str]:
    """What there is to say where the weights do not fit the machine's GPU.

    Parameters
    ----------
    cost : CostModel
        Of the machine and the model.
    resident_bytes : int
        Bytes of routed experts held at most, with the staging slot.
    """
    machine = cost.hardware
    if resident_bytes + cost.dense_bytes <= machine.gpu_memory_bytes:
        return []
    return [
        f"Does not fit: {resident_bytes / 1e9:.4g} GB of experts and {cost.dense_bytes / 1e9:.4g} GB of other weights are more "
        f"than the {machine.gpu_memory_bytes / 1e9:.4g} GB of {machine.name}; latency and speed are those of a GPU like it "
        "with room for them. vram gives a residency policy the budget that fits."
    ]
