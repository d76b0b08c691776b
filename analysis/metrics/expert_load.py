"""Figures of expert load: per expert, its skew, and unique experts of a forward.

G = bootstrap units, L = layers, E = experts.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import polars as pl

from analysis.metrics.bootstrap import Axes, Bootstrap, beats, divide, grid_frame, ordered_sum, typed, with_total
from analysis.metrics.growth_kernels import unique_sums
from analysis.metrics.load_kernels import load_unique_sums
from analysis.metrics.nulls import popular_unique
from analysis.metrics.settings import STANDARD, UNITS
from analysis.metrics.stream import LayerView, Shape
from analysis.metrics.timeline import Timeline

LOAD_COLUMNS = {
    "layer": pl.Int32,
    "expert": pl.Int32,
    "load": pl.Int64,
    "share": pl.Float64,
    "relative": pl.Float64,
    "rank": pl.Int32,
    "activity": pl.Float64,
}
BALANCE_COLUMNS = {name: STANDARD[name] for name in ("metric", "scope", "layer", "value", "low", "high", "n")}
UNIQUE_COLUMNS = {
    name: STANDARD[name]
    for name in ("metric", "scope", "layer", "state", "value", "low", "high", "null_independent", "n", "beats_null")
}
UNIQUE_STATES = ("all", "masked", "decoded")
BALANCE = ("gini", "load_cv", "entropy_experts", "top_tenth", "hot_experts", "dead_experts")
HOT = 2.0
"""An expert is hot with at least this many times an even share of its layer's load."""


def gini(load: np.ndarray) -> np.ndarray:
    """Gini coefficient along the last axis: 0 even, near 1 when one expert has everything; NaN without load.

    Source: Gini (1912), as sum_i (2 i - n - 1) x_i / (n sum x) over x sorted upwards, i from 1: one division of whole
    numbers.
    """
    count = load.shape[-1]
    ordered = np.sort(load, axis=-1).astype(np.float64)
    weighted = ordered_sum(ordered * (2 * np.arange(1, count + 1) - count - 1), -1)
    return divide(weighted, count * ordered_sum(ordered, -1))


