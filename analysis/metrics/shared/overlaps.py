"""Metrics of the overlap of two K-sets, by the token states and the distance of the rows they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import polars as pl

from analysis.metrics.shared.bootstrap import Bootstrap
from analysis.metrics.shared.frames import Axes, Grid, ordered_sum, with_total
from analysis.metrics.shared.metric import Metric
from analysis.metrics.shared.nulls import WORDS, Overlaps, RowNulls
from analysis.metrics.shared.settings import NULLS, UNITS, VALUE, VERDICT, columns
from analysis.metrics.shared.study import Study


class PairOverlap(Metric):
    """Overlap of pairs of rows, ``sums`` [G, L, states, distances].

    ``states``: token states of a pair, each with the class of its nulls. ``shares``: the metrics, out of those of
    :class:`~analysis.metrics.shared.nulls.Overlaps`.
    """

    columns = columns("metric", "layer", "state", "distance", *VALUE, *NULLS, *VERDICT)
    by_position = True
    nulls = WORDS
    states: ClassVar[Mapping[str, str]]
    shares: ClassVar[tuple[str, ...]]

    def __init__(self, study: Study, scope: str, distances: int) -> None:
        super().__init__(study, scope)
        self.distances = distances
        self.sums = Overlaps.zeros(UNITS, len(self.shape.layers), len(self.states), distances)
        self.row_nulls = study.watch(RowNulls)

    def frame(self, bootstrap: Bootstrap) -> pl.DataFrame:
        """Each metric by layer, state (all of them first) and distance; n: pairs."""
        layered = [with_total(array, 1) for array in self.sums]
        sums = Overlaps(*(np.concatenate([ordered_sum(array, 2)[:, :, None], array], axis=2) for array in layered))
        classes = [["all"], *([name] for name in self.states.values())]
        axes: Axes = {"state": ["all", *self.states], "distance": range(1, self.distances + 1)}
        grids: list[Grid] = []
        for metric in self.shares:
            values = bootstrap.columns(*sums.shares()[metric]) | {"n": ordered_sum(sums.pairs, 0)}
            values |= self.row_nulls.columns(metric, classes)
            grids.append(({"metric": [metric], "layer": self.shape.labels, **axes}, values))
        return self.tidy(*grids)
