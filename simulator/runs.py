"""From tallies to runs: summaries put together, speed-ups, and the notes that say how far a figure may be trusted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simulator.plan import Plan
from simulator.registry import describe
from simulator.result import Run
from simulator.tallies.placement_tally import PlacementTally
from simulator.tallies.summary import RoutingTally

EXACT = "Exact: the recorded experts on the recorded forwards."
OPEN_LOOP = (
    "Estimate: exact on the recorded router scores, but open loop: other experts would change hidden states, and with them "
    "later routing and tokens, which a replay cannot see; nothing here measures accuracy."
)
SIMULATED = (
    "Estimate: the forwards are simulated from recorded ones, and open loop: other experts and other tokens would change "
    "hidden states, and with them later routing, which a replay cannot see; nothing here measures accuracy."
)
SPLIT = "The budget is shared out by the loads of the replayed run, which a server cannot know beforehand."
INTERVAL = "unique_experts_ci95 is a normal approximation over requests."


def make_runs(
    plan: Plan,
    simulated: list[bool],
    trajectory_notes: list[list[str]],
    routed: list[RoutingTally],
    placed: Mapping[tuple[int, int], PlacementTally],
) -> list[Run]:
    """The runs of a product, routing outermost, then residency, then hardware.

    Parameters
    ----------
    plan : Plan
        The policies.
    simulated, trajectory_notes : list
        Of each acceptance policy: whether any forward was not a recorded one, and what its trajectories say.
    routed : list of RoutingTally
        Of each routing policy.
    placed : mapping
        (routing, residency) to its tally.
    """
    runs: list[Run] = []
    for r, routing in enumerate(plan.routings):
        a = plan.acceptance_of[r]
        of_routing, bounds = routed[r].summary(), routed[r].bounds()
        accepted = int(routed[r].accepted.sum())
        named = {
            "acceptance": describe(plan.acceptances[a]),
            "routing": describe(routing),
        }
        other = named["routing"]["name"] != "vanilla" or simulated[a]
        estimate = other and not (hasattr(routing, "recorded_in") and routing.recorded_in(plan.geometry))
        for p, residency in enumerate(plan.residencies):
            tally = placed[r, p]
            notes = [SIMULATED if simulated[a] else OPEN_LOOP if estimate else EXACT, *trajectory_notes[a]]
            for policy in (routing, residency):
                notes += getattr(policy, "notes", ())
            notes += [SPLIT] if getattr(residency, "split", None) else []
            notes += [INTERVAL] if of_routing["unique_experts_ci95"] else []
            cost = 0
            for machine in plan.machines:
                latency = tally.latency(cost if machine.cost is not None else None, accepted)
                cost += machine.cost is not None
                runs.append(
                    Run(
                        run=len(runs),
                        **named,
                        residency=describe(residency),
                        hardware=machine.spec,
                        summary={**of_routing, **tally.summary(of_routing["assignments"]), **latency},
                        estimate=estimate,
                        bounds=bounds,
                        notes=[*notes, *([machine.note] if machine.note else [])],
                    )
                )
    for run in runs:
        run.summary["speedup"] = speedup(runs[0].summary, run.summary)
    return runs


def speedup(first: Mapping[str, Any], other: Mapping[str, Any]) -> float | None:
    """Ratio of accepted tokens a second, or of latencies where no token was accepted; None where either has no latency.

    Parameters
    ----------
    first, other : mapping
        ``latency_s`` and ``tokens_per_s`` of the run to compare with, and of the other.
    """
    if not first.get("latency_s") or not other.get("latency_s"):
        return None
    if first.get("tokens_per_s") and other.get("tokens_per_s"):
        return other["tokens_per_s"] / first["tokens_per_s"]
    return first["latency_s"] / other["latency_s"]
