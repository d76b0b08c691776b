"""The Pareto front against its definition, row by row."""

from __future__ import annotations

import math

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.pareto import pareto
from tracer.errors import UserError


def naive_front(rows, minimise, maximise, by):
    """Indices of rows that no row of their group beats: at least as good everywhere and better somewhere."""

    def cost(row):
        small = [math.inf if row[name] is None else row[name] for name in minimise]
        return small + [math.inf if row[name] is None else -row[name] for name in maximise]

    def beats(one, other):
        pairs = list(zip(cost(one), cost(other), strict=True))
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    def alike(one, other):
        return all(one[name] == other[name] for name in by)

    return [i for i, row in enumerate(rows) if not any(alike(other, row) and beats(other, row) for other in rows)]


figure = st.none() | st.integers(0, 4) | st.floats(0, 3, width=16)
rows = st.lists(
    st.fixed_dictionaries(
        {
            "trace": st.sampled_from("ab"),
            "hardware": st.none() | st.just("h100-pcie5"),
            "latency_s": figure,
            "resident_bytes": st.integers(0, 4),
            "gate_retained": figure,
        }
    ),
    max_size=25,
)
SCHEMA = {
    "trace": pl.String,
    "hardware": pl.String,
    "latency_s": pl.Float64,
    "resident_bytes": pl.Int64,
    "gate_retained": pl.Float64,
}


@given(rows=rows)
@settings(max_examples=150, deadline=None)
def test_the_front_is_what_no_row_beats(rows):
    frame = pl.DataFrame(rows, SCHEMA, orient="row", strict=False).with_row_index("at")
    minimise, maximise = ["latency_s", "resident_bytes"], ["gate_retained"]
    for by in (("trace", "hardware"), ("trace",), ()):
        found = pareto(frame, [*minimise, *maximise], by)
        assert found["at"].to_list() == naive_front(frame.to_dicts(), minimise, maximise, by)
    assert pareto(frame, ["resident_bytes"], by=["trace"])["at"].to_list() == naive_front(
        frame.to_dicts(), ["resident_bytes"], [], ["trace"]
    )


def test_figures_are_those_of_the_machine_where_there_is_one():
    base = {"trace": "a", "unique_experts": 3.0, "gate_retained": None, "resident_bytes": 5, "bytes_to_gpu": 7}
    rows = [
        base | {"hardware": None, "latency_s": None, "cpu_tokens": 2},
        base | {"hardware": None, "latency_s": None, "cpu_tokens": 1},
        base | {"hardware": "m", "latency_s": 2.0, "cpu_tokens": 1},
        base | {"hardware": "m", "latency_s": 1.0, "cpu_tokens": 9},
    ]
    assert pareto(pl.DataFrame(rows))["cpu_tokens"].to_list() == [1, 9]
    with pytest.raises(UserError, match=r"no figure 'latncy_s' \(did you mean latency_s\?\)"):
        pareto(pl.DataFrame(rows), ["latncy_s"])
    with pytest.raises(UserError, match="column trace holds no numbers"):
        pareto(pl.DataFrame(rows), ["trace"])
    with pytest.raises(UserError, match="Neither less nor more of forwards is better"):
        pareto(pl.DataFrame({"forwards": [1, 2]}), ["forwards"])


def test_runs_over_their_budget_are_not_on_the_front():
    rows = [{"latency_s": 1.0, "over_budget": True}, {"latency_s": 3.0, "over_budget": False}]
    rows.append({"latency_s": 2.0, "over_budget": None})
    frame = pl.DataFrame(rows)
    assert pareto(frame, ["latency_s"])["latency_s"].to_list() == [2.0]
    assert pareto(frame.head(1), ["latency_s"]).is_empty()
    assert pareto(frame.head(1).with_columns(trace=pl.lit("a")), ["latency_s"]).is_empty()
