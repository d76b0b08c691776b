"""Replay a trace under routing x residency x hardware: the only loop over segments and layers.

A segment's layers run side by side in threads; a routing policy's selection is made once and shared by all residencies; policy
states go from segment to segment, so memory does not grow with the trace except for the table of cells.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from simulator.plan import Plan, make_plan
from simulator.policy import ExpertStream, Selection, Trajectory
from simulator.registry import describe
from simulator.result import ReplayResult, cell_columns, forward_columns
from simulator.runs import make_runs
from simulator.streams.gather import absent_layer, check_trajectory, current_block_rows, gather_layer
from simulator.streams.spool import Spool, StreamSpool
from simulator.streams.stream import build_stream, merge_streams
from simulator.tallies.cells import RoutedCells
from simulator.tallies.placement_tally import PlacementTally
from simulator.tallies.summary import RoutingTally
from tracer.errors import UserError
from tracer.trace import LayerTrace, Segment

# A layer's router scores may take 64 MiB a segment and several copies while it is served.
MAX_THREADS, MAX_THREADS_WITH_SCORES = 16, 4


def replay(
    trace: Any,
    routing: Sequence[Any] = ("vanilla",),
    residency: Sequence[Any] = ("all_resident",),
    hardware: str | Sequence[str] | None = None,
    progress: Callable[[int, int | None], None] | None = None,
    *,
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
        Preset names or TOML paths with their options, see :func:`simulator.cost.priced_on`.
    progress : callable, optional
        ``progress(done, total)`` after every segment, in model calls; ``total`` is None where the trace does not know it.
    keep_cells : bool
        Whether the result holds its table of cells; without, only summaries are left.
    threads : int, optional
        How many layers are served side by side at most; by default as many as the machine has processors.

    Raises
    ------
    UserError
        A spec that does not load, or a policy that needs what the trace does not hold.
    """
    plan = make_plan(trace, routing, residency, hardware)
    if threads is not None and threads < 1:
        raise UserError(f"threads={threads} is no number of threads; give 1 or more.")
    cap = MAX_THREADS_WITH_SCORES if plan.with_scores else MAX_THREADS
    threads = max(1, min(threads or os.cpu_count() or 1, cap, len(plan.geometry.layers)))
    passes = 2 if plan.two_passes else 1
    calls = getattr(trace, "num_forwards", None)
    done = 0

    def count(segment: Segment) -> None:
        nonlocal done
        done += segment.forwards.num_forwards
        if progress is not None:
            progress(done, None if calls is None else passes * int(calls))

    with ThreadPoolExecutor(threads) as pool, closing(StreamSpool()) as spool:
        runner = _Runner(plan, pool, keep_cells)
        if plan.two_passes:
            for segment in trace.segments():
                runner.survey(segment, spool)
                count(segment)
        runner.start(spool)
        for segment in trace.segments():
            runner.serve(segment)
            count(segment)
    return runner.result(trace)


@dataclass(frozen=True, slots=True)
class _View:
    """A segment as one acceptance policy runs it."""

    trajectory: Trajectory
    forward_ids: np.ndarray  # uint32 [F]
    block_rows: np.ndarray | None  # bool [R]


