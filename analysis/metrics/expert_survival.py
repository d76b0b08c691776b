"""How long an expert stays active, and how long it stays wanted. L = layers, D = distances, E = experts."""

from __future__ import annotations

import numpy as np
import polars as pl

from analysis.curves import Beside, Series
from analysis.metrics.kernels.loads import UNWANTED, survival_sums
from analysis.metrics.shared.bootstrap import Bootstrap
from analysis.metrics.shared.frames import Axes, divide, ordered_sum, with_total
from analysis.metrics.shared.load import ACTIVITY, Members, all_drawn
from analysis.metrics.shared.metric import Metric
from analysis.metrics.shared.settings import NULLS, UNITS, VALUE, VERDICT, columns
from analysis.metrics.shared.study import Study
from analysis.metrics.shared.timeline import Timeline
from analysis.metrics.shared.view import LayerView


class Survival(Metric):
    """How long an expert stays, by distance in steps of a block.

    ``survival``: share of a step's active experts that stay active in every one of the next ``distance`` steps;
    ``residency``: the same of the wanted set of ``budget`` experts, as in :func:`drift`. Nulls: independent steps in
    which each expert is as often there as it is, sum q^(t+1) / sum q; the share of the set on a static list as long as
    the mean set (hot); each request's steps in random order (shuffle).
    """

    name, place = "survival", 50
    columns = columns("metric", "scope", "layer", "budget", "distance", *VALUE, *NULLS, *VERDICT)
    by_scope = True
    reason = "No block has two denoise forwards with routed rows."
    nulls = ACTIVITY
    headline = {
        "active expert still active next step": {"metric": "survival", "distance": 1},
        "wanted expert still wanted next step": {"metric": "residency", "distance": 1, "budget": "middle"},
    }
    charts = (
        Beside(
            title="How long an expert stays active",
            subtitle="Share of the experts active in a denoise forward that stay active in each of the next steps.",
            where={"metric": "survival"},
            at="distance",
            x="denoise steps",
            noun="distance",
            y="active experts still active",
            percent=True,
            nulls=ACTIVITY,
        ),
        Series(
            title="How long an expert stays wanted",
            subtitle="Share of the experts with most tokens that are among them in each of the next steps too.",
            where={"metric": "residency"},
            at="distance",
            x="denoise steps",
            noun="distance",
            y="wanted experts still wanted",
            percent=True,
            series="budget",
            word="the {} most wanted",
            legend="experts of a layer",
        ),
    )

    def __init__(self, study: Study, scope: str) -> None:
        super().__init__(study, scope)
        self.members, distances = study.watch(Members, scope), self.settings.distances
        cells = (len(self.shape.layers), len(self.members.sizes), UNITS, distances)
        self.risk, self.alive = np.zeros(cells, np.int64), np.zeros(cells, np.int64)
        self.spans = np.zeros((UNITS, distances), np.int64)

    def begin(self, times: Timeline) -> None:
        for t in range(1, self.settings.distances + 1):
            np.add.at(self.spans[:, t - 1], times.run_unit, np.maximum(np.diff(times.run_offsets) - t, 0))

    def layer(self, view: LayerView) -> None:
        ranks, runs = view.ranks(self.scope), (view.times.run_offsets, view.times.run_unit)
        for number, size in enumerate(self.members.sizes):
            survival_sums(ranks, size, *runs, self.risk[view.index, number], self.alive[view.index, number])

    def frame(self, bootstrap: Bootstrap) -> pl.DataFrame:
        """The active experts, then each budget, by layer and distance; n: experts at risk."""
        grids, distances = [], range(1, self.settings.distances + 1)
        sizes = list(enumerate(self.members.sizes))
        for number, size in (sizes[-1], *sizes[:-1]):
            risk, alive = (with_total(np.moveaxis(a[:, number], 0, 1), 1) for a in (self.risk, self.alive))
            share = self.members.share(number)
            whole = with_total(ordered_sum(share, 1), 0)
            expected = np.stack([with_total(ordered_sum(share ** (t + 1), 1), 0) for t in distances], axis=1)
            listed = [ordered_sum(np.sort(row)[::-1][: round(float(ordered_sum(row, 0)))], 0) for row in share]
            values = bootstrap.columns(alive, risk)
            values["null_independent"] = divide(expected, whole[:, None])
            values["null_hot"] = divide(with_total(np.array(listed, np.float64), 0), whole)[:, None]
            values["null_shuffle"] = self._shuffled(number, bootstrap.units)
            axes: Axes = {
                "metric": ["survival" if size == UNWANTED else "residency"],
                "scope": [self.scope],
                "budget": [None if size == UNWANTED else size],
                "layer": self.shape.labels,
                "distance": distances,
            }
            grids.append((axes, values))
        return self.tidy(*grids)

    def _shuffled(self, number: int, units: int) -> np.ndarray:
        """Survival in a set with the steps of each unit in random order, float64 [L + 1, D]."""
        member, steps = self.members.member[number, :units], self.members.parts[:units, None, None]
        drawn = [ordered_sum(chance, 2) for chance in all_drawn(member, steps, self.settings.distances + 1)]
        by_distance = []
        for t, alive in enumerate(drawn[1:]):
            weight = self.spans[:units, t, None].astype(np.float64)
            by_distance.append(divide(*(with_total(ordered_sum(weight * part, 0), 0) for part in (alive, drawn[0]))))
        return np.stack(by_distance, axis=1)