def balance_figures(load: np.ndarray) -> np.ndarray:
    """The figures of :data:`BALANCE` of loads [..., E], stacked on the last axis.

    load_cv: standard deviation over mean. entropy_experts: exp of the entropy, the number of evenly used experts that
    would be as mixed. top_tenth: share of the busiest tenth of the experts (rounded up). hot_experts: those at
    :data:`HOT` times an even share. dead_experts: those without load.
    """
    experts = load.shape[-1]
    counts = load.astype(np.float64)
    total = ordered_sum(counts, -1)
    share = divide(counts, total[..., None])
    logs = np.log(np.where(share > 0, share, 1))
    busiest = np.sort(counts, axis=-1)[..., ::-1][..., : -(-experts // 10)]
    figures = [
        gini(load),
        # Of whole numbers up to the root: E sum x^2 - (sum x)^2 is E^2 times the variance.
        divide(np.sqrt(np.maximum(experts * ordered_sum(counts * counts, -1) - total * total, 0)), total),
        np.exp(-ordered_sum(share * logs, -1)),
        divide(ordered_sum(busiest, -1), total),
        np.where(total > 0, ordered_sum((counts * experts >= HOT * total[..., None]).astype(np.float64), -1), np.nan),
        np.where(total > 0, ordered_sum((counts == 0).astype(np.float64), -1), np.nan),
    ]
    return np.stack(figures, axis=-1)


def routed_rows(view: LayerView) -> np.ndarray:
    """Routed rows of each part, every branch, int64 [P]."""
    bounds = np.concatenate(([0], np.cumsum(view.count > 0)))
    return bounds[view.times.last] - bounds[view.times.first]


class Load:
    """Load of every expert over the denoise forwards: of block rows where the trace knows them, else of all rows."""

    def __init__(self, shape: Shape, scope: str) -> None:
        self.shape, self.scope = shape, scope
        layers = len(shape.layers)
        self.load = np.zeros((UNITS, layers, shape.experts), np.int64)
        self.active, self.steps = np.zeros((layers, shape.experts), np.int64), np.zeros(layers, np.int64)
        self.rows = np.zeros(layers, np.int64)

    def begin(self, times: Timeline) -> None:
        pass

    def add(self, view: LayerView) -> None:
        loads, times = view.loads(self.scope), view.times
        starts = times.run_offsets[:-1]
        if times.parts:
            np.add.at(self.load[:, view.index], times.run_unit, np.add.reduceat(loads, starts, axis=0))
        self.active[view.index] += (loads > 0).sum(axis=0)
        self.steps[view.index] += np.count_nonzero(loads.any(axis=1))
        if self.scope == "block":
            self.rows[view.index] += np.count_nonzero(view.size)
        else:
            self.rows[view.index] += int(routed_rows(view).sum())

    def end(self) -> None:
        pass

    @property
    def total(self) -> np.ndarray:
        """int64 [L, E]."""
        return ordered_sum(self.load, 0)

    def load_frame(self) -> pl.DataFrame:
        """One row per layer and expert: load (token-slots), share of the layer's load, share times E, rank from 1
        (ties to the lowest id), activity (share of the denoise forwards that use it)."""
        total = self.total
        layers, experts = total.shape
        order = np.argsort(-total, axis=1, kind="stable")
        rank = np.empty_like(order)
        np.put_along_axis(rank, order, np.broadcast_to(np.arange(1, experts + 1), order.shape), 1)
        share = divide(total, ordered_sum(total, 1)[:, None])
        columns = {
            "layer": np.repeat(self.shape.layers, experts),
            "expert": np.tile(np.arange(experts), layers),
            "load": total.reshape(-1),
            "share": share.reshape(-1),
            "relative": (share * experts).reshape(-1),
            "rank": rank.reshape(-1),
            "activity": divide(self.active, self.steps[:, None]).reshape(-1),
        }
        kept = np.repeat(self.steps > 0, experts)
        return typed({name: column[kept] for name, column in columns.items()}, LOAD_COLUMNS).select(list(LOAD_COLUMNS))

    def balance_frame(self, bootstrap: Bootstrap) -> pl.DataFrame:
        """Skew of each layer's load, and the mean of the layers; n: token-slots."""
        load = self.load[: bootstrap.units]

        def figures(loads: np.ndarray) -> np.ndarray:
            by_layer = balance_figures(loads)
            known = ~np.isnan(by_layer)
            mean = divide(ordered_sum(np.where(known, by_layer, 0), 1), ordered_sum(known.astype(np.int64), 1))
            return np.concatenate([by_layer, mean[:, None]], axis=1)

        value, low, high = bootstrap.statistic(figures, load)
        slots = with_total(ordered_sum(self.total, 1), 0)
        axes = {"metric": BALANCE, "scope": [self.scope], "layer": self.shape.labels}
        columns = {name: array.T[:, None] for name, array in (("value", value), ("low", low), ("high", high))}
        return grid_frame(axes, {**columns, "n": slots}).select(list(BALANCE_COLUMNS))


class Unique:
    """Distinct experts of a denoise forward, over its block rows (dMoE, arXiv 2605.30876) and over all its rows."""

    def __init__(self, shape: Shape, scope: str) -> None:
        self.shape, self.scope = shape, scope
        states = UNIQUE_STATES if scope == "block" else UNIQUE_STATES[:1]
        cells = (UNITS, len(shape.layers), len(states))
        self.states = states
        self.forwards, self.unique, self.squares = (np.zeros(cells, np.int64) for _ in range(3))
        self.rows_seen = np.zeros((len(shape.layers), len(states), shape.block_length + 1), np.int64)
        self.rows_called: list[Counter[int]] = [Counter() for _ in shape.layers]
        self.load = np.zeros((len(shape.layers), shape.experts), np.int64)

    def begin(self, times: Timeline) -> None:
        pass

    def add(self, view: LayerView) -> None:
        times = view.times
        if self.scope == "block":
            sums = self.forwards, self.unique, self.squares, self.rows_seen
            unique_sums(view.bits, view.size, times.state, times.unit, view.index, *sums)
        else:
            columns = (array[:, view.index, 0] for array in (self.forwards, self.unique, self.squares))
            load_unique_sums(view.forward_loads, times.unit, *columns)
            self.load[view.index] += view.forward_loads.sum(axis=0)
            self.rows_called[view.index].update(rows for rows in routed_rows(view).tolist() if rows)

    def end(self) -> None:
        pass

    def frame(self, bootstrap: Bootstrap, load: Load) -> pl.DataFrame:
        """unique_mean, unique_sd (over forwards, of the population), unique_cv, and unique_sample_mean, the unweighted
        mean over units of their means (dMoE's metric). States: all rows, masked rows, known rows. n: forwards.

        null_independent, for the means: as many rows, drawn independently with the layer's popularity in this scope.
        """
        units = bootstrap.units
        forwards, unique, squares = (with_total(a[:units], 1) for a in (self.forwards, self.unique, self.squares))
        mean_by_unit = divide(unique, forwards)
        known = ~np.isnan(mean_by_unit)

        def spread(count: np.ndarray, total: np.ndarray, square: np.ndarray) -> np.ndarray:
            variance = divide(square * count - total * total, count * count)
            return np.sqrt(np.maximum(variance, 0))

        figures = {
            "unique_mean": bootstrap.ratio(unique, forwards),
            "unique_sd": bootstrap.statistic(spread, forwards, unique, squares),
            "unique_cv": bootstrap.statistic(
                lambda c, t, s: divide(spread(c, t, s), divide(t, c)), forwards, unique, squares
            ),
            "unique_sample_mean": bootstrap.ratio(np.where(known, mean_by_unit, 0), known.astype(np.int64)),
        }
        axes: Axes = {"scope": [self.scope], "layer": self.shape.labels, "state": self.states}
        frames = []
        for metric, (value, low, high) in figures.items():
            columns = {"value": value, "low": low, "high": high, "n": ordered_sum(forwards, 0)}
            null = np.full((len(self.shape.layers) + 1, len(self.states)), np.nan)
            if metric in ("unique_mean", "unique_sample_mean"):
                null = self._expected(load)
            columns["null_independent"] = null
            frames.append(grid_frame({"metric": [metric], **axes}, columns))
        frame = beats(pl.concat(frames), smaller=("unique_mean", "unique_sample_mean"))
        return frame.select(list(UNIQUE_COLUMNS))

    def _expected(self, load: Load) -> np.ndarray:
        """Mean over forwards of the distinct experts of as many independent rows, float64 [L + 1, states]."""
        if self.scope == "block":
            total, rows, seen = load.total, load.rows, self.rows_seen
            counts = np.flatnonzero(seen.any(axis=(0, 1)))
            seen = seen[:, :, counts]
        else:
            counts = np.array(sorted(set().union(*self.rows_called)), np.int64)
            seen = np.array([[[called[n] for n in counts.tolist()]] for called in self.rows_called], np.int64)
            total, rows = self.load, ordered_sum(seen[:, 0] * counts, 1)
        expected = popular_unique(total, rows, counts)[:, None] * seen
        forwards = with_total(ordered_sum(seen, 2), 0)
        return divide(with_total(ordered_sum(expected, 2), 0), forwards)
