"""What a layer's experts say of the next one's. L = layers, E = experts, M = sampled rows, G = bootstrap units."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import polars as pl

from analysis.curves import Beside, null_of
from analysis.metrics.kernels.layers import pairing_sums, predict_hits
from analysis.metrics.shared.bootstrap import Bootstrap
from analysis.metrics.shared.frames import divide, ordered_sum, with_total
from analysis.metrics.shared.load import Load
from analysis.metrics.shared.metric import LayerColumn, Metric, Row
from analysis.metrics.shared.result import ConsistencyResult
from analysis.metrics.shared.samples import RowSample
from analysis.metrics.shared.settings import NULLS, UNITS, VALUE, VERDICT, columns
from analysis.metrics.shared.study import Study
from analysis.metrics.shared.timeline import Timeline
from analysis.metrics.shared.view import LayerView

FIGURE = "next layer's experts foretold"
RECALL = {"metric": "recall"}
WORDS = {
    "hot": "the layer's most used experts",
    "independent": "a stranger's experts",
    "shuffle": "the guess for a stranger",
}


class Predictability(Metric):
    """How many of a layer's experts the layer before foretells.

    ``recall``: co-occurrence counts of one half of the requests guess the other half's sampled rows, as many experts
    as the row uses. ``layer`` is the layer guessed. Nulls: its most used experts (hot), the guess for a stranger's row
    (shuffle), the experts of a stranger (independent).

    The guess for a row: the experts e' of largest sum over its experts e of count(e, e') / count(e), ties to the
    lowest id. Counts come from every block row of the requests of one half (odd and even, in order of appearance). A
    stranger is a random row of another block or request. n: experts to guess.
    """

    name, place = "predictability", 120
    columns = columns("metric", "layer", *VALUE, *NULLS, *VERDICT)
    by_position = True
    reason = "Needs routed rows of two adjacent MoE layers in at least two requests: one half predicts the other."
    nulls = WORDS
    headline = {FIGURE: RECALL}
    headline_place = 95
    by_layer = (LayerColumn("foretold", "percent", "experts guessed from the layer before", RECALL),)
    charts = (
        Beside(
            title="How far a layer foretells the next",
            subtitle="Share of a row's experts guessed from its experts in the layer before; half of the requests guess the "
            "other half.",
            at="layer",
            x="layer guessed",
            noun="layer",
            y="experts guessed right",
            percent=True,
            nulls=WORDS,
        ),
    )

    def __init__(self, study: Study, scope: str) -> None:
        super().__init__(study, scope)
        self.load, self.sample = study.watch(Load), study.watch(RowSample)
        steps, experts = max(0, len(self.shape.layers) - 1), self.shape.experts
        self.together = np.zeros((steps, 2, experts, experts), np.uint32)
        self.used = np.zeros((steps, 2, experts), np.int64)

    def begin(self, times: Timeline) -> None:
        self.before: LayerView | None = None

    def layer(self, view: LayerView) -> None:
        before = self.before
        if before is not None and before.index == view.index - 1:
            # UNITS is even, so a unit's parity is that of every request in it.
            rows = view.times.grid, view.times.unit % 2
            sums = self.together[before.index], self.used[before.index]
            pairing_sums(before.ids, before.count, view.ids, view.count, *rows, *sums)
        self.before = view

    def end(self) -> None:
        self.before = None

    def frame(self, bootstrap: Bootstrap) -> pl.DataFrame:
        """By layer guessed."""
        steps, sample = len(self.together), self.sample
        if bootstrap.units < 2:
            return pl.DataFrame(schema=self.columns)
        unit = sample.columns["unit"]
        fold = 1 - unit % 2
        rng = np.random.default_rng(self.settings.seed + 3)
        partner = rng.integers(0, max(1, len(sample)), len(sample))
        apart = sample.other_block(np.arange(len(sample)), partner)
        # Guesses: from the row itself, from a stranger, the popular experts, a stranger's own next experts.
        hits, asked = np.zeros((4, UNITS, steps), np.int64), np.zeros((4, UNITS, steps), np.int64)
        halves = np.stack([ordered_sum(self.load.load[half::2], 0) for half in (0, 1)])
        for step in range(steps):
            before, after = sample.rows(step), sample.rows(step + 1)
            counts = self.together[step], self.used[step], halves[:, step + 1]
            right = predict_hits(*before, *after, fold, partner, *counts)
            known = (after[1] > 0) & (before[1] > 0) & (self.used[step].sum(axis=1)[fold] > 0)
            for guess in range(4):
                counted = known & (apart & (before[1][partner] > 0) if guess in (1, 3) else True)
                np.add.at(hits[guess, :, step], unit[counted], right[guess][counted])
                np.add.at(asked[guess, :, step], unit[counted], after[1][counted].astype(np.int64))
        hits, asked = with_total(hits, 2), with_total(asked, 2)
        shares = divide(ordered_sum(hits, 1), ordered_sum(asked, 1))
        values = bootstrap.columns(hits[0], asked[0])
        values |= {"null_shuffle": shares[1], "null_hot": shares[2], "null_independent": shares[3]}
        return self.tidy(({"metric": ["recall"], "layer": self.shape.labels[1:] if steps else [None]}, values))

    @staticmethod
    def findings(result: ConsistencyResult, rows: Mapping[str, Row]) -> list[str]:
        """How much a layer foretells, against the best of the other guesses."""
        if FIGURE not in rows:
            return []
        row = rows[FIGURE]
        against = f", against {100 * row['null']:.0f}% by {null_of(row)}" if row["null"] is not None else ""
        return [f"A layer foretells {100 * row['value']:.0f}% of the next one's experts{against}."]
