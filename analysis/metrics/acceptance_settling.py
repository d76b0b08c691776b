"""How the routing of a position settles after its token is accepted."""

from __future__ import annotations

import numpy as np
import polars as pl

from analysis.curves import Series
from analysis.metrics.kernels.sets import settling_sums
from analysis.metrics.shared.bootstrap import Bootstrap
from analysis.metrics.shared.frames import Axes, with_total
from analysis.metrics.shared.metric import Metric
from analysis.metrics.shared.nulls import WORDS, RowNulls
from analysis.metrics.shared.settings import NULLS, UNITS, VALUE, VERDICT, columns
from analysis.metrics.shared.study import Study
from analysis.metrics.shared.view import LayerView

REFERENCES = {
    "previous": ("masked", "mixed", "known"),
    "accepting": ("mixed", "mixed", "mixed"),
    "first_known": ("known", "known", "known"),
    "final": ("mixed", "known", "known"),
}
"""What a set is held against, with the class of the nulls at lag 0 (still a mask), lag 1 and later (real tokens)."""


class Settling(Metric):
    """How routing settles after a position is accepted.

    Jaccard of the position's set ``lag`` steps after its acceptance with a reference. Lag 0 is the accepting forward,
    the last that sees a mask; lag 1 the first that sees the token. References: ``previous`` step; ``accepting``, the
    set at lag 0; ``first_known``, that at lag 1; ``final``, the position's last denoise forward of the block.
    Acceptances by the last forward of a block have no later denoise forward and are not counted.
    """

    name, place = "settling", 20
    columns = columns("metric", "layer", "reference", "lag", *VALUE, *NULLS, *VERDICT)
    by_position = True
    reason = "No block has a denoise forward after one that accepts a position."
    nulls = WORDS
    charts = (
        Series(
            title="How routing settles after acceptance",
            subtitle="Jaccard of a position's experts with those of a reference step. Step 0 accepts it and is the last to "
            "see a mask; step 1 is the first to see the token.",
            at="lag",
            x="steps since the acceptance",
            noun="step",
            series="reference",
            words={
                "previous": "the step before",
                "accepting": "the accepting step",
                "first_known": "the first step that sees the token",
                "final": "the last step of the block",
            },
            legend="held against",
        ),
    )

    def __init__(self, study: Study, scope: str) -> None:
        super().__init__(study, scope)
        cells = (UNITS, len(self.shape.layers), len(REFERENCES), self.settings.lags + 1)
        self.pairs, self.jaccard = np.zeros(cells, np.int64), np.zeros(cells)
        self.row_nulls = study.watch(RowNulls)

    def layer(self, view: LayerView) -> None:
        times = view.times
        runs = times.run_offsets, times.run_unit
        settling_sums(view.bits, view.size, times.state, *runs, view.index, self.pairs, self.jaccard)

    def frame(self, bootstrap: Bootstrap) -> pl.DataFrame:
        """Jaccard by layer, reference and lag; n: pairs of rows."""
        lags = range(self.settings.lags + 1)
        classes = [[by_lag[min(lag, 2)] for lag in lags] for by_lag in REFERENCES.values()]
        values = bootstrap.columns(with_total(self.jaccard, 1), with_total(self.pairs, 1))
        axes: Axes = {"metric": ["jaccard"], "layer": self.shape.labels, "reference": list(REFERENCES), "lag": lags}
        return self.tidy((axes, values | self.row_nulls.columns("jaccard", classes)))
