"""What a replay is asked to do: specs turned into policies and machines, and refused early where the trace lacks something."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from simulator.cost import CostModel
from simulator.policy import ACTIVE, BRANCHES, CONFIDENCE, SCORES, TOKENS, WEIGHTS, Geometry
from simulator.pricing import priced_on
from simulator.registry import describe, load_policy
from simulator.streams.gather import geometry_of
from simulator.streams.loads import loaded_geometry
from tracer.errors import UserError

LACKS = {
    WEIGHTS: ("gate weights", "capture or import it with gate weights"),
    ACTIVE: ("router scores of the experts in use", "capture it again with --level active or scores"),
    SCORES: ("router scores of all experts", "capture it again with --level scores"),
    CONFIDENCE: ("predictions and confidences of its tokens", "capture it from a decoding loop"),
    BRANCHES: ("speculative branches", "capture a run that speculates"),
    TOKENS: ("a tokens table", "capture it with one"),
}


@dataclass(frozen=True, slots=True)
class Machine:
    """A hardware spec; ``cost`` is None without one, or where the trace's model lacks what the formulas need."""

    spec: str | None
    cost: CostModel | None
    note: str | None


@dataclass(frozen=True, slots=True)
class Plan:
    """The policies of a replay. ``acceptance_of`` gives each routing policy its place in ``acceptances``.

    ``placed_on`` gives each residency policy asked for its place in ``residencies``, machine by machine: one that decides by a
    machine's speed is another policy on each.
    """

    geometry: Geometry
    acceptances: list[Any]
    acceptance_of: list[int]
    routings: list[Any]
    residencies: list[Any]
    machines: list[Machine]
    placed_on: list[tuple[int, ...]]

    @property
    def runs(self) -> list[tuple[int, int, int]]:
        """Places of routing, residency and machine of every run, routing outermost."""
        return [(r, p, m) for r in range(len(self.routings)) for own in self.placed_on for m, p in enumerate(own)]

    @property
    def with_scores(self) -> bool:
        """Whether any routing policy reads router scores."""
        return any(policy.requires & {ACTIVE, SCORES} for policy in self.routings)

    @property
    def costs(self) -> list[CostModel]:
        """The cost models of those machines that have one, in order."""
        return [machine.cost for machine in self.machines if machine.cost is not None]

    @property
    def two_passes(self) -> bool:
        """Whether any residency policy looks at the whole run first."""
        return any(policy.passes == 2 for policy in self.residencies)


def make_plan(
    trace: Any,
    routing: Sequence[Any],
    residency: Sequence[Any],
    hardware: str | Sequence[str] | None,
) -> Plan:
    """Load every policy and machine and hold their needs against what the trace has.

    Parameters
    ----------
    trace
        Anything with ``meta``, ``first_block`` and ``has(requirement)``.
    routing, residency : sequence
        Specs or policy objects, or one spec.
    hardware : str or sequence of str, optional
        Hardware specs, see :func:`simulator.pricing.priced_on`. Policies that decide by a machine's speed learn of it.

    Raises
    ------
    UserError
        A spec that does not load, or a policy that needs what the trace does not hold.
    """
    routings = [_policy("routing", spec) for spec in _several(routing)]
    residencies = [_policy("residency", spec) for spec in _several(residency)]
    if not routings or not residencies:
        raise UserError("A replay needs a routing and a residency policy; give at least one of each.")
    acceptances: list[Any] = []
    acceptance_of = []
    for policy in routings:
        own = policy.acceptance() if hasattr(policy, "acceptance") else None
        own = own if own is not None else load_policy("acceptance", "recorded")
        if own not in acceptances:
            acceptances.append(own)
        acceptance_of.append(acceptances.index(own))
    for axis, policies in (("routing", routings), ("acceptance", acceptances), ("residency", residencies)):
        for policy in policies:
            _check(axis, policy, trace)
    names = [hardware] if hardware is None or isinstance(hardware, str) else list(hardware)
    machines = [_machine(name, trace) for name in names or [None]]
    # A policy fitted on another trace shares its budget out by the loads of that one.
    split = any(getattr(p, "split", None) and not getattr(p, "fit_on", None) for p in residencies)
    geometry = loaded_geometry(trace) if split else geometry_of(trace)
    placed: list[Any] = []
    placed_on = []
    for policy in residencies:
        alike: list[Any] = []
        on = []
        for machine in machines:
            learned = hasattr(policy, "priced") and machine.cost is not None
            there = policy.priced(machine.cost, geometry) if learned else policy
            if there not in alike:
                alike.append(there)
            on.append(len(placed) + alike.index(there))
        placed += alike
        placed_on.append(tuple(on))
    return Plan(geometry, acceptances, acceptance_of, routings, placed, machines, placed_on)


def _several(specs: Any) -> Sequence[Any]:
    return [specs] if isinstance(specs, str) else specs


def _policy(axis: str, spec: Any) -> Any:
    return load_policy(axis, spec) if isinstance(spec, str) else spec


def _check(axis: str, policy: Any, trace: Any) -> None:
    for requirement in sorted(policy.requires):
        if not trace.has(requirement):
            what, remedy = LACKS.get(requirement, (requirement, "capture it again"))
            raise UserError(
                f"{axis} policy {describe(policy)['name']} needs {what}, which this trace does not hold "
                f"(captured at level {trace.meta.capture_level}); {remedy}."
            )

    if policy.requires & {ACTIVE, SCORES} and trace.meta.kind_routers:
        raise UserError(
            f"{axis} policy {describe(policy)['name']} chooses again by one rule a layer, and in this trace calls of different "
            "kinds go through routers of their own; use a policy that keeps the recorded experts."
        )


def _machine(spec: str | None, trace: Any) -> Machine:
    if spec is None:
        return Machine(None, None, None)
    return Machine(spec, *priced_on(spec, trace.meta.model))
