"""Aggregation against its naive definition, and charts that are valid, bounded and labelled."""

from __future__ import annotations

import json
import re
from collections import defaultdict

import altair as alt
import numpy as np
import polars as pl
import pytest
import vl_convert
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import aggregate, charts, marks, theme
from tests.analysis import replayed
from tracer.errors import UserError


def naive_unique(cells, forwards, runs, by):
    """Mean unique experts of denoise cells by (series, step or layer), with dicts and loops."""
    kind = {f["forward_id"]: f for f in forwards.iter_rows(named=True)}
    first = {}
    for run in runs.iter_rows(named=True):
        first.setdefault(run["series"], run["run"] if run["acceptance_policy"] == "recorded" else None)
    name = {run: series for series, run in first.items() if run is not None}
    found = defaultdict(list)
    for cell in cells.iter_rows(named=True):
        forward = kind[cell["forward_id"]]
        if cell["run"] in name and forward["kind"] == "denoise":
            key = forward["step"] if by == "step" else cell["layer"]
            found[name[cell["run"]], key].append(cell["unique_experts"])
    return {key: sum(values) / len(values) for key, values in found.items()}


def naive_progress(forwards):
    """Tokens masked before and accepted by each step, mean over all blocks."""
    rows = [f for f in forwards.iter_rows(named=True) if f["kind"] == "denoise"]
    blocks = {(f["request_id"], f["block"]) for f in rows}
    found = {}
    for step in sorted({f["step"] for f in rows}):
        here = [f for f in rows if f["step"] == step]
        found[step] = (
            sum(f["num_masked"] for f in here) / len(blocks),
            sum(f["num_accepted"] for f in here) / len(blocks),
            len(here),
        )
    return found


def naive_load(load, experts):
    """Load of each layer, largest first, as a multiple of an even share."""
    tokens = defaultdict(lambda: [0] * experts)
    for row in load.iter_rows(named=True):
        tokens[row["layer"]][row["expert_id"]] += row["tokens"]
    return {
        layer: [c * experts / sum(counts) if sum(counts) else 0.0 for c in sorted(counts, reverse=True)]
        for layer, counts in tokens.items()
    }


def every_chart(seed=0):
    """Each chart of the module, drawn from the fixture."""
    trace = replayed.trace(seed=seed)
    swept = [("tide", {"budget": b, "refresh_interval": i}, 0.5 + b / 64, 1e5) for b in (8, 16) for i in (1, 4)]
    replay = replayed.replay(trace.forwards, residencies=(*replayed.RESIDENCIES, *swept))
    runs = aggregate.runs_frame(replay.document)
    budgets = aggregate.by_parameter(replay.document, "budget")
    return {
        "unique_by_step": charts.unique_by_step(aggregate.unique_by_step(replay.cells, trace.forwards, runs)),
        "unique_by_layer": charts.unique_by_layer(aggregate.unique_by_layer(replay.cells, trace.forwards, runs)),
        "block_progress": charts.block_progress(aggregate.block_progress(trace.forwards)),
        "load_by_rank": charts.load_by_rank(aggregate.load_by_rank(trace.load, replayed.EXPERTS)),
        "hit_rate": charts.bars(aggregate.whole_groups(runs), "hit_rate", "expert_hit_rate"),
        "latency": charts.latency(aggregate.latency_parts(replay.document)),
        "traffic": charts.traffic(runs),
        "tradeoff": charts.tradeoff(aggregate.one_run_a_series(runs)),
        "by_budget": charts.by_parameter(budgets, "budget", "hit_rate"),
        "by_interval": charts.by_parameter(
            aggregate.by_parameter(replay.document, "refresh_interval"), "refresh_interval", "tokens_per_s"
        ),
    }


@pytest.fixture(scope="module")
def drawn():
    return every_chart()


def rows_of(spec):
    return sum(len(rows) for rows in spec.get("datasets", {}).values())


def titles_of(spec):
    """Every axis title, legend title and mark of a spec."""
    return json.dumps({key: value for key, value in spec.items() if key not in ("datasets", "config")})


