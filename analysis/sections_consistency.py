"""The report's section on consistency: tables, charts with their nulls, and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from analysis.curves import Chart, hardest, null_of, unbeaten
from analysis.findings_consistency import unbeaten_findings
from analysis.metrics import ConsistencyResult
from analysis.metrics.shared.metric import metrics
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

LAYER = Column("layer", "count", "as numbered in the model")


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
    lost, drawn_frames = unbeaten_findings(result), {name for name, _ in panels()}
    missing = [why for name, why in result.reasons.items() if name not in drawn_frames]
    notes = [*lost, *dict.fromkeys(missing), *result.notes]
    if notes:
        parts.append(bullets(notes))
    columns, layers = by_layer(result)
    if layers:
        parts.append(table(columns, layers))
    return [*parts, pair(*(made for name, chart in panels() for made in _panel(out, result, name, chart)))]


def panels() -> list[tuple[str, Chart]]:
    """The charts of all metrics in the order of their places, each with the name of its frame."""
    charts = [(metric, chart) for metric in metrics().values() for chart in metric.charts]
    ordered = sorted(charts, key=lambda drawn: drawn[1].place or drawn[0].place)
    return [(metric.name, chart) for metric, chart in ordered]


def by_layer(result: ConsistencyResult) -> tuple[list[Column], list[list[Any]]]:
    """Columns and rows of the table by layer; no rows where nothing was measured by layer."""
    columns, measured = [LAYER], []
    for name, metric in metrics().items():
        for shown in metric.by_layer:
            columns.append(Column(shown.heading, shown.written, shown.meaning))
            frame, by_number = result.frames.get(name), {}
            if frame is not None and frame.height:
                frame = hardest(frame) if shown.column == "null" else frame
                frame = frame.filter(pl.col("layer").is_not_null(), **shown.where)
                by_number = dict(frame.select("layer", shown.column).iter_rows())
            measured.append(by_number)
    return columns, [[layer, *(one.get(layer) for one in measured)] for layer in sorted(set().union(*measured))]


def _headline_row(row: dict[str, Any]) -> list[Any]:
    # An indented figure belongs to the one above it.
    figure = row["figure"]
    name = f"– {figure.strip()}" if figure.startswith(" ") else figure
    null = null_of(row) if row["null_name"] else None
    beats = {True: "yes", False: "no", None: None}[row["beats_null"]]
    interval = f"{row['low']:,.3f} to {row['high']:,.3f}" if row["low"] is not None else None
    return [name, row["value"], row["null"], beats, interval, null, row["n"]]


def _panel(out: Page, result: ConsistencyResult, name: str, chart: Chart) -> list[str]:
    """A chart of one frame, or why there is none; nothing where the frame was not asked for."""
    if name not in result.frames:
        return []
    curve = chart.curve(result.frames[name]) if result.frames[name].height else pl.DataFrame()
    if curve.is_empty():
        reason = result.reasons.get(name, "The analysis has no row of the kind this chart draws.")
        return [paragraph(f"{name.capitalize()}: {reason}", "empty")]
    return [out.chart(chart.draw(curve), unbeaten(curve, chart.noun) if chart.noun else "")]
