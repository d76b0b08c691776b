"""Charts: a small frame in, an Altair chart out. Nothing is computed here; :mod:`analysis.aggregate` makes the frames.

Every chart is 600 px wide, carries its own config (:mod:`analysis.theme`), says in its title what is shown and in its
subtitle over what, and labels estimates as such.
"""

from __future__ import annotations

import math

import altair as alt
import polars as pl

from analysis import theme
from analysis.figures import FIGURES
from analysis.marks import bounded, broken, capital, estimates, finish, lines, series, tip, whole_numbers


def unique_by_step(frame: pl.DataFrame) -> alt.TopLevelMixin:
    """Unique experts by step, a line a series. Columns: series, policy, step, unique_experts, forwards, estimate."""
    x = alt.X("step:Q", title="denoise step inside the block", axis=whole_numbers(frame, "step"))
    told = [alt.Tooltip("step:Q"), tip("unique_experts")]
    told += [alt.Tooltip("forwards:Q", title="model calls averaged", format=",")]
    subtitle = "Mean over layers, requests and blocks; later steps exist only in the blocks that take that long."
    return _unique_experts(frame, "denoise step", x, told, subtitle)


def unique_by_layer(frame: pl.DataFrame) -> alt.TopLevelMixin:
    """Unique experts by layer, a line a series. Columns: series, policy, layer, unique_experts, estimate."""
    x = alt.X("layer:Q", title="layer of the model", axis=whole_numbers(frame, "layer")).scale(zero=False)
    told = [alt.Tooltip("layer:Q"), tip("unique_experts")]
    return _unique_experts(frame, "layer", x, told, "Mean over denoise forwards; dense layers have no experts.")


def _unique_experts(frame: pl.DataFrame, along: str, x: alt.X, told: list, subtitle: str) -> alt.TopLevelMixin:
    y = alt.Y("unique_experts:Q", title=FIGURES["unique_experts"].title).scale(zero=True)
    name = f"Unique experts by {along}"
    chart = lines(
        bounded(frame, name), x, y, "series", "policy", "routing", [alt.Tooltip("series:N", title="routing"), *told]
    )
    return finish(chart, name, subtitle + estimates(frame))


def block_progress(frame: pl.DataFrame) -> alt.TopLevelMixin:
    """Tokens masked before and accepted by each denoise step. Columns: step, masked, accepted, blocks."""
    names = {"masked": "masked before the step", "accepted": "accepted by the step"}
    colour = alt.Color("what:N", title="tokens", sort=None).scale(
        domain=list(names.values()), range=[theme.GREY, theme.VERMILLION]
    )
    long = (
        bounded(frame, "block progress")
        .rename(names)
        .unpivot(list(names.values()), index=["step", "blocks"], variable_name="what", value_name="tokens")
        .drop_nulls("tokens")
    )
    base = alt.Chart(long).encode(
        x=alt.X("step:Q", title="denoise step inside the block", axis=whole_numbers(frame, "step")),
        y=alt.Y("tokens:Q", title="tokens a block").scale(zero=True),
        color=colour,
        tooltip=[
            alt.Tooltip("step:Q", title="step"),
            alt.Tooltip("what:N", title="tokens"),
            alt.Tooltip("tokens:Q", title="mean a block", format=".2f"),
            alt.Tooltip("blocks:Q", title="blocks still running", format=","),
        ],
    )
    chart = base.mark_line() + base.mark_point(filled=True)
    subtitle = "Mean over all blocks; a finished block counts as 0, so the accepted tokens add up to a block."
    return finish(chart, "How a block fills up", subtitle)


