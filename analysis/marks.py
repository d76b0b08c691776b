"""What the charts are made of: series with colour, dash and shape, lines with points, axes of whole numbers, titles."""

from __future__ import annotations

import textwrap

import altair as alt
import polars as pl

from analysis import theme
from analysis.aggregate import MAX_ROWS
from analysis.figures import FIGURES
from tracer.errors import UserError

SUBTITLE = 96
"""Characters of a subtitle's line that fit the width of a chart."""
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")


def bounded(frame: pl.DataFrame, what: str) -> pl.DataFrame:
    """The frame, if a chart can carry it; UserError says to aggregate it first if not."""
    if frame.height > MAX_ROWS:
        raise UserError(
            f"{what} has {frame.height} rows and a chart draws at most {MAX_ROWS}: aggregate the frame first."
        )
    return frame


def series(frame: pl.DataFrame, name: str, policy: str, title: str) -> tuple[alt.Color, alt.StrokeDash, alt.Shape]:
    """Colour, dash and shape of each series, merged in one legend that is in the order of first appearance."""
    known = frame.unique(name, keep="first", maintain_order=True)
    domain, policies = known[name].to_list(), known[policy].to_list()
    legend = alt.Legend(title=title, symbolFillColor=theme.GREY)
    return (
        alt.Color(name, type="nominal", sort=None, legend=legend).scale(domain=domain, range=theme.colours(policies)),
        alt.StrokeDash(name, type="nominal", sort=None, legend=legend).scale(
            domain=domain, range=theme.dashes(policies)
        ),
        alt.Shape(name, type="nominal", sort=None, legend=legend).scale(
            domain=domain, range=[SHAPES[i % len(SHAPES)] for i in range(len(domain))]
        ),
    )


def estimates(frame: pl.DataFrame, name: str = "series") -> str:
    """A sentence, led by a space, that says which series are estimates; empty where none is."""
    if "estimate" not in frame.columns:
        return ""
    found = frame.filter("estimate")[name].unique(maintain_order=True).to_list()
    more = f" and {len(found) - 6} more" if len(found) > 6 else ""
    return f" Estimates: {', '.join(found[:6])}{more}." if found else ""


def whole_numbers(frame: pl.DataFrame, name: str) -> alt.Axis:
    """An axis whose ticks are values that occur, a dozen at most."""
    values = sorted(set(frame[name].to_list()))
    shown = values[:: max(1, -(-len(values) // 12))]
    # Without the count, the theme's own thins them out again; a plain format would round to the axis's step.
    return alt.Axis(values=shown, tickCount=max(1, len(shown)), labelExpr="format(datum.value, '~r')")


def broken(labels: list[str]) -> tuple[alt.Axis, int]:
    """An axis that breaks long labels at their joints, and the pixels a label may need."""
    count = max((1 + label.count(", ") + label.count(" × ") for label in labels), default=1)
    expression = "split(replace(datum.label, regexp(', | × ', 'g'), '\\n'), '\\n')"
    return alt.Axis(labelExpr=expression, labelOffset=-6.5 * (count - 1)), 13 * count + 10


def tip(name: str) -> alt.Tooltip:
    """A figure in a tooltip."""
    figure = FIGURES[name]
    number = {"percent": ".1%", "two": ".2f"}.get(figure.written, ",.4g")
    return alt.Tooltip(f"{name}:Q", title=figure.title, format=number)


def capital(words: str) -> str:
    """Words as they begin a sentence."""
    return words[:1].upper() + words[1:]


def lines(frame: pl.DataFrame, x: alt.X, y: alt.Y, name: str, policy: str, title: str, tooltip: list) -> alt.LayerChart:
    """A line with points for each series."""
    colour, dash, shape = series(frame, name, policy, title)
    base = alt.Chart(frame).encode(x=x, y=y, color=colour, tooltip=tooltip)
    return base.mark_line().encode(strokeDash=dash) + base.mark_point(filled=True).encode(shape=shape)


def finish(chart: alt.TopLevelMixin, title: str, subtitle: str, height: int | None = 260) -> alt.TopLevelMixin:
    """Size, title, subtitle and theme; ``height`` None keeps the chart's own."""
    # A drawn subtitle does not wrap by itself.
    wrapped = textwrap.wrap(subtitle, SUBTITLE)
    sized = chart.properties(width=theme.WIDTH, title=alt.Title(title, subtitle=wrapped), description=title)
    return theme.themed(sized if height is None else sized.properties(height=height))
