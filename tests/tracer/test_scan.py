"""Plain views of a trace: tidy routing, raw tables, facts, and the schema as Markdown."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest

from tests.made_up.calls import record
from tracer.errors import UserError
from tracer.parquet import TraceWriter, open_trace
from tracer.schema import TABLES, schema_markdown
from tracer.summary import describe


@pytest.fixture(scope="module")
def recorded():
    return record(np.random.default_rng(0), count=True, level="active")


@pytest.fixture(scope="module")
def trace(recorded, tmp_path_factory):
    path = tmp_path_factory.mktemp("scan") / "a.trace"
    with TraceWriter(path, recorded.meta, segment_forwards=4) as writer:
        recorded.write(writer)
    return open_trace(path)


def naive_tidy(recorded):
    return sorted(
        (number, layer, r, int(e), float(np.float16(routing.gate_weights[n, r, k])))
        for number, (_, _, routing) in enumerate(recorded.calls)
        for n, layer in enumerate(routing.layers)
        for r in range(routing.expert_ids.shape[1])
        for k, e in enumerate(routing.expert_ids[n, r, : routing.count[n, r]])
    )


def test_tidy_view(trace, recorded):
    columns = ("forward_id", "layer", "row", "expert_id", "gate_weight")
    tidy = trace.scan("routing")
    frame = tidy.collect()
    assert frame.columns == ["forward_id", "layer", "row", "slot", "expert_id", "gate_weight"]
    assert sorted(frame.select(columns).rows()) == naive_tidy(recorded)
    slots = frame.group_by("forward_id", "layer", "row").agg(pl.col("slot"))["slot"].to_list()
    counts = [int(own) for _, _, routing in recorded.calls for own in routing.count.ravel()]
    assert sorted(slots) == sorted(list(range(own)) for own in counts if own)
    # filter, projection and limit are applied by the source itself
    late = tidy.filter((pl.col("layer") == 2) & (pl.col("forward_id") > 5)).select(columns).collect()
    assert sorted(late.rows()) == [row for row in naive_tidy(recorded) if row[1] == 2 and row[0] > 5]
    assert len(tidy.head(7).collect()) == 7
    first = frame.head(9).filter(pl.col("slot") == 0)
    assert tidy.head(9).filter(pl.col("slot") == 0).select("layer").collect().equals(first.select("layer"))
    assert 0 < len(first) < 9
    assert tidy.select(pl.len()).collect().item() == trace.num_decisions


def test_raw_tables(trace, recorded):
    parts = [part for parts, _, _ in recorded.calls for part in parts]
    forwards = trace.scan("forwards").collect()
    assert forwards.columns == [column.name for column in TABLES["forwards"]]
    assert forwards["duration_ns"].to_list() == [part["duration_ns"] for part in parts]
    assert forwards["chosen_branch"].null_count() == len(parts)
    assert len(trace.scan("tokens").collect()) == trace.num_rows
    rows = trace.scan("rows").collect()
    assert rows.columns == [column.name for column in TABLES["routing"]]
    assert len(rows) == 2 * trace.num_rows and rows["expert_ids"].dtype == pl.Binary
    keys = [
        (number, layer, r)
        for number, (_, _, routing) in enumerate(recorded.calls)
        for layer in routing.layers
        for r in range(routing.expert_ids.shape[1])
    ]
    assert sorted(rows.select("forward_id", "layer", "row").rows()) == keys
    assert {len(ids) for ids in rows["expert_ids"]} == {2} and {len(own) for own in rows["gate_weights"]} == {4}
    assert rows["router_scores"].null_count() == len(rows)
    assert len(trace.scan("scores").collect()) == 2 * len(recorded.calls)
    assert trace.scan("requests").collect()["request_id"].to_list() == [0, 1, 2, 3]
    with pytest.raises(UserError, match=r"there is no table 'cells': choose one of requests, forwards, .*, rows"):
        trace.scan("cells")
    with pytest.raises(UserError, match="has no loads table"):
        trace.scan("loads")
    with pytest.raises(UserError, match="there is no requirement 'speed'"):
        trace.has("speed")


def test_missing_table(tmp_path):
    recorded = record(np.random.default_rng(0), tokens=False)
    with TraceWriter(tmp_path / "a.trace", recorded.meta) as writer:
        recorded.write(writer)
    with pytest.raises(UserError, match="has no tokens table"):
        open_trace(tmp_path / "a.trace").scan("tokens")


def test_describe(trace, recorded):
    facts = describe(trace)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["counts"]["decisions"] == len(naive_tidy(recorded))
    assert facts["counts"]["forwards_by_kind"] == {"prefill": 2, "denoise": 8, "commit": 4, "decode": 0}
    assert facts["counts"]["stop_reasons"] == {"length": 4}
    assert facts["bytes"]["total"] == sum(p.stat().st_size for p in trace.path.glob("*/*.parquet"))
    sizes = facts["bytes_per_decision"]
    assert 0 < sizes["ids"] < sizes["ids_and_weights"] < sizes["all"]
    assert sizes["all"] == facts["bytes"]["total"] / facts["counts"]["decisions"]


def test_describe_an_empty_trace(tmp_path):
    TraceWriter(tmp_path / "a.trace", record(np.random.default_rng(0)).meta).close()
    facts = describe(open_trace(tmp_path / "a.trace"))
    assert facts["counts"]["forwards"] == 0 and facts["bytes_per_decision"]["ids"] is None


def test_schema_markdown():
    text = schema_markdown()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == sum(len(columns) for columns in TABLES.values())
    assert "| `chosen_branch` | uint8? | the copy that was kept |" in rows
    assert any(row.startswith("| `expert_ids` | binary[K or 2K] | uint8 (E <= 256) or uint16 [K]") for row in rows)
    assert all(line.count("|") == 4 for line in rows)
    assert [line.split("`")[1] for line in text.splitlines() if line.startswith("**")] == list(TABLES)
