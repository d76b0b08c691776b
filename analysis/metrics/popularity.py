"""Whether expert popularity agrees across requests and across datasets.

G = bootstrap units, L = layers, E = experts, D = datasets.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import polars as pl

from analysis.metrics.bootstrap import Bootstrap, beats, divide, grid_frame, ordered_sum
from analysis.metrics.expert_load import Load
from analysis.metrics.settings import STANDARD, UNITS
from analysis.metrics.stream import LayerView, Shape
from analysis.metrics.timeline import Timeline

MEASURES = ("cosine", "rank_correlation", "top_overlap")
AGREEMENT_COLUMNS = {
    "metric": pl.String,
    "between": pl.String,
    "first": pl.String,
    "second": pl.String,
    "layer": pl.Int32,
    **{name: STANDARD[name] for name in ("value", "low", "high", "null_shuffle", "n", "beats_null")},
}
DRAWS = 250
"""Replicates at most between datasets, where each one ranks all loads again."""

EXTRA = {"between": pl.String, "first": pl.String, "second": pl.String}


def doubled_ranks(load: np.ndarray) -> np.ndarray:
    """Twice the average rank of each entry along the last axis, float64, so that ties stay whole numbers."""
    out = np.empty(load.shape)
    flat, ranked = load.reshape(-1, load.shape[-1]), out.reshape(-1, load.shape[-1])
    for row, place in zip(flat, ranked, strict=True):
        ordered = np.sort(row)
        place[:] = np.searchsorted(ordered, row, "left") + np.searchsorted(ordered, row, "right") + 1
    return out


def top_sets(load: np.ndarray, size: int) -> np.ndarray:
    """float64 [..., E]: 1 for the ``size`` experts of largest load, ties to the lowest id, none without load."""
    order = np.argsort(-load, axis=-1, kind="stable")[..., :size]
    out = np.zeros(load.shape)
    np.put_along_axis(out, order, 1.0, -1)
    return out * (load > 0)


def measures(load: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Agreement of every pair of loads [N, E] with each other, and what permuted expert labels would give: two [3, N,
    N].

    cosine of the loads; Spearman's rank correlation with average ranks; experts shared by the top-``size`` sets over
    ``size``. All sums are whole numbers below 2^53, so they are exact in any order. NaN where a load is empty (or
    even, for ranks).
    """
    numbers = load.astype(np.float64)
    experts = load.shape[-1]
    norm = np.sqrt((numbers * numbers).sum(axis=-1))
    total = numbers.sum(axis=-1)
    scale = norm[:, None] * norm[None, :]
    ranks = doubled_ranks(numbers) - (experts + 1)
    spread = np.sqrt((ranks * ranks).sum(axis=-1))
    top = top_sets(numbers, size)
    some = np.where((total[:, None] > 0) & (total[None, :] > 0), 1.0, np.nan)
    value = [
        divide(numbers @ numbers.T, scale),
        divide(ranks @ ranks.T, spread[:, None] * spread[None, :]) * some,
        top @ top.T / size * some,
    ]
    held = top.sum(axis=-1)
    null = [
        divide(total[:, None] * total[None, :] / experts, scale),
        np.zeros_like(some) * some,
        held[:, None] * held[None, :] / experts / size * some,
    ]
    return np.stack(value), np.stack(null)


class DatasetLoad:
    """Load of every expert by dataset, int64 [D, L, E]; requests without a dataset are left out."""

    def __init__(self, shape: Shape, scope: str, requests: pl.DataFrame) -> None:
        self.scope = scope
        known = requests.drop_nulls("dataset") if "dataset" in requests.columns else requests.head(0)
        pairs = zip(known["request_id"].to_list(), known["dataset"].to_list() if known.height else (), strict=True)
        by_request = {int(request): str(dataset) for request, dataset in pairs}
        self.names = sorted(set(by_request.values()))
        place = {name: number for number, name in enumerate(self.names)}
        self.of_request = {request: place[name] for request, name in by_request.items()}
        self.load = np.zeros((len(self.names), len(shape.layers), shape.experts), np.int64)

    def begin(self, times: Timeline) -> None:
        self.dataset = np.array([self.of_request.get(r, -1) for r in times.run_request.tolist()], np.int64)

    def add(self, view: LayerView) -> None:
        if len(self.dataset) and self.names:
            runs = np.add.reduceat(view.loads(self.scope), view.times.run_offsets[:-1], axis=0)
            known = self.dataset >= 0
            np.add.at(self.load[:, view.index], self.dataset[known], runs[known])

    def end(self) -> None:
        pass