def load_by_rank(frame: pl.DataFrame) -> alt.TopLevelMixin:
    """Heat map of expert load, layer by rank. Columns: layer, rank, rank_end, relative."""
    layers = sorted(frame["layer"].unique().to_list())
    chart = (
        alt.Chart(bounded(frame, "expert load").with_columns(pl.col("rank") - 0.5, pl.col("rank_end") + 0.5))
        .transform_calculate(first="datum.rank + 0.5", last="datum.rank_end - 0.5")
        .mark_rect()
        .encode(
            x=alt.X(
                "rank:Q", title="expert, busiest of the layer first", axis=alt.Axis(tickMinStep=1, format="d")
            ).scale(zero=False, nice=False),
            x2="rank_end:Q",
            y=alt.Y("layer:O", title="layer", sort=layers),
            color=alt.Color("relative:Q", title="load, times an even share").scale(scheme="viridis", domainMin=0),
            tooltip=[
                alt.Tooltip("layer:O", title="layer"),
                alt.Tooltip("first:Q", title="from rank"),
                alt.Tooltip("last:Q", title="to rank"),
                alt.Tooltip("relative:Q", title="times an even share", format=".2f"),
            ],
        )
    )
    subtitle = "Tokens routed to an expert over all recorded forwards, as a multiple of an even spread (1)."
    return finish(chart, "Load of the experts by layer", subtitle, height=max(200, min(480, 26 * len(layers))))


def bars(frame: pl.DataFrame, figure: str, *more: str) -> alt.TopLevelMixin:
    """A share by residency and routing, grouped bars; ``more`` figures are told beside. Columns: those of runs_frame."""
    shown = FIGURES[figure]
    rows = bounded(frame.drop_nulls(figure), shown.heading)
    colour, _, _ = series(rows, "series", "routing_policy", "routing")
    places = rows["residency"].unique(maintain_order=True).to_list()
    axis, room = broken(places)
    share = alt.Axis(format="%", tickCount=5)
    chart = (
        alt.Chart(rows)
        .mark_bar()
        .encode(
            x=alt.X(f"{figure}:Q", title=shown.title, axis=share).scale(domain=[0, 1]),
            y=alt.Y("residency:N", title=None, sort=places, axis=axis),
            yOffset=alt.YOffset("series:N", sort=None),
            color=colour,
            tooltip=[
                alt.Tooltip("residency:N"),
                alt.Tooltip("series:N", title="routing"),
                *(tip(name) for name in (figure, *more)),
            ],
        )
    )
    height = len(places) * max(room, 14 * rows["series"].n_unique() + 8)
    subtitle = f"{capital(shown.meaning)}, over all forwards."
    return finish(chart, f"{capital(shown.heading)} by residency and routing", subtitle + estimates(rows), height)


def latency(frame: pl.DataFrame) -> alt.TopLevelMixin:
    """Latency of each run by part, stacked bars. Columns: label, part, ms, total_ms."""
    parts = frame["part"].unique(maintain_order=True).to_list()
    labels = frame["label"].unique(maintain_order=True).to_list()
    rows = bounded(frame, "latency parts").with_columns(
        pl.col("part").replace_strict(parts, range(len(parts)), return_dtype=pl.Int64).alias("order")
    )
    axis, room = broken(labels)
    base = alt.Chart(rows).encode(y=alt.Y("label:N", title=None, sort=labels, axis=axis))
    colours = [theme.PARTS.get(part) or theme.colour(part) for part in parts]
    bars = base.mark_bar().encode(
        x=alt.X("ms:Q", title="ms an accepted token (estimate)", axis=alt.Axis(tickCount=6), stack="zero"),
        color=alt.Color("part:N", title="part", sort=None).scale(domain=parts, range=colours),
        order=alt.Order("order:Q"),
        tooltip=[
            alt.Tooltip("label:N", title="run"),
            alt.Tooltip("part:N"),
            alt.Tooltip("ms:Q", title="ms a token", format=".4g"),
            alt.Tooltip("total_ms:Q", title="all parts, overlap counted once", format=".4g"),
        ],
    )
    totals = base.mark_tick(thickness=3, fill="white", stroke="black", strokeWidth=1, bandSize=24).encode(
        x="max(total_ms):Q"
    )
    subtitle = (
        "Estimate from the hardware preset, not measured. The white tick is the total: parts may overlap in time."
    )
    return finish(bars + totals, "Where the time goes", subtitle, height=room * len(labels))


