"""What a trace cannot say, or says and nothing counts: padding, an unfinished trace, unknown acceptance; it is told."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from analysis.findings import trace_findings
from analysis.metrics import SCHEMAS, Settings, consistency
from analysis.summary import summarise_trace
from simulator.acceptance.team import TeamAcceptance
from simulator.interval import find_interval
from simulator.parallel import expert_parallel, parallel_runs
from simulator.registry import policy_names
from simulator.replaying import replay
from tests.analysis.naive_runs import QUICK
from tests.analysis.replayed import stored
from tests.made_up.changes import add_padding
from tests.made_up.runs import block_run
from tests.made_up.tables import MemoryTrace, geometry_of, meta_of
from tracer.checking import check
from tracer.errors import UserError
from tracer.schema import DENOISE, MASKED, NOISE, PADDING

HARDWARE = "h100-pcie5"
RESIDENCIES = ["all_resident", "lru:budget=3", "lru:scope=global,budget=3", "tide:budget=3", "static:budget=3"]
SHAPE = {"requests": 3, "blocks": 3}


# Defaults that are above the 2 experts a token of these traces.
SPECS = {"des_seq": "des_seq:k_prime=1", "oea": "oea:k0=1", "top_k": "top_k:k=1"}


def noted(notes, word):
    """The notes with a word in them."""
    return [note for note in notes if word in note]


@pytest.fixture(scope="module", params=[True, False], ids=["cache", "no cache"])
def both(request, tmp_path_factory):
    """A trace, and the same with rows of padding in every call."""
    folder, shape = tmp_path_factory.mktemp("padding"), {**SHAPE, "kv_cache": request.param}
    plain = stored(folder / "plain.trace", **shape)[1]
    rng = np.random.default_rng(3)
    padded = stored(folder / "padded.trace", changed=lambda segment: add_padding(rng, segment), **shape)[1]
    assert not check(padded.path) and padded.num_rows == plain.num_rows + padded.padding_rows
    return plain, padded


@pytest.mark.parametrize("routing", policy_names("routing"))
def test_padding_counts_for_nothing_in_a_replay(routing, both):
    plain, padded = (replay(trace, [SPECS.get(routing, routing)], RESIDENCIES) for trace in both)
    assert padded.cells.equals(plain.cells, null_equal=True)
    assert padded.forwards.drop("num_tokens").equals(plain.forwards.drop("num_tokens"))
    for one, other in zip(padded.runs, plain.runs, strict=True):
        assert one.summary == other.summary and one.bounds == other.bounds
        told = noted(one.notes, "Padding is counted nowhere")
        assert len(told) == 1 and not noted(other.notes, "Padding")
        assert [note for note in one.notes if note not in told] == other.notes


def test_the_note_says_how_many_rows_and_what_they_would_add(both):
    padded = both[1]
    cells = without = everything = rows = 0
    for segment in padded.segments():
        padding = segment.tokens.state == PADDING
        rows += int(padding.sum())
        offsets = segment.forwards.row_offsets
        for layer in segment.layers:
            found = segment.layer(layer, with_padding=True)
            for f in range(segment.forwards.num_forwards):
                of_call = range(offsets[f], offsets[f + 1])
                if padding[offsets[f] : offsets[f + 1]].any():
                    used = {t: set(found.expert_ids[t, : found.count[t]].tolist()) for t in of_call}
                    cells += 1
                    without += len(set().union(*(used[t] for t in of_call if not padding[t])))
                    everything += len(set().union(*used.values()))
    assert everything > without
    expected = f"{rows} of {padded.num_rows} rows ({without / cells:.1f} unique experts a layer there, "
    assert noted(padded.notes, expected + f"{everything / cells:.1f} with it).")


def test_padding_counts_for_nothing_in_the_other_figures(both):
    plain, padded = both
    intervals = [find_interval(trace, 3, HARDWARE) for trace in (plain, padded)]
    # the model computes its rows of padding, which is time
    for name in ("extra_misses", "hit_rate", "expert_hit_rate", "promotions"):
        assert intervals[0].columns[name].tolist() == intervals[1].columns[name].tolist()
    assert intervals[0].drift == intervals[1].drift and noted(intervals[1].notes, "Padding")
    loads = [expert_parallel(trace, 3, "balanced") for trace in (plain, padded)]
    assert loads[0].frame.equals(loads[1].frame) and loads[0].summary == loads[1].summary
    runs = parallel_runs(padded, gpus=[3])
    assert all(noted(run["notes"], "Padding") for run in runs)


def test_padding_counts_for_nothing_in_consistency(both):
    plain, padded = (consistency(trace, settings=Settings(**QUICK)) for trace in both)
    for name in SCHEMAS:
        assert padded.frames[name].equals(plain.frames[name], null_equal=True), name
    assert padded.summary == plain.summary and padded.reasons == plain.reasons
    told = noted(padded.notes, "Padding is counted nowhere")
    assert len(told) == 1 and [note for note in padded.notes if note not in told] == plain.notes


def test_figures_of_an_unfinished_trace_say_so(tmp_path):
    trace = stored(tmp_path / "cut.trace", finished=False, **SHAPE)[1]
    said = "this trace was not finished: 2 requests of 3 ended"
    assert noted(check(trace.path), said)
    result = replay(trace, ["vanilla", "team"], RESIDENCIES)
    assert all(len(noted(run.notes, said)) == 1 for run in result.runs)
    assert all(len(noted(run["notes"], said)) == 1 for run in parallel_runs(trace, gpus=[2]))
    assert len(noted(find_interval(trace, 3, HARDWARE).notes, said)) == 1
    assert len(noted(consistency(trace, settings=Settings(**QUICK)).notes, said)) == 1
    whole = stored(tmp_path / "whole.trace", **SHAPE)[1]
    assert not noted(replay(whole).runs[0].notes, "not finished")


def unknown(segment, calls):
    """The segment, of ``calls`` of which nobody knows how many tokens they gained."""
    gained = segment.forwards.num_accepted.copy()
    gained[calls(segment.forwards)] = -1
    return replace(segment, forwards=replace(segment.forwards, num_accepted=gained))


@pytest.mark.parametrize("every", [True, False])
def test_without_tokens_gained_there_is_no_figure_of_tokens(every, tmp_path):
    def calls(forwards):
        denoise = np.flatnonzero(forwards.kind == DENOISE)
        return denoise if every else denoise[-1:]

    trace = stored(tmp_path / "unknown.trace", changed=lambda segment: unknown(segment, calls), **SHAPE)[1]
    known = stored(tmp_path / "known.trace", **SHAPE)[1]
    assert not check(trace.path)
    result, other = (replay(each, ["vanilla", "team"], ["all_resident"], HARDWARE) for each in (trace, known))
    missing = {"tokens_per_forward", "tokens_per_forward_with_commit", "tokens_per_s"}
    run, team = result.runs
    assert run.summary == {**other.runs[0].summary, **dict.fromkeys(missing)}
    assert None not in [other.runs[0].summary[name] for name in missing]
    assert len(noted(run.notes, "does not say how many tokens each call gained")) == 1
    # TEAM's walk counts its own tokens, from the rows
    for name in missing:
        assert team.summary[name] == other.runs[1].summary[name] is not None
    assert team.bounds == other.runs[1].bounds
    gained = result.forwards.filter((pl.col("run") == 0) & (pl.col("kind") == "denoise"))["num_accepted"]
    assert gained.dtype == pl.Int64 and (gained == -1).sum() == (len(gained) if every else 1)
    figures = consistency(trace, settings=Settings(**QUICK))
    assert figures.summary["accepted_per_step"] is None
    assert figures.frames["acceptance"]["metric"].unique().to_list() == ["steps_per_block"]
    assert noted(figures.notes, "does not say how many tokens")
    told = trace_findings(summarise_trace(trace))[1]
    assert told.startswith("A block takes ") and told.endswith(" denoise forwards on average.")


def with_tokens(segment, **columns):
    return replace(segment, tokens=replace(segment.tokens, **columns))


@pytest.mark.parametrize("policy", [TeamAcceptance(), TeamAcceptance(speculate=False)])
def test_team_refuses_a_trace_that_edits_tokens(policy):
    segment, _ = block_run(np.random.default_rng(0))
    edited = segment.tokens.edited.copy()
    edited[-1] = True
    with pytest.raises(UserError, match="team takes decided tokens to stay, and this trace edits them; replay it with"):
        policy.unroll(with_tokens(segment, edited=edited), geometry_of(segment))


@pytest.mark.parametrize("policy", [TeamAcceptance(), TeamAcceptance(speculate=False)])
@pytest.mark.parametrize("kv_cache", [True, False])
def test_noise_is_as_undecided_as_a_mask(policy, kv_cache):
    segment, _ = block_run(np.random.default_rng(1), requests=2, blocks=2, kv_cache=kv_cache)
    state = segment.tokens.state
    noisy = with_tokens(segment, state=np.where(state == MASKED, np.uint8(NOISE), state))
    masked, noise = (policy.unroll(each, geometry_of(segment)) for each in (segment, noisy))
    for name in masked.forwards.__slots__:
        assert getattr(masked.forwards, name).tolist() == getattr(noise.forwards, name).tolist()
    assert np.where(noise.state == NOISE, MASKED, noise.state).tolist() == masked.state.tolist()
    for name in ("position", "source", "reused", "cold", "branch", "bound_rows", "bounds", "notes"):
        one, other = getattr(masked, name), getattr(noise, name)
        assert np.array_equal(one, other) if isinstance(one, np.ndarray) else repr(one) == repr(other), name


def test_noise_replays_as_masks_do():
    segment, first_block = block_run(np.random.default_rng(2), requests=2, blocks=2)
    state = segment.tokens.state
    noisy = with_tokens(segment, state=np.where(state == MASKED, np.uint8(NOISE), state))
    meta = meta_of({layer: segment.layer(layer).router for layer in segment.layers})
    results = [replay(MemoryTrace(meta, first_block, [each]), ["vanilla", "team"]) for each in (segment, noisy)]
    assert results[0].to_json() == results[1].to_json()
    assert results[0].cells.equals(results[1].cells, null_equal=True)
    assert results[0].forwards.equals(results[1].forwards)
