"""Sums that add up the same way everywhere, and the tidy frames that figures stand in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from analysis.metrics.shared.settings import NULLS

Axes = Mapping[Any, Sequence[Any]]
"""Labels of a grid, outermost axis first; an axis may stand for several columns, as a tuple of names with tuples."""
Grid = tuple[Axes, Mapping[str, np.ndarray]]
"""A grid's axes, and arrays that broadcast to its shape, ``n`` among them."""


def ordered_sum(array: np.ndarray, axis: int) -> np.ndarray:
    """Sum along an axis, adding first to last, so that floats add up the same way everywhere."""
    moved = np.moveaxis(array, axis, 0)
    total = np.zeros(moved.shape[1:], array.dtype)
    for part in moved:
        total = total + part
    return total


def with_total(array: np.ndarray, axis: int) -> np.ndarray:
    """The array with its sum along ``axis`` as one more entry of that axis, at the end."""
    return np.concatenate([array, np.expand_dims(ordered_sum(array, axis), axis)], axis=axis)


def divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """float64 quotient, NaN where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    out = np.full(numerator.shape, np.nan)
    np.divide(numerator, denominator, out=out, where=denominator != 0)
    return out


def mean(array: np.ndarray) -> np.ndarray:
    """Mean along the last axis, leaving out NaN; NaN where there is nothing."""
    known = ~np.isnan(array)
    return divide(ordered_sum(np.where(known, array, 0), array.ndim - 1), known.sum(axis=-1))


def with_mean(array: np.ndarray) -> np.ndarray:
    """The last axis followed by its mean, leaving out NaN."""
    return np.concatenate([array, mean(array)[..., None]], axis=-1)


def tidy(columns: Mapping[str, Any], grids: Iterable[Grid], smaller: Sequence[str] = ()) -> pl.DataFrame:
    """A frame of exactly ``columns`` with one row a cell of the grids, first axis outermost.

    Cells whose ``n`` is 0 are left out; NaN, and a column that a grid lacks, become null. ``beats_null``, where it is
    among the columns, is filled in by :func:`beats`.
    """
    frame = pl.concat([_cells(columns, axes, values) for axes, values in grids])
    return (beats(frame, smaller) if "beats_null" in columns else frame).select(list(columns))


def _cells(columns: Mapping[str, Any], axes: Axes, values: Mapping[str, np.ndarray]) -> pl.DataFrame:
    shape = tuple(len(labels) for labels in axes.values())
    counted = np.flatnonzero(np.broadcast_to(values["n"], shape).reshape(-1) > 0)
    series: dict[str, pl.Series] = {}
    for (names, labels), place in zip(axes.items(), np.unravel_index(counted, shape), strict=True):
        several = zip(names, zip(*labels, strict=True), strict=True) if isinstance(names, tuple) else [(names, labels)]
        for name, column in several:
            series[name] = pl.Series(name, list(column), dtype=columns[name]).gather(place.astype(np.uint32))
    for name in columns.keys() & values.keys():
        made = pl.Series(name, np.broadcast_to(values[name], shape).reshape(-1)[counted]).cast(columns[name])
        series[name] = made.fill_nan(None) if columns[name] == pl.Float64 else made
    nothing = [pl.lit(None, kind).alias(name) for name, kind in columns.items() if name not in series]
    return pl.DataFrame(series).with_columns(nothing).select(list(columns))


def beats(frame: pl.DataFrame, smaller: Sequence[str] = ()) -> pl.DataFrame:
    """Add ``beats_null``: the interval lies wholly on the consistent side of every null that is known.

    Larger is more consistent, except for the metrics named in ``smaller``. Null without an interval or without a null.
    """
    nulls = [pl.col(name) for name in NULLS if name in frame.columns]
    above = pl.col("low") > pl.max_horizontal(nulls)
    below = pl.col("high") < pl.min_horizontal(nulls)
    verdict = pl.when(pl.col("metric").is_in(list(smaller))).then(below).otherwise(above)
    return frame.with_columns(verdict.alias("beats_null"))
