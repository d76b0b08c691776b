"""The report's section on TIDE's refresh interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from analysis import charts_interval
from analysis.figures import shown_in
from analysis.page import Column, Page, bullets, heading, pair, paragraph, table
from analysis.summary import TraceSummary

NONE = (
    "No refresh interval was computed for this report; it is where a replay under tide names a machine, and "
    "moetrace interval finds it for any budget."
)
INTERVALS = (
    Column("choice", meaning="what chooses the interval"),
    Column("interval", "count", "refresh interval, denoise steps"),
    Column("slower than the best", "percent", "the regret"),
    *(Column(figure.heading, figure.written, figure.meaning) for figure in shown_in("interval")),
)
CHOICES = {
    "program": "TIDE's program, misses measured",
    "memoryless": "TIDE's program, memoryless misses",
    "best": "replaying every interval",
}


def interval(out: Page, traces: Sequence[TraceSummary]) -> None:
    """TIDE's program, the replayed latency and what following the program costs."""
    parts = []
    for trace in traces:
        for result in trace.intervals:
            parts += [
                heading(f"{trace.name}: {result.budget} experts a layer on {result.hardware}"),
                paragraph(_chosen(result)),
                table(INTERVALS, _choice_rows(result)),
                pair(*(out.chart(draw(result)) for draw in charts_interval.ALL)),
                *([bullets(result.notes)] if result.notes else []),
            ]
    out.section("interval", "Interval", *(parts or [paragraph(NONE, "empty")]))


def _chosen(result: Any) -> str:
    cost = f"{100 * result.regret:.1f}% slower" if result.regret > 0 else "as fast"
    return (
        f"With {100 * result.drift:.1f}% of the wanted set changing a step, TIDE's program chooses an interval of "
        f"{result.program}; of the intervals replayed, {result.best} is the fastest. Following the program is {cost} "
        "(estimate)."
    )


def _choice_rows(result: Any) -> list[list[Any]]:
    frame = result.frame
    rows = []
    for name, words in CHOICES.items():
        found = frame.filter(pl.col("refresh_interval") == getattr(result, name)).row(0, named=True)
        keys = ("refresh_interval", "slowdown", *(figure.name for figure in shown_in("interval")))
        rows.append([words, *(found[key] for key in keys)])
    return rows
