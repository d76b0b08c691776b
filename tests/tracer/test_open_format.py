"""Anybody can write and read a trace: README's example makes one, and other readers open the parts that ours writes."""

from __future__ import annotations

import re
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from simulator.replaying import replay
from tracer.checking import check
from tracer.parquet import open_trace
from tracer.synthetic import SyntheticOptions, write_synthetic

OPTIONS = SyntheticOptions(requests=1, blocks=2, layers=3, level="scores")
README = (Path(__file__).parent.parent.parent / "README.md").read_text()


def block(marker):
    """The Python code between two markers of README."""
    text = README.split(f"<!-- {marker}:begin -->")[1].split(f"<!-- {marker}:end -->")[0]
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return code


def test_the_minimal_example_is_a_valid_trace(tmp_path, monkeypatch):
    code = block("minimal")
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(lines) <= 20
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert check("hand.trace") == []
    trace = open_trace("hand.trace")
    assert trace.scan("routing").collect()["expert_id"].to_list() == [0, 3, 1, 3]
    (run,) = replay(trace, ["vanilla"], ["all_resident"]).runs
    assert (run.summary["unique_experts"], run.summary["tokens_per_forward"]) == (3.0, 2.0)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A trace of our writer with its layers as our reader gives them."""
    path = tmp_path_factory.mktemp("open") / "first.trace"
    write_synthetic(path, OPTIONS, segment_forwards=8)
    trace = open_trace(path)
    layers = {n: [s.layer(n, with_scores=True) for s in trace.segments()] for n in trace.meta.model.moe_layers}
    joined = {
        name: np.concatenate([getattr(own, name) for n in sorted(layers) for own in layers[n]])
        for name in ("expert_ids", "gate_weights", "router_scores")
    }
    return path, joined


def by_layer(frame):
    """Rows of all parts, layer by layer."""
    return frame.sort("layer", "forward_id", "row")


def test_polars_reads_the_parts_by_readmes_line(written):
    path, expected = written
    code = re.search(r"pl\.col\(\"expert_ids\"\)\.bin\.reinterpret\(dtype=pl\.Array\(pl\.UInt8, 8\)\)", README)
    rows = by_layer(pl.read_parquet(path / "routing" / "*.parquet"))
    found = rows.with_columns(eval(code[0]))
    np.testing.assert_array_equal(found["expert_ids"].to_numpy(), expected["expert_ids"])
    weights = rows.with_columns(pl.col("gate_weights").bin.reinterpret(dtype=pl.Array(pl.UInt16, 8)))["gate_weights"]
    np.testing.assert_array_equal(weights.to_numpy().view(np.float16), expected["gate_weights"])
    scores = rows.with_columns(pl.col("router_scores").bin.reinterpret(dtype=pl.Array(pl.Float32, 256)))[
        "router_scores"
    ]
    np.testing.assert_array_equal(scores.to_numpy(), expected["router_scores"])


def test_pyarrow_reads_the_parts(written):
    path, expected = written
    rows = pq.read_table(path / "routing").sort_by(
        [("layer", "ascending"), ("forward_id", "ascending"), ("row", "ascending")]
    )
    for name, dtype in (("expert_ids", np.uint8), ("gate_weights", np.float16), ("router_scores", np.float32)):
        found = np.frombuffer(b"".join(rows[name].to_pylist()), dtype).reshape(expected[name].shape)
        np.testing.assert_array_equal(found, expected[name])


def test_duckdb_reads_ids_and_keys(written):
    path, expected = written
    parts = path / "routing" / "*.parquet"
    rows = duckdb.sql(
        f"select layer, forward_id, row, expert_ids from '{parts}' order by layer, forward_id, row"
    ).fetchall()
    assert np.frombuffer(b"".join(row[3] for row in rows), np.uint8).tolist() == expected["expert_ids"].ravel().tolist()
    trace = open_trace(path)
    assert len(rows) == 3 * trace.num_rows
    counted = duckdb.sql(f"select layer, count(*) from '{parts}' group by layer order by layer").fetchall()
    assert counted == [(n, trace.num_rows) for n in trace.meta.model.moe_layers]


def test_compact_parts_are_read_by_pyarrow(tmp_path, written):
    _, expected = written
    path = write_synthetic(tmp_path / "a.trace", OPTIONS, segment_forwards=8, compact=True)
    assert check(path) == []
    rows = pq.read_table(path / "routing").sort_by(
        [("layer", "ascending"), ("forward_id", "ascending"), ("row", "ascending")]
    )
    found = np.frombuffer(b"".join(rows["gate_weights"].to_pylist()), np.float16).reshape(-1, 8)
    np.testing.assert_array_equal(found, expected["gate_weights"])
