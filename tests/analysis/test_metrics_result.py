"""The whole analysis: one pass, its summary, headline and document, and traces that have little or nothing to say."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings

import analysis.metrics as metrics
from analysis.metrics import SCHEMAS, Settings, consistency
from tests.analysis.naive_runs import QUICK, naive_runs
from tests.made_up.runs import decoded_trace, written_trace
from tests.made_up.strategies import traces
from tests.made_up.tables import MemoryTrace, in_memory, meta_of
from tracer.errors import UserError
from tracer.schema import COMMIT, DENOISE, MASKED, PADDING
from tracer.trace import RouterSpec, Segment

FAST = Settings(replicates=20)
TOKENLESS = ("requests", "forwards", "routing")
SMALL = {"block_length": 2, "experts": 4, "requests": [0, 0, 1, 1]}
BY_POSITION = {"overlap", "settling", "spatial", "growth", "predictability", "order", "confidence", "calibration"}


def without_tokens(trace):
    parts = tuple(replace(segment, tokens=None) for segment in trace.pieces)
    return replace(trace, meta=replace(trace.meta, tables=TOKENLESS), pieces=parts)


def test_every_frame_has_its_schema():
    result = consistency(decoded_trace(0, requests=3, blocks=3, pieces=3), settings=FAST)
    assert list(result.frames) == list(SCHEMAS)
    for name, frame in result.frames.items():
        assert dict(frame.schema) == SCHEMAS[name], name
        assert frame.height > 0, name
    assert result.reasons == {}


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_each_figure_alone_is_that_of_the_whole(name):
    trace = decoded_trace(1, requests=3, blocks=2, block_length=5)
    alone = getattr(metrics, name)(trace, replicates=20)
    assert alone.equals(consistency(trace, settings=FAST).frames[name])


@settings(max_examples=40, deadline=None)
@given(traces())
def test_any_trace_gives_frames_or_reasons(trace):
    result = consistency(trace, settings=Settings(**QUICK))
    for name, frame in result.frames.items():
        assert dict(frame.schema) == SCHEMAS[name]
        assert (frame.height == 0) == (name in result.reasons), name
        for column in {"value", "n"} & set(frame.columns):
            assert frame[column].null_count() == 0, name
    json.dumps(result.to_json(), allow_nan=False)


def test_the_same_seed_gives_the_same_and_another_gives_others():
    trace = decoded_trace(2, requests=4, blocks=2)
    first, again = (consistency(trace, settings=Settings(replicates=20, seed=3)).to_json() for _ in range(2))
    assert first == again
    other = consistency(trace, settings=Settings(replicates=20, seed=4)).frames["overlap"]
    mine = consistency(trace, settings=Settings(replicates=20, seed=3)).frames["overlap"]
    assert other["value"].equals(mine["value"])
    assert not other["low"].equals(mine["low"])


def test_document_is_plain_json_without_nan():
    result = consistency(decoded_trace(0, requests=1, blocks=1), settings=FAST)
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert set(document) == {"summary", "notes", "reasons", "headline", "frames"}
    assert len(document["frames"]["load"]["expert"]) == 2 * 9


def test_progress_hears_every_segment():
    trace = decoded_trace(0, requests=3, pieces=3)
    heard = []
    consistency(trace, heard.append, settings=FAST)
    sizes = [segment.forwards.num_forwards for segment in trace.pieces]
    assert heard == np.cumsum(sizes).tolist()


def test_headline_takes_all_layers_and_the_hardest_null():
    result = consistency(decoded_trace(0, requests=3, blocks=3), settings=FAST)
    rows = {row["figure"]: row for row in result.headline()}
    row = rows["same position, next step: Jaccard"]
    frame = result.frames["overlap"].filter(pl.col("layer").is_null(), metric="jaccard", state="all", distance=1)
    found = frame.row(0, named=True)
    assert row["value"] == found["value"]
    assert row["null"] == max(found["null_hot"], found["null_independent"], found["null_shuffle"])
    drift = rows["wanted set, share that changes a step"]
    frame = result.frames["drift"].filter(
        pl.col("layer").is_null(), metric="drift", scope="block", distance=1, budget=2
    )
    found = frame.row(0, named=True)
    assert drift["null"] == min(found["null_hot"], found["null_independent"], found["null_shuffle"])
    assert set(row) == {"figure", "value", "low", "high", "null", "null_name", "beats_null", "n", "frame"}


def test_summary_counts_what_is_there():
    trace = decoded_trace(7, requests=2, blocks=2)
    runs = list(naive_runs(trace))
    steps = [step for run in runs for step in run[3]]
    summary = consistency(trace, settings=FAST).summary
    forwards = trace.pieces[0].forwards
    denoise = forwards.kind == DENOISE
    assert summary["requests"] == 2
    assert summary["blocks"] == len(runs) == 4
    assert summary["denoise_forwards"] == len(steps) == denoise.sum()
    assert summary["forwards"] == len(denoise)
    assert summary["decisions"] == forwards.num_rows * 2 * 2
    assert summary["accepted_per_step"] == forwards.num_accepted[denoise].sum() / len(steps)


def test_a_trace_without_tokens_says_so_and_gives_the_rest():
    result = consistency(without_tokens(decoded_trace(0, requests=2, blocks=3)), settings=FAST)
    empty = {name for name, frame in result.frames.items() if not frame.height}
    assert empty == BY_POSITION
    assert all("tokens table" in result.reasons[name] for name in empty)
    assert set(result.frames["cosine"]["scope"]) == {"forward"}
    assert set(result.frames["balance"]["scope"]) == {"forward"}
    assert result.frames["cosine"]["null_independent"].is_null().all()
    assert result.frames["cosine"]["null_shuffle"].is_not_null().all()


def test_tokenless_loads_are_those_of_all_rows():
    trace = decoded_trace(0, requests=2, blocks=2)
    with_tokens, without = (consistency(t, settings=FAST).frames["load"] for t in (trace, without_tokens(trace)))
    # With a KV cache a denoise forward holds its block and nothing else.
    assert with_tokens.equals(without)


def test_a_trace_without_blocks_says_so():
    trace = decoded_trace(0, requests=2)
    meta = replace(trace.meta, decoding={})
    result = consistency(replace(trace, meta=meta), settings=FAST)
    assert all("block_length" in result.reasons[name] for name in BY_POSITION)


def test_a_trace_without_denoise_forwards_says_so():
    trace = decoded_trace(0, requests=2)
    for segment in trace.pieces:
        segment.forwards.kind[:] = COMMIT
    result = consistency(trace, settings=FAST)
    assert {name for name, frame in result.frames.items() if frame.height} == set()
    assert {result.reasons[name] for name in SCHEMAS} == {"The trace has no denoise forwards."}
    assert result.headline() == []


def test_an_empty_trace_says_so():
    trace = MemoryTrace(meta_of({1: RouterSpec(9, 2)}), {}, [])
    result = consistency(trace)
    assert result.reasons["overlap"] == "The trace has no denoise forwards."
    json.dumps(result.to_json(), allow_nan=False)


def test_one_forward_of_one_request():
    sets = {layer: np.array([[[0, 1], [1, 2]]]) for layer in (1, 2)}
    result = consistency(written_trace(sets, [[MASKED, MASKED]], block_length=2, experts=4), settings=FAST)
    silent = {name for name, frame in result.frames.items() if not frame.height}
    assert silent == {"overlap", "settling", "cosine", "drift", "survival", "predictability", "agreement"}
    assert all(result.reasons[name] for name in silent)
    assert "fewer than two" in result.reasons["intervals"]
    spatial = result.frames["spatial"]
    assert spatial["low"].is_null().all() and spatial["beats_null"].is_null().all()


def test_rows_without_confidence_or_routing():
    states = np.full((2, 2), MASKED)
    sets = {1: np.array([[[0], [1]], [[0], [1]]])}
    silent = written_trace(sets, states, block_length=2, experts=4, confidence=np.full((2, 2), np.nan))
    result = consistency(silent, settings=FAST)
    assert "confidence" in result.reasons["calibration"]
    unrouted = written_trace({1: np.full((2, 2, 1), -1)}, states, block_length=2, experts=4)
    result = consistency(unrouted, settings=FAST)
    assert {result.reasons[name] for name in SCHEMAS} == {"No row of the trace is routed in any MoE layer."}


@pytest.mark.parametrize("kept", ["prompt", "padding"])
def test_denoise_forwards_that_route_no_block_row(kept):
    """Rows outside the block (a prompt without a KV cache) are all there is; or padding, which counts for nothing."""
    trace = written_trace({1: np.zeros((4, 2, 1), int), 2: np.ones((4, 2, 1), int)}, np.full((4, 2), MASKED), **SMALL)
    tokens = trace.pieces[0].tokens
    if kept == "prompt":
        tokens.position[:] = np.tile([0, 1], 4)
    else:
        tokens.state[:] = PADDING
    trace.pieces[0].forwards.block[:] = 3
    result = consistency(trace, settings=FAST)
    spoken = {name for name, frame in result.frames.items() if frame.height}
    if kept == "padding":
        assert spoken == set() and result.summary["decisions"] == 0
        assert {result.reasons[name] for name in SCHEMAS} == {"No row of the trace is routed in any MoE layer."}
    else:
        assert spoken == {"cosine", "drift", "survival", "working_set", "unique", "acceptance"}
        assert set(result.frames["unique"]["scope"]) == {"forward"}
    assert all(result.reasons[name] for name in set(SCHEMAS) - spoken)
    json.dumps(result.to_json(), allow_nan=False)


def test_a_layer_missing_from_a_segment():
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(6)[:2] for _ in range(8)]).reshape(4, 2, 2)
    trace = written_trace(
        {1: ids, 2: ids}, np.full((4, 2), MASKED), block_length=2, experts=6, blocks=[0, 0, 1, 1], cut=[2]
    )
    first, second = trace.pieces
    second = Segment(second.forwards, second.tokens, (1,), second.load)
    result = consistency(replace(trace, pieces=(first, second)), settings=FAST)
    overlap = result.frames["overlap"].filter(metric="jaccard", state="all", distance=1)
    assert dict(zip(overlap["layer"], overlap["n"], strict=True)) == {1: 4, 2: 2, None: 6}


def test_chosen_branch_stands_for_the_block_and_all_branches_for_the_forward():
    trace = written_trace({1: np.array([[[0], [1], [2], [3]]])}, np.full((1, 4), MASKED), block_length=2, experts=9)
    segment = trace.pieces[0]
    segment.tokens.position[:] = [0, 1, 0, 1]
    forwards = replace(segment.forwards, branches=np.array([2], np.uint8), chosen_branch=np.array([1], np.int16))
    layers = {1: segment.layer(1)}
    result = consistency(replace(trace, pieces=(in_memory(forwards, segment.tokens, layers),)), settings=FAST)
    used = result.frames["load"].filter(pl.col("load") > 0)["expert"].to_list()
    assert used == [2, 3]
    unique = result.frames["unique"].filter(metric="unique_mean", state="all", layer=1)
    assert dict(zip(unique["scope"], unique["value"], strict=True)) == {"block": 2.0, "forward": 4.0}


def test_unknown_figures_are_refused():
    with pytest.raises(UserError, match="no consistency figure 'overlaps'"):
        consistency(decoded_trace(0), only=("overlaps",))
