"""Replay a trace under acceptance x routing x residency x hardware: experiments, one walk for all of them, and a result."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from simulator.cost import CostModel
from simulator.experiment import Branch, Experiment, Machine, branches, make_experiments
from simulator.policy import Geometry
from simulator.result import ReplayResult, forward_columns
from simulator.runs import make_runs
from simulator.speedups import replayed_along
from simulator.streams.routed import BLIND, View
from simulator.streams.spool import Spool
from simulator.tallies.placement_tally import PlacementTally
from simulator.tallies.placing import Placing
from simulator.tallies.summary import RoutingTally
from simulator.walk import Walk, Watcher


def replay(
    trace: Any,
    routing: Sequence[Any] = ("vanilla",),
    residency: Sequence[Any] = ("all_resident",),
    hardware: str | Sequence[str] | None = None,
    progress: Callable[[int, int | None], None] | None = None,
    *,
    acceptance: Sequence[Any] | None = None,
    keep_cells: bool = True,
    threads: int | None = None,
) -> ReplayResult:
    """Replay a trace under every routing policy x residency policy x machine, routing outermost.

    Parameters
    ----------
    trace
        An opened trace: ``meta`` (TraceMeta), ``first_block`` (request to block), ``segments()`` (Segment after Segment, as
        often as asked) and ``has(requirement)``.
    routing, residency : sequence
        Specs (``"tide:budget=64,refresh_interval=4"``) or policy objects.
    hardware : str or sequence of str, optional
        Preset names or TOML paths with their options, see :func:`simulator.pricing.priced_on`.
    progress : callable, optional
        ``progress(done, total)`` after every segment, in model calls; ``total`` is None where the trace does not know it.
    acceptance : sequence, optional
        Acceptance policies, multiplied likewise, outermost; by default the one a routing policy brings along, else the recorded
        forwards.
    keep_cells : bool
        Whether the result holds its table of cells; without, only summaries are left.
    threads : int, optional
        How many layers are served side by side at most; by default as many as the machine has processors.

    Raises
    ------
    UserError
        A spec that does not load, or a policy that needs what the trace does not hold.
    """
    geometry, experiments = make_experiments(trace, routing, residency, hardware, acceptance)
    return run_experiments(trace, geometry, experiments, progress, keep_cells, threads)


def run_experiments(
    trace: Any,
    geometry: Geometry,
    experiments: Sequence[Experiment],
    progress: Callable[[int, int | None], None] | None = None,
    keep_cells: bool = True,
    threads: int | None = None,
) -> ReplayResult:
    """Run any list of experiments in one walk; runs come in their order. Other arguments as of :func:`replay`.

    What they are compared with is replayed along, and is no run of the result.
    """
    walk, tables = Walk(trace, geometry, threads), Spool()
    tree = branches([*experiments, *replayed_along(experiments, geometry)])
    cell_keys: list[Hashable] = [(one.acceptance, one.routing, one.residency) for one in experiments]
    kept_cells = dict.fromkeys(cell_keys, tables) if keep_cells else None
    run_forwards: dict[Any, Forwards] = {}
    tallies: dict[Branch, RoutingTally] = {}
    placing: dict[Branch, list[Any]] = {}
    for branch, residencies in tree.items():
        if branch[0] not in run_forwards:
            notes = getattr(trace, "notes", ())
            run_forwards[branch[0]] = walk.watch(Forwards(branch[0], tables, notes), branch)
        tallies[branch] = walk.watch(RoutingTally(geometry), branch)
        placing[branch] = [
            walk.watch(watcher, branch)
            for watcher in _placing(branch, residencies, tallies[branch], geometry, kept_cells)
        ]
    walk.run(progress)
    placed: dict[tuple[Any, ...], PlacementTally] = {
        (*branch, policy): tally
        for branch, watchers in placing.items()
        for watcher in watchers
        for policy, tally in watcher.result().items()
    }
    ran = {acceptance: watcher.result() for acceptance, watcher in run_forwards.items()}
    if walk.blind:
        for _, notes in ran.values():
            notes.append(BLIND)
    first = next(iter(run_forwards.values()))
    return ReplayResult(
        trace=_told(trace, geometry, first),
        runs=make_runs(geometry, experiments, ran, tallies, placed),
        _spool=tables,
        _cell_keys=cell_keys if keep_cells else None,
        _forward_keys=[one.acceptance for one in experiments],
    )


def _placing(
    branch: Branch,
    residencies: dict[Any, list[Machine]],
    routed: RoutingTally,
    geometry: Geometry,
    tables: Mapping[Hashable, Spool] | None,
) -> Iterator[Any]:
    """What watches for the residency policies of a branch: one for many where that is all that is asked, else one each.

    ``tables``: where the cells go that are kept, by acceptance, routing and residency; None where no run keeps any.
    """
    together: dict[Any, list[Any]] = {}
    for policy, machines in residencies.items():
        many = one_pass(policy, machines) if tables is None else None
        if many is None:
            key = (*branch, policy)
            kept = None if tables is None or key not in tables else (tables[key], key)
            yield Placing(policy, geometry, cost_models(machines), routed, kept)
        else:
            together.setdefault(many, []).append(policy)
    for many, policies in together.items():
        yield many(policies, geometry)


def cost_models(machines: Sequence[Machine]) -> list[CostModel]:
    """What prices a placement on these machines, each once."""
    distinct: list[CostModel] = []
    for machine in machines:
        for cost in (machine.cost, *machine.band):
            if cost is not None and cost not in distinct:
                distinct.append(cost)
    return distinct


def one_pass(policy: Any, machines: Sequence[Machine]) -> Any:
    """The watcher that serves many settings of a policy in one pass; None without one, or where seconds are asked for."""
    priced = any(machine.cost is not None for machine in machines)
    return policy.many() if hasattr(policy, "many") and not priced else None


def _told(trace: Any, geometry: Geometry, forwards: Forwards) -> dict[str, Any]:
    """What was replayed."""
    meta = trace.meta
    return {
        "model": meta.model.id,
        "capture_level": meta.capture_level,
        "complete": meta.complete,
        **{key: meta.decoding.get(key) for key in ("loop", "block_length", "kv_cache")},
        "moe_layers": len(geometry.layers),
        "num_experts": geometry.num_experts,
        "top_k": geometry.top_k,
        "requests": len(forwards.requests),
        "forwards": forwards.recorded,
    }


class Forwards(Watcher):
    """The forwards an acceptance policy runs: their table, whether they are simulated, and what it has to say of them."""

    def __init__(self, acceptance: Any, tables: Spool, notes: Sequence[str]) -> None:
        self._acceptance, self._tables, self._notes = acceptance, tables, list(notes)
        self._simulated = False
        self.requests: set[int] = set()
        self.recorded = 0

    def begin(self, view: View) -> None:
        """Take in a segment's forwards."""
        trajectory = view.trajectory
        self.requests.update(np.unique(view.segment.forwards.request_id).tolist())
        self.recorded += view.segment.forwards.num_forwards
        self._simulated |= not trajectory.recorded
        self._notes += [note for note in trajectory.notes if note not in self._notes]
        self._tables.put(self._acceptance, forward_columns(view.forward_ids, trajectory))

    def result(self) -> tuple[bool, list[str]]:
        """Whether any forward is not a recorded one, and the notes."""
        return self._simulated, self._notes
