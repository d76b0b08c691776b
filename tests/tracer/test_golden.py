"""Traces that the first writer of version 2 wrote, readable for ever: ``golden/*.v2`` hold what ``expected.json`` says.

Between them they have every table, column and state: requests side by side, padding, noise, edits, branches, rows of fewer
experts or none, layers that only some calls run, unknown numbers, rows without scores.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tracer.checking import check
from tracer.parquet import open_trace

GOLDEN = Path(__file__).parent / "golden"


def everything(path):
    """Whatever a reader gives, as JSON has it; NaN as null."""
    trace = open_trace(path)
    if "loads" in trace.meta.tables:
        steps, counts = trace.loads
        return {"steps": steps.tolist(), "counts": counts.tolist()}
    found = {"requests": trace.requests.to_dicts(), "decisions": trace.num_decisions, "padding": trace.padding_rows}
    for number, segment in enumerate(trace.segments()):
        for part, table in (("forwards", segment.forwards), ("tokens", segment.tokens)):
            for name in table.__slots__:
                found[f"{number} {part} {name}"] = plain(getattr(table, name))
        for layer in segment.layers:
            own = segment.layer(layer, with_scores=True, with_padding=True)
            for name in ("expert_ids", "count", "gate_weights", "router_scores", "present"):
                found[f"{number} layer {layer} {name}"] = plain(getattr(own, name))
            found[f"{number} layer {layer} count without padding"] = plain(segment.layer(layer).count)
    return found


def plain(values):
    if values is None:
        return None
    if values.dtype.kind == "f":
        return np.where(np.isnan(values), None, values.astype(object)).tolist()
    return values.tolist()


@pytest.mark.parametrize("name", ["ids", "active", "scores", "loads"])
def test_golden_trace(name):
    path = GOLDEN / f"{name}.v2"
    assert check(path) == []
    expected = json.loads((GOLDEN / "expected.json").read_text())[name]
    found = json.loads(json.dumps(everything(path), default=float))
    assert found == expected
