"""Speed-ups against runs replayed one by one: like with like, whatever else is asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from simulator.presets import BAND
from simulator.replaying import replay
from simulator.speedups import RESIDENCY_NOTE, ROUTING_NOTE
from tests.analysis.replayed import stored
from tests.made_up.runs import random_trace

RESIDENCY = [
    "all_resident",
    "none_resident",
    "lru:budget=3",
    "tide:budget=3,refresh_interval=2",
    "lfu:budget_bytes=40000",
]
MACHINES = ["h100", "rtx-4090:kernel=loop,overlap=true"]


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return stored(tmp_path_factory.mktemp("traces") / "a.trace")[1]


def speed(trace, routing, residency, machine):
    """Tokens a second of one run, replayed alone."""
    return replay(trace, routing, residency, machine).runs[0].summary["tokens_per_s"]


def with_kernel(machine, kernel):
    name, _, options = machine.partition(":")
    rest = [option for option in options.split(",") if option and not option.startswith("kernel=")]
    return f"{name}:{','.join([*rest, f'kernel={kernel}'])}"


def naive(trace, routing, residency, machine):
    """Both speed-ups of a run by their definitions, each run replayed on its own."""
    ratios = {
        one: speed(trace, routing, residency, one) / speed(trace, "vanilla", residency, one)
        for one in (machine, *(with_kernel(machine, kernel) for kernel in BAND))
    }
    value, *band = ratios.values()
    budget = residency.partition(":")[2].split(",")[0]
    rivals = [f"lru:{budget}", f"static:{budget}"] if budget else []
    best = max((speed(trace, routing, rival, machine) for rival in rivals), default=None)
    return {
        "speedup": {"value": value, "low": min(band), "high": max(band)},
        "speedup_residency": best and speed(trace, routing, residency, machine) / best,
    }


@pytest.mark.parametrize("machine", MACHINES)
def test_speed_ups_are_those_of_runs_made_alone(machine, trace):
    routing = "dmoe:top_p=0.3,min_experts=1"
    result = replay(trace, [routing], RESIDENCY, machine)
    assert len(result.runs) == len(RESIDENCY) and result.cells["run"].n_unique() == len(RESIDENCY)
    assert any(run.summary["speedup"]["low"] < run.summary["speedup"]["high"] for run in result.runs)
    for residency, run in zip(RESIDENCY, result.runs, strict=True):
        expected = naive(trace, routing, residency, machine)
        assert run.summary["speedup"] == pytest.approx(expected["speedup"], rel=1e-12)
        assert run.summary["speedup_residency"] == expected["speedup_residency"]
        assert ROUTING_NOTE in run.notes and (RESIDENCY_NOTE in run.notes) == ("budget" in residency)


def test_what_else_is_asked_for_changes_no_speed_up(trace):
    alone = replay(trace, ["dmoe"], ["tide:budget=3"], "h100").runs[0]
    among = replay(trace, ["vanilla", "dmoe"], ["static:budget=3", "tide:budget=3", "lru:budget=3"], ["l40s", "h100"])
    same = [r for r in among.runs if (r.routing["name"], r.residency["name"], r.hardware) == ("dmoe", "tide", "h100")]
    assert [replace(run, run=0) for run in same] == [alone]
    for run in among.runs:
        if run.routing["name"] == "vanilla":
            assert run.summary["speedup"] == {"value": 1.0, "low": 1.0, "high": 1.0}
        if run.residency["name"] in ("lru", "static"):
            assert run.summary["speedup_residency"] <= 1.0
        assert run.kernel == "vllm_fused"


def test_the_kernel_of_a_band_prices_placements_as_they_are(trace):
    """A policy that decides by the machine's speed decides once, by the machine it is asked for."""
    run = replay(trace, ["dmoe:top_p=0.3,min_experts=1"], ["fiddler:budget=2"], "h100:kernel=ideal").runs[0]
    chosen = run.residency["parameters"]["cpu_tokens_max"]
    fixed = replay(
        trace, ["dmoe:top_p=0.3,min_experts=1"], [f"fiddler:budget=2,cpu_tokens_max={chosen}"], "h100:kernel=ideal"
    ).runs[0]
    assert run.summary["speedup"] == fixed.summary["speedup"]


def test_nothing_is_replayed_along_without_a_latency():
    trace, seen = random_trace(2, segments=3, calls=4), []
    replay(trace, residency=["lru:budget=1"], progress=lambda *step: seen.append(step))
    assert seen == [(4, 12), (8, 12), (12, 12)]


def test_a_budget_shared_out_by_another_trace_is_compared_with_one_shared_out_equally(trace):
    policy = f"static:budget=3,split=auto,fit_on={trace.path}"
    run = replay(trace, ["vanilla"], [policy], "h100").runs[0]
    rivals = [speed(trace, "vanilla", f"{name}:budget=3", "h100") for name in ("lru", "static")]
    assert run.summary["speedup_residency"] == pytest.approx(run.summary["tokens_per_s"] / max(rivals), rel=1e-12)
