"""Figures of decoding itself: tokens a step accepts, in which order, and what confidence says of the final token.

P = parts (denoise forwards of a request), S = positions of a block, G = bootstrap units.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from analysis.metrics.bootstrap import Bootstrap, beats, divide, grid_frame, ordered_sum
from analysis.metrics.decoding_kernels import confidence_sums, final_tokens, order_sums
from analysis.metrics.settings import STANDARD, UNITS, Settings
from analysis.metrics.stream import LayerView, Shape
from analysis.metrics.timeline import Timeline

_TAIL = {name: STANDARD[name] for name in ("value", "low", "high")}
ACCEPTANCE_COLUMNS = {"metric": pl.String, "step": pl.Int32, **_TAIL, "n": pl.Int64}
ORDER_COLUMNS = {
    "metric": pl.String,
    **_TAIL,
    "null_independent": pl.Float64,
    "n": pl.Int64,
    "beats_null": pl.Boolean,
}
CONFIDENCE_COLUMNS = {
    "metric": pl.String,
    "steps_before": pl.Int32,
    **_TAIL,
    "confidence": pl.Float64,
    "n": pl.Int64,
}
CALIBRATION_COLUMNS = {
    "metric": pl.String,
    "rows": pl.String,
    "bin": pl.Int32,
    "bin_low": pl.Float64,
    "bin_high": pl.Float64,
    "confidence": pl.Float64,
    **_TAIL,
    "n": pl.Int64,
}
STEPS = 256
"""Steps of a block told apart at most; the last gathers those after it."""


class Decoding:
    """Acceptance, its order, and confidence against the final token. Needs no layer."""

    def __init__(self, shape: Shape, settings: Settings) -> None:
        self.settings = settings
        steps = min(max(shape.block_length, 1), STEPS)
        self.parts, self.accepted = np.zeros((UNITS, steps), np.int64), np.zeros((UNITS, steps), np.int64)
        self.blocks, self.accepted_known = np.zeros(UNITS, np.int64), True
        self.ranked, self.correlation = np.zeros(UNITS, np.int64), np.zeros(UNITS)
        self.taken, self.leftmost, self.expected = np.zeros(UNITS, np.int64), np.zeros(UNITS, np.int64), np.zeros(UNITS)
        lags = (UNITS, settings.lags + 1)
        self.guesses, self.changed, self.sure = np.zeros(lags, np.int64), np.zeros(lags, np.int64), np.zeros(lags)
        bins = (UNITS, 2, settings.bins)
        self.binned, self.right, self.confidence = np.zeros(bins, np.int64), np.zeros(bins, np.int64), np.zeros(bins)

    def begin(self, times: Timeline) -> None:
        last = self.parts.shape[1] - 1
        places = times.unit, np.clip(times.step, 0, last)
        np.add.at(self.parts, places, 1)
        np.add.at(self.accepted, places, times.accepted)
        self.accepted_known &= bool((times.accepted >= 0).all())
        np.add.at(self.blocks, times.run_unit, 1)
        tokens = times.segment.tokens
        if tokens is None or not times.grid.size or not len(tokens.position):
            return

        def placed(column: np.ndarray) -> np.ndarray:
            return np.ascontiguousarray(column[times.grid])

        # Absent positions read the last row; their state keeps every kernel from looking at it.
        offsets, unit, state = times.run_offsets, times.run_unit, times.state
        predicted = placed(tokens.predicted_id)
        when, final = final_tokens(state, placed(tokens.accepted), predicted, placed(tokens.token_id), offsets)
        order_sums(state, when, offsets, unit, self.ranked, self.correlation, self.taken, self.leftmost, self.expected)
        rows = predicted, placed(tokens.confidence).astype(np.float64)
        lagged, binned = (self.guesses, self.changed, self.sure), (self.binned, self.right, self.confidence)
        confidence_sums(state, *rows, when, final, offsets, unit, *lagged, *binned)

    def add(self, view: LayerView) -> None:
        pass

    def end(self) -> None:
        pass

    def frames(self, bootstrap: Bootstrap) -> dict[str, pl.DataFrame]:
        """The family's frames by name."""
        return {
            "acceptance": self.acceptance_frame(bootstrap),
            "order": self.order_frame(bootstrap),
            "confidence": self.confidence_frame(bootstrap),
            "calibration": self.calibration_frame(bootstrap),
        }

    def acceptance_frame(self, bootstrap: Bootstrap) -> pl.DataFrame:
        """accepted_per_step, at each step of a block and (step null) at any; accepted_per_block; steps_per_block."""
        units = bootstrap.units
        parts, accepted, blocks = self.parts[:units], self.accepted[:units], self.blocks[:units]
        all_parts, all_accepted = ordered_sum(parts, 1), ordered_sum(accepted, 1)
        rows: list[tuple[str, np.ndarray, np.ndarray, Any]] = [
            ("accepted_per_step", accepted, parts, range(parts.shape[1]))
        ]
        rows += [
            (name, top[:, None], bottom[:, None], (None,))
            for name, top, bottom in (
                ("accepted_per_step", all_accepted, all_parts),
                ("accepted_per_block", all_accepted, blocks),
                ("steps_per_block", all_parts, blocks),
            )
        ]
        frames = []
        for metric, top, bottom, steps in rows:
            if metric.startswith("accepted") and not self.accepted_known:
                continue
            value, low, high = bootstrap.ratio(top, bottom)
            columns = {"value": value, "low": low, "high": high, "n": ordered_sum(bottom, 0)}
            frames.append(grid_frame({"metric": [metric], "step": steps}, columns, {"step": pl.Int32}))
        return pl.concat(frames).select(list(ACCEPTANCE_COLUMNS))

    def order_frame(self, bootstrap: Bootstrap) -> pl.DataFrame:
        """rank_correlation: Spearman's, of position against the step of acceptance, mean over blocks (1 = left to
        right, null 0). left_to_right: share of accepted tokens that stood among the leftmost masked positions, as many
        as the step accepts (null: any order, by formula)."""
        units = bootstrap.units
        taken = self.taken[:units]
        expected = divide(ordered_sum(self.expected[:units], 0), ordered_sum(taken, 0))
        rows = (
            ("rank_correlation", self.correlation[:units], self.ranked[:units], np.zeros(1)),
            ("left_to_right", self.leftmost[:units], taken, expected),
        )
        frames = []
        for metric, top, bottom, null in rows:
            value, low, high = bootstrap.ratio(top, bottom)
            columns = {"value": value, "low": low, "high": high, "n": ordered_sum(bottom, 0), "null_independent": null}
            frames.append(grid_frame({"metric": [metric]}, columns))
        return beats(pl.concat(frames)).select(list(ORDER_COLUMNS))

    def confidence_frame(self, bootstrap: Bootstrap) -> pl.DataFrame:
        """changed: share of masked rows whose predicted token is not the one finally accepted, by steps before the
        acceptance; beside it the mean confidence of those rows."""
        guesses, changed, sure = (a[: bootstrap.units] for a in (self.guesses, self.changed, self.sure))
        value, low, high = bootstrap.ratio(changed, guesses)
        counted = ordered_sum(guesses, 0)
        columns = {"value": value, "low": low, "high": high, "n": counted}
        columns["confidence"] = divide(ordered_sum(sure, 0), counted)
        axes = {"metric": ["changed"], "steps_before": range(guesses.shape[1])}
        extra = {"steps_before": pl.Int32, "confidence": pl.Float64}
        return grid_frame(axes, columns, extra).select(list(CONFIDENCE_COLUMNS))

    def calibration_frame(self, bootstrap: Bootstrap) -> pl.DataFrame:
        """final_share: share of masked rows whose predicted token is the one finally accepted, by confidence, and (bin
        null) over all; calibration_error: mean over rows of |share - mean confidence| of their bin. rows: "all" masked
        rows, or "waiting", those their own forward does not accept."""
        units, bins = bootstrap.units, self.settings.bins
        binned, right, confidence = (a[:units] for a in (self.binned, self.right, self.confidence))
        value, low, high = bootstrap.ratio(right, binned)
        counted = ordered_sum(binned, 0)
        edges = np.arange(bins + 1) / bins
        columns = {"value": value, "low": low, "high": high, "n": counted, "bin_low": edges[:-1], "bin_high": edges[1:]}
        columns["confidence"] = divide(ordered_sum(confidence, 0), counted)
        extra = {name: CALIBRATION_COLUMNS[name] for name in ("rows", "bin", "bin_low", "bin_high", "confidence")}
        rows = ("all", "waiting")
        frames = [grid_frame({"metric": ["final_share"], "rows": rows, "bin": range(bins)}, columns, extra)]
        whole = [ordered_sum(array, 2) for array in (binned, right, confidence)]
        mean = divide(ordered_sum(whole[2], 0), ordered_sum(whole[0], 0))

        def error(count: np.ndarray, hit: np.ndarray, sure: np.ndarray) -> np.ndarray:
            return divide(ordered_sum(np.abs(hit - sure), 2), ordered_sum(count, 2))

        pooled = {
            "final_share": bootstrap.ratio(whole[1], whole[0]),
            "calibration_error": bootstrap.statistic(error, binned, right, confidence),
        }
        for metric, (middle, bottom, top) in pooled.items():
            columns = {"value": middle, "low": bottom, "high": top, "n": ordered_sum(whole[0], 0), "confidence": mean}
            columns = {name: array[:, None] for name, array in columns.items()}
            columns |= {"bin_low": np.full((1, 1), np.nan), "bin_high": np.full((1, 1), np.nan)}
            frames.append(grid_frame({"metric": [metric], "rows": rows, "bin": [None]}, columns, extra))
        return pl.concat([f.select(list(CALIBRATION_COLUMNS)) for f in frames])
