"""Whether the popularity of experts agrees across requests and across datasets.

G = bootstrap units, L = layers, E = experts, D = datasets.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import polars as pl

from analysis.metrics.shared.agreement import DRAWS, MEASURES, PAIR, WORDS, compared, measures, resampled
from analysis.metrics.shared.bootstrap import Bootstrap
from analysis.metrics.shared.frames import Grid, divide, ordered_sum, with_mean
from analysis.metrics.shared.load import Load
from analysis.metrics.shared.metric import Metric
from analysis.metrics.shared.settings import UNITS, VALUE, VERDICT, columns
from analysis.metrics.shared.study import Study
from analysis.metrics.shared.timeline import Timeline
from analysis.metrics.shared.view import LayerView


class Agreement(Metric):
    """Whether expert popularity agrees across requests and across datasets.

    ``cosine`` of loads, Spearman's ``rank_correlation``, ``top_overlap`` of the busiest quarter. ``between`` requests:
    mean over pairs; between datasets: each pair (``first``, ``second``). Null: permuted expert labels, by formula.
    Between datasets there are intervals while every bootstrap unit is one request.
    """

    name, place = "agreement", 130
    columns = columns("metric", *PAIR, "layer", *VALUE, "null_shuffle", *VERDICT)
    reason = "Needs at least two requests or two datasets with routed rows."
    nulls = WORDS
    headline = {"popularity across requests: cosine": {"metric": "cosine", "between": "requests"}}

    def __init__(self, study: Study, scope: str) -> None:
        super().__init__(study, scope)
        self.load, requests = study.watch(Load), study.trace.requests
        known = requests.drop_nulls("dataset") if "dataset" in requests.columns else requests.head(0)
        pairs = known.select("request_id", "dataset").iter_rows() if known.height else ()
        by_request = {int(request): str(dataset) for request, dataset in pairs}
        self.names = sorted(set(by_request.values()))
        self.dataset_of = {request: self.names.index(name) for request, name in by_request.items()}
        self.by_dataset = np.zeros((len(self.names), len(self.shape.layers), self.shape.experts), np.int64)
        self.size = max(1, self.shape.experts // 4)

    def begin(self, times: Timeline) -> None:
        self.dataset = np.array([self.dataset_of.get(r, -1) for r in times.run_request.tolist()], np.int64)

    def layer(self, view: LayerView) -> None:
        if self.names:
            known = self.dataset >= 0
            runs = view.times.by_run(view.loads(self.scope))
            np.add.at(self.by_dataset[:, view.index], self.dataset[known], runs[known])

    def frame(self, bootstrap: Bootstrap) -> pl.DataFrame:
        """By what is compared and layer, and the mean layer; n: pairs of bootstrap units, or 1."""
        grids = [self._requests(bootstrap)] if bootstrap.units > 1 else []
        if len(self.names) > 1:
            grids.append(self._datasets(bootstrap))
        return self.tidy(*grids) if grids else pl.DataFrame(schema=self.columns)

    def _requests(self, bootstrap: Bootstrap) -> Grid:
        units, weights = bootstrap.units, bootstrap.weights
        upper = np.triu_indices(units, 1)
        by_layer = []
        for layer in range(len(self.shape.layers)):
            alike, permuted = measures(self.load.load[:units, layer], self.size)
            known = np.triu(np.ones((units, units), bool), 1) & ~np.isnan(alike)
            pairs = np.where(known, alike, 0)
            count = known[:, *upper].sum(axis=1)
            value, null = (
                divide(ordered_sum(np.where(known, array, 0)[:, *upper], 1), count) for array in (alike, permuted)
            )
            # A unit drawn twice is no pair of requests: only pairs of different units count, as often as both are drawn.
            drawn = [
                divide(((weights @ of_measure) * weights).sum(1), ((weights @ counted) * weights).sum(1))
                for of_measure, counted in zip(pairs, known.astype(np.float64), strict=True)
            ]
            by_layer.append((value, null, count, np.stack(drawn, axis=1)))
        value, null, count, replicates = (np.stack(arrays, axis=-1) for arrays in zip(*by_layer, strict=True))
        low, high = bootstrap.interval(with_mean(replicates))
        values = {"value": with_mean(value), "low": low, "high": high, "null_shuffle": with_mean(null)}
        values["n"] = np.concatenate([count, count.max(axis=-1, initial=0)[:, None]], axis=-1)
        axes = {"metric": MEASURES, PAIR: [("requests", None, None)], "layer": self.shape.labels}
        return axes, {name: array[:, None] for name, array in values.items()}

    def _datasets(self, bootstrap: Bootstrap) -> Grid:
        pairs = list(combinations(range(len(self.names)), 2))
        value, null = (with_mean(array) for array in compared(self.by_dataset, pairs, self.size))
        values = {"value": value, "null_shuffle": null, "n": np.ones((1, 1, 1), np.int64)}
        numbers = self.study.units.number
        if 1 < len(numbers) <= UNITS:
            unit_dataset = np.array([self.dataset_of.get(request, -1) for request in numbers])
            members = [np.flatnonzero(unit_dataset == number) for number in range(len(self.names))]
            sides = [(bootstrap.weights[:DRAWS, m], self.load.load[m]) for m in members]
            ends = bootstrap.interval(with_mean(resampled(sides, pairs, self.size)))
            values |= dict(zip(("low", "high"), ends, strict=True))
        labels = [("datasets", self.names[a], self.names[b]) for a, b in pairs]
        return {"metric": MEASURES, PAIR: labels, "layer": self.shape.labels}, values
