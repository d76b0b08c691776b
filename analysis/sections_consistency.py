"""The report's section on consistency: tables, charts with their nulls, and sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import altair as alt
import polars as pl

from analysis import charts_consistency, curves, findings_consistency
from analysis.metrics.result import ConsistencyResult
from analysis.page import Column, Page, bullets, heading, pair, paragraph, table
from analysis.sections_seeds import Recordings, panel
from analysis.summary import TraceSummary

NULLS = (
    "A null says what a figure would be without the consistency it stands for: with a static list of experts, with rows drawn "
    "independently, or with another block. A figure beats its null where its whole interval over requests does."
)
NONE = "No consistency analysis was passed to this report."

HEADLINE = (
    Column("figure", meaning="all layers together"),
    Column("value", "three"),
    Column("null", "three", "the null hardest to beat"),
    Column("beaten", meaning="whether the whole interval lies on the consistent side of every null"),
    Column("95% interval", meaning="bootstrap over requests"),
    Column("which null", meaning="what the null is"),
    Column("n", "count", "pairs, rows, forwards or blocks averaged, over all layers"),
)

LAYERS = (
    Column("layer", "count", "as numbered in the model"),
    Column("next step: Jaccard", "three", "of the same position's experts"),
    Column("null", "three", "the null hardest to beat"),
    Column("next step: cosine", "three", "of the block's expert counts"),
    Column("null", "three", "the null hardest to beat"),
    Column("unique experts", "two", "of the block's rows in a denoise forward"),
    Column("null", "two", "as many independent rows of the same popularity"),
    Column("their CV", "three", "deviation over mean of the unique experts, over forwards"),
    Column("load: Gini", "three", "0 even, 1 all on one expert"),
    Column("load: CV", "three", "deviation over mean of the load, over experts"),
    Column("hot", "count", "experts with at least twice an even share"),
    Column("dead", "count", "experts never used"),
    Column("foretold", "percent", "experts guessed from the layer before"),
)
_UNIQUE = {"scope": "block", "state": "all"}
BY_LAYER: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("overlap", "value", {"metric": "jaccard", "state": "all", "distance": 1}),
    ("overlap", "null", {"metric": "jaccard", "state": "all", "distance": 1}),
    ("cosine", "value", {"scope": "block", "distance": 1}),
    ("cosine", "null", {"scope": "block", "distance": 1}),
    ("unique", "value", {"metric": "unique_mean", **_UNIQUE}),
    ("unique", "null_independent", {"metric": "unique_mean", **_UNIQUE}),
    ("unique", "value", {"metric": "unique_cv", **_UNIQUE}),
    ("balance", "value", {"metric": "gini"}),
    ("balance", "value", {"metric": "load_cv"}),
    ("balance", "value", {"metric": "hot_experts"}),
    ("balance", "value", {"metric": "dead_experts"}),
    ("predictability", "value", {"metric": "recall"}),
)
"""Frame, column and rows behind each column of :data:`LAYERS` after the first."""

Draw = Callable[[pl.DataFrame], alt.TopLevelMixin]
PANELS: tuple[tuple[str, Callable[[pl.DataFrame], pl.DataFrame], Draw, str], ...] = (
    ("overlap", curves.overlap_by_distance, charts_consistency.overlap_by_distance, "distance"),
    ("overlap", curves.overlap_by_layer, charts_consistency.overlap_by_layer, "layer"),
    ("settling", curves.settling, charts_consistency.settling, "step"),
    ("cosine", curves.cosine, charts_consistency.cosine, "distance"),
    ("drift", curves.drift, charts_consistency.drift, "distance"),
    ("survival", curves.survival, charts_consistency.survival, "distance"),
    ("survival", curves.residency, charts_consistency.residency, "distance"),
    ("working_set", curves.working_set, charts_consistency.working_set, "length"),
    ("growth", curves.growth, charts_consistency.growth, "number"),
    ("spatial", curves.spatial, charts_consistency.spatial, "distance"),
    ("predictability", curves.predictability, charts_consistency.predictability, "layer"),
    ("acceptance", curves.acceptance, charts_consistency.acceptance, ""),
    ("confidence", curves.confidence, charts_consistency.confidence, ""),
    ("calibration", curves.calibration, charts_consistency.calibration, ""),
)
"""Frame, what makes a curve of it, what draws that, and what its x axis counts where points are held against nulls."""


def consistency(out: Page, traces: Sequence[TraceSummary], recordings: Sequence[Recordings]) -> None:
    """Headline figures with their nulls, how they go with distance, layer, state and rows, and across recordings."""
    parts = [part for several in recordings for part in panel(out, several)]
    for trace in traces:
        if trace.consistency is not None:
            parts += [heading(trace.name), *_consistency_panel(out, trace.consistency)]
    if parts:
        parts.insert(0, paragraph(NULLS, "note"))
    out.section("consistency", "Consistency", *(parts or [paragraph(NONE, "empty")]))


def _consistency_panel(out: Page, result: ConsistencyResult) -> list[str]:
    rows = result.headline()
    parts = []
    if rows:
        parts.append(table(HEADLINE, [_headline_row(row) for row in rows]))
    lost = findings_consistency.unbeaten_findings(result)
    drawn_frames = {name for name, *_ in PANELS}
    missing = [why for name, why in result.reasons.items() if name not in drawn_frames]
    notes = [*lost, *dict.fromkeys(missing), *result.notes]
    if notes:
        parts.append(bullets(notes))
    layers = _by_layer(result)
    if layers:
        parts.append(table(LAYERS, layers))
    drawn = [made for name, gather, draw, noun in PANELS for made in _panel(out, result, name, gather, draw, noun)]
    return [*parts, pair(*drawn)]


def _by_layer(result: ConsistencyResult) -> list[list[Any]]:
    """Rows of :data:`LAYERS`; none where nothing was measured by layer."""
    measured: list[dict[int, Any]] = []
    for name, column, wanted in BY_LAYER:
        frame = result.frames.get(name)
        found: dict[int, Any] = {}
        if frame is not None and frame.height:
            frame = curves.hardest(frame) if column == "null" else frame
            frame = frame.filter(pl.col("layer").is_not_null(), **wanted)
            found = dict(frame.select("layer", column).iter_rows())
        measured.append(found)
    return [[layer, *(found.get(layer) for found in measured)] for layer in sorted(set().union(*measured))]


def _headline_row(row: dict[str, Any]) -> list[Any]:
    # An indented figure belongs to the one above it.
    figure = row["figure"]
    name = f"– {figure.strip()}" if figure.startswith(" ") else figure
    null = curves.null_words(row["frame"], row["null_name"]) if row["null_name"] else None
    beats = {True: "yes", False: "no", None: None}[row["beats_null"]]
    interval = f"{row['low']:,.3f} to {row['high']:,.3f}" if row["low"] is not None else None
    return [name, row["value"], row["null"], beats, interval, null, row["n"]]


def _panel(
    out: Page,
    result: ConsistencyResult,
    name: str,
    gather: Callable[[pl.DataFrame], pl.DataFrame],
    draw: Draw,
    noun: str,
) -> list[str]:
    """A chart of one frame, or why there is none; nothing where the frame was not asked for."""
    if name not in result.frames:
        return []
    curve = gather(result.frames[name]) if result.frames[name].height else pl.DataFrame()
    if curve.is_empty():
        reason = result.reasons.get(name, "The analysis has no row of the kind this chart draws.")
        return [paragraph(f"{name.capitalize()}: {reason}", "empty")]
    return [out.chart(draw(curve), curves.unbeaten(curve, noun) if noun else "")]
