"""How the distinct experts of a forward grow with its rows."""

from __future__ import annotations

import numpy as np
import polars as pl

from analysis.curves import Beside
from analysis.metrics.kernels.sets import growth_sums
from analysis.metrics.shared.bootstrap import Bootstrap
from analysis.metrics.shared.frames import ordered_sum, with_total
from analysis.metrics.shared.load import POPULAR, Load, popular_unique
from analysis.metrics.shared.metric import Metric
from analysis.metrics.shared.samples import hashed
from analysis.metrics.shared.settings import UNITS, VALUE, VERDICT, columns
from analysis.metrics.shared.study import Study
from analysis.metrics.shared.timeline import Timeline
from analysis.metrics.shared.view import LayerView

ORDERS = {"position": "by position", "random": "in random order"}
DENSE = 64
"""Every number of rows up to this is a point of the growth curve; beyond, a sixteenth more each."""
NULLS = {"independent": POPULAR, "uniform": "independent rows, even popularity"}


class Growth(Metric):
    """Distinct experts of the first n block rows of a forward, by position and in a seeded random order.

    Beside them n independent rows of the layer's popularity, sum over e of 1 - (1 - p_e)^n (``null_independent``), and
    of no popularity, E (1 - (1 - K / E)^n) (``null_uniform``). Smaller is more consistent. The mean over the forwards
    that have so many rows; all layers: the mean layer.
    """

    name, place = "growth", 80
    columns = columns("metric", "order", "layer", "rows", *VALUE, "null_independent", "null_uniform", *VERDICT)
    by_position = True
    smaller = ("unique",)
    nulls = NULLS
    charts = (
        Beside(
            title="Unique experts against rows",
            subtitle="Distinct experts a layer of the first rows of a block in a denoise forward; fewer is more alike.",
            at="rows",
            x="rows of the block",
            noun="number",
            place=69,
            y="unique experts a layer",
            zero=True,
            alike=1,
            nulls=NULLS,
            lines={words: ("order", name) for name, words in ORDERS.items()},
        ),
    )

    def __init__(self, study: Study, scope: str) -> None:
        super().__init__(study, scope)
        self.load = study.watch(Load)
        points, at = [], 1
        while at <= self.shape.block_length:
            points.append(at)
            at = at + 1 if at < DENSE else at + at // 16
        self.points = np.array(points, np.int64)
        cells = (UNITS, len(self.shape.layers), len(ORDERS), len(points))
        self.forwards, self.unique = np.zeros(cells, np.int64), np.zeros(cells, np.int64)

    def begin(self, times: Timeline) -> None:
        self.key = hashed(self.settings.seed + 2, times.request, times.block, times.step)

    def layer(self, view: LayerView) -> None:
        sums = self.forwards, self.unique
        growth_sums(view.bits, view.size, view.times.unit, self.key, self.points, view.index, *sums)

    def frame(self, bootstrap: Bootstrap) -> pl.DataFrame:
        """By layer, order and rows; n: forwards."""
        values = bootstrap.columns(with_total(self.unique, 1), with_total(self.forwards, 1))
        experts, share = self.shape.experts, np.array(self.shape.top_k)[:, None] / self.shape.experts
        popular = popular_unique(self.load.total, self.load.rows, self.points)
        even = experts * (1 - (1 - share) ** self.points[None, :])
        for name, table in (("null_independent", popular), ("null_uniform", even)):
            mean = ordered_sum(table, 0) / max(1, len(table))
            values[name] = np.concatenate([table, mean[None]])[:, None]
        axes = {"metric": ["unique"], "layer": self.shape.labels, "order": list(ORDERS), "rows": self.points.tolist()}
        return self.tidy((axes, values))
