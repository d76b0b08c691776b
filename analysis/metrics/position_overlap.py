"""Overlap of the experts of two positions in one forward."""

from __future__ import annotations

from analysis.curves import Series
from analysis.metrics.kernels.sets import position_sums
from analysis.metrics.shared.overlaps import PairOverlap
from analysis.metrics.shared.study import Study
from analysis.metrics.shared.view import LayerView

NEXT = {"metric": "jaccard", "distance": 1}


class Spatial(PairOverlap):
    """Overlap of the K-sets of two positions of a block in one forward, by their distance and state.

    Metrics and nulls as in :func:`overlap`; states: both ``masked``, ``mixed``, both ``decoded``, and ``all``.
    """

    name, place = "spatial", 70
    reason = "No denoise forward routes two positions of its block."
    # In the order in which the kernel tells them apart.
    states = {"masked": "masked", "mixed": "mixed", "decoded": "known"}
    shares = ("jaccard", "kept")
    headline = {
        "neighbouring positions: Jaccard": {**NEXT, "state": "all"},
        "  both masked": {**NEXT, "state": "masked"},
        "  one masked, one known": {**NEXT, "state": "mixed"},
    }
    charts = (
        Series(
            title="Overlap of neighbouring positions",
            subtitle="Jaccard of the experts of two positions of a block in one denoise forward.",
            where={"metric": "jaccard"},
            at="distance",
            x="distance, positions",
            noun="distance",
            series="state",
            words={"all": "all pairs", "masked": "both masked", "mixed": "one masked", "decoded": "both known"},
            legend="pairs",
        ),
    )

    def __init__(self, study: Study, scope: str) -> None:
        super().__init__(study, scope, max(1, min(study.settings.positions, study.shape.block_length - 1)))

    def layer(self, view: LayerView) -> None:
        times = view.times
        position_sums(view.bits, view.size, times.state, times.unit, view.index, *self.sums[:4])
