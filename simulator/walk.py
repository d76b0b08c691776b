"""The walk: the one loop over the segments and layers of a trace, for whoever watches.

A watcher looks at one branch, an acceptance and a routing policy; what branches have in common is made once. A segment's layers
run side by side in threads; every state goes from segment to segment, so memory does not grow with the trace. Watchers that
must see the whole run first get a pass of their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np

from simulator.policy import ACTIVE, SCORES, ExpertStream, Geometry, Trajectory
from simulator.registry import load_policy, name_of
from simulator.streams.gather import check_trajectory, current_block_rows, gather_layer, recorded_layer
from simulator.streams.routed import RoutedLayer, View
from simulator.streams.spool import StreamSpool
from simulator.streams.stream import merge_streams
from tracer.errors import UserError
from tracer.trace import LayerTrace, Segment

# A layer's router scores may take 64 MiB a segment and several copies while it is served.
MAX_THREADS, MAX_THREADS_WITH_SCORES = 16, 4

# Slots of a layer in a segment below which handing it to a thread costs more than serving it.
SIDE_BY_SIDE = 1 << 14

# Decisions, once for every branch, that a first pass keeps for the second; up to some 30 bytes each.
KEPT_DECISIONS = 1 << 22

Views = dict[tuple[Any, Any], View]


class Watcher:
    """Whatever looks at a walk. A segment is :meth:`begin`, :meth:`layer` of every layer, side by side, and :meth:`end`.

    ``passes`` 2: :meth:`prepare` gets every stream of the run first. ``ordered``: the entries of its streams must come in the
    order that :class:`simulator.policy.ExpertStream` describes.
    """

    passes: int = 1
    ordered: bool = False

    def scopes(self, layers: int, slots: int) -> Sequence[int | None]:
        """What :meth:`prepare` is called for: indices of layers, or None for all in one stream.

        ``slots`` are those of a layer in the first segment.
        """
        return ()

    def prepare(self, at: int | None, streams: Iterable[ExpertStream]) -> None:
        """Make the first state of a layer, or of all; ``streams`` are the run's if ``passes`` is 2, else none."""

    def begin(self, view: View) -> None:
        """A segment starts."""

    def layer(self, at: int, routed: RoutedLayer) -> None:
        """Take in a layer, ``at`` its index in ``Geometry.layers``; several may be served at once."""

    def end(self) -> None:
        """The segment's layers have been served."""

    def result(self) -> Any:
        """What was seen, once the walk is done."""


