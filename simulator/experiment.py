"""Runs as rows: specs turned into experiments (acceptance, routing, residency, machine), refused early.

Policies are frozen dataclasses and serve as keys: experiments with equal policies share what follows from them, so a list of
experiments is a tree, acceptance at its root and machines at its leaves (:func:`branches`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from simulator.budget import Budgeted
from simulator.cost import CostModel
from simulator.policy import ACTIVE, BRANCHES, CONFIDENCE, SCORES, TOKENS, WEIGHTS, Geometry
from simulator.pricing import kernel_band, priced_on
from simulator.registry import describe, load_policy, name_of
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
    """A hardware spec; ``cost`` is None without one, or where the trace's model lacks what the formulas need.

    ``band`` is the same machine with each kernel of :data:`simulator.presets.BAND`; empty where ``cost`` is None.
    """

    spec: str | None
    cost: CostModel | None = None
    note: str | None = None
    band: tuple[CostModel, ...] = ()

    @property
    def kernel(self) -> str | None:
        """Name of the kernel it prices GPU experts with."""
        return None if self.cost is None else self.cost.hardware.kernel.name


@dataclass(frozen=True, slots=True)
class Experiment:
    """One run to be made: a policy of each axis, and the machine that prices it."""

    acceptance: Any
    routing: Any
    residency: Any
    machine: Machine


Branch = tuple[Any, Any]
"""An acceptance and a routing policy: what a segment's streams of experts follow from."""


def branches(experiments: Iterable[Experiment]) -> dict[Branch, dict[Any, list[Machine]]]:
    """Experiments as a tree: residency policies of each branch, and the distinct machines of each, in the order met."""
    tree: dict[Branch, dict[Any, list[Machine]]] = {}
    for one in experiments:
        machines = tree.setdefault((one.acceptance, one.routing), {}).setdefault(one.residency, [])
        if one.machine not in machines:
            machines.append(one.machine)
    return tree


def make_experiments(
    trace: Any,
    routing: Sequence[Any],
    residency: Sequence[Any],
    hardware: str | Sequence[str] | None = None,
    acceptance: Any = None,
) -> tuple[Geometry, list[Experiment]]:
    """Load every policy and machine, hold their needs against what the trace has, and multiply them.

    Parameters
    ----------
    trace
        Anything with ``meta``, ``first_block`` and ``has(requirement)``.
    routing, residency : sequence
        Specs or policy objects, or one spec.
    hardware : str or sequence of str, optional
        Hardware specs, see :func:`simulator.pricing.priced_on`. Policies that decide by a machine's speed learn of it.
    acceptance : sequence, optional
        As ``routing``. Without, every routing policy has the acceptance policy it brings along, or the recorded forwards.

    Returns
    -------
    tuple
        The geometry, and the experiments, acceptance outermost, then routing, residency and hardware.

    Raises
    ------
    UserError
        A spec that does not load, policies that do not go together, or one that needs what the trace does not hold.
    """
    loaded = {
        axis: [load_policy(axis, spec) if isinstance(spec, str) else spec for spec in _several(specs)]
        for axis, specs in (("acceptance", acceptance or ()), ("routing", routing), ("residency", residency))
    }
    if not loaded["routing"] or not loaded["residency"]:
        raise UserError("A replay needs a routing and a residency policy; give at least one of each.")
    for axis, policies in loaded.items():
        for policy in policies:
            check_hashable(axis, policy)
    pairs = [(_accepted(asked, one), one) for asked in loaded["acceptance"] or [None] for one in loaded["routing"]]
    used = {"routing": loaded["routing"], "acceptance": [pair[0] for pair in pairs], "residency": loaded["residency"]}
    for axis, policies in used.items():
        for policy in policies:
            _check(axis, policy, trace)
    machines = [_machine(name, trace) for name in _several(hardware or ()) or [None]]
    # A policy fitted on another trace shares its budget out by the loads of that one.
    shared_out = any(getattr(p, "split", None) and not getattr(p, "fit_on", None) for p in loaded["residency"])
    geometry = loaded_geometry(trace) if shared_out else geometry_of(trace)
    made = [
        Experiment(one, other, _on(policy, machine, geometry), machine)
        for (one, other), policy, machine in product(pairs, loaded["residency"], machines)
    ]
    return geometry, made


def _several(specs: Any) -> Sequence[Any]:
    return [specs] if isinstance(specs, str) else specs


def check_hashable(axis: str, policy: Any) -> None:
    """Refuse a policy that cannot be a key, in a sentence."""
    try:
        hash(policy)
    except TypeError:
        name = name_of(policy)
        raise UserError(
            f"The {axis} policy {name} must be a frozen dataclass: write @dataclass(frozen=True)."
        ) from None


def _accepted(asked: Any, routing: Any) -> Any:
    """The acceptance policy of a routing policy: the one asked for, the one it brings along, or the recorded forwards."""
    brought = routing.acceptance() if hasattr(routing, "acceptance") else None
    if asked is None or asked == brought:
        return brought or load_policy("acceptance", "recorded")
    return routing.accepting(asked) if hasattr(routing, "accepting") else asked


def _on(residency: Any, machine: Machine, geometry: Geometry) -> Any:
    """A residency policy as it decides for a model on a machine."""
    residency = residency.settled(geometry) if isinstance(residency, Budgeted) else residency
    priced = hasattr(residency, "priced") and machine.cost is not None
    return residency.priced(machine.cost, geometry) if priced else residency


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
        return Machine(None)
    cost, note = priced_on(spec, trace.meta.model)
    return Machine(spec, cost, note, () if cost is None else kernel_band(cost))
