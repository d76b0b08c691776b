"""The load of every expert, and how uneven it is. E = experts."""

from __future__ import annotations

import numpy as np
import polars as pl

from analysis.metrics.shared.bootstrap import Bootstrap
from analysis.metrics.shared.frames import divide, mean, ordered_sum, with_total
from analysis.metrics.shared.load import Load as Sums
from analysis.metrics.shared.metric import LayerColumn, Metric
from analysis.metrics.shared.settings import VALUE, columns
from analysis.metrics.shared.study import Study

BALANCE = ("gini", "load_cv", "entropy_experts", "top_tenth", "hot_experts", "dead_experts")
HOT = 2.0
"""An expert is hot with at least this many times an even share of its layer's load."""


class Load(Metric):
    """Load of every expert: token-slots, share of its layer, share times E, rank from 1, share of forwards that use it.

    Rows of the current block, or all rows where the trace has no tokens table. Ranks: ties to the lowest id.
    """

    name, place = "load", 100
    columns = columns("layer", "expert", "load", "share", "relative", "rank", "activity")

    def __init__(self, study: Study, scope: str) -> None:
        super().__init__(study, scope)
        self.sums = study.watch(Sums)

    def frame(self, bootstrap: Bootstrap) -> pl.DataFrame:
        """One row per layer that is used and expert."""
        total, steps = self.sums.total, self.sums.steps[:, None]
        experts = total.shape[1]
        order = np.argsort(-total, axis=1, kind="stable")
        rank = np.empty_like(order)
        np.put_along_axis(rank, order, np.broadcast_to(np.arange(1, experts + 1), order.shape), 1)
        share = divide(total, ordered_sum(total, 1)[:, None])
        values = {"load": total, "share": share, "relative": share * experts, "rank": rank}
        values |= {"activity": divide(self.sums.active, steps), "n": steps}
        return self.tidy(({"layer": self.shape.layers, "expert": range(experts)}, values))


class Balance(Metric):
    """Skew of each layer's load, and the mean layer.

    ``gini``; ``load_cv``, deviation over mean; ``entropy_experts``, as many evenly used experts would be as mixed;
    ``top_tenth``, the share of the busiest tenth; ``hot_experts``, at twice an even share or more; ``dead_experts``,
    never used. n: token-slots. Uneven resamples make these figures larger, so an interval may lie above its value.
    """

    name, place = "balance", 110
    columns = columns("metric", "scope", "layer", *VALUE, "n")
    headline = {"load skew: Gini": {"metric": "gini"}, "experts never used, a layer": {"metric": "dead_experts"}}
    by_layer = (
        LayerColumn("load: Gini", "three", "0 even, 1 all on one expert", {"metric": "gini"}),
        LayerColumn("load: CV", "three", "deviation over mean of the load, over experts", {"metric": "load_cv"}),
        LayerColumn("hot", "count", "experts with at least twice an even share", {"metric": "hot_experts"}),
        LayerColumn("dead", "count", "experts never used", {"metric": "dead_experts"}),
    )

    def __init__(self, study: Study, scope: str) -> None:
        super().__init__(study, scope)
        self.sums = study.watch(Sums)

    def frame(self, bootstrap: Bootstrap) -> pl.DataFrame:
        """Each figure by layer."""

        def figures(loads: np.ndarray) -> np.ndarray:
            by_layer = balance_figures(loads)
            return np.concatenate([by_layer, mean(np.moveaxis(by_layer, 1, -1))[:, None]], axis=1)

        measured = bootstrap.statistic(figures, self.sums.load)
        values = {name: array.T[:, None] for name, array in zip(VALUE, measured, strict=True)}
        values["n"] = with_total(ordered_sum(self.sums.total, 1), 0)
        return self.tidy(({"metric": BALANCE, "scope": [self.scope], "layer": self.shape.labels}, values))


def balance_figures(load: np.ndarray) -> np.ndarray:
    """The figures of :data:`BALANCE` of loads [..., E], stacked on the last axis; NaN without load.

    gini: 0 even, near 1 when one expert has everything. Source: Gini (1912), as sum_i (2 i - n - 1) x_i / (n sum x)
    over x sorted upwards, i from 1: one division of whole numbers. load_cv: standard deviation over mean.
    entropy_experts: exp of the entropy. top_tenth: rounded up. hot_experts: those at :data:`HOT` times an even share.
    """
    experts = load.shape[-1]
    counts = load.astype(np.float64)
    total = ordered_sum(counts, -1)
    ordered = np.sort(counts, axis=-1)
    share = divide(counts, total[..., None])
    logs = np.log(np.where(share > 0, share, 1))
    hot, dead = (
        np.where(total > 0, ordered_sum(which.astype(np.float64), -1), np.nan)
        for which in (counts * experts >= HOT * total[..., None], counts == 0)
    )
    figures = [
        divide(ordered_sum(ordered * (2 * np.arange(1, experts + 1) - experts - 1), -1), experts * total),
        # Of whole numbers up to the root: E sum x^2 - (sum x)^2 is E^2 times the variance.
        divide(np.sqrt(np.maximum(experts * ordered_sum(counts * counts, -1) - total * total, 0)), total),
        np.exp(-ordered_sum(share * logs, -1)),
        divide(ordered_sum(ordered[..., ::-1][..., : -(-experts // 10)], -1), total),
        hot,
        dead,
    ]
    return np.stack(figures, axis=-1)
