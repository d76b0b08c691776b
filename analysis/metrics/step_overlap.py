"""Overlap of one position's experts from step to step."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from analysis.curves import Series, against
from analysis.metrics.kernels.sets import step_sums
from analysis.metrics.shared.metric import LayerColumn, Row
from analysis.metrics.shared.overlaps import PairOverlap
from analysis.metrics.shared.result import ConsistencyResult
from analysis.metrics.shared.study import Study
from analysis.metrics.shared.timeline import Timeline
from analysis.metrics.shared.view import LayerView

STEP, FAR = "same position, next step: Jaccard", "same position, farthest step: Jaccard"
MASKED, FLIPPED, KNOWN = "  still masked", "  accepted in between", "  known before and after"
STATES = {
    "all": "all rows",
    "masked": "still masked",
    "accepted": "accepted in between",
    "decoded": "known before and after",
    "remasked": "masked again",
}
NEXT = {"metric": "jaccard", "distance": 1}


class Overlap(PairOverlap):
    """Overlap of the same position's K-set between denoise steps of a block.

    Metrics by layer, state and distance in steps: ``jaccard``; ``kept``, the share of the earlier set's experts that
    are chosen again; ``unchanged``, the share of equal sets. States: ``masked`` in both steps, ``accepted`` in
    between, ``decoded`` (known in both), ``remasked``, and ``all``. n: pairs of rows. Nulls: the layer's K most used
    experts (hot), rows of other blocks (independent), the same position of the request's previous block (shuffle). How
    many tokens a step accepts moves these figures: read them beside :func:`acceptance`.
    """

    name, place = "overlap", 10
    reason = "No block has two denoise forwards that route the same position."
    # In the order in which the kernel tells them apart.
    states = {"masked": "masked", "accepted": "mixed", "remasked": "mixed", "decoded": "known"}
    shares = ("jaccard", "kept", "unchanged")
    headline = {
        STEP: {**NEXT, "state": "all"},
        MASKED: {**NEXT, "state": "masked"},
        FLIPPED: {**NEXT, "state": "accepted"},
        KNOWN: {**NEXT, "state": "decoded"},
        "  share of sets that stay the same": {"metric": "unchanged", "state": "all", "distance": 1},
        FAR: {"metric": "jaccard", "state": "all", "distance": "last"},
    }
    by_layer = (
        LayerColumn("next step: Jaccard", "three", "of the same position's experts", {**NEXT, "state": "all"}),
        LayerColumn("null", "three", "the null hardest to beat", {**NEXT, "state": "all"}, "null"),
    )
    charts = (
        Series(
            title="Overlap from step to step",
            subtitle="Jaccard of the experts of the same position, some denoise steps apart; 1 = the same experts.",
            where={"metric": "jaccard"},
            at="distance",
            x="distance, denoise steps",
            noun="distance",
            series="state",
            words=STATES,
            legend="rows",
        ),
        Series(
            title="Overlap to the next step by layer",
            subtitle="Jaccard of the experts of the same position, one denoise step apart.",
            where=NEXT,
            at="layer",
            x="layer of the model",
            noun="layer",
            series="state",
            words=STATES,
            legend="rows",
        ),
    )

    def __init__(self, study: Study, scope: str) -> None:
        super().__init__(study, scope, study.settings.distances)

    def begin(self, times: Timeline) -> None:
        self.longest = int(np.diff(times.run_offsets).max(initial=0))

    def layer(self, view: LayerView) -> None:
        times = view.times
        runs = times.run_offsets, times.run_unit
        for distance in range(1, min(self.distances, self.longest - 1) + 1):
            step_sums(view.shared(distance), distance, view.size, times.state, *runs, view.index, *self.sums)

    @staticmethod
    def findings(result: ConsistencyResult, rows: Mapping[str, Row]) -> list[str]:
        """How near the next step is and the farthest, and what the acceptance of the token does to it."""
        sentences = []
        if STEP in rows:
            near = rows[STEP]
            sentence = f"A position's experts overlap from step to step with a Jaccard of {near['value']:.2f}"
            sentence += against(near)
            if FAR in rows:
                apart = int(result.frames["overlap"]["distance"].to_numpy().max())
                sentence += f", and {rows[FAR]['value']:.2f} at {apart} steps" if apart > 1 else ""
            accepted = result.summary.get("accepted_per_step")
            sentences.append(
                sentence + (f", at {accepted:.2f} accepted tokens a step." if accepted is not None else ".")
            )
        rest = [f"{rows[name]['value']:.2f} where it is {name.strip()}" for name in (MASKED, KNOWN) if name in rows]
        if FLIPPED in rows and rest:
            flipped = rows[FLIPPED]
            sentences.append(
                f"Where the token is accepted in between it is {flipped['value']:.2f}{against(flipped)}; "
                f"{' and '.join(rest)}."
            )
        return sentences
