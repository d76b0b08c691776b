"""A sweep is its replays, one by one, however it was stopped and taken up again."""

from __future__ import annotations

import json
import sys
from itertools import product

import polars as pl
import pytest

from simulator import sweeping as sweeps
from simulator.registry import load_policy, spec_of
from simulator.replaying import replay, run_experiments
from simulator.sweep_table import trace_identity
from simulator.sweeping import sweep
from tests.analysis.replayed import stored
from tracer.errors import UserError
from tracer.parquet import open_trace

ROUTING = ["vanilla", "dmoe:top_p=0.4|0.8,min_experts=2..3"]
RESIDENCY = ["all_resident", "tide:budget=2|5,refresh_interval=1..3", "lru:scope=global,budget=3", "static:budget=3"]
MACHINES = ["h100-pcie5", "a100-pcie4:overlap=true"]
OWN_POLICY = '''
from dataclasses import dataclass
from simulator.residency.static import Static

@dataclass(frozen=True)
class Mine(Static):
    """A policy of the user's own."""
'''


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return stored(tmp_path_factory.mktemp("traces") / "a.trace")[1]


def flat(summary):
    """A summary's figures by column, parts of a figure by name."""
    found = {}
    for key, value in summary.items():
        if key == "unique_experts_ci95":
            found |= dict(zip((f"{key}.low", f"{key}.high"), value or (None, None), strict=True))
        elif key == "speedup":
            found |= dict.fromkeys((key, f"{key}.low", f"{key}.high"))
            found |= {key: value["value"], f"{key}.low": value["low"], f"{key}.high": value["high"]} if value else {}
        elif isinstance(value, dict):
            found |= {f"{key}.{part}": figure for part, figure in value.items()}
        elif key != "latency":
            found[key] = value
    return found


def naive_sweep(trace, machines):
    """Every configuration replayed on its own: (routing, residency, hardware) to the run."""
    routings = ["vanilla", *(f"dmoe:top_p={p},min_experts={n}" for p, n in product((0.4, 0.8), (2, 3)))]
    tides = [f"tide:budget={b},refresh_interval={tau}" for b, tau in product((2, 5), (1, 2, 3))]
    residencies = ["all_resident", *tides, "lru:scope=global,budget=3", "static:budget=3"]
    return {
        (spec_of(load_policy("routing", r)), spec_of(load_policy("residency", p)), m): replay(trace, [r], [p], m).runs[
            0
        ]
        for r, p, m in product(routings, residencies, machines)
    }


@pytest.mark.parametrize("machines", [None, MACHINES])
def test_every_row_is_the_replay_of_its_configuration(machines, trace, tmp_path):
    result = sweep(trace, ROUTING, RESIDENCY, machines, out=tmp_path / "results.parquet")
    expected = naive_sweep(trace, machines or [None])
    rows = result.frame.to_dicts()
    assert [(row["routing"], row["residency"], row["hardware"]) for row in rows] == list(expected)
    assert (result.computed, result.reused) == (len(expected), 0)
    for row, run in zip(rows, expected.values(), strict=True):
        figures = flat(run.summary)
        assert {key: row[key] for key in figures} == figures
        assert (row["estimate"], row["notes"], row["kernel"]) == (run.estimate, run.notes, run.kernel)
        for axis in ("routing", "residency", "acceptance"):
            told = getattr(run, axis)["parameters"]
            assert {key: row[f"{axis}.{key}"] for key in told} == told
        assert (row["model"], row["trace"]) == ("made", trace_identity(trace))
    assert pl.read_parquet(result.path).equals(result.frame)


class Stopped(Exception):
    """Stands for whatever kills a sweep."""


def stop_after(monkeypatch, passes):
    """Let a sweep's replays run ``passes`` times; the list says how many runs each had."""
    done = []

    def once(*arguments, **options):
        if len(done) == passes:
            raise Stopped
        result = run_experiments(*arguments, **options)
        done.append(len(result.runs))
        return result

    monkeypatch.setattr(sweeps, "run_experiments", once)
    return done


