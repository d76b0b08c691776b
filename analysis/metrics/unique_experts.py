"""Distinct experts of a denoise forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import polars as pl

from analysis.curves import against
from analysis.metrics.kernels.sets import unique_sums
from analysis.metrics.shared.bootstrap import Bootstrap
from analysis.metrics.shared.frames import Axes, divide, ordered_sum, with_total
from analysis.metrics.shared.load import POPULAR, Load, popular_unique
from analysis.metrics.shared.metric import LayerColumn, Metric, Row
from analysis.metrics.shared.result import ConsistencyResult
from analysis.metrics.shared.settings import UNITS, VALUE, VERDICT, columns
from analysis.metrics.shared.study import Study
from analysis.metrics.shared.view import LayerView

STATES = ("all", "masked", "decoded")
MEAN = {"metric": "unique_mean", "state": "all"}
SPREAD = {"metric": "unique_cv", "state": "all"}
BLOCK = {"scope": "block"}
FIGURE = "unique experts of a block, a layer"


class Unique(Metric):
    """Distinct experts of a denoise forward. Source: dMoE, arXiv 2605.30876 (mean and deviation by layer, mean over
    samples).

    ``unique_mean``, ``unique_sd`` (of the population of forwards), ``unique_cv``, ``unique_sample_mean`` (unweighted
    mean over requests). Scope ``block``: rows of the block, by state; ``forward``: all rows of the call, every branch.
    n: forwards; the row for all layers pools forwards and layers. Null of the means: as many independent rows of the
    layer's popularity.
    """

    name, place = "unique", 90
    columns = columns("metric", "scope", "layer", "state", *VALUE, "null_independent", *VERDICT)
    by_scope = True
    smaller = ("unique_mean", "unique_sample_mean")
    nulls = {"independent": POPULAR}
    headline = {FIGURE: MEAN, "  their coefficient of variation": SPREAD}
    by_layer = (
        LayerColumn("unique experts", "two", "of the block's rows in a denoise forward", MEAN | BLOCK),
        LayerColumn("null", "two", "as many independent rows of the same popularity", MEAN | BLOCK, "null_independent"),
        LayerColumn("their CV", "three", "deviation over mean of the unique experts, over forwards", SPREAD | BLOCK),
    )

    def __init__(self, study: Study, scope: str) -> None:
        super().__init__(study, scope)
        self.load, layers = study.watch(Load), len(self.shape.layers)
        self.states = STATES if scope == "block" else STATES[:1]
        cells = (UNITS, layers, len(self.states))
        self.forwards, self.unique, self.squares = (np.zeros(cells, np.int64) for _ in range(3))
        self.rows_seen = np.zeros((layers, len(self.states), self.shape.block_length + 1), np.int64)
        self.rows_called: list[Counter[int]] = [Counter() for _ in self.shape.layers]
        self.forward_load = np.zeros((layers, self.shape.experts), np.int64)

    def layer(self, view: LayerView) -> None:
        times, layer = view.times, view.index
        sums = self.forwards, self.unique, self.squares
        if self.scope == "block":
            unique_sums(view.bits, view.size, times.state, times.unit, layer, *sums, self.rows_seen)
            return
        unique = (view.forward_loads > 0).sum(axis=1)
        for array, counted in zip(sums, (unique > 0, unique, unique * unique), strict=True):
            np.add.at(array[:, layer, 0], times.unit, counted)
        self.forward_load[layer] += view.forward_loads.sum(axis=0)
        self.rows_called[layer].update(rows for rows in view.routed_rows.tolist() if rows)

    def frame(self, bootstrap: Bootstrap) -> pl.DataFrame:
        """Each metric by layer and state."""
        forwards, unique, squares = (with_total(a, 1) for a in (self.forwards, self.unique, self.squares))
        mean_by_unit = divide(unique, forwards)
        known = ~np.isnan(mean_by_unit)

        def deviation(count: np.ndarray, total: np.ndarray, square: np.ndarray) -> np.ndarray:
            variance = divide(square * count - total * total, count * count)
            return np.sqrt(np.maximum(variance, 0))

        def variation(count: np.ndarray, total: np.ndarray, square: np.ndarray) -> np.ndarray:
            return divide(deviation(count, total, square), divide(total, count))

        figures = {
            "unique_mean": bootstrap.ratio(unique, forwards),
            "unique_sd": bootstrap.statistic(deviation, forwards, unique, squares),
            "unique_cv": bootstrap.statistic(variation, forwards, unique, squares),
            "unique_sample_mean": bootstrap.ratio(np.where(known, mean_by_unit, 0), known.astype(np.int64)),
        }
        axes: Axes = {"scope": [self.scope], "layer": self.shape.labels, "state": self.states}
        expected, grids = self._expected(), []
        for metric, figure in figures.items():
            values = dict(zip(VALUE, figure, strict=True)) | {"n": ordered_sum(forwards, 0)}
            if metric in self.smaller:
                values["null_independent"] = expected
            grids.append(({"metric": [metric], **axes}, values))
        return self.tidy(*grids)

    def _expected(self) -> np.ndarray:
        """Mean over forwards of the distinct experts of as many independent rows, float64 [L + 1, states]."""
        if self.scope == "block":
            total, rows, seen = self.load.total, self.load.rows, self.rows_seen
            counts = np.flatnonzero(seen.any(axis=(0, 1)))
            seen = seen[:, :, counts]
        else:
            counts = np.array(sorted(set().union(*self.rows_called)), np.int64)
            seen = np.array([[[called[n] for n in counts.tolist()]] for called in self.rows_called], np.int64)
            total, rows = self.forward_load, ordered_sum(seen[:, 0] * counts, 1)
        expected = popular_unique(total, rows, counts)[:, None] * seen
        return divide(*(with_total(ordered_sum(part, 2), 0) for part in (expected, seen)))

    @staticmethod
    def findings(result: ConsistencyResult, rows: Mapping[str, Row]) -> list[str]:
        """How many experts a block's rows touch, and what independent routing without popularity would make of it."""
        if FIGURE not in rows:
            return []
        row = rows[FIGURE]
        sentence = f"The block's rows touch {row['value']:.1f} experts a layer in a denoise forward{against(row, 1)}"
        growth = result.frames.get("growth")
        if growth is not None and growth.height:
            whole = growth.filter(pl.col("layer").is_null(), pl.col("order") == "position").sort("rows")
            last = whole.row(-1, named=True)
            even, times = last["null_uniform"], last["null_uniform"] / last["value"]
            sentence += f"; the formula of independent routing says {even:.1f} for {last['rows']} rows"
            sentence += f", {times:.2f} times as many"
        return [f"{sentence}."]
