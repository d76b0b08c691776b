"""Two traces or two replays side by side: every difference found, the large ones first, the certain ones before the rest."""

from __future__ import annotations

import copy
import json

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.comparing import diff, difference
from analysis.metrics import Settings, across_seeds, consistency
from analysis.summary import ReplaySummary
from simulator.replaying import replay
from tests.analysis import replayed
from tracer.errors import UserError
from tracer.parquet import open_trace
from tracer.synthetic import SyntheticOptions, write_synthetic


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_a_difference_is_relative_and_symmetric(a, b):
    found = difference(a, b)
    assert found == difference(b, a) and 0 <= found <= 2
    assert (found == 0) == (a == b)
    if a != b:
        assert found == abs(a - b) / max(abs(a), abs(b))


def test_what_is_no_number_differs_wholly_or_not_at_all():
    assert [difference(a, b) for a, b in (("x", "x"), ("x", "y"), (True, False), (None, 3), (1.0, float("nan")))] == [
        0,
        1,
        1,
        1,
        1,
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("diff")
    paths = []
    for seed in (3, 4):
        _, opened = replayed.stored(root / f"{seed}.trace", seed=seed)
        replay(opened, ["vanilla", "top_k:k=1"], ["lru:budget=3"], hardware="h100-pcie5").write(root / f"{seed}.replay")
        paths.append((root / f"{seed}.trace", root / f"{seed}.replay"))
    return paths


def in_order(rows):
    """Whether rows are ranked: unequal ones first; there, by tier, certain ones first, larger ones first."""
    sizes, provenance = {"counts", "bytes", "bytes per decision"}, {"trace", "provenance"}
    keys = [
        (
            r["difference"] == 0,
            (r["part"] in sizes or "." in r["figure"]) * (r["part"] not in provenance) + 2 * (r["part"] in provenance),
            r["apart"] is False,
            -r["difference"],
        )
        for r in rows
    ]
    return keys == sorted(keys)


def test_traces_are_compared_in_facts_and_figures(folders):
    (first, _), (second, _) = folders
    found = diff(first, second)
    assert (found.kind, found.a, found.b) == ("trace", "3.trace", "4.trace")
    assert in_order(found.rows) and found.differing
    rows = {(r["part"], r["figure"]): r for r in found.rows}
    for name, path in (("a", first), ("b", second)):
        opened = open_trace(path)
        assert rows["counts", "decisions"][name] == opened.num_decisions
        headline = {r["figure"].strip(): r for r in consistency(opened, settings=Settings(replicates=200)).headline()}
        for figure, row in headline.items():
            told = rows["consistency", figure]
            assert (told[name], told[f"low_{name}"], told[f"high_{name}"]) == (row["value"], row["low"], row["high"])
    for row in found.rows:
        ends = [row[end] for end in ("low_a", "high_a", "low_b", "high_b")]
        assert (row["apart"] is None) == (None in ends)
        if None not in ends:
            assert row["apart"] == (ends[1] < ends[2] or ends[3] < ends[0])
    assert json.loads(json.dumps(found.to_json()))["rows"] == found.rows
    assert found.sentence().startswith(
        f"3.trace and 4.trace differ in {len(found.differing)} of {len(found.rows)} values"
    )


def test_popularity_is_compared_between_recordings_of_one_model(folders, tmp_path):
    (first, _), (second, _) = folders
    pooled = across_seeds({"a": open_trace(first), "b": open_trace(second)}, replicates=200)
    pooled = pooled.filter(pl.col("layer").is_null() & pl.col("first").is_null(), metric="cosine")
    whole, prompts = (pooled.filter(between=name).row(0, named=True) for name in ("traces", "prompts"))
    notes = diff(first, second).notes
    assert notes[0].startswith(f"The popularity of a layer's experts agrees with a cosine of {whole['value']:.3f} (")
    assert notes[1].startswith(f"For the same prompt its cosine is {prompts['value']:.3f} (")
    assert f": {max(prompts[f'null_{null}'] for null in ('hot', 'independent', 'shuffle')):.3f})" in notes[1]
    other = write_synthetic(
        tmp_path / "other.trace", SyntheticOptions(experts=8, groups=1, topk_group=1, top_k=2, layers=2, blocks=1)
    )
    assert not [note for note in diff(first, other).notes if "opularity" in note]


def test_a_trace_agrees_with_itself(folders):
    (first, _), _ = folders
    found = diff(open_trace(first), first)
    assert found.differing == [] and "agree in all" in found.sentence()
    assert (found.a, found.b) == ("3.trace (first)", "3.trace (second)")


def test_replays_are_compared_run_by_run(folders):
    (_, first), (_, second) = folders
    found = diff(first, second)
    documents = [json.loads((path / "replay.json").read_text()) for path in (first, second)]
    rows = {(r["part"], r["figure"]): (r["a"], r["b"]) for r in found.rows}
    assert {part for part, _ in rows} == {"replayed trace", "vanilla × lru", "top_k × lru"}
    vanilla = "vanilla × lru"
    for figure in ("unique_experts", "hit_rate", "bytes_to_gpu", "latency_s"):
        assert rows[vanilla, figure] == tuple(d["runs"][0]["summary"][figure] for d in documents)
    assert in_order(found.rows)
    ranked = next(r for r in found.rows if (r["part"], r["figure"]) == (vanilla, "unique_experts"))
    ends = [e for d in documents for e in d["runs"][0]["summary"]["unique_experts_ci95"]]
    assert [ranked[end] for end in ("low_a", "high_a", "low_b", "high_b")] == ends
    assert not [figure for _, figure in rows if "ci95" in figure]
    assert diff(first, first).differing == []


def test_runs_that_only_one_side_has_are_named():
    one = replayed.document()
    other = copy.deepcopy(one)
    other["runs"] = other["runs"][:7]
    found = diff(ReplaySummary(one), ReplaySummary(other))
    assert [note for note in found.notes if note.startswith("Only replay (first) has the run dmoe:")]
    assert len([note for note in found.notes if note.startswith("Only")]) == 2
    assert found.differing == []


def test_one_run_each_is_compared_whatever_its_policy():
    runs = replayed.document()["runs"]
    left, right = ({"trace": {}, "runs": [runs[i]]} for i in (0, 6))
    found = diff(ReplaySummary(left), ReplaySummary(right))
    row = next(r for r in found.rows if r["figure"] == "unique_experts")
    assert (row["a"], row["b"], row["difference"]) == (22.9, 11.25, (22.9 - 11.25) / 22.9)
    assert row["part"] == "vanilla × all_resident against dmoe × all_resident"
    assert "Some runs are open-loop estimates; see their own notes." in found.notes


def test_replays_without_a_common_run_say_so():
    one = replayed.document(hardware=None)
    found = diff(ReplaySummary(one), ReplaySummary(replayed.document(hardware="h200")))
    assert (
        found.notes[0] == "The two replays share no run: none has the same policies, parameters and hardware in both."
    )


def test_kinds_that_differ_and_folders_that_are_neither_are_refused(folders, tmp_path):
    (trace, result), _ = folders
    with pytest.raises(UserError, match=r"3\.trace is a trace and 3\.replay is a replay; name two traces"):
        diff(trace, result)
    with pytest.raises(UserError, match="holds neither a trace"):
        diff(tmp_path, trace)