class Walk:
    """A trace and who watches it.

    Parameters
    ----------
    trace
        An opened trace: ``meta`` (TraceMeta), ``first_block`` (request to block) and ``segments()``, as often as asked.
    geometry : Geometry
        Of the trace.
    threads : int, optional
        How many layers are served side by side at most; by default as many as the machine has processors.
    weights : bool
        Whether gate weights are read, which order a row's experts; without, the lowest id goes first and reading is faster.

    Raises
    ------
    UserError
        ``threads`` is no number of threads.
    """

    def __init__(self, trace: Any, geometry: Geometry, threads: int | None = None, weights: bool = True) -> None:
        if threads is not None and threads < 1:
            raise UserError(f"threads={threads} is no number of threads; give 1 or more.")
        self.trace, self.geometry, self.weights = trace, geometry, weights
        self.threads = threads or os.cpu_count() or 1
        self.recorded = load_policy("acceptance", "recorded"), load_policy("routing", "vanilla")
        self.watchers: dict[tuple[Any, Any], list[Watcher]] = {}
        # A policy that chooses again met rows whose scores were not recorded.
        self.blind = False

    def watch(self, watcher: Any, branch: tuple[Any, Any] | None = None) -> Any:
        """Let a watcher look at a branch (acceptance, routing), by default at what was recorded; gives the watcher."""
        self.watchers.setdefault(branch or self.recorded, []).append(watcher)
        return watcher

    def run(self, progress: Callable[[int, int | None], None] | None = None) -> None:
        """Show every segment to every watcher.

        ``progress(done, total)`` hears of every segment, in model calls; ``total`` is None where the trace does not know it.
        """
        every = [watcher for watchers in self.watchers.values() for watcher in watchers]
        passes = max((watcher.passes for watcher in every), default=1)
        calls = getattr(self.trace, "num_forwards", None)
        done = 0

        def count(segment: Segment) -> None:
            nonlocal done
            done += segment.forwards.num_forwards
            if progress is not None:
                progress(done, None if calls is None else passes * int(calls))

        self._scores = any(routing.requires & {ACTIVE, SCORES} for _, routing in self.watchers)
        self._ordered = any(watcher.ordered for watcher in every)
        cap = MAX_THREADS_WITH_SCORES if self._scores else MAX_THREADS
        with (
            ThreadPoolExecutor(max(1, min(self.threads, cap, len(self.geometry.layers)))) as self._pool,
            closing(StreamSpool()) as spool,
        ):
            first = FirstPass(self, spool)
            if passes == 2:
                for segment, views in self._segments():
                    first.survey(segment, views)
                    count(segment)
            prepared = False
            for segment, views in first.kept if passes == 2 and first.kept is not None else self._segments():
                if not prepared:
                    self._prepare(segment, first)
                    prepared = True
                self._serve(segment, views)
                count(segment)

    def _segments(self) -> Iterator[tuple[Segment, Views]]:
        """Every segment as each branch runs it; simulated forwards are numbered on from the segment before."""
        numbered = {acceptance: 0 for acceptance, _ in self.watchers}
        for segment in self.trace.segments():
            run: dict[Any, tuple[Trajectory, np.ndarray, np.ndarray | None]] = {}
            for policy in numbered:
                trajectory = policy.unroll(segment, self.geometry)
                check_trajectory(trajectory, segment, name_of(policy))
                ids = trajectory.forwards.forward_id
                if not trajectory.recorded:
                    ids = np.arange(numbered[policy], numbered[policy] + len(ids), dtype=np.uint32)
                numbered[policy] += len(ids)
                run[policy] = trajectory, ids, current_block_rows(trajectory, self.geometry.block_length)
            yield (
                segment,
                {branch: View(segment, *run[branch[0]], self.geometry, self._ordered) for branch in self.watchers},
            )

    def each(self, job: Callable[[Any], Any], items: Iterable[Any], slots: int) -> list[Any]:
        """Answers in order, found side by side where a job has enough slots to be worth a thread."""
        return list((self._pool.map if slots >= SIDE_BY_SIDE else map)(job, items))

    def each_layer(self, job: Callable[[int], Any], segment: Segment) -> list[Any]:
        """As :meth:`each`, for every layer of a segment."""
        return self.each(job, range(len(self.geometry.layers)), self._slots(segment))

    def _slots(self, segment: Segment) -> int:
        return segment.forwards.num_rows * self.geometry.top_k

    def routed(self, views: Views, at: int) -> Iterator[tuple[tuple[Any, Any], RoutedLayer]]:
        """A layer as each branch has it, kept or made now; rows are gathered once an acceptance policy."""
        if all(view.kept for view in views.values()):
            yield from ((branch, view.kept[at]) for branch, view in views.items())
            return
        segment = next(iter(views.values())).segment
        recorded = recorded_layer(segment, at, self.geometry, self._scores, self.weights)
        gathered: dict[Any, LayerTrace] = {}
        for branch, view in views.items():
            if branch[0] not in gathered:
                gathered[branch[0]] = gather_layer(recorded, segment.forwards, view.trajectory)
            yield branch, RoutedLayer(at, gathered[branch[0]], view, branch[1])

    def _prepare(self, segment: Segment, first: FirstPass) -> None:
        jobs = [
            (branch, watcher, at)
            for branch, watchers in self.watchers.items()
            for watcher in watchers
            for at in watcher.scopes(len(self.geometry.layers), self._slots(segment))
        ]

        def job(key: tuple[tuple[Any, Any], Watcher, int | None]) -> None:
            branch, watcher, at = key
            watcher.prepare(at, first.streams(branch, at) if watcher.passes == 2 else ())

        # What looks at streams on disk is worth a thread.
        self.each(job, jobs, 0 if first.kept is not None else first.decisions)

    def _serve(self, segment: Segment, views: Views) -> None:
        every = [(views[branch], watcher) for branch, watchers in self.watchers.items() for watcher in watchers]
        for view, watcher in every:
            watcher.begin(view)

        def job(at: int) -> None:
            for branch, routed in self.routed(views, at):
                for watcher in self.watchers[branch]:
                    watcher.layer(at, routed)

        self.each_layer(job, segment)
        self.each(lambda watcher: watcher.end(), (watcher for _, watcher in every), self._slots(segment))
        self.blind |= any(view.blind for view in views.values())


class FirstPass:
    """What a first pass over a trace leaves for the second: routed segments, or only their streams where the trace is large."""

    def __init__(self, walk: Walk, spool: StreamSpool) -> None:
        self.walk, self.spool = walk, spool
        self.decisions = 0
        # None from when on it is too much.
        self.kept: list[tuple[Segment, Views]] | None = []

    def survey(self, segment: Segment, views: Views) -> None:
        """Keep a segment as it is routed, or put its streams aside."""
        walk = self.walk
        rows = sum(view.trajectory.forwards.num_rows for view in views.values())
        self.decisions += rows * len(walk.geometry.layers) * walk.geometry.top_k
        if self.kept is not None and self.decisions <= KEPT_DECISIONS:
            layers = walk.each_layer(lambda at: [(b, one.settled()) for b, one in walk.routed(views, at)], segment)
            for of_layer in layers:
                for branch, routed in of_layer:
                    views[branch].kept.append(routed)
            self.kept.append((segment, views))
            return
        waiting = [*(self.kept or ()), (segment, views)]

        def put_aside(at: int) -> None:
            for _, seen in waiting:
                for branch, routed in walk.routed(seen, at):
                    self.spool.put_stream((*branch, at), routed.stream)

        walk.each_layer(put_aside, segment)
        self.kept = None

    def streams(self, branch: tuple[Any, Any], at: int | None) -> Iterable[ExpertStream]:
        """The streams of a branch in a layer, or of all layers merged, segment after segment."""
        if self.kept is not None:
            views = [views[branch] for _, views in self.kept]
            return [view.merged() if at is None else view.kept[at].stream for view in views]
        if at is not None:
            return self.spool.streams((*branch, at))
        every = (self.spool.streams((*branch, each)) for each in range(len(self.walk.geometry.layers)))
        return map(merge_streams, zip(*every, strict=True))