def test_every_chart_validates_and_is_bounded(drawn):
    for name, chart in drawn.items():
        spec = chart.to_dict(validate=True)
        assert 0 < rows_of(spec) <= 2 * aggregate.MAX_ROWS, name
        assert spec["title"]["text"] and spec["title"]["subtitle"], name
        assert spec["description"] == spec["title"]["text"], name
        assert spec["width"] == 600, name
        assert "tooltip" in titles_of(spec), name
        assert "http" not in titles_of(spec).replace(spec["$schema"], ""), name


def test_an_axis_of_whole_numbers_shows_each_of_them_as_it_is():
    frame = pl.DataFrame({"budget": [8.0, 16.0, 24.0, 48.0], "value": [1.0, 2.0, 3.0, 4.0]})
    chart = alt.Chart(frame).mark_point().encode(x=alt.X("budget:Q", axis=marks.whole_numbers(frame, "budget")))
    drawn = vl_convert.vegalite_to_svg(theme.themed(chart).to_dict())
    assert re.findall(r">([\d.]+)</text>", drawn) == ["8", "16", "24", "48"]


def test_titles_say_units_and_estimates(drawn):
    assert "estimate" in titles_of(drawn["latency"].to_dict())
    assert "ms an accepted token" in titles_of(drawn["latency"].to_dict())
    assert "estimate" in titles_of(drawn["by_interval"].to_dict())
    assert "MB" in titles_of(drawn["traffic"].to_dict())
    for name in ("unique_by_step", "unique_by_layer", "block_progress", "hit_rate", "traffic", "tradeoff", "by_budget"):
        subtitle = " ".join(drawn[name].to_dict()["title"]["subtitle"])
        named = {"by_budget": "Estimates: team × tide refresh_interval=4, ", "traffic": "Estimates: team, dmoe."}
        named |= dict.fromkeys(("hit_rate", "tradeoff"), "Estimates: team, dmoe.")
        named |= dict.fromkeys(("unique_by_step", "unique_by_layer"), "Estimates: dmoe.")
        assert named.get(name, "") in subtitle and ("Estimates" in subtitle) == (name in named), name
    exact = aggregate.runs_frame(replayed.document(routings=replayed.ROUTINGS[:1]))
    assert "stimate" not in titles_of(charts.bars(exact, "hit_rate").to_dict())
    assert "not accuracy" in titles_of(drawn["tradeoff"].to_dict())


def test_a_frame_too_large_is_refused_in_a_sentence():
    frame = pl.DataFrame({"step": range(3000), "masked": [0.5] * 3000, "accepted": [0.5] * 3000, "blocks": [1] * 3000})
    with pytest.raises(UserError, match="block progress has 3000 rows and a chart draws at most 2000"):
        charts.block_progress(frame)
    assert marks.bounded(frame.head(2000), "block progress").height == 2000


