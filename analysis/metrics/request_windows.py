"""Distinct experts over several forwards of a request. L = layers, W = windows, E = experts."""

from __future__ import annotations

import numpy as np
import polars as pl

from analysis.curves import Beside
from analysis.metrics.kernels.loads import window_sums
from analysis.metrics.shared.bootstrap import Bootstrap
from analysis.metrics.shared.frames import Axes, divide, ordered_sum, with_total
from analysis.metrics.shared.load import ACTIVITY, Members, all_drawn
from analysis.metrics.shared.metric import Metric
from analysis.metrics.shared.settings import UNITS, VALUE, VERDICT, columns
from analysis.metrics.shared.study import Memory, Study
from analysis.metrics.shared.timeline import Timeline
from analysis.metrics.shared.view import LayerView

NEVER = -(1 << 40)


class WorkingSet(Metric):
    """Distinct experts over windows of consecutive denoise forwards of a request, across its blocks.

    Source: Denning, The working set model for program behavior (1968). All layers: the mean layer. Nulls: independent
    forwards with the same activity, sum of 1 - (1 - q)^w; each request's forwards in random order (shuffle). A static
    list is its own working set.
    """

    name, place = "working_set", 60
    columns = columns("metric", "scope", "layer", "window", *VALUE, "null_independent", "null_shuffle", *VERDICT)
    by_scope = True
    reason = "No request has as many denoise forwards as the smallest window."
    smaller = ("working_set",)
    nulls = ACTIVITY
    headline = {"distinct experts over 8 forwards": {"window": 8}}
    charts = (
        Beside(
            title="Working set of a window",
            subtitle="Distinct experts a layer over so many denoise forwards in a row; fewer is more alike.",
            at="window",
            x="denoise forwards in the window",
            noun="length",
            y="distinct experts a layer",
            zero=True,
            alike=1,
            nulls=ACTIVITY,
        ),
    )

    def __init__(self, study: Study, scope: str) -> None:
        super().__init__(study, scope)
        self.members = study.watch(Members, scope)
        self.windows = np.array(self.settings.windows, np.int64)
        cells = (len(self.shape.layers), UNITS, len(self.windows))
        self.windowed, self.distinct = np.zeros(cells, np.int64), np.zeros(cells, np.int64)
        self.memory = Memory()

    def begin(self, times: Timeline) -> None:
        self.requests = list(dict.fromkeys(times.request.tolist()))
        place = {request: number for number, request in enumerate(self.requests)}
        self.slot = np.array([place[request] for request in times.request.tolist()], np.int64)
        layers = len(self.shape.layers)
        self.last = np.full((layers, len(self.requests), self.shape.experts), NEVER, np.int64)
        self.clock = np.zeros((layers, len(self.requests)), np.int64)
        for number, request in enumerate(self.requests):
            if request in self.memory:
                self.last[:, number], self.clock[:, number] = self.memory[request]

    def layer(self, view: LayerView) -> None:
        layer = view.index
        state = self.slot, self.last[layer], self.clock[layer]
        sums = self.windowed[layer], self.distinct[layer]
        window_sums(view.loads(self.scope), view.times.unit, *state, self.windows, *sums)

    def end(self) -> None:
        states = ((self.last[:, n].copy(), self.clock[:, n].copy()) for n in range(len(self.requests)))
        self.memory.renew(zip(self.requests, states, strict=True))

    def frame(self, bootstrap: Bootstrap) -> pl.DataFrame:
        """By layer and window; n: windows."""
        sums = (with_total(np.moveaxis(array, 0, 1), 1) for array in (self.distinct, self.windowed))
        share = self.members.share(-1)
        expected = np.stack([ordered_sum(1 - (1 - share) ** w, 1) for w in self.windows], axis=1)
        mean = ordered_sum(expected, 0) / max(1, len(expected))
        values = bootstrap.columns(*sums)
        values["null_independent"] = np.concatenate([expected, mean[None]])
        values["null_shuffle"] = self._shuffled(bootstrap.units)
        axes: Axes = {"metric": ["working_set"], "scope": [self.scope], "layer": self.shape.labels}
        return self.tidy(({**axes, "window": self.windows.tolist()}, values))

    def _shuffled(self, units: int) -> np.ndarray:
        """Distinct experts of windows with the forwards of each unit in random order, float64 [L + 1, W]."""
        steps, windows = self.members.parts[:units, None, None], self.windows.tolist()
        missed = all_drawn(steps - self.members.member[-1, :units], steps, max(windows))
        sums = {w: ordered_sum(1 - chance, 2) for w, chance in enumerate(missed, 1) if w in windows}
        by_window = []
        for place, w in enumerate(windows):
            counted = self.windowed[:, :units, place].T
            by_window.append(divide(*(with_total(ordered_sum(part, 0), 0) for part in (counted * sums[w], counted))))
        return np.stack(by_window, axis=1)