def traffic(frame: pl.DataFrame) -> alt.TopLevelMixin:
    """Bytes moved against the working set, a point a run. Columns: those of runs_frame."""
    rows = bounded(frame.drop_nulls(["bytes_to_gpu", "working_set_bytes"]), "traffic").with_columns(
        (pl.col("bytes_to_gpu") / pl.col("forwards") / 1e6).alias("moved"),
        (pl.col("working_set_bytes") / 1e6).alias("needed"),
    )
    # Every budget of a policy in that policy's colour: a sweep would need more colours than can be told apart.
    colour, _, _ = series(rows, "residency_policy", "residency_policy", "residency")
    # On the other side of the plot: two legends beside each other do not fit a narrow page.
    shape = series(rows, "series", "routing_policy", "routing")[2]
    shape = shape.legend(orient="bottom", title="routing", symbolFillColor=theme.GREY)
    chart = (
        alt.Chart(rows)
        .mark_point(size=90, filled=True, opacity=0.9)
        .encode(
            x=alt.X("needed:Q", title="needed a forward (working set), MB").scale(zero=True),
            y=alt.Y("moved:Q", title="moved to the GPU a forward, MB").scale(zero=True),
            color=colour,
            shape=shape,
            tooltip=[
                alt.Tooltip("label:N", title="run"),
                alt.Tooltip("needed:Q", title="working set, MB", format=",.4g"),
                alt.Tooltip("moved:Q", title="moved to the GPU a forward, MB", format=",.4g"),
            ],
        )
    )
    subtitle = "Mean a forward, summed over layers; 1 MB = 10^6 bytes."
    return finish(chart, "Weights moved against weights needed", subtitle + estimates(rows))


def tradeoff(frame: pl.DataFrame) -> alt.TopLevelMixin:
    """Gate weight retained against unique experts, a point a series. Columns: those of runs_frame."""
    rows = bounded(frame.drop_nulls(["unique_experts", "gate_retained"]), "trade-off")
    colour, _, shape = series(rows, "series", "routing_policy", "routing")
    # From a round 5 percent under the least to all of it.
    floor = max(0.0, math.floor(20 * min(rows["gate_retained"].to_list(), default=1.0) - 0.5) / 20)
    y = alt.Y("gate_retained:Q", title=FIGURES["gate_retained"].title, axis=alt.Axis(format="%")).scale(
        domain=[floor, 1]
    )
    base = alt.Chart(rows).encode(y=y, color=colour)
    x = alt.X("unique_experts:Q", title=FIGURES["unique_experts"].title).scale(zero=True)
    points = base.mark_point(size=110, filled=True).encode(
        x=x,
        shape=shape,
        tooltip=[
            alt.Tooltip("series:N", title="routing"),
            tip("unique_experts"),
            tip("gate_retained"),
            alt.Tooltip("unique_low:Q", title="scenario bound, low", format=".2f"),
            alt.Tooltip("unique_high:Q", title="scenario bound, high", format=".2f"),
        ],
    )
    subtitle = "Up and to the left is better. Gate weight is not accuracy." + estimates(rows)
    if rows["unique_low"].null_count() == rows.height:
        return finish(points, "What fewer experts cost", subtitle)
    bounds = base.transform_filter("isValid(datum.unique_low)").mark_rule(strokeWidth=2)
    bounds = bounds.encode(x="unique_low:Q", x2="unique_high:Q")
    return finish(
        bounds + points, "What fewer experts cost", f"{subtitle} Lines: scenario bounds where a run has them."
    )


PARAMETERS = {"budget": "budget, experts a layer", "refresh_interval": "refresh interval, denoise steps"}


def by_parameter(frame: pl.DataFrame, parameter: str, figure: str) -> alt.TopLevelMixin:
    """One figure against a residency parameter, a line a pair of policies. Columns: those of aggregate.by_parameter."""
    title, named = FIGURES[figure].title, PARAMETERS.get(parameter, parameter)
    number = {"percent": "%", "two": "~g"}.get(FIGURES[figure].written, "~s")
    return finish(
        lines(
            bounded(frame.drop_nulls(figure), f"{figure} by {parameter}"),
            alt.X("value:Q", title=named, axis=whole_numbers(frame, "value")),
            alt.Y(f"{figure}:Q", title=title, axis=alt.Axis(format=number)).scale(zero=True),
            "line",
            "residency_policy",
            "run",
            [alt.Tooltip("line:N", title="run"), alt.Tooltip("value:Q", title=parameter), tip(figure)],
        ),
        f"{capital(title.split(',')[0])} by {named.split(',')[0]}",
        "One line a pair of policies, one point a run." + estimates(frame, "line"),
    )
