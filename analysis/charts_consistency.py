"""Charts of the consistency analysis: a curve of :mod:`analysis.curves` in, an Altair chart out, the nulls always beside.

Where several series are drawn, the null hardest to beat is a dashed line in the colour of its series; where there is one,
every null is a grey line of its own. Shaded: the interval over requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import polars as pl

from analysis import theme
from analysis.marks import SHAPES, bounded, finish, whole_numbers

INTERVAL = "Shaded: 95% interval over requests."
HARDEST = f"Dashed, same colour: the null hardest to beat. {INTERVAL}"
GREY = f"Grey: nulls. {INTERVAL}"


def overlap_by_distance(curve: pl.DataFrame) -> alt.TopLevelMixin:
    """Jaccard of one position's experts by steps apart, a line a token state."""
    subtitle = f"Jaccard of the experts of the same position, some denoise steps apart; 1 = the same experts. {HARDEST}"
    return _curves(curve, "Overlap from step to step", subtitle, "distance, denoise steps", "rows")


def overlap_by_layer(curve: pl.DataFrame) -> alt.TopLevelMixin:
    """Jaccard from one step to the next by layer, a line a token state."""
    subtitle = f"Jaccard of the experts of the same position, one denoise step apart. {HARDEST}"
    return _curves(curve, "Overlap to the next step by layer", subtitle, "layer of the model", "rows")


def settling(curve: pl.DataFrame) -> alt.TopLevelMixin:
    """Jaccard by steps since the acceptance, a line a reference."""
    subtitle = (
        "Jaccard of a position's experts with those of a reference step. Step 0 accepts it and is the last to see a mask; "
        f"step 1 is the first to see the token. {HARDEST}"
    )
    return _curves(
        curve, "How routing settles after acceptance", subtitle, "steps since the acceptance", "held against"
    )


def spatial(curve: pl.DataFrame) -> alt.TopLevelMixin:
    """Jaccard of two positions of a forward by positions apart, a line a pair of token states."""
    subtitle = f"Jaccard of the experts of two positions of a block in one denoise forward. {HARDEST}"
    return _curves(curve, "Overlap of neighbouring positions", subtitle, "distance, positions", "pairs")


def cosine(lines: pl.DataFrame) -> alt.TopLevelMixin:
    """Cosine of expert counts by steps apart, with every null."""
    subtitle = f"Cosine of the tokens each expert gets in two denoise forwards of a block; 1 = the same shares. {GREY}"
    y = alt.Y("value:Q", title="cosine of expert counts").scale(domain=[0, 1])
    return _beside(lines, "Expert counts from step to step", subtitle, "distance, denoise steps", y)


def survival(lines: pl.DataFrame) -> alt.TopLevelMixin:
    """Share of active experts that stay active for some steps, with every null."""
    subtitle = f"Share of the experts active in a denoise forward that stay active in each of the next steps. {GREY}"
    y = alt.Y("value:Q", title="active experts still active", axis=alt.Axis(format="%")).scale(domain=[0, 1])
    return _beside(lines, "How long an expert stays active", subtitle, "denoise steps", y)


def residency(curve: pl.DataFrame) -> alt.TopLevelMixin:
    """Share of wanted experts that stay wanted for some steps, a line a size of the set."""
    subtitle = f"Share of the experts with most tokens that are among them in each of the next steps too. {HARDEST}"
    y = alt.Y("value:Q", title="wanted experts still wanted", axis=alt.Axis(format="%")).scale(domain=[0, 1])
    return _curves(curve, "How long an expert stays wanted", subtitle, "denoise steps", "experts of a layer", y)


def working_set(lines: pl.DataFrame) -> alt.TopLevelMixin:
    """Distinct experts of windows of forwards, with what forwards in another order or independent ones would need."""
    subtitle = f"Distinct experts a layer over so many denoise forwards in a row; fewer is more alike. {GREY}"
    y = alt.Y("value:Q", title="distinct experts a layer").scale(zero=True)
    return _beside(lines, "Working set of a window", subtitle, "denoise forwards in the window", y)


def drift(curve: pl.DataFrame) -> alt.TopLevelMixin:
    """Share of the wanted set that an earlier wanted set lacks, a line a size of the set."""
    subtitle = f"Of the experts with most tokens, the share that was not among them some steps before; less is alike. {HARDEST}"
    y = alt.Y("value:Q", title="share of the set that is new", axis=alt.Axis(format="%")).scale(domain=[0, 1])
    return _curves(curve, "Drift of the wanted set", subtitle, "distance, denoise steps", "experts of a layer", y)