class _Runner:
    """Policy states and tallies of a replay between segments."""

    def __init__(self, plan: Plan, pool: ThreadPoolExecutor, keep_cells: bool) -> None:
        geometry = plan.geometry
        self.plan, self.pool, self.keep_cells = plan, pool, keep_cells
        self.names = [describe(policy)["name"] for policy in plan.routings]
        self.pairs = [(r, p) for r in range(len(plan.routings)) for p in range(len(plan.residencies))]
        self.states: dict[tuple[int, int, int | None], Any] = {}
        self.routed = [RoutingTally(geometry) for _ in plan.routings]
        self.placed = {
            pair: PlacementTally(geometry, plan.residencies[pair[1]].scope, plan.costs) for pair in self.pairs
        }
        # Cells by (routing, residency), forwards by acceptance.
        self.tables = Spool()
        self.simulated = [False] * len(plan.acceptances)
        self.notes: list[list[str]] = [[] for _ in plan.acceptances]
        self.next_id = [0] * len(plan.acceptances)
        self.requests: set[int] = set()
        self.recorded_forwards = 0

    def _views(self, segment: Segment) -> list[_View]:
        views = []
        for a, policy in enumerate(self.plan.acceptances):
            trajectory = policy.unroll(segment, self.plan.geometry)
            check_trajectory(trajectory, segment, describe(policy)["name"])
            ids = trajectory.forwards.forward_id
            if not trajectory.recorded:
                ids = np.arange(self.next_id[a], self.next_id[a] + len(ids), dtype=np.uint32)
            views.append(_View(trajectory, ids, current_block_rows(trajectory, self.plan.geometry.block_length)))
        return views

    def _streams(
        self, segment: Segment, views: list[_View], at: int
    ) -> Iterator[tuple[int, LayerTrace, Selection, ExpertStream]]:
        """One layer under every routing policy: its number, the gathered layer, the selection and its stream."""
        geometry = self.plan.geometry
        number = geometry.layers[at]
        if number in segment.layers:
            recorded = segment.layer(number, self.plan.with_scores)
        else:
            recorded = absent_layer(number, segment.forwards, geometry.routers[number])
        gathered: dict[int, LayerTrace] = {}
        for r, policy in enumerate(self.plan.routings):
            a = self.plan.acceptance_of[r]
            trajectory = views[a].trajectory
            if a not in gathered:
                gathered[a] = gather_layer(recorded, segment.forwards, trajectory)
            layer = gathered[a]
            if layer.present.any():
                selection = policy.select(layer, trajectory, geometry)
            else:
                selection = Selection(layer.expert_ids, layer.count, None)
            offsets = trajectory.forwards.row_offsets
            stream = build_stream(selection, offsets, at, geometry.num_experts, layer.present, self.names[r])
            yield r, layer, selection, stream

    def _layers(self, job: Callable[[int], Any]) -> list[Any]:
        return list(self.pool.map(job, range(len(self.plan.geometry.layers))))

    def survey(self, segment: Segment, spool: StreamSpool) -> None:
        """First pass: put a segment's streams aside for policies that look at the whole run."""
        views = self._views(segment)

        def job(at: int) -> None:
            for r, _, _, stream in self._streams(segment, views, at):
                spool.put_stream((r, at), stream)

        self._layers(job)

    def start(self, spool: StreamSpool) -> None:
        """Initial states of every policy, in every layer or over all of them."""
        geometry = self.plan.geometry
        layers = range(len(geometry.layers))

        def streams(r: int, at: int | None) -> Iterable[ExpertStream]:
            if at is not None:
                return spool.streams((r, at))
            return map(merge_streams, zip(*(spool.streams((r, each)) for each in layers), strict=True))

        def job(key: tuple[int, int, int | None]) -> Any:
            r, p, at = key
            policy = self.plan.residencies[p]
            return policy.fit(streams(r, at), geometry, at) if policy.passes == 2 else policy.start(geometry, at)

        keys = [
            (r, p, at)
            for r, p in self.pairs
            for at in ((None,) if self.plan.residencies[p].scope == "global" else layers)
        ]
        self.states = dict(zip(keys, self.pool.map(job, keys), strict=True))

    def serve(self, segment: Segment) -> None:
        """Route and place a segment, and add it to every tally."""
        plan, geometry = self.plan, self.plan.geometry
        views = self._views(segment)
        layers = len(geometry.layers)
        of_routing = [views[a] for a in plan.acceptance_of]
        routed = [RoutedCells.empty(view.trajectory, layers) for view in of_routing]
        for r, p in self.pairs:
            self.placed[r, p].begin(of_routing[r].trajectory, self.keep_cells)
        shared = [p for p, policy in enumerate(plan.residencies) if policy.scope == "global"]

        def place(r: int, p: int, at: int | None, stream: ExpertStream) -> None:
            policy, key = plan.residencies[p], (r, p, at)
            forwards = of_routing[r].trajectory.forwards
            placement, self.states[key] = policy.place(stream, forwards, geometry, self.states[key])
            self.placed[r, p].serve(stream, placement, describe(policy)["name"])

        def job(at: int) -> list[ExpertStream]:
            kept = []
            for r, layer, selection, stream in self._streams(segment, views, at):
                view = of_routing[r]
                self.routed[r].serve(routed[r], at, layer, selection, stream, view.trajectory, view.block_rows)
                for p in range(len(plan.residencies)):
                    if p not in shared:
                        place(r, p, at, stream)
                kept.append(stream)
            return kept if shared else []

        by_layer = self._layers(job)
        if shared:
            merged = [merge_streams(list(of_layer)) for of_layer in zip(*by_layer, strict=True)]
            every = [(r, p) for r in range(len(plan.routings)) for p in shared]
            list(self.pool.map(lambda pair: place(pair[0], pair[1], None, merged[pair[0]]), every))
        self._tally(segment, views, routed)

    def _tally(self, segment: Segment, views: list[_View], routed: list[RoutedCells]) -> None:
        plan = self.plan
        self.requests.update(np.unique(segment.forwards.request_id).tolist())
        self.recorded_forwards += segment.forwards.num_forwards
        for a, view in enumerate(views):
            self.simulated[a] |= not view.trajectory.recorded
            self.notes[a] += [note for note in view.trajectory.notes if note not in self.notes[a]]
            self.next_id[a] += len(view.forward_ids)
            self.tables.put(a, forward_columns(view.forward_ids, view.trajectory))
        for r, p in self.pairs:
            view = views[plan.acceptance_of[r]]
            if p == 0:
                self.routed[r].add(view.trajectory, routed[r])
            placed = self.placed[r, p].end(view.trajectory)
            if placed is not None:
                self.tables.put((r, p), cell_columns(view.forward_ids, plan.geometry.layers, routed[r], placed))

    def result(self, trace: Any) -> ReplayResult:
        """Everything served so far."""
        plan, meta = self.plan, trace.meta
        told = {
            "model": meta.model.id,
            "capture_level": meta.capture_level,
            "complete": meta.complete,
            **{key: meta.decoding.get(key) for key in ("loop", "block_length", "kv_cache")},
            "moe_layers": len(plan.geometry.layers),
            "num_experts": plan.geometry.num_experts,
            "top_k": plan.geometry.top_k,
            "requests": len(self.requests),
            "forwards": self.recorded_forwards,
        }
        runs = make_runs(plan, self.simulated, self.notes, self.routed, self.placed)
        machines = range(len(plan.machines))
        return ReplayResult(
            trace=told,
            runs=runs,
            _spool=self.tables,
            _cell_keys=[pair for pair in self.pairs for _ in machines] if self.keep_cells else None,
            _forward_keys=[plan.acceptance_of[r] for r, _ in self.pairs for _ in machines],
        )
