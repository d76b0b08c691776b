"""In which order a block's positions are accepted. G = bootstrap units."""

from __future__ import annotations

import numpy as np
import polars as pl

from analysis.metrics.kernels.decoding import order_sums
from analysis.metrics.shared.bootstrap import Bootstrap
from analysis.metrics.shared.frames import divide, ordered_sum
from analysis.metrics.shared.metric import Metric
from analysis.metrics.shared.settings import UNITS, VALUE, VERDICT, columns
from analysis.metrics.shared.study import Study
from analysis.metrics.shared.timeline import Timeline


class Order(Metric):
    """Order in which a block's positions are accepted.

    ``rank_correlation``: Spearman's, of position against step, mean over blocks; 1 is left to right, as a model that
    writes one token after the other. ``left_to_right``: share of accepted tokens among the leftmost masked positions,
    as many as the step accepts; null: any order.
    """

    name, place = "order", 150
    columns = columns("metric", *VALUE, "null_independent", *VERDICT)
    by_position = True
    routed = False
    reason = "No token is accepted in these forwards, as far as the tokens table says."
    nulls = {"independent": "any order"}
    headline = {"acceptance order: rank correlation": {"metric": "rank_correlation"}}

    def __init__(self, study: Study, scope: str) -> None:
        super().__init__(study, scope)
        self.ranked, self.taken, self.leftmost = (np.zeros(UNITS, np.int64) for _ in range(3))
        self.correlation, self.expected = np.zeros(UNITS), np.zeros(UNITS)

    def begin(self, times: Timeline) -> None:
        if times.final is not None:
            sums = self.ranked, self.correlation, self.taken, self.leftmost, self.expected
            order_sums(times.state, times.final[0], times.run_offsets, times.run_unit, *sums)

    def frame(self, bootstrap: Bootstrap) -> pl.DataFrame:
        """Both; n: blocks, tokens."""
        expected = divide(ordered_sum(self.expected, 0), ordered_sum(self.taken, 0))
        rank, left = bootstrap.columns(self.correlation, self.ranked), bootstrap.columns(self.leftmost, self.taken)
        return self.tidy(
            ({"metric": ["rank_correlation"]}, rank | {"null_independent": np.zeros(1)}),
            ({"metric": ["left_to_right"]}, left | {"null_independent": expected}),
        )
