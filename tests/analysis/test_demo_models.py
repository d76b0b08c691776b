"""What the README says of the bundled models holds on a fresh demo: routing is consistent in time, beyond its nulls."""

from __future__ import annotations

from dataclasses import replace

import polars as pl
import pytest

from analysis.metrics import consistency
from tracer.capture import run_capture
from tracer.capture_plan import DEMO_OPTIONS, demo_prompts, plan_capture
from tracer.parquet import open_trace


@pytest.fixture(scope="module", params=["llada2", "sdar"])
def frames(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "demo.trace"
    run_capture(plan_capture(f"demo:{request.param}", path, demo_prompts(), replace(DEMO_OPTIONS, level="ids")))
    result = consistency(open_trace(path), only=("overlap", "cosine", "drift", "survival", "unique", "working_set"))
    return {name: frame.filter(pl.col("layer").is_null()) for name, frame in result.frames.items()}


@pytest.mark.parametrize("metric", ["jaccard", "kept", "unchanged"])
@pytest.mark.parametrize("state", ["all", "masked", "decoded"])
def test_a_position_keeps_its_experts_at_every_distance(frames, metric, state):
    rows = frames["overlap"].filter(metric=metric, state=state)
    assert rows["distance"].to_list() == list(range(1, 9))
    assert rows["beats_null"].to_list() == [True] * 8


def test_acceptance_changes_them_and_yet_not_wholly(frames):
    rows = frames["overlap"].filter(metric="jaccard", distance=1)
    value = dict(rows.select("state", "value").iter_rows())
    assert value["accepted"] < min(value["masked"], value["decoded"]) / 2
    assert rows.filter(state="accepted")["beats_null"].to_list() == [True]


def test_counts_wanted_sets_and_active_experts_last(frames):
    for name, wanted in (("cosine", {}), ("drift", {"metric": "drift"}), ("survival", {})):
        rows = frames[name].filter(pl.col("distance") <= 5, scope="block", **wanted)
        assert rows.height >= 5 and rows["beats_null"].all(), name
    windows = frames["working_set"].filter(pl.col("window").is_between(2, 16), scope="block")
    assert windows["beats_null"].to_list() == [True] * 4


def test_fewer_experts_than_independent_rows_would_need(frames):
    assert frames["unique"].filter(metric="unique_mean")["beats_null"].all()