def confidence(lines: pl.DataFrame) -> alt.TopLevelMixin:
    """Share of masked rows whose prediction changes yet, and their confidence, by steps before the acceptance."""
    subtitle = (
        f"Rows still masked: is the predicted token the one accepted in the end, and how sure is the model? {INTERVAL}"
    )
    y = alt.Y("value:Q", title="share, confidence", axis=alt.Axis(format="%")).scale(domain=[0, 1])
    return _beside(lines, "Confidence against later change", subtitle, "steps before the acceptance", y)


def seeds(lines: pl.DataFrame) -> alt.TopLevelMixin:
    """Cosine of expert popularity across recordings by layer, with every null."""
    subtitle = (
        "Cosine of the loads of a layer's experts in two recordings, mean over their pairs. Grey: nulls of the same prompt. "
        f"{INTERVAL}"
    )
    y = alt.Y("value:Q", title="cosine of expert loads").scale(domain=[0, 1])
    return _beside(lines, "Popularity of experts across recordings", subtitle, "layer of the model", y)


def growth(lines: pl.DataFrame) -> alt.TopLevelMixin:
    """Distinct experts of the first rows of a forward, with what independent rows would touch."""
    subtitle = (
        f"Distinct experts a layer of the first rows of a block in a denoise forward; fewer is more alike. {GREY}"
    )
    y = alt.Y("value:Q", title="unique experts a layer").scale(zero=True)
    return _beside(lines, "Unique experts against rows", subtitle, "rows of the block", y)


def predictability(lines: pl.DataFrame) -> alt.TopLevelMixin:
    """Share of a layer's experts that the layer before foretells, with every null."""
    subtitle = (
        "Share of a row's experts guessed from its experts in the layer before; half of the requests guess the other half. "
        f"{GREY}"
    )
    y = alt.Y("value:Q", title="experts guessed right", axis=alt.Axis(format="%")).scale(domain=[0, 1])
    return _beside(lines, "How far a layer foretells the next", subtitle, "layer guessed", y)


def acceptance(frame: pl.DataFrame) -> alt.TopLevelMixin:
    """Accepted tokens by step. Columns: step, value, low, high, n."""
    base = alt.Chart(bounded(frame, "accepted tokens")).encode(
        x=alt.X("step:Q", title="denoise step inside the block", axis=whole_numbers(frame, "step")),
        tooltip=[
            alt.Tooltip("step:Q", title="step"),
            *_figures("tokens accepted"),
            alt.Tooltip("n:Q", title="blocks that take the step", format=","),
        ],
    )
    drawn = base.encode(y=alt.Y("value:Q", title="tokens accepted a step").scale(zero=True))
    lines = drawn.mark_line(color=theme.VERMILLION), drawn.mark_point(color=theme.VERMILLION, filled=True)
    band = [_band(base, theme.VERMILLION)] if frame["low"].count() else []
    chart = alt.layer(*band, *lines)
    subtitle = f"Mean over the blocks that take so many steps. Overlap falls as steps accept more. {INTERVAL}"
    return finish(chart, "Tokens accepted by each step", subtitle)


def calibration(frame: pl.DataFrame) -> alt.TopLevelMixin:
    """Share of final predictions by confidence. Columns: rows, confidence, value, low, high, n."""
    names = frame["rows"].unique(maintain_order=True).to_list()
    colour, shape = _named("rows", "rows", names, theme.PALETTE)
    percent = alt.Axis(format="%", tickCount=5)
    base = alt.Chart(bounded(frame, "calibration")).encode(
        x=alt.X("confidence:Q", title="confidence, mean of the bin", axis=percent).scale(domain=[0, 1]),
        tooltip=[
            alt.Tooltip("rows:N"),
            alt.Tooltip("confidence:Q", title="mean confidence", format=".1%"),
            *_figures("final", ".1%"),
            alt.Tooltip("n:Q", title="rows", format=","),
        ],
    )
    y = alt.Y("value:Q", title="predictions that are final", axis=percent).scale(domain=[0, 1])
    ends = alt.Chart(pl.DataFrame({"confidence": [0.0, 1.0], "value": [0.0, 1.0]}))
    diagonal = ends.mark_line(color=theme.GREY, strokeDash=[4, 4], strokeWidth=1.4)
    drawn = base.encode(y=y, color=colour)
    layers = [diagonal.encode(x="confidence:Q", y=y), *_bands(base, "rows", names, theme.PALETTE), drawn.mark_line()]
    chart = alt.layer(*layers, drawn.mark_point(filled=True).encode(shape=shape))
    subtitle = f"Share of predicted tokens that are the ones finally accepted. Grey: as confident as right. {INTERVAL}"
    return finish(chart, "Confidence against the final token", subtitle)