@pytest.mark.parametrize("passes", [1, 2, 5])
def test_a_stopped_sweep_loses_only_the_runs_under_way(passes, trace, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "RUNS_A_PASS", 8)
    monkeypatch.setattr(sweeps, "BRANCHES_A_PASS", 2)
    whole = sweep(trace, ROUTING, RESIDENCY, MACHINES, out=tmp_path / "whole.parquet")
    out = tmp_path / "stopped.parquet"
    done = stop_after(monkeypatch, passes)
    with pytest.raises(Stopped):
        sweep(trace, ROUTING, RESIDENCY, MACHINES, out=out)
    assert pl.read_parquet(out).height == sum(done)
    more = stop_after(monkeypatch, -1)
    resumed = sweep(trace, ROUTING, RESIDENCY, MACHINES, out=out)
    assert resumed.reused == sum(done) and resumed.computed == sum(more) == whole.computed - sum(done)
    assert max(more) <= 8
    assert resumed.frame.equals(whole.frame)
    assert out.read_bytes() == whole.path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["stopped.parquet", "whole.parquet"]
    stop_after(monkeypatch, 0)
    assert sweep(trace, ROUTING, RESIDENCY, MACHINES, out=out).computed == 0


def test_many_configurations_share_a_pass(trace, tmp_path, monkeypatch):
    done = stop_after(monkeypatch, -1)
    sweep(trace, ["vanilla"], ["tide:budget=1..8,refresh_interval=1..8"], out=tmp_path / "r.parquet")
    assert done == [64]


def test_rows_of_other_traces_and_grids_stay_as_they_are(trace, tmp_path):
    out = tmp_path / "r.parquet"
    other = stored(tmp_path / "b.trace", seed=1)[1]
    assert trace_identity(other) != trace_identity(trace)
    sweep(trace, ["vanilla"], ["all_resident"], "h100-pcie5", out=out)
    sweep(other, ["vanilla"], ["all_resident", "lru:budget=1"], "h100-pcie5", out=out)
    last = sweep(trace, ["vanilla"], ["none_resident", "lru:budget=1"], "h100-pcie5", out=out)
    frame = pl.read_parquet(out)
    assert frame["trace"].to_list() == [trace_identity(t) for t in (trace, trace, other, other, trace)]
    assert (last.computed, last.reused) == (2, 0)
    for one in (trace, other):
        of_trace = frame.filter(pl.col("trace") == trace_identity(one))
        for row in of_trace.iter_rows(named=True):
            alone = replay(one, residency=[row["residency"]], hardware="h100-pcie5").runs[0].summary
            assert (row["speedup"], row["speedup_residency"]) == (1.0, alone["speedup_residency"])


def test_a_trace_keeps_its_identity_when_it_moves_and_loses_it_when_it_grows(trace, tmp_path):
    again = stored(tmp_path / "elsewhere.trace")[1]
    moved = tmp_path / "moved.trace"
    before = trace_identity(again)
    again.path.rename(moved)
    assert trace_identity(open_trace(moved)) == before
    meta = json.loads((moved / "meta.json").read_text())
    (moved / "meta.json").write_text(json.dumps(meta | {"complete": False, "checksum": None}))
    assert trace_identity(open_trace(moved)) != before


def test_an_edited_policy_file_is_run_again(trace, tmp_path):
    policy, out = tmp_path / "mine.py", tmp_path / "r.parquet"
    policy.write_text(OWN_POLICY)
    specs = ["all_resident", f"{policy}:budget=1..2"]
    assert sweep(trace, residency=specs, out=out).computed == 3
    assert sweep(trace, residency=specs, out=out).computed == 0
    policy.write_text(OWN_POLICY + "\n# Edited.\n")
    assert sweep(trace, residency=specs, out=out).computed == 2
    assert pl.read_parquet(out).height == 3


