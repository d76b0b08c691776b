"""Percentile bootstrap over requests from sufficient statistics.

Units are requests (or groups of them where there are many). Every figure is a function of sums over units, so a
replicate is those sums with the units' weights, and no second pass over the trace is needed. G units, X figures, B
replicates. Source of the method: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3,
percentile intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from analysis.metrics.shared.frames import divide, ordered_sum
from analysis.metrics.shared.settings import VALUE

SLICE = 1 << 21
"""Numbers a slice of replicates may hold for each sum."""


class Bootstrap:
    """Seeded multinomial weights float64 [B, G], and the intervals they give.

    With fewer than two units there are no intervals: they are NaN.
    """

    def __init__(self, units: int, replicates: int, level: float, seed: int) -> None:
        self.units = units
        self.tail = (1 - level) / 2
        draws = (
            np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), replicates) if units > 1 else ()
        )
        self.weights = np.asarray(draws, np.float64)

    def interval(self, replicates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Percentile interval of replicates [B, X], leaving out those that are NaN."""
        ordered = np.sort(replicates, axis=0)
        known = np.count_nonzero(~np.isnan(ordered), axis=0)
        ends = []
        for share in (self.tail, 1 - self.tail):
            # Linear interpolation between order statistics, as numpy.quantile does it; NaN sorts last.
            place = share * np.maximum(known - 1, 0)
            below = np.floor(place).astype(np.int64)
            above = np.minimum(below + 1, np.maximum(known - 1, 0))
            first = np.take_along_axis(ordered, below[None], 0)[0]
            second = np.take_along_axis(ordered, above[None], 0)[0]
            ends.append(first + (second - first) * (place - below))
        return ends[0], ends[1]

    def ratio(self, numerator: np.ndarray, denominator: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sum over units of a numerator by that of a denominator, both [G, ...]: (value, low, high), each [...]."""
        return self.statistic(divide, *np.broadcast_arrays(numerator, denominator))

    def columns(self, numerator: np.ndarray, denominator: np.ndarray) -> dict[str, np.ndarray]:
        """Columns of :meth:`ratio`, and ``n``, the sum of the denominator."""
        values = dict(zip(VALUE, self.ratio(numerator, denominator), strict=True))
        return {**values, "n": ordered_sum(denominator, 0)}

    def statistic(
        self, figure: Callable[..., np.ndarray], *sums: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A figure of sums over units: (value, low, high).

        ``figure`` takes arrays [N, ...], N draws of the sums, and returns [N, ...]. The sums may have room for more
        units than there are; those beyond hold nothing.
        """
        sums = tuple(array[: self.units] for array in sums)
        totals = [ordered_sum(array, 0)[None] for array in sums]
        value = np.asarray(figure(*totals))[0]
        if self.units < 2:
            nothing = np.full(value.shape, np.nan)
            return value, nothing, nothing.copy()
        # In slices, so that a figure's working memory does not grow with the number of replicates.
        rows = max(1, SLICE // max(1, max(array[0].size for array in sums)))
        replicates = np.concatenate(
            [figure(*self._drawn(sums, start, start + rows)) for start in range(0, len(self.weights), rows)]
        )
        low, high = self.interval(replicates.reshape(len(replicates), -1))
        return value, low.reshape(value.shape), high.reshape(value.shape)

    def _drawn(self, sums: Sequence[np.ndarray], start: int, stop: int) -> list[np.ndarray]:
        """The sums of replicates ``start`` to ``stop``, each [N, ...]."""
        weights = self.weights[start:stop]
        flat = [array.reshape(self.units, -1).astype(np.float64) for array in sums]
        return [(weights @ flat_sum).reshape(-1, *array.shape[1:]) for flat_sum, array in zip(flat, sums, strict=True)]
