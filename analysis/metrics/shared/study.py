"""One pass over a trace's segments: every watcher sees each layer of each segment once.

A watcher keeps sums per bootstrap unit and nothing that grows with the trace.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

import numpy as np
import polars as pl

from analysis.metrics.shared.settings import Settings
from analysis.metrics.shared.timeline import Timeline, Units, timeline
from analysis.metrics.shared.view import LayerView, shape_of
from simulator import walk as walks
from simulator.streams.gather import geometry_of
from simulator.streams.routed import RoutedLayer, View
from simulator.walk import Walk
from tracer.trace import Segment, TraceMeta

W = TypeVar("W", bound="Watcher")


class Trace(Protocol):
    """What the figures need of a trace; :func:`tracer.parquet.open_trace` returns one."""

    @property
    def meta(self) -> TraceMeta: ...

    @property
    def first_block(self) -> dict[int, int]: ...

    @property
    def requests(self) -> pl.DataFrame: ...

    def segments(self) -> Iterator[Segment]: ...


class Watcher:
    """Looks at every layer of every segment; begins and ends with each segment."""

    def begin(self, times: Timeline) -> None:
        """A segment starts."""

    def layer(self, view: LayerView) -> None:
        """One layer of the segment; layers come in ascending order."""

    def end(self) -> None:
        """The segment's last layer has been seen."""


class Totals(Watcher):
    """How much of the trace there is."""

    def __init__(self, study: Study) -> None:
        self.segments = self.forwards = self.denoise = self.blocks = self.accepted = self.decisions = 0
        self.rows = {"block": 0, "forward": 0}
        self.accepted_known = True

    def begin(self, times: Timeline) -> None:
        self.segments += 1
        self.forwards += times.segment.forwards.num_forwards
        self.denoise += times.parts
        self.blocks += times.runs
        self.accepted += int(times.accepted.sum())
        self.accepted_known &= bool((times.accepted >= 0).all())
        self.rows["block"] += int((times.grid >= 0).sum())
        self.rows["forward"] += times.rows

    def layer(self, view: LayerView) -> None:
        self.decisions += int(view.count.sum(dtype=np.int64))

    def mean_rows(self, scope: str) -> int:
        """Rows of a denoise forward, rounded; at least 1."""
        return max(1, round(self.rows[scope] / self.denoise)) if self.denoise else 1


class Study:
    """What the metrics of one trace have in common: its sizes, what is asked, and sums that several of them read.

    ``scopes``: rows figures may be counted over, "block" (the current block's) and "forward" (all of a call); the first
    is that of the figures that have one scope.
    """

    def __init__(self, trace: Trace, settings: Settings) -> None:
        self.trace, self.settings = trace, settings
        self.shape, self.units = shape_of(trace.meta), Units()
        self.has_tokens = "tokens" in trace.meta.tables
        self.has_blocks = self.has_tokens and self.shape.block_length > 0
        self.scopes = ("block", "forward") if self.has_blocks else ("forward",)
        self._watchers: dict[Hashable, Watcher] = {}
        self.totals = self.watch(Totals)

    @property
    def budgets(self) -> tuple[int, ...]:
        """Sizes of the sets of most used experts: those asked for, else an eighth, a quarter and a half of the experts."""
        return self.settings.budgets or tuple(sorted({max(1, self.shape.experts // part) for part in (8, 4, 2)}))

    @property
    def watchers(self) -> Iterable[Watcher]:
        """Everything that watches."""
        return self._watchers.values()

    def watch(self, kind: Callable[..., W], *key: str) -> W:
        """The study's only ``kind(study, *key)``, made when it is first asked for; it sees the whole trace."""
        if (kind, *key) not in self._watchers:
            self._watchers[kind, *key] = kind(self, *key)
        watcher: Any = self._watchers[kind, *key]
        return watcher

    def run(self, progress: Callable[[int], Any] | None = None) -> None:
        """Show the trace to everything that watches; ``progress`` hears how many model calls have been read."""
        # one thread: the layer before is what foretells a layer
        walk = Walk(self.trace, geometry_of(self.trace), threads=1, weights=False)
        walk.watch(_Shown(self))
        walk.run(None if progress is None else lambda done, _: progress(done))


class _Shown(walks.Watcher):
    """Shows the recorded rows of a walk to everything that watches a study."""

    def __init__(self, study: Study) -> None:
        self._study = study

    def begin(self, view: View) -> None:
        self._layers = view.segment.layers
        self._times = timeline(view.segment, self._study.shape.block_length, self._study.units)
        for watcher in self._study.watchers:
            watcher.begin(self._times)

    def layer(self, at: int, routed: RoutedLayer) -> None:
        if routed.layer.layer in self._layers:
            view = LayerView(self._times, at, routed.layer, self._study.shape)
            for watcher in self._study.watchers:
                watcher.layer(view)

    def end(self) -> None:
        for watcher in self._study.watchers:
            watcher.end()


class Memory(dict[int, Any]):
    """What is remembered of requests from segment to segment, least recently seen dropped first."""

    KEPT = 1024

    def renew(self, values: Iterable[tuple[int, Any]]) -> None:
        """Remember these of their requests."""
        for request, value in values:
            self.pop(request, None)
            self[request] = value
        while len(self) > self.KEPT:
            del self[next(iter(self))]
