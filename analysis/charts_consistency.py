"""Draws the charts of the consistency metrics (see :mod:`analysis.curves`) with Altair, the nulls always beside.

Where several series are drawn, the null hardest to beat is a dashed line in the colour of its series; where there is one,
every null is a grey line of its own. Shaded: the interval over requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import polars as pl

from analysis import theme
from analysis.curves import Beside, Chart, Series
from analysis.marks import SHAPES, bounded, finish, whole_numbers

__all__ = [
    "INTERVAL",
    "axis",
    "band",
    "bands",
    "beside",
    "bounded",
    "figures",
    "finish",
    "named",
    "series",
    "whole_numbers",
]

INTERVAL = "Shaded: 95% interval over requests."


def series(chart: Series, curve: pl.DataFrame) -> alt.TopLevelMixin:
    """A measured line for each series, its interval, and its hardest null."""
    names = curve["series"].unique(maintain_order=True).to_list()
    colour, shape = named("series", chart.legend, names, theme.PALETTE)
    base = _base(chart, curve).encode(
        tooltip=[
            alt.Tooltip("series:N", title=chart.legend),
            alt.Tooltip("at:Q", title=chart.x),
            *figures("Jaccard" if chart.y == Chart.y else "value"),
            alt.Tooltip("null:Q", title="null hardest to beat", format=".3f"),
            alt.Tooltip("null_name:N", title="which is"),
            alt.Tooltip("n:Q", title="pairs", format=","),
        ],
    )
    nulls = base.mark_line(strokeDash=[4, 4], strokeWidth=1.4).encode(y="null:Q", color=colour)
    measured = base.encode(y=axis(chart), color=colour)
    points = measured.mark_point(filled=True).encode(shape=shape)
    layers = alt.layer(*bands(base, "series", names, theme.PALETTE), nulls, measured.mark_line(), points)
    return finish(layers, chart.title, f"{chart.subtitle} Dashed, same colour: the null hardest to beat. {INTERVAL}")


def beside(chart: Beside, lines: pl.DataFrame) -> alt.TopLevelMixin:
    """Measured lines in colour and every null in grey, told apart by dash and shape."""
    known = lines.unique("line", keep="first", maintain_order=True)
    names, nulls = known["line"].to_list(), known["is_null"].to_list()
    measured, greys = iter(theme.PALETTE), iter(theme.DASHES[1:])
    colours = [theme.GREY if null else next(measured) for null in nulls]
    dashes = [list(next(greys)) if null else [1, 0] for null in nulls]
    colour, shape = named("line", None, names, colours)
    dash = alt.StrokeDash("line:N", sort=None, legend=None).scale(domain=names, range=dashes)
    tooltip = [alt.Tooltip("line:N"), alt.Tooltip("at:Q", title=chart.x), *figures("value")]
    base = _base(chart, lines).encode(tooltip=tooltip)
    drawn = base.encode(y=axis(chart), color=colour)
    shaded = bands(base, "line", [name for name, null in zip(names, nulls, strict=True) if not null], colours)
    points = drawn.mark_point(filled=True).encode(shape=shape)
    # On its own, or the outlines of the legend's symbols would be dashed too and hide their shapes.
    layers = alt.layer(*shaded, drawn.mark_line().encode(strokeDash=dash), points).resolve_legend(
        strokeDash="independent"
    )
    return finish(layers, chart.title, " ".join(filter(None, (chart.subtitle, chart.grey, INTERVAL))))


def _base(chart: Chart, curve: pl.DataFrame) -> alt.Chart:
    x = alt.X("at:Q", title=chart.x, axis=whole_numbers(curve, "at")).scale(zero=False, nice=False, padding=8)
    return alt.Chart(bounded(curve, chart.title)).encode(x=x)


def axis(chart: Chart) -> alt.Y:
    """The y axis of a chart: its value, as a share or as a number from 0 up."""
    y = alt.Y("value:Q", title=chart.y, axis=alt.Axis(format="%")) if chart.percent else alt.Y("value:Q", title=chart.y)
    return y.scale(zero=True) if chart.zero else y.scale(domain=[0, 1])


def named(field: str, title: str | None, names: Sequence[str], colours: Sequence[str]) -> tuple[alt.Color, alt.Shape]:
    """Colour and shape of a few named series, in one legend."""
    shapes = [SHAPES[i % len(SHAPES)] for i in range(len(names))]
    return (
        alt.Color(f"{field}:N", sort=None, title=title).scale(domain=names, range=list(colours[: len(names)])),
        alt.Shape(f"{field}:N", sort=None, title=title).scale(domain=names, range=shapes),
    )


def bands(base: alt.Chart, field: str, names: Sequence[str], colours: Sequence[str]) -> list[alt.Chart]:
    """The interval of each point, shaded, a layer a series: one layer for all would fade the legend.

    None for a series without intervals: Vega complains of layers that hold nothing.
    """
    known = set(base.data.drop_nulls("low")[field])
    return [
        band(base.transform_filter(alt.FieldEqualPredicate(equal=name, field=field)), colour)
        for name, colour in zip(names, colours, strict=False)
        if name in known
    ]


def band(base: alt.Chart, colour: str) -> alt.Chart:
    """The interval of each point, shaded."""
    shown = base.transform_filter("isValid(datum.low)").mark_area(opacity=0.18, color=colour)
    return shown.encode(y="low:Q", y2="high:Q", tooltip=alt.value(None))


def figures(name: str, form: str = ".3f") -> list[alt.Tooltip]:
    """Tooltips of a value and its interval."""
    return [
        alt.Tooltip("value:Q", title=name, format=form),
        alt.Tooltip("low:Q", title="interval, low", format=form),
        alt.Tooltip("high:Q", title="interval, high", format=form),
    ]
