"""The whole replay against one written with sets and loops: every cell, every key of the summary, the files."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from simulator.cost import CostModel
from simulator.policy import Selection, Trajectory
from simulator.presets import load_hardware
from simulator.replaying import replay
from simulator.runs import memory_notes
from tests.made_up.changes import joined
from tests.made_up.runs import random_trace
from tests.simulator.naive_replay import LAYERS, E, mean, naive_cells, naive_choice, naive_forwards, naive_summary
from tracer.errors import UserError
from tracer.schema import DENOISE, KINDS

SUMMARY = {
    *("forwards", "denoise_forwards", "unique_experts", "unique_experts_block", "unique_experts_all_forwards"),
    *("unique_experts_block_all_forwards", "unique_experts_per_request", "unique_experts_ci95", "tokens_per_forward"),
    *(
        "tokens_per_forward_with_commit",
        "assignments",
        "working_set_bytes",
        "gate_retained",
        "gpu_tokens",
        "cpu_tokens",
    ),
    *("promotions", "demotions", "hit_rate", "expert_hit_rate", "expert_hit_rate_by_kind", "bytes_to_gpu"),
    "staging_bytes",
    *("experts_retained", "load_skew", "working_set_experts", "gpu_tokens_per_promotion"),
    *("refreshes", "surplus_refreshes", "hit_rate_by_lag"),
    *("bytes_to_host", "resident_bytes", "latency_s", "latency", "tokens_per_s", "speedup", "speedup_residency"),
}

CELLS = {
    "run": pl.UInt16,
    "forward_id": pl.UInt32,
    "layer": pl.UInt16,
    "assignments": pl.UInt32,
    "unique_experts": pl.UInt16,
    "unique_experts_block": pl.UInt16,
    "gpu_tokens": pl.UInt32,
    "cpu_tokens": pl.UInt32,
    "gpu_experts": pl.UInt16,
    "cpu_experts": pl.UInt16,
    "hit_tokens": pl.UInt32,
    "hit_experts": pl.UInt16,
    "promotions": pl.UInt16,
    "demotions": pl.UInt16,
    "gate_retained": pl.Float32,
}


@dataclass(frozen=True)
class FirstSlots:
    """A toy routing policy: every row keeps its first ``keep`` slots."""

    keep: int = 1
    requires: ClassVar[frozenset[str]] = frozenset()

    def select(self, layer, trajectory, geometry):
        count = np.minimum(layer.count, self.keep).astype(np.uint8)
        if trajectory.reused is not None:
            count[trajectory.reused] = 0
        return Selection(layer.expert_ids, count, layer.gate_weights)


@dataclass(frozen=True)
class EveryOther:
    """A toy acceptance policy: every second call only, its rows backwards, every third row reused."""

    requires: ClassVar[frozenset[str]] = frozenset()

    def unroll(self, segment, geometry):
        table = segment.forwards
        calls = np.arange(0, table.num_forwards, 2)
        rows = [np.arange(table.row_offsets[f], table.row_offsets[f + 1])[::-1] for f in calls]
        parts = np.flatnonzero(np.isin(table.part_forward, calls))
        columns = {
            n: getattr(table, n)[parts] for n in ("request_id", "kind", "block", "step", "num_tokens", "kv_tokens")
        }
        more = ("num_masked", "num_accepted", "num_edited", "branches", "chosen_branch")
        columns |= {n: getattr(table, n)[parts] for n in more}
        sizes = [len(r) for r in rows]
        source = np.concatenate(rows)
        reused = np.arange(len(source)) % 3 == 2
        starts = [table.row_start[parts], columns["num_tokens"]]
        # Reversed rows: the last part of a call comes first.
        total = np.repeat(sizes, np.diff(table.part_offsets)[calls])
        return Trajectory(
            forwards=replace(
                table,
                forward_id=np.arange(len(calls), dtype=np.uint32),
                row_offsets=np.cumsum([0, *sizes]),
                part_offsets=np.cumsum([0, *np.diff(table.part_offsets)[calls]]),
                row_start=total - starts[0] - starts[1],
                duration_ns=table.duration_ns[parts],
                **columns,
            ),
            position=segment.tokens.position[source],
            state=segment.tokens.state[source],
            source=source,
            reused=reused,
            notes=("Every other call.",),
            bounds={"accepted": (1, 4), "denoise_forwards": (2, 2)},
            bound_rows=(~reused & (source % 2 == 0), np.ones(len(source), bool)),
        )


@dataclass(frozen=True)
class Halved(FirstSlots):
    """The toy routing policy that brings the toy acceptance policy along."""

    def acceptance(self):
        return EveryOther()


RESIDENCIES = {
    "all_resident": ("all_resident",),
    "lru:budget=2": ("lru", 2),
    "lru:scope=global,budget_bytes=4000": ("lru_global", 4000),
    "tide:budget=3,refresh_interval=2": ("tide", 3, 2),
}


@given(seed=st.integers(0, 10**6), weights=st.booleans(), simulated=st.booleans())
@settings(max_examples=50, deadline=None)
def test_every_cell_and_every_figure_equals_the_naive_replay(seed, weights, simulated):
    trace = random_trace(seed, requests=3, calls=6, weights=weights)
    routings = [("vanilla", 3, None), (FirstSlots(2), 2, None)]
    if simulated:
        routings = [(Halved(2), 2, EveryOther())]
    result = replay(trace, [r for r, _, _ in routings], list(RESIDENCIES))
    assert [run.run for run in result.runs] == list(range(len(routings) * 4))
    frame, sizes = result.cells, {1: 1100, 2: 1200}
    for r, (_, keep, acceptance) in enumerate(routings):
        calls = naive_forwards(trace, acceptance)
        for p, residency in enumerate(RESIDENCIES.values()):
            cells = naive_cells(calls, keep, trace.first_block, residency, weights)
            run = result.runs[r * 4 + p]
            rows = frame.filter(pl.col("run") == run.run)
            assert list(zip(rows["forward_id"], rows["layer"], strict=True)) == list(cells)
            for row, cell in zip(rows.iter_rows(named=True), cells.values(), strict=True):
                kept, vanilla = cell.pop("kept"), cell.pop("vanilla")
                assert {key: row[key] for key in cell} == cell
                share = None if kept is None else np.float32(kept / vanilla if vanilla else 1.0)
                assert row["gate_retained"] == share
                cell["kept"], cell["vanilla"] = kept, vanilla
            expected = naive_summary(calls, cells, sizes, keep, trace.first_block, residency)
            found = {key: run.summary[key] for key in expected}
            low, high = found["unique_experts_ci95"] or (-math.inf, math.inf)
            assert low <= (found["unique_experts"] or 0) <= high
            for key in ("unique_experts_per_request", "unique_experts_ci95"):
                assert found.pop(key) == (pytest.approx(expected[key], rel=1e-12) if expected[key] else expected[key])
                del expected[key]
            assert found == expected


@given(seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_a_trace_in_segments_replays_as_in_one(seed):
    trace = random_trace(seed, segments=4, calls=3, requests=3, num_layers=3)
    specs = [*RESIDENCIES, "static:budget=2", "belady:budget=2", "belady:scope=global,budget=2", "lfu:budget=2"]
    routings = ["vanilla", FirstSlots(1)]
    several, one = (replay(t, routings, specs, hardware="h100-pcie5") for t in (trace, joined(trace)))
    assert several.cells.equals(one.cells, null_equal=True)
    assert several.forwards.equals(one.forwards)
    assert several.to_json() == one.to_json()


def test_simulated_forwards_are_numbered_anew_and_carry_bounds():
    trace = random_trace(5, segments=2, calls=6)
    result = replay(trace, ["vanilla", Halved(1)])
    recorded, other = result.runs
    assert (recorded.estimate, recorded.bounds, recorded.acceptance["name"]) == (False, None, "recorded")
    assert other.estimate and other.acceptance == {"name": "test_replay", "parameters": {}}
    assert "Every other call." in other.notes and "Every other call." not in recorded.notes
    assert result.cells.filter(pl.col("run") == 1)["forward_id"].unique().sort().to_list() == list(range(6))
    assert other.bounds["tokens_per_forward"] == [2 / 4, 8 / 4]
    calls = naive_forwards(trace, EveryOther())
    steps = [(c, n) for c in calls if c["kind"] == DENOISE for n in LAYERS if c["present"][n]]
    lower = mean(len({e for t in c["bounds"][0] for e in naive_choice(c, n, 1)[t]}) for c, n in steps)
    upper = mean(len({e for t in c["bounds"][1] for e, _ in c["experts"][n][t]}) for c, n in steps)
    assert other.bounds["unique_experts"] == [lower, upper]
    ran = result.forwards.filter(pl.col("run") == 1)
    assert ran["kind"].to_list() == [KINDS[c["kind"]] for c in calls for _ in c["parts"]]
    assert ran["num_tokens"].to_list() == [len(p["rows"]) for c in calls for p in c["parts"]]


@given(seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_relabelling_experts_changes_no_figure_of_a_trace_without_ties(seed):
    trace = random_trace(seed, ties=False)
    # Among float16 values two of a row may be drawn alike all the same.
    rows = [row for piece in trace.pieces for n in piece.layers for row in piece.layer(n).gate_weights.tolist()]
    assume(all(len(set(row)) == len(row) for row in rows))
    labels = np.random.default_rng(seed).permutation(E).astype(np.uint8)
    relabelled = replace(trace, pieces=[relabel(piece, labels) for piece in trace.pieces])
    # Policies whose rules name experts by id only to break ties between equal loads or uses.
    specs = ["all_resident", "lru:budget=2", "lru:scope=global,budget=2", "lfu:budget=2"]
    before, after = (replay(t, ["vanilla", FirstSlots(2)], specs) for t in (trace, relabelled))
    assert before.cells.equals(after.cells)
    assert before.to_json() == after.to_json()


def relabel(piece, labels):
    def load(*asked):
        found = piece.load(*asked)
        return replace(found, expert_ids=labels[found.expert_ids])

    return replace(piece, load=load)


def test_cells_have_the_published_columns_and_json_the_published_keys(tmp_path):
    trace = random_trace(3)
    result = replay(trace, ["vanilla"], ["all_resident", "lru:budget=2"], hardware="a100-pcie4:overlap=true")
    assert dict(result.cells.schema) == CELLS
    paths = result.write(tmp_path / "out")
    assert dict(pl.read_parquet(paths[0]).schema) == CELLS
    assert pl.read_parquet(paths[0]).equals(result.cells)
    document = json.loads(paths[1].read_text(encoding="utf-8"))
    assert document == result.to_json()
    assert list(document) == ["trace", "runs"]
    for run in document["runs"]:
        assert list(run) == [
            "run",
            "acceptance",
            "routing",
            "residency",
            "hardware",
            "kernel",
            "summary",
            "estimate",
            "over_budget",
            "bounds",
            "notes",
        ]
        assert set(run["summary"]) == SUMMARY
        assert sorted(run["summary"]["latency"]) == ["cpu_experts", "dense", "gpu_experts", "to_gpu", "to_host"]
        assert run["hardware"] == "a100-pcie4:overlap=true"
        assert any("estimates" in note for note in run["notes"])
    assert document["runs"][1]["residency"] == {
        "name": "lru",
        "parameters": {"budget": 2, "scope": "layer", "hold": "budget"},
    }
    assert document["trace"]["forwards"] == trace.num_forwards


def test_notes_say_how_far_a_figure_may_be_trusted():
    trace = random_trace(4)
    result = replay(
        trace, ["vanilla", FirstSlots(1), Halved(1)], ["all_resident", "static:budget=1", "belady:budget=1"]
    )
    exact, best_case, bound, open_loop, *_, simulated = (run.notes for run in result.runs)
    assert exact[0].startswith("Exact: ") and "popularity of the replayed run" in best_case[1] and "a bound" in bound[1]
    assert "open loop" in open_loop[0] and open_loop[0].startswith(
        "Estimate: exact on what was recorded of the routers"
    )
    assert "open loop" in simulated[0] and simulated[0].startswith("Estimate: the forwards are simulated")


def test_results_are_never_overwritten_unless_forced(tmp_path):
    result = replay(random_trace(3))
    result.write(tmp_path)
    with pytest.raises(UserError, match=r"holds replay\.parquet already"):
        result.write(tmp_path)
    result.write(tmp_path, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["forwards.parquet", "replay.json", "replay.parquet"]


def test_forwards_are_written_beside_the_cells(tmp_path, monkeypatch):
    monkeypatch.setattr("simulator.result.ROWS_AT_ONCE", 1)
    result = replay(random_trace(6, segments=3), ["vanilla", Halved(1)], ["all_resident", "lru:budget=1"])
    cells, _, forwards = result.write(tmp_path)
    assert pl.read_parquet(forwards).equals(result.forwards)
    assert dict(pl.read_parquet(forwards).schema) == dict(result.forwards.schema)
    assert pl.read_parquet(cells).equals(result.cells, null_equal=True)


def test_a_replay_without_cells_keeps_everything_else(tmp_path):
    trace = random_trace(6, segments=3)
    specs = [*RESIDENCIES, "static:budget=2"]
    kept, lean = (
        replay(trace, ["vanilla", FirstSlots(1)], specs, "h100-pcie5", keep_cells=kept) for kept in (True, False)
    )
    assert lean.to_json() == kept.to_json()
    assert lean.forwards.equals(kept.forwards)
    for ask in (lambda: lean.cells, lambda: lean.write(tmp_path / "out")):
        with pytest.raises(UserError, match="kept no cells"):
            ask()


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads, monkeypatch):
    trace = random_trace(8, segments=2, num_layers=5)
    specs = [*RESIDENCIES, "belady:budget=2", "belady:scope=global,budget=2"]
    one = replay(trace, residency=specs)
    monkeypatch.setattr("simulator.walk.SIDE_BY_SIDE", 0)
    several = replay(trace, residency=specs, threads=threads)
    assert several.to_json() == one.to_json() and several.cells.equals(one.cells)
    with pytest.raises(UserError, match="threads=0"):
        replay(trace, threads=0)


@pytest.mark.parametrize("share", [0.0, 0.4, 0.7])
def test_what_the_first_pass_keeps_changes_nothing(share, monkeypatch):
    trace = random_trace(9, segments=4, calls=5, num_layers=3)
    routings, read = ["vanilla", FirstSlots(1), Halved(1)], []
    specs = [*RESIDENCIES, "static:budget=2", "belady:budget=2", "belady:scope=global,budget=2"]
    pieces = [replace(p, load=lambda n, *asked, p=p: read.append(n) or p.load(n, *asked)) for p in trace.pieces]
    trace = replace(trace, pieces=pieces)
    kept = replay(trace, routings, specs, "h100-pcie5")
    once = len(read)
    decisions = sum(p.forwards.num_rows * (2 + 0.5) * 3 * trace.meta.model.top_k for p in pieces)
    monkeypatch.setattr("simulator.walk.KEPT_DECISIONS", share * decisions)
    anew = replay(trace, routings, specs, "h100-pcie5")
    assert len(read) == 3 * once
    assert anew.to_json() == kept.to_json()
    assert anew.cells.equals(kept.cells, null_equal=True) and anew.forwards.equals(kept.forwards)


def test_weights_that_do_not_fit_the_gpu_are_told():
    trace = random_trace(11)
    model = replace(trace.meta.model, dense_bytes=8_000_000_000)
    trace = replace(trace, meta=replace(trace.meta, model=model))
    everything = sum(trace.meta.model.expert_bytes.values()) * trace.meta.model.num_experts
    machine = load_hardware("rtx-4060-laptop")
    for room, fits in ((everything + 8_000_000_000, True), (everything + 7_999_999_999, False)):
        cost = CostModel(replace(machine, gpu_memory_bytes=room), 8, 8, 8_000_000_000, 2)
        assert bool(memory_notes(cost, everything)) != fits
    runs = replay(trace, ["vanilla"], ["all_resident"], ["rtx-4060-laptop", "h100-pcie5"]).runs
    told = [[note for note in run.notes if note.startswith("Does not fit")] for run in runs]
    assert len(told[0]) == 1 and "8 GB of other weights" in told[0][0] and not told[1]


def test_latency_is_the_sum_of_its_forwards_and_speed_up_a_ratio_of_throughputs():
    trace = random_trace(11, calls=8)
    machine = load_hardware("h100-pcie5")
    result = replay(trace, ["vanilla"], ["none_resident", "all_resident", "lru:budget=1"], hardware="h100-pcie5")
    slow, fast, moving = (run.summary for run in result.runs)
    for summary in (slow, fast, moving):
        assert summary["latency_s"] == pytest.approx(sum(summary["latency"].values()), rel=1e-12)
    assert slow["latency"]["gpu_experts"] == slow["latency"]["to_gpu"] == 0
    assert fast["latency"]["cpu_experts"] == fast["latency"]["to_gpu"] == 0
    sizes = {1: 1100, 2: 1200}
    promoted = result.cells.filter(pl.col("run") == 2).group_by("layer").agg(pl.col("promotions").cast(int).sum())
    expected = sum(
        n * (machine.copy_latency_s + sizes[layer] / machine.h2d_bytes_per_s) for layer, n in promoted.rows()
    )
    assert moving["latency"]["to_gpu"] == pytest.approx(expected, rel=1e-12)
    accepted = sum(int(p.forwards.num_accepted.sum()) for p in trace.pieces)
    assert slow["tokens_per_s"] == accepted / slow["latency_s"]
    # Each is vanilla routing on the recorded forwards itself.
    assert all(summary["speedup"] == {"value": 1.0, "low": 1.0, "high": 1.0} for summary in (slow, fast, moving))
    assert (slow["speedup_residency"], fast["speedup_residency"]) == (None, None)


def test_without_hardware_or_without_geometry_latency_is_null():
    keys = ("latency_s", "latency", "tokens_per_s", "speedup", "speedup_residency")
    for trace, hardware in ((random_trace(1), None), (random_trace(1, dense_bytes=None), "h100-pcie5")):
        run = replay(trace, hardware=hardware).runs[0]
        assert [run.summary[key] for key in keys] == [None] * 5 and run.kernel is None
        assert any("dense_bytes" in note for note in run.notes) == (hardware is not None)


def test_several_machines_come_innermost():
    trace = random_trace(1)
    result = replay(trace, ["vanilla"], ["all_resident", "none_resident"], hardware=["h100-pcie5", "a100-pcie4"])
    named = [(run.residency["name"], run.hardware) for run in result.runs]
    assert named == [(p, h) for p in ("all_resident", "none_resident") for h in ("h100-pcie5", "a100-pcie4")]
    halves = [result.cells.filter(pl.col("run") == run).drop("run") for run in range(4)]
    assert halves[0].equals(halves[1]) and halves[2].equals(halves[3])


def test_a_policy_that_decides_by_the_machine_is_another_on_each():
    trace = random_trace(1, expert_bytes=dict.fromkeys((1, 2), 6_291_456))
    machines = ["h100-pcie5", "gh200", "rtx-4060-laptop", "h100-pcie5:overlap=true"]
    specs = ["fiddler:budget=2", "lru:budget=2", "fiddler:budget=2,cpu_tokens_max=1"]
    together = replay(trace, ["vanilla", FirstSlots(1)], specs, machines)
    alone = [replay(trace, ["vanilla", FirstSlots(1)], specs, machine) for machine in machines]
    for number, run in enumerate(together.runs):
        of_machine, other = alone[number % 4], number // 4
        expected = of_machine.runs[other]
        assert replace(run, run=other) == expected
        mine, theirs = (
            c.filter(pl.col("run") == n).drop("run") for c, n in ((together.cells, number), (of_machine.cells, other))
        )
        assert mine.equals(theirs, null_equal=True)
    decided = {run.residency["parameters"]["cpu_tokens_max"] for run in together.runs[:4]}
    assert len(decided) > 1


def test_a_cache_that_held_more_than_its_budget_says_so():
    trace = random_trace(1, expert_bytes={1: 1000, 2: 1000})
    specs = ["lru:budget=1,hold=batch", "lru:budget=7,hold=batch", "static:budget=1", "lru:budget=1"]
    small, whole, fixed, bound = replay(trace, residency=specs).runs
    assert small.summary["resident_bytes"] > 2000 == bound.summary["resident_bytes"]
    assert [run.over_budget for run in (small, whole, fixed, bound)] == [True, False, False, False]
    assert any(
        "Over budget: lru held up to" in note and "more than its budget of 0.002 MB" in note for note in small.notes
    )
    assert not any("more than its budget" in note for run in (whole, fixed, bound) for note in run.notes)


def test_a_budget_that_is_a_share_is_told_in_experts():
    share, number = replay(random_trace(1), residency=["lru:budget=50%", "lru:budget=3"]).runs
    assert share.residency == number.residency and share.summary == number.summary


def test_the_staging_slot_is_the_largest_expert_that_is_fetched():
    trace = random_trace(1, expert_bytes={1: 1000, 2: 1500})
    specs = ["lru:budget=1", "lru:budget=1,scope=global", "lru:budget=1,hold=batch", "static:budget=1", "all_resident"]
    runs = replay(trace, residency=specs).runs
    assert [run.summary["staging_bytes"] for run in runs] == [1500, 1500, 0, 0, 0]
    assert all(runs[at].summary["promotions"] for at in range(3))
    quiet = replace(trace, pieces=[])
    assert replay(quiet, residency=["lru:budget=1"]).runs[0].summary["staging_bytes"] == 0


@pytest.mark.parametrize("axis", ["routing", "residency"])
@pytest.mark.parametrize(("body", "says"), [("return None", "answers nothing"), ("return 1 / 0", "ZeroDivisionError")])
def test_what_fails_in_a_policy_of_ones_own_is_told_in_a_sentence(axis, body, says, tmp_path):
    method = {"routing": "select", "residency": "place"}[axis]
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import dataclass\n\n\n@dataclass(frozen=True)\nclass Mine:\n    requires = frozenset()\n"
        "    passes, scope = 1, 'layer'\n\n    def start(self, *_):\n        pass\n\n"
        f"    def {method}(self, *_):\n        {body}\n"
    )
    with pytest.raises(UserError, match=f"The policy mine .*{says}") as refused:
        replay(random_trace(1), **{axis: [str(path)]})
    assert "\n" not in str(refused.value)


def test_one_spec_alone_is_as_good_as_a_list():
    trace = random_trace(1)
    assert replay(trace, "vanilla", "lru:budget=2").to_json() == replay(trace, ["vanilla"], ["lru:budget=2"]).to_json()


def test_a_replay_is_not_written_into_a_trace(tmp_path):
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(UserError, match="is a trace; name another folder"):
        replay(random_trace(1)).write(tmp_path, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["meta.json"]


def test_policies_are_refused_before_anything_is_read():
    trace = replace(random_trace(1, level="ids"), holds=frozenset({"weights"}))
    trace.segments = None
    with pytest.raises(
        UserError, match=r"needs router scores .* \(captured at level ids\); capture it again with --level active"
    ):
        replay(trace, ["dmoe"])
    with pytest.raises(UserError, match="at least one of each"):
        replay(trace, ["vanilla"], [])
    with pytest.raises(UserError, match="no hardware preset"):
        replay(trace, hardware="abacus")
    with pytest.raises(UserError, match="no parameter 'speed=2'"):
        replay(trace, hardware="h100-pcie5:speed=2")


def test_progress_counts_calls_over_both_passes():
    trace, seen = random_trace(2, segments=3, calls=4), []
    replay(trace, residency=["lru:budget=1"], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 12), (8, 12), (12, 12)]
    seen.clear()
    replay(trace, residency=["static:budget=1"], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 24) for n in (4, 8, 12, 16, 20, 24)]


@dataclass(frozen=True)
class Outside:
    """An acceptance policy that asks for rows the segment does not have."""

    requires: ClassVar[frozenset[str]] = frozenset()

    def unroll(self, segment, geometry):
        return Trajectory(segment.forwards, None, None, source=np.arange(segment.forwards.num_rows) + 1)


@dataclass(frozen=True)
class Astray(FirstSlots):
    """Brings it along."""

    def acceptance(self):
        return Outside()


def test_rows_from_outside_the_segment_are_refused():
    with pytest.raises(UserError, match="rows from outside the segment"):
        replay(random_trace(1), [Astray()])