def _curves(
    curve: pl.DataFrame, title: str, subtitle: str, x: str, legend: str, y: alt.Y | None = None
) -> alt.TopLevelMixin:
    """A measured line for each series, its interval, and its hardest null; a Jaccard unless ``y`` says otherwise."""
    names = curve["series"].unique(maintain_order=True).to_list()
    colour, shape = _named("series", legend, names, theme.PALETTE)
    base = alt.Chart(bounded(curve, title)).encode(
        x=alt.X("at:Q", title=x, axis=whole_numbers(curve, "at")).scale(zero=False, nice=False, padding=8),
        tooltip=[
            alt.Tooltip("series:N", title=legend),
            alt.Tooltip("at:Q", title=x),
            *_figures("Jaccard" if y is None else "value"),
            alt.Tooltip("null:Q", title="null hardest to beat", format=".3f"),
            alt.Tooltip("null_name:N", title="which is"),
            alt.Tooltip("n:Q", title="pairs", format=","),
        ],
    )
    y = alt.Y("value:Q", title="Jaccard of the K-sets").scale(domain=[0, 1]) if y is None else y
    nulls = base.mark_line(strokeDash=[4, 4], strokeWidth=1.4).encode(y="null:Q", color=colour)
    measured = base.encode(y=y, color=colour)
    layers = [*_bands(base, "series", names, theme.PALETTE), nulls, measured.mark_line()]
    return finish(alt.layer(*layers, measured.mark_point(filled=True).encode(shape=shape)), title, subtitle)


def _beside(lines: pl.DataFrame, title: str, subtitle: str, x: str, y: alt.Y) -> alt.TopLevelMixin:
    """Measured lines in colour and every null in grey, told apart by dash and shape."""
    known = lines.unique("line", keep="first", maintain_order=True)
    names, nulls = known["line"].to_list(), known["is_null"].to_list()
    measured, greys = iter(theme.PALETTE), iter(theme.DASHES[1:])
    colours = [theme.GREY if null else next(measured) for null in nulls]
    dashes = [list(next(greys)) if null else [1, 0] for null in nulls]
    colour, shape = _named("line", None, names, colours)
    dash = alt.StrokeDash("line:N", sort=None, legend=None).scale(domain=names, range=dashes)
    base = alt.Chart(bounded(lines, title)).encode(
        x=alt.X("at:Q", title=x, axis=whole_numbers(lines, "at")).scale(zero=False, nice=False, padding=8),
        tooltip=[alt.Tooltip("line:N"), alt.Tooltip("at:Q", title=x), *_figures("value")],
    )
    drawn = base.encode(y=y, color=colour)
    bands = _bands(base, "line", [name for name, null in zip(names, nulls, strict=True) if not null], colours)
    points = drawn.mark_point(filled=True).encode(shape=shape)
    # On its own, or the outlines of the legend's symbols would be dashed too and hide their shapes.
    layers = alt.layer(*bands, drawn.mark_line().encode(strokeDash=dash), points).resolve_legend(
        strokeDash="independent"
    )
    return finish(layers, title, subtitle)


def _named(field: str, title: str | None, names: Sequence[str], colours: Sequence[str]) -> tuple[alt.Color, alt.Shape]:
    """Colour and shape of a few named series, in one legend."""
    shapes = [SHAPES[i % len(SHAPES)] for i in range(len(names))]
    return (
        alt.Color(f"{field}:N", sort=None, title=title).scale(domain=names, range=list(colours[: len(names)])),
        alt.Shape(f"{field}:N", sort=None, title=title).scale(domain=names, range=shapes),
    )


def _bands(base: alt.Chart, field: str, names: Sequence[str], colours: Sequence[str]) -> list[alt.Chart]:
    """The interval of each point, shaded, a layer a series: one layer for all would fade the legend.

    None for a series without intervals: Vega complains of layers that hold nothing.
    """
    known = set(base.data.drop_nulls("low")[field])
    return [
        _band(base.transform_filter(alt.FieldEqualPredicate(equal=name, field=field)), colour)
        for name, colour in zip(names, colours, strict=False)
        if name in known
    ]


def _band(base: alt.Chart, colour: str) -> alt.Chart:
    shown = base.transform_filter("isValid(datum.low)").mark_area(opacity=0.18, color=colour)
    return shown.encode(y="low:Q", y2="high:Q", tooltip=alt.value(None))


def _figures(name: str, form: str = ".3f") -> list[alt.Tooltip]:
    """Tooltips of a value and its interval."""
    return [
        alt.Tooltip("value:Q", title=name, format=form),
        alt.Tooltip("low:Q", title="interval, low", format=form),
        alt.Tooltip("high:Q", title="interval, high", format=form),
    ]