@given(seed=st.integers(0, 2**32 - 1), requests=st.integers(1, 3), blocks=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_unique_experts_by_step_and_layer_equal_the_naive_means(seed, requests, blocks):
    rng = np.random.default_rng(seed)
    forwards = replayed.forwards(rng, requests, blocks)
    replay = replayed.replay(forwards, seed=seed)
    runs = aggregate.runs_frame(replay.document)
    for by, gather in (("step", aggregate.unique_by_step), ("layer", aggregate.unique_by_layer)):
        frame = gather(replay.cells, forwards, runs)
        got = {(row["series"], row[by]): row["unique_experts"] for row in frame.iter_rows(named=True)}
        want = naive_unique(replay.cells, forwards, runs, by)
        assert got.keys() == want.keys()
        # Means of whole numbers: sums are exact, and both divide the same two of them.
        assert got == want
        assert frame["series"].unique(maintain_order=True).to_list() == ["vanilla", "dmoe"]


def test_runs_with_forwards_of_their_own_are_drawn_when_those_are_given():
    trace = replayed.trace()
    replay = replayed.replay(trace.forwards)
    runs = aggregate.runs_frame(replay.document)
    assert aggregate.left_out(trace.forwards, runs) == ["team"]
    own = pl.concat([trace.forwards.with_columns(pl.lit(run).alias("run")) for run in runs["run"]])
    assert aggregate.left_out(own, runs) == []
    found = aggregate.unique_by_layer(replay.cells, own, runs)
    assert found["series"].unique(maintain_order=True).to_list() == ["vanilla", "team", "dmoe"]


def test_calls_that_batch_different_steps_are_left_out():
    forwards = pl.DataFrame(
        {"forward_id": [0, 0, 1, 1], "request_id": [0, 1, 0, 1], "kind": ["denoise"] * 4, "step": [0, 1, 2, 2]}
    )
    runs = aggregate.runs_frame(replayed.document())
    cells = pl.DataFrame({"run": [0, 0], "forward_id": [0, 1], "layer": [1, 1], "unique_experts": [9, 4]})
    found = aggregate.unique_by_step(cells, forwards, runs)
    assert found.select("step", "unique_experts", "forwards").rows() == [(2, 4.0, 1)]


@given(seed=st.integers(0, 2**32 - 1), requests=st.integers(0, 3), blocks=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_block_progress_equals_the_naive_means(seed, requests, blocks):
    forwards = replayed.forwards(np.random.default_rng(seed), max(1, requests), blocks)
    if requests == 0:
        forwards = forwards.filter(pl.col("kind") != "denoise")
    frame = aggregate.block_progress(forwards)
    assert {row[0]: row[1:] for row in frame.iter_rows()} == naive_progress(forwards)
    if requests:
        assert frame["accepted"].sum() == pytest.approx(replayed.BLOCK)


def test_block_progress_leaves_out_what_the_trace_does_not_say():
    told = replayed.forwards(np.random.default_rng(0))
    last = (pl.col("step") == pl.col("step").max()) & (pl.col("kind") == "denoise")
    some = told.with_columns(num_accepted=pl.when(~last).then("num_accepted"))
    frame, whole = aggregate.block_progress(some), aggregate.block_progress(told)
    assert frame.drop("accepted").equals(whole.drop("accepted"))
    assert frame["accepted"].to_list() == [*whole["accepted"].to_list()[:-1], None]
    drawn = charts.block_progress(frame).to_dict()
    assert sum(len(rows) for rows in drawn["datasets"].values()) == 2 * frame.height - 1


@given(seed=st.integers(0, 2**32 - 1), layers=st.integers(1, 4), experts=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_load_by_rank_equals_the_naive_shares(seed, layers, experts):
    rng = np.random.default_rng(seed)
    rows = [
        (layer, expert, int(rng.integers(0, 9)))
        for layer in range(layers)
        for expert in range(experts)
        if rng.random() < 0.8 or expert == 0
    ]
    load = pl.DataFrame(rows, schema=("layer", "expert_id", "tokens"), orient="row")
    frame = aggregate.load_by_rank(load, experts)
    want = naive_load(load, experts)
    got = {layer: frame.filter(pl.col("layer") == layer)["relative"].to_list() for layer in want}
    assert got == want
    assert frame["rank"].to_list() == frame["rank_end"].to_list() == list(range(1, experts + 1)) * layers


def test_load_of_a_large_model_is_binned_and_adds_up():
    load = pl.DataFrame({"layer": np.repeat(np.arange(94), 512), "expert_id": list(range(512)) * 94, "tokens": 3})
    frame = aggregate.load_by_rank(load, 512)
    assert frame.height <= aggregate.MAX_ROWS
    assert frame["relative"].to_list() == [1.0] * frame.height
    covered = frame.select((pl.col("rank_end") - pl.col("rank") + 1).sum().over("layer")).to_series()
    assert set(covered) == {512}
    assert rows_of(charts.load_by_rank(frame).to_dict()) <= aggregate.MAX_ROWS


def test_names_hold_only_what_tells_policies_apart():
    lone = [("dmoe", {"top_p": 0.6}), ("vanilla", {})]
    assert aggregate.labels(lone) == ["dmoe", "vanilla"]
    several = [("dmoe", {"top_p": p, "min_experts": 12}) for p in (0.5, 0.6)]
    assert aggregate.labels(several) == ["dmoe top_p=0.5", "dmoe top_p=0.6"]
    assert aggregate.labels(several, frozenset({"top_p"})) == ["dmoe", "dmoe"]


def test_a_run_says_its_acceptance_where_it_does_not_go_without_saying():
    document = replayed.document(residencies=replayed.RESIDENCIES[:1])
    assert aggregate.runs_frame(document)["series"].to_list() == ["vanilla", "team", "dmoe"]
    document["runs"][2]["acceptance"] = {"name": "egp", "parameters": {}}
    assert aggregate.runs_frame(document)["series"].to_list() == ["vanilla", "team", "egp + dmoe"]
    document["runs"][0]["hardware"] = {"name": "a100"}
    assert aggregate.runs_frame(document)["label"][0] == "vanilla × all_resident × a100"


def test_runs_without_residency_or_figures_are_kept_with_nulls():
    frame = aggregate.runs_frame({"runs": [{"routing": "vanilla", "residency": None, "summary": {"hit_rate": None}}]})
    assert frame.select("series", "residency", "hit_rate", "latency_s").rows() == [
        ("vanilla", "all_resident", None, None)
    ]
    assert aggregate.runs_frame({}).height == 0


def test_latency_is_told_a_token():
    document = replayed.document(replayed.ROUTINGS[:1], replayed.RESIDENCIES[:1])
    frame = aggregate.latency_parts(document)
    seconds = document["runs"][0]["summary"]["latency"]
    assert dict(frame.select("part", "ms").iter_rows()) == {p: 1e3 * s / 121 for p, s in seconds.items() if s}
    assert aggregate.latency_parts(replayed.document(hardware=None)).is_empty()


def test_budget_lines_leave_the_budget_out_of_the_name():
    residencies = [("lru", {"budget": b}, b / 40, 1.0) for b in (32, 8, 16)] + [("tide", {"budget": 8}, 0.5, 1.0)]
    frame = aggregate.by_parameter(replayed.document(replayed.ROUTINGS[:2], residencies), "budget")
    assert frame["line"].unique(maintain_order=True).to_list() == ["vanilla × lru", "team × lru"]
    assert frame["value"].to_list() == [8.0, 16.0, 32.0] * 2
    assert frame["hit_rate"].to_list() == [0.2, 0.4, 0.8] * 2
    assert aggregate.by_parameter(replayed.document(), "budget").is_empty()


def test_bars_are_cut_at_whole_residencies():
    residencies = [("lru", {"budget": b}, 0.5, 1.0) for b in range(1, 30)]
    frame = aggregate.whole_groups(aggregate.runs_frame(replayed.document(residencies=residencies)))
    assert frame.height <= aggregate.MAX_BARS
    assert set(frame.group_by("residency").len()["len"]) == {3}


def luminance(colour):
    """Relative luminance by WCAG 2.1."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_every_colour_stands_out_on_both_grounds():
    for colour in {*theme.PALETTE, theme.GREY, *theme.COLOURS.values(), *theme.PARTS.values()}:
        assert contrast(colour, theme.LIGHT_GROUND) >= 3, colour
        assert contrast(colour, theme.DARK_GROUND) >= 3, colour
    assert contrast(theme.LIGHT_INK, theme.LIGHT_GROUND) >= 7
    assert contrast(theme.DARK_INK, theme.DARK_GROUND) >= 7


def test_a_policy_keeps_its_colour_and_bounds_are_grey():
    assert theme.colour("dmoe") == theme.colours(["vanilla", "dmoe"])[1] == theme.GREEN
    assert {theme.colour(bound) for bound in theme.BOUNDS} == {theme.GREY}
    assert theme.colour("my_own_policy") == theme.colour("my_own_policy") in theme.PALETTE
    routings = ("vanilla", "team", "dmoe", "top_k", "des_seq", "des_vote", "oea", "block_pool", "skip", "expert_choice")
    assert len({theme.colour(policy) for policy in routings}) == len(routings)
    assert not set(theme.PARTS.values()) & set(theme.PALETTE)


def test_series_of_one_policy_differ_in_colour_and_dash():
    policies = ["dmoe"] * 4 + ["vanilla"]
    assert len(set(theme.colours(policies))) == 5
    assert len({tuple(d) for d in theme.dashes(policies[:4])}) == 4


def test_the_config_is_valid_in_both_schemes():
    for dark in (False, True):
        alt.Config.from_dict(theme.config(dark))
        assert theme.config(dark)["axis"]["labelFontSize"] >= 12
