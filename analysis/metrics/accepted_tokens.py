"""How many tokens a step accepts. P = parts (denoise forwards of a request), G = bootstrap units."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from analysis.curves import Chart
from analysis.metrics.shared.bootstrap import Bootstrap
from analysis.metrics.shared.metric import Metric
from analysis.metrics.shared.settings import UNITS, VALUE, columns
from analysis.metrics.shared.study import Study
from analysis.metrics.shared.timeline import Timeline

STEPS = 256
"""Steps of a block told apart at most; the last gathers those after it."""


class ByStep(Chart):
    """Tokens a step accepts, by its number in the block: ``step``, ``value``, ``low``, ``high``, ``n`` (blocks that take
    the step)."""

    def curve(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The rows that are about one step."""
        steps = frame.filter(pl.col("metric") == "accepted_per_step").drop_nulls("step").sort("step")
        return steps.select("step", *VALUE, "n")

    def draw(self, curve: pl.DataFrame) -> Any:
        """A line with its interval."""
        import altair as alt

        from analysis import charts_consistency as drawing
        from analysis import theme

        base = alt.Chart(drawing.bounded(curve, self.title)).encode(
            x=alt.X("step:Q", title=self.x, axis=drawing.whole_numbers(curve, "step")),
            tooltip=[
                alt.Tooltip("step:Q", title="step"),
                *drawing.figures("tokens accepted"),
                alt.Tooltip("n:Q", title="blocks that take the step", format=","),
            ],
        )
        drawn = base.encode(y=drawing.axis(self))
        lines = drawn.mark_line(color=theme.VERMILLION), drawn.mark_point(color=theme.VERMILLION, filled=True)
        band = [drawing.band(base, theme.VERMILLION)] if curve["low"].count() else []
        return drawing.finish(alt.layer(*band, *lines), self.title, f"{self.subtitle} {drawing.INTERVAL}")


class Acceptance(Metric):
    """Tokens accepted by a step (by its number, and null for any), accepted by a block, and steps of a block."""

    name, place = "acceptance", 140
    columns = columns("metric", "step", *VALUE, "n")
    routed = False
    headline = {"tokens accepted a step": {"metric": "accepted_per_step", "step": None}}
    charts = (
        ByStep(
            title="Tokens accepted by each step",
            subtitle="Mean over the blocks that take so many steps. Overlap falls as steps accept more.",
            at="step",
            x="denoise step inside the block",
            y="tokens accepted a step",
            zero=True,
        ),
    )

    def __init__(self, study: Study, scope: str) -> None:
        super().__init__(study, scope)
        steps = min(max(self.shape.block_length, 1), STEPS)
        self.parts, self.accepted = np.zeros((UNITS, steps), np.int64), np.zeros((UNITS, steps), np.int64)
        self.blocks = np.zeros(UNITS, np.int64)

    def begin(self, times: Timeline) -> None:
        places = times.unit, np.clip(times.step, 0, self.parts.shape[1] - 1)
        np.add.at(self.parts, places, 1)
        np.add.at(self.accepted, places, times.accepted)
        np.add.at(self.blocks, times.run_unit, 1)

    def frame(self, bootstrap: Bootstrap) -> pl.DataFrame:
        """accepted_per_step by step, then whole, accepted_per_block and steps_per_block; n: steps, blocks."""
        parts, accepted, blocks = (array[:, None] for array in (self.parts.sum(1), self.accepted.sum(1), self.blocks))
        figures: list[tuple[str, np.ndarray, np.ndarray, Any]] = [
            ("accepted_per_step", self.accepted, self.parts, range(self.parts.shape[1])),
            ("accepted_per_step", accepted, parts, [None]),
            ("accepted_per_block", accepted, blocks, [None]),
            ("steps_per_block", parts, blocks, [None]),
        ]
        known = self.study.totals.accepted_known
        return self.tidy(
            *(
                ({"metric": [metric], "step": steps}, bootstrap.columns(top, bottom))
                for metric, top, bottom, steps in figures
                if known or not metric.startswith("accepted")
            )
        )