@pytest.mark.parametrize("said", ["import mine_helper", "from mine_helper import NUMBER"])
def test_an_edited_module_that_a_policy_file_imports_is_noticed(said, trace, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    policy, helper, out = tmp_path / "mine.py", tmp_path / "mine_helper.py", tmp_path / "r.parquet"
    helper.write_text("NUMBER = 1\n")
    policy.write_text(f"{said}\n{OWN_POLICY}")
    try:
        assert [sweep(trace, residency=[f"{policy}:budget=1"], out=out).computed for _ in range(2)] == [1, 0]
        helper.write_text("NUMBER = 2\n")
        assert sweep(trace, residency=[f"{policy}:budget=1"], out=out).computed == 1
    finally:
        del sys.modules["mine_helper"]


def test_another_trace_to_fit_on_is_noticed_under_its_old_name(trace, tmp_path):
    path, out = tmp_path / "fit.trace", tmp_path / "r.parquet"
    stored(path)
    spec = [f"static:budget=2,fit_on={path}"]
    assert [sweep(trace, residency=spec, out=out).computed for _ in range(2)] == [1, 0]
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps(meta | {"complete": False, "checksum": None}))
    assert sweep(trace, residency=spec, out=out).computed == 1


def test_a_policy_that_decides_by_the_machine_is_another_on_each(trace, tmp_path):
    result = sweep(trace, residency=["fiddler:budget=2"], hardware=MACHINES, out=tmp_path / "r.parquet")
    alone = [replay(trace, residency=["fiddler:budget=2"], hardware=m).runs[0] for m in MACHINES]
    assert result.frame["latency_s"].to_list() == [run.summary["latency_s"] for run in alone]
    assert result.frame["residency.cpu_tokens_max"].to_list() == [
        run.residency["parameters"]["cpu_tokens_max"] for run in alone
    ]
    assert result.frame["residency"].to_list() == ["fiddler:budget=2"] * 2


def test_progress_rises_to_all_calls_of_all_runs(trace, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "RUNS_A_PASS", 2)
    seen = []
    result = sweep(
        trace,
        residency=["lru:budget=1..4", "static:budget=1"],
        out=tmp_path / "r.parquet",
        progress=lambda done, total: seen.append((done, total)),
    )
    total = result.computed * trace.num_forwards
    assert seen == sorted(seen) and seen[-1] == (total, total) and {t for _, t in seen} == {total}


def test_files_that_are_no_sweep_are_left_alone_unless_forced(trace, tmp_path):
    out = tmp_path / "r.parquet"
    for damage in (b"no table", None):
        if damage is None:
            pl.DataFrame({"a": [1]}).write_parquet(out)
        else:
            out.write_bytes(damage)
        before = out.read_bytes()
        with pytest.raises(UserError, match="is not a sweep's result"):
            sweep(trace, out=out)
        assert out.read_bytes() == before
    assert sweep(trace, out=out, force=True).computed == 1
    assert sweep(trace, out=out, force=True).computed == 1
    with pytest.raises(UserError, match="is a folder"):
        sweep(trace, out=tmp_path)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"residency": ["tide:budget=4..1"]}, "range 4..1"),
        ({"residency": ["tide:bugdet=1..4"]}, "no parameter 'bugdet=1'"),
        ({"routing": ["vanila"]}, "no routing policy 'vanila'"),
        ({"hardware": "h100-pcie5:host_gib=a|b"}, "host_gib=a is no amount"),
        ({"routing": []}, "at least one of each"),
        ({"workers": 0}, "threads=0"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(options, sentence, trace, tmp_path):
    out = tmp_path / "r.parquet"
    with pytest.raises(UserError) as error:
        sweep(trace, **options, out=out)
    assert sentence in str(error.value) and not out.exists()
