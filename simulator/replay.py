"""Replay a trace under routing x residency x hardware: the only loop over segments and layers.

A segment's layers run side by side in threads; a routing policy's selection is made once and shared by all residencies; policy
states go from segment to segment, so memory does not grow with the trace except for the table of cells.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np

from simulator.plan import Plan, make_plan
from simulator.policy import ExpertStream
from simulator.registry import answer_of, describe
from simulator.result import ReplayResult, cell_columns, forward_columns
from simulator.runs import make_runs
from simulator.streams.routed import BLIND, RoutedLayer, RoutedSegment, Router
from simulator.streams.spool import Spool, StreamSpool
from simulator.streams.stream import merge_streams
from simulator.tallies.cells import RoutedCells
from simulator.tallies.placement_tally import PlacementTally
from simulator.tallies.summary import RoutingTally
from tracer.errors import UserError
from tracer.trace import Segment

# A layer's router scores may take 64 MiB a segment and several copies while it is served.
MAX_THREADS, MAX_THREADS_WITH_SCORES = 16, 4

# Slots of a layer in a segment below which handing it to a thread costs more than serving it.
SIDE_BY_SIDE = 1 << 14

# Decisions, once for every routing policy, that a first pass keeps for the second; up to some 30 bytes each.
KEPT_DECISIONS = 1 << 22


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
        Preset names or TOML paths with their options, see :func:`simulator.pricing.priced_on`.
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
        runner = _Runner(plan, pool, spool, keep_cells, getattr(trace, "notes", ()))
        if plan.two_passes:
            for segment in trace.segments():
                runner.survey(segment)
                count(segment)
        for routed in runner.segments(trace):
            runner.serve(routed)
            count(routed.segment)
    return runner.result(trace)


class _Runner:
    """Policy states and tallies of a replay between segments."""

    def __init__(
        self, plan: Plan, pool: ThreadPoolExecutor, spool: StreamSpool, keep_cells: bool, notes: Iterable[str] = ()
    ) -> None:
        geometry = plan.geometry
        self.plan, self.pool, self.spool, self.keep_cells = plan, pool, spool, keep_cells
        self.router = Router(plan)
        self.residencies = [describe(policy)["name"] for policy in plan.residencies]
        self.pairs = [(r, p) for r in range(len(plan.routings)) for p in range(len(plan.residencies))]
        # Whether a policy serves all layers in one stream.
        self.shared = [policy.scope == "global" for policy in plan.residencies]
        self.states: dict[tuple[int, int, int | None], Any] = {}
        self.routed = [RoutingTally(geometry) for _ in plan.routings]
        self.placed = {
            pair: PlacementTally(geometry, plan.residencies[pair[1]].scope, plan.costs) for pair in self.pairs
        }
        # Cells by (routing, residency), forwards by acceptance.
        self.tables = Spool()
        self.simulated = [False] * len(plan.acceptances)
        self.notes: list[list[str]] = [list(notes) for _ in plan.acceptances]
        self.requests: set[int] = set()
        self.recorded_forwards = 0
        # What a first pass routed; None without one, and from when on it is too much.
        self.kept: list[RoutedSegment] | None = [] if plan.two_passes else None
        self.kept_decisions = 0

    def _each(self, job: Callable[[Any], Any], items: Iterable[Any], slots: int) -> list[Any]:
        """Answers in order, found side by side where a job has enough slots to be worth a thread."""
        return list((self.pool.map if slots >= SIDE_BY_SIDE else map)(job, items))

    def _layers(self, job: Callable[[int], Any], segment: Segment) -> list[Any]:
        geometry = self.plan.geometry
        return self._each(job, range(len(geometry.layers)), segment.forwards.num_rows * geometry.top_k)

    def survey(self, segment: Segment) -> None:
        """First pass: keep a segment as it is routed, or put only its streams aside where the trace is large."""
        plan = self.plan
        routed = self.router.begin(segment)
        rows = sum(routed.views[a].trajectory.forwards.num_rows for a in plan.acceptance_of)
        self.kept_decisions += rows * len(plan.geometry.layers) * plan.geometry.top_k
        if self.kept is not None and self.kept_decisions <= KEPT_DECISIONS:

            def keep(at: int) -> list[RoutedLayer]:
                # No tally reads scores.
                return [
                    replace(one, layer=replace(one.layer, router_scores=None)) for one in self.router.layers(routed, at)
                ]

            routed.kept = self._layers(keep, segment)
            self.kept.append(routed)
            return

        def put_aside(at: int) -> None:
            for earlier in (*(self.kept or ()), routed):
                for r, one in enumerate(self.router.layers(earlier, at)):
                    self.spool.put_stream((r, at), one.stream)

        self._layers(put_aside, segment)
        self.kept = None

    def _start(self, slots: int) -> None:
        """Initial states of every policy, in every layer or over all of them; ``slots`` of a layer in the first segment."""
        geometry, kept = self.plan.geometry, self.kept
        for p, policy in enumerate(self.plan.residencies):
            # Where layers are too small for threads, one call for all of them is what is fast.
            self.shared[p] |= slots < SIDE_BY_SIDE and getattr(policy, "together", False)
        layers = range(len(geometry.layers))

        def streams(r: int, at: int | None) -> Iterable[ExpertStream]:
            if kept is not None:
                return [routed.merged(r) if at is None else routed.kept[at][r].stream for routed in kept if routed.kept]
            if at is not None:
                return self.spool.streams((r, at))
            return map(merge_streams, zip(*(self.spool.streams((r, each)) for each in layers), strict=True))

        def job(key: tuple[int, int, int | None]) -> Any:
            r, p, at = key
            policy = self.plan.residencies[p]
            return policy.fit(streams(r, at), geometry, at) if policy.passes == 2 else policy.start(geometry, at)

        keys = [(r, p, at) for r, p in self.pairs for at in ((None,) if self.shared[p] else layers)]
        # Policies that fit to streams on disk are worth a thread.
        surveyed = self.kept_decisions if kept is None else 0
        self.states = dict(zip(keys, self._each(job, keys, surveyed), strict=True))

    def segments(self, trace: Any) -> Iterable[RoutedSegment]:
        """The trace's segments to be served, as the first pass kept them or begun anew."""
        if self.kept is not None:
            return self.kept
        self.router = Router(self.plan)
        return map(self.router.begin, trace.segments())

    def serve(self, routed: RoutedSegment) -> None:
        """Route and place a segment, and add it to every tally."""
        plan = self.plan
        if not self.states:
            self._start(routed.segment.forwards.num_rows * plan.geometry.top_k)
        of_routing = [routed.views[a] for a in plan.acceptance_of]
        cells = [RoutedCells.empty(view.trajectory, len(plan.geometry.layers)) for view in of_routing]
        for r, p in self.pairs:
            self.placed[r, p].begin(of_routing[r].trajectory, self.keep_cells)
        shared = [p for p, together in enumerate(self.shared) if together]
        alone = [p for p, together in enumerate(self.shared) if not together]

        def place(r: int, p: int, at: int | None, stream: ExpertStream) -> None:
            key = (r, p, at)
            forwards = of_routing[r].trajectory.forwards
            answer = answer_of(plan.residencies[p], "place", stream, forwards, plan.geometry, self.states[key])
            placement, self.states[key] = answer
            self.placed[r, p].serve(stream, placement, self.residencies[p])

        def job(at: int) -> list[ExpertStream]:
            streams = []
            for r, one in enumerate(self.router.layers(routed, at)):
                view = of_routing[r]
                self.routed[r].serve(
                    cells[r], at, one.layer, one.selection, one.stream, view.trajectory, view.block_rows
                )
                for p in alone:
                    place(r, p, at, one.stream)
                streams.append(one.stream)
            return streams if shared and routed.kept is None else []

        by_layer = self._layers(job, routed.segment)
        if shared:
            routings = range(len(plan.routings))
            if routed.kept is None:
                merged = [merge_streams(list(of_layer)) for of_layer in zip(*by_layer, strict=True)]
            else:
                merged = [routed.merged(r) for r in routings]
            every = [(r, p) for r in routings for p in shared]
            largest = max(len(stream.experts) for stream in merged)
            self._each(lambda pair: place(pair[0], pair[1], None, merged[pair[0]]), every, largest)
        self._tally(routed, cells)

    def _tally(self, routed: RoutedSegment, cells: list[RoutedCells]) -> None:
        plan, segment = self.plan, routed.segment
        self.requests.update(np.unique(segment.forwards.request_id).tolist())
        self.recorded_forwards += segment.forwards.num_forwards
        for a, view in enumerate(routed.views):
            self.simulated[a] |= not view.trajectory.recorded
            self.notes[a] += [note for note in view.trajectory.notes if note not in self.notes[a]]
            self.tables.put(a, forward_columns(view.forward_ids, view.trajectory))
        for r, p in self.pairs:
            view = routed.views[plan.acceptance_of[r]]
            if p == 0:
                self.routed[r].add(view.trajectory, cells[r])
            placed = self.placed[r, p].end(view.trajectory)
            if placed is not None:
                self.tables.put((r, p), cell_columns(view.forward_ids, plan.geometry.layers, cells[r], placed))

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
        if self.router.blind:
            for notes in self.notes:
                notes.append(BLIND)
        runs = make_runs(plan, self.simulated, self.notes, self.routed, self.placed)
        return ReplayResult(
            trace=told,
            runs=runs,
            _spool=self.tables,
            _cell_keys=[(r, p) for r, p, _ in plan.runs] if self.keep_cells else None,
            _forward_keys=[plan.acceptance_of[r] for r, _, _ in plan.runs],
        )