def agreement_frame(
    bootstrap: Bootstrap, shape: Shape, load: Load, datasets: DatasetLoad, numbers: dict[int, int]
) -> pl.DataFrame:
    """Metrics of :data:`MEASURES` between requests (mean over pairs of units) and between datasets (each pair), by
    layer.

    ``top_overlap`` compares the busiest quarter of the experts. null_shuffle: expert labels permuted at random, by
    formula. ``numbers`` are the requests in order of appearance. Between datasets there are intervals while every unit
    is one request.
    """
    size = max(1, shape.experts // 4)
    frames = [_between_requests(bootstrap, shape, load, size)] if bootstrap.units > 1 else []
    if len(datasets.names) > 1:
        frames.append(_between_datasets(bootstrap, shape, load, datasets, numbers, size))
    if not frames:
        return pl.DataFrame(schema=AGREEMENT_COLUMNS)
    return pl.concat(frames)


def with_mean(array: np.ndarray) -> np.ndarray:
    """Layers [..., L] followed by their mean, leaving out those that are NaN."""
    known = ~np.isnan(array)
    mean = divide(ordered_sum(np.where(known, array, 0), array.ndim - 1), known.sum(axis=-1))
    return np.concatenate([array, mean[..., None]], axis=-1)


def _between_requests(bootstrap: Bootstrap, shape: Shape, load: Load, size: int) -> pl.DataFrame:
    units = bootstrap.units
    upper = np.triu_indices(units, 1)
    value, null, count = [], [], []
    replicates = []
    for layer in range(len(shape.layers)):
        found, permuted = measures(load.load[:units, layer], size)
        known = np.triu(np.ones((units, units), bool), 1) & ~np.isnan(found)
        pairs = np.where(known, found, 0)
        ends = known[:, *upper].sum(axis=1)
        value.append(divide(ordered_sum(pairs[:, *upper], 1), ends))
        null.append(divide(ordered_sum(np.where(known, permuted, 0)[:, *upper], 1), ends))
        count.append(ends)
        weights = bootstrap.weights
        # A unit drawn twice is no pair of requests: only pairs of different units count, as often as both are drawn.
        drawn = [
            divide(((weights @ of_measure) * weights).sum(1), ((weights @ counted) * weights).sum(1))
            for of_measure, counted in zip(pairs, known.astype(np.float64), strict=True)
        ]
        replicates.append(np.stack(drawn, axis=1))
    low, high = bootstrap.interval(with_mean(np.stack(replicates, axis=-1)).reshape(len(bootstrap.weights), -1))
    shaped = (len(MEASURES), 1, 1, 1, len(shape.layers) + 1)
    counts = np.stack(count, axis=-1)
    columns = {
        "value": with_mean(np.stack(value, axis=-1)).reshape(shaped),
        "low": low.reshape(shaped),
        "high": high.reshape(shaped),
        "null_shuffle": with_mean(np.stack(null, axis=-1)).reshape(shaped),
        "n": np.concatenate([counts, counts.max(axis=-1, initial=0)[:, None]], axis=-1).reshape(shaped),
    }
    axes = {"metric": MEASURES, "between": ["requests"], "first": [None], "second": [None], "layer": shape.labels}
    return beats(grid_frame(axes, columns, EXTRA)).select(list(AGREEMENT_COLUMNS))


def _between_datasets(
    bootstrap: Bootstrap, shape: Shape, load: Load, datasets: DatasetLoad, numbers: dict[int, int], size: int
) -> pl.DataFrame:
    pairs = list(combinations(range(len(datasets.names)), 2))
    first, second = np.array(pairs).T
    single = 1 < len(numbers) <= UNITS
    value, null, replicates = [], [], []
    unit_dataset = np.full(bootstrap.units, -1)
    for request, number in numbers.items():
        unit_dataset[number % UNITS] = datasets.of_request.get(request, -1)
    for layer in range(len(shape.layers)):
        found, permuted = measures(datasets.load[:, layer], size)
        value.append(found[:, first, second])
        null.append(permuted[:, first, second])
        if single:
            units = load.load[: bootstrap.units, layer].astype(np.float64)
            members = [unit_dataset == number for number in range(len(datasets.names))]
            drawn = np.stack([bootstrap.weights[:DRAWS, m] @ units[m] for m in members], axis=1)
            replicates.append(np.stack([measures(one, size)[0][:, first, second] for one in drawn]))
    columns = {
        "value": with_mean(np.stack(value, axis=-1)),
        "null_shuffle": with_mean(np.stack(null, axis=-1)),
        "n": np.ones((1, 1, 1), np.int64),
    }
    shape_out = columns["value"].shape
    if single:
        low, high = bootstrap.interval(with_mean(np.stack(replicates, axis=-1)).reshape(len(replicates[0]), -1))
        columns |= {"low": low.reshape(shape_out), "high": high.reshape(shape_out)}
    else:
        columns |= {"low": np.full(shape_out, np.nan), "high": np.full(shape_out, np.nan)}
    axes = {"metric": MEASURES, "pair": range(len(pairs)), "layer": shape.labels}
    frame = grid_frame(axes, columns, {"pair": pl.UInt32})
    named = pl.Series(datasets.names, dtype=pl.String)
    frame = frame.with_columns(
        pl.lit("datasets").alias("between"),
        named.gather(first)[frame["pair"]].alias("first"),
        named.gather(second)[frame["pair"]].alias("second"),
    )
    return beats(frame).select(list(AGREEMENT_COLUMNS))
