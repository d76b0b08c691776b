"""Charts of TIDE's refresh interval: the program's objective, the replayed latency, and the regret between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import altair as alt
import polars as pl

from analysis import theme
from analysis.figures import shown_in
from analysis.marks import SHAPES, bounded, broken, finish, tip, whole_numbers

PROGRAM, MEMORYLESS, BEST = "program, measured", "program, memoryless", "fastest replay"
COLOURS = {PROGRAM: theme.VERMILLION, MEMORYLESS: theme.PURPLE, BEST: theme.BLUE}
X = "refresh interval, denoise steps"
TOLD = [figure.name for figure in shown_in("interval")]


def _chosen(result: Any) -> dict[str, int]:
    return {PROGRAM: result.program, MEMORYLESS: result.memoryless, BEST: result.best}


def _x(frame: pl.DataFrame) -> alt.X:
    axis = whole_numbers(frame, "refresh_interval")
    return alt.X("refresh_interval:Q", title=X, axis=axis).scale(zero=False, nice=False, padding=10)


def _scales(names: list[str]) -> tuple[alt.Color, alt.Shape]:
    colours, shapes = [COLOURS[name] for name in names], [SHAPES[list(COLOURS).index(name)] for name in names]
    return (
        alt.Color("choice:N", sort=None, title=None).scale(domain=names, range=colours),
        alt.Shape("choice:N", sort=None, title=None).scale(domain=names, range=shapes),
    )


def objective(result: Any) -> alt.TopLevelMixin:
    """The program's objective by interval, with measured and with memoryless misses; a large mark where each is least."""
    frame = bounded(result.frame, "intervals")
    columns = {PROGRAM: "objective", MEMORYLESS: "objective_memoryless"}
    rows = pl.concat(
        frame.select(
            "refresh_interval",
            pl.lit(name).alias("choice"),
            (pl.col(column) * 1e3).alias("ms"),
            (pl.col("refresh_interval") == _chosen(result)[name]).alias("least"),
        )
        for name, column in columns.items()
    )
    colour, shape = _scales(list(columns))
    base = alt.Chart(bounded(rows, "intervals")).encode(
        x=_x(frame),
        y=alt.Y("ms:Q", title="ms a block and layer (estimate)").scale(zero=True),
        color=colour,
        tooltip=[
            alt.Tooltip("choice:N"),
            alt.Tooltip("refresh_interval:Q", title="interval"),
            alt.Tooltip("ms:Q", title="ms a block and layer", format=".4g"),
        ],
    )
    least = base.transform_filter("datum.least").mark_point(filled=True, size=130).encode(shape=shape)
    subtitle = (
        f"Moves and misses of {result.budget} experts a layer on {result.hardware}, as the program counts them; "
        "the mark is its choice."
    )
    return finish(base.mark_line() + least, "What TIDE's program minimises", subtitle)


def latency(result: Any) -> alt.TopLevelMixin:
    """Replayed latency by interval, with a mark at each choice."""
    frame = bounded(result.frame, "intervals").select("refresh_interval", *TOLD)
    tooltip = [alt.Tooltip("refresh_interval:Q", title="interval"), *map(tip, TOLD)]
    x = _x(frame)
    y = alt.Y("latency_s:Q", title="seconds for the trace (estimate)").scale(zero=False)
    line = alt.Chart(frame).mark_line(color=theme.GREY).encode(x=x, y=y, tooltip=tooltip)
    colour, shape = _scales(list(COLOURS))
    points = alt.Chart(_at_choices(result)).mark_point(filled=True, size=130, opacity=0.9)
    points = points.encode(x=x, y=y, color=colour, shape=shape, tooltip=[alt.Tooltip("choice:N"), *tooltip])
    subtitle = "Every interval replayed on the recorded experts; estimate from the hardware preset, not measured."
    return finish(line + points, "Replayed latency by refresh interval", subtitle)


def regret(result: Any) -> alt.TopLevelMixin:
    """How much slower each choice is than the fastest replay, a bar a choice."""
    rows = _at_choices(result)
    colour, _ = _scales(list(COLOURS))
    axis = alt.Axis(format=".1%", tickCount=5)
    most = max(0.01, 1.05 * max(rows["slowdown"].to_list()))
    labels = rows["label"].to_list()
    names, room = broken(labels)
    base = alt.Chart(rows).encode(
        x=alt.X("slowdown:Q", title="slower (estimate)", axis=axis).scale(domain=[0, most]),
        y=alt.Y("label:N", title=None, sort=labels, axis=names),
        tooltip=[
            alt.Tooltip("choice:N"),
            alt.Tooltip("refresh_interval:Q", title="interval"),
            alt.Tooltip("slowdown:Q", title="regret", format=".2%"),
        ],
    )
    # A tick beside the bar, so that a regret of nothing is seen too.
    chart = base.mark_bar(height=20).encode(color=colour.legend(None)) + base.mark_tick(
        thickness=3, bandSize=28
    ).encode(color=colour.legend(None))
    subtitle = "Replayed latency at the chosen interval against the fastest replay."
    return finish(chart, "What each choice of interval costs", subtitle, height=max(40, room) * len(COLOURS))


ALL: tuple[Callable[[Any], alt.TopLevelMixin], ...] = (objective, latency, regret)


def _at_choices(result: Any) -> pl.DataFrame:
    chosen = pl.DataFrame({"choice": list(COLOURS), "refresh_interval": list(_chosen(result).values())})
    names = ("refresh_interval", "slowdown", *TOLD)
    found = chosen.join(result.frame.select(names), on="refresh_interval", how="left", maintain_order="left")
    return found.with_columns(pl.format("{}: {}", "choice", "refresh_interval").alias("label"))
