"""What the confidence of a prediction says of the token finally accepted. G = bootstrap units."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from analysis.curves import Beside, Chart, line
from analysis.metrics.kernels.decoding import confidence_sums
from analysis.metrics.shared.bootstrap import Bootstrap
from analysis.metrics.shared.frames import divide, ordered_sum
from analysis.metrics.shared.metric import Metric
from analysis.metrics.shared.settings import UNITS, VALUE, columns
from analysis.metrics.shared.study import Study, Watcher
from analysis.metrics.shared.timeline import Timeline

ROWS = {"all": "all masked rows", "waiting": "rows not accepted yet"}
REASON = "No masked row has a confidence and a final token."


class Sums(Watcher):
    """Masked rows up to their acceptance: how many, those whose prediction is right (or changes yet), their confidence.

    ``lagged`` three [G, lags + 1], by steps before the acceptance; ``binned`` three [G, 2, bins], by confidence.
    """

    def __init__(self, study: Study) -> None:
        shapes = (UNITS, study.settings.lags + 1), (UNITS, len(ROWS), study.settings.bins)
        self.lagged, self.binned = (
            (np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape)) for shape in shapes
        )

    def begin(self, times: Timeline) -> None:
        if times.final is not None:
            rows = times.placed("predicted_id"), times.placed("confidence").astype(np.float64), *times.final
            runs = times.run_offsets, times.run_unit
            confidence_sums(times.state, *rows, *runs, *self.lagged, *self.binned)


class ByStep(Beside):
    """The share of predictions that change yet beside the mean confidence."""

    def curve(self, frame: pl.DataFrame) -> pl.DataFrame:
        """One line each."""
        changed = frame.filter(pl.col("metric") == "changed")
        sure = changed.select("steps_before", "n", pl.col("confidence").alias("value"))
        lines = {"predictions that are not final": changed, "mean confidence": sure}
        return pl.concat([line(words, rows, self.at) for words, rows in lines.items()]).drop("beats_null")


class Reliability(Chart):
    """Share of final predictions by mean confidence of a bin: ``rows``, ``confidence``, ``value``, ``low``, ``high``,
    ``n``."""

    def curve(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The bins."""
        bins = (
            frame.filter(pl.col("metric") == "final_share").drop_nulls("bin").filter(pl.col("rows").is_in(list(ROWS)))
        )
        named = pl.col("rows").replace_strict(ROWS, return_dtype=pl.String)
        return bins.select(named, "confidence", *VALUE, "n")

    def draw(self, curve: pl.DataFrame) -> Any:
        """A line a kind of rows, and the diagonal."""
        import altair as alt

        from analysis import charts_consistency as drawing
        from analysis import theme

        names = curve["rows"].unique(maintain_order=True).to_list()
        colour, shape = drawing.named("rows", "rows", names, theme.PALETTE)
        percent = alt.Axis(format="%", tickCount=5)
        base = alt.Chart(drawing.bounded(curve, self.title)).encode(
            x=alt.X("confidence:Q", title=self.x, axis=percent).scale(domain=[0, 1]),
            tooltip=[
                alt.Tooltip("rows:N"),
                alt.Tooltip("confidence:Q", title="mean confidence", format=".1%"),
                *drawing.figures("final", ".1%"),
                alt.Tooltip("n:Q", title="rows", format=","),
            ],
        )
        y = alt.Y("value:Q", title=self.y, axis=percent).scale(domain=[0, 1])
        ends = alt.Chart(pl.DataFrame({"confidence": [0.0, 1.0], "value": [0.0, 1.0]}))
        diagonal = ends.mark_line(color=theme.GREY, strokeDash=[4, 4], strokeWidth=1.4).encode(x="confidence:Q", y=y)
        drawn = base.encode(y=y, color=colour)
        bands = drawing.bands(base, "rows", names, theme.PALETTE)
        points = drawn.mark_point(filled=True).encode(shape=shape)
        chart = alt.layer(diagonal, *bands, drawn.mark_line(), points)
        return drawing.finish(chart, self.title, f"{self.subtitle} {drawing.INTERVAL}")


class _Confident(Metric):
    """A metric of :class:`Sums`."""

    by_position = True
    routed = False
    reason = REASON

    def __init__(self, study: Study, scope: str) -> None:
        super().__init__(study, scope)
        self.sums = study.watch(Sums)


class Confidence(_Confident):
    """Share of masked rows whose predicted token is not the one finally accepted, by steps before the acceptance.

    Beside it the rows' mean confidence.
    """

    name, place = "confidence", 160
    columns = columns("metric", "steps_before", *VALUE, "confidence", "n")
    charts = (
        ByStep(
            title="Confidence against later change",
            subtitle="Rows still masked: is the predicted token the one accepted in the end, and how sure is the model?",
            at="steps_before",
            x="steps before the acceptance",
            y="share, confidence",
            percent=True,
            grey="",
        ),
    )

    def frame(self, bootstrap: Bootstrap) -> pl.DataFrame:
        """By steps before the acceptance; n: rows."""
        guesses, changed, sure = self.sums.lagged
        values = bootstrap.columns(changed, guesses)
        values["confidence"] = divide(ordered_sum(sure, 0), values["n"])
        return self.tidy(({"metric": ["changed"], "steps_before": range(guesses.shape[1])}, values))


class Calibration(_Confident):
    """Confidence against the share of predictions that are final, by confidence bin.

    ``final_share`` by bin and over all (bin null), ``calibration_error`` (mean over rows of their bin's distance).
    Rows: ``all`` masked rows, or ``waiting``, those their own forward does not accept.
    """

    name, place = "calibration", 170
    columns = columns("metric", "rows", "bin", "bin_low", "bin_high", "confidence", *VALUE, "n") | {"rows": pl.String}
    headline = {"confidence: calibration error": {"metric": "calibration_error", "rows": "all"}}
    charts = (
        Reliability(
            title="Confidence against the final token",
            subtitle="Share of predicted tokens that are the ones finally accepted. Grey: as confident as right.",
            at="confidence",
            x="confidence, mean of the bin",
            y="predictions that are final",
        ),
    )

    def frame(self, bootstrap: Bootstrap) -> pl.DataFrame:
        """By rows and bin, then over all bins; n: rows."""
        binned, right, sure = self.sums.binned
        bins = binned.shape[2]
        edges = np.arange(bins + 1) / bins

        def error(count: np.ndarray, hit: np.ndarray, confidence: np.ndarray) -> np.ndarray:
            return divide(ordered_sum(np.abs(hit - confidence), 2), ordered_sum(count, 2))

        def confident(values: dict[str, np.ndarray], total: np.ndarray) -> dict[str, np.ndarray]:
            return values | {"confidence": divide(ordered_sum(total, 0), values["n"])}

        axes = {"metric": ["final_share"], "rows": list(ROWS)}
        by_bin = confident(bootstrap.columns(right, binned), sure) | {"bin_low": edges[:-1], "bin_high": edges[1:]}
        count, hit, total = (ordered_sum(array, 2)[:, :, None] for array in self.sums.binned)
        whole = confident(bootstrap.columns(hit, count), total)
        off = zip(VALUE, bootstrap.statistic(error, binned, right, sure), strict=True)
        wrong = whole | {name: array[:, None] for name, array in off}
        return self.tidy(
            ({**axes, "bin": range(bins)}, by_bin),
            ({**axes, "bin": [None]}, whole),
            ({**axes, "metric": ["calibration_error"], "bin": [None]}, wrong),
        )
