"""Synthetic traces: valid, seeded, with the consistency that was asked for and ids that follow from the scores."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from analysis.verbs.synth import synth
from cli import app
from simulator.replaying import replay
from tests.made_up.routers import route_row
from tracer.checking import check
from tracer.errors import UserError
from tracer.parquet import open_trace
from tracer.synthetic import SyntheticOptions, write_synthetic

SMALL = SyntheticOptions(
    layers=2, experts=16, top_k=3, groups=4, topk_group=2, blocks=2, block_length=8, prompt_tokens=11
)


def written(path, options=SMALL, /, **changes):
    return open_trace(write_synthetic(path, dataclasses.replace(options, **changes)))


@pytest.mark.parametrize("level", ["ids", "active", "scores"])
@pytest.mark.parametrize("kv_cache", [True, False])
@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_valid_and_true_to_its_scores(tmp_path, level, kv_cache, score_function):
    trace = written(tmp_path / "a.trace", level=level, kv_cache=kv_cache, score_function=score_function, seed=3)
    assert check(trace.path) == []
    kinds = {kind for segment in trace.segments() for kind in segment.forwards.kind.tolist()}
    assert kinds == ({0, 1, 2} if kv_cache else {1})
    for segment in trace.segments():
        assert segment.forwards.num_accepted.sum() == 2 * (24 - 11)
        for layer in segment.layers:
            own = segment.layer(layer, with_scores=True)
            np.testing.assert_allclose(own.gate_weights.sum(axis=1, dtype=np.float32), 2.5, rtol=2e-3)
            if level != "scores":
                continue
            for t in range(len(own.count)):
                ids, weights = route_row(own.router_scores[t], own.router)
                assert set(ids) == set(own.expert_ids[t].tolist())
                by_expert = dict(zip(own.expert_ids[t].tolist(), own.gate_weights[t]))
                np.testing.assert_allclose([by_expert[e] for e in ids], weights, rtol=2e-3)


def digest(trace):
    content = hashlib.sha256()
    for part in sorted(trace.path.glob("*/*.parquet")):
        content.update(part.read_bytes())
    return content.hexdigest()


def test_seeded(tmp_path):
    first, again, other = (written(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert digest(first) == digest(again) != digest(other)


def test_traces_of_all_levels_have_the_same_rows(tmp_path):
    ids = []
    for level in ("ids", "active", "scores"):
        frame = written(tmp_path / level, level=level).scan("routing").collect()
        ids.append(
            frame.select("forward_id", "layer", "row", "expert_id").sort("forward_id", "layer", "row", "expert_id")
        )
    assert ids[0].equals(ids[1]) and ids[0].equals(ids[2])


@pytest.mark.parametrize("temporal", [0.0, 0.7, 1.0])
def test_temporal_consistency(tmp_path, temporal):
    trace = written(tmp_path / "a.trace", SyntheticOptions(layers=3, blocks=2, temporal=temporal, accepted_per_step=2))
    stays = []
    for segment in trace.segments():
        forwards = segment.forwards
        for layer in segment.layers:
            ids = segment.layer(layer).expert_ids
            for f in range(1, forwards.num_forwards):
                if forwards.step[f] > 0:
                    now, before = (ids[forwards.row_offsets[i] : forwards.row_offsets[i + 1]] for i in (f, f - 1))
                    stays.append((now[:, :, None] == before[:, None, :]).any(axis=2).mean())
    # leavers may come back through another slot's draw, which is rare
    assert temporal - 0.02 <= np.mean(stays) <= temporal + 0.06 * (1 - temporal) + 0.02


def test_spatial_consistency_and_skew(tmp_path):
    def neighbours(**changes):
        (segment,) = written(tmp_path / str(len(changes)), experts=64, blocks=6, temporal=0, **changes).segments()
        ids = segment.layer(1).expert_ids
        row = np.arange(len(ids)) - np.repeat(segment.forwards.row_offsets[:-1], np.diff(segment.forwards.row_offsets))
        shared = (ids[1:, :, None] == ids[:-1, None, :]).any(axis=2)[row[1:] > 0].mean()
        return shared, np.bincount(ids.reshape(-1), minlength=64).max() / ids.size

    alone, flat = neighbours(spatial=0.0, skew=0.0)
    together, _ = neighbours(spatial=0.8, skew=0.0, seed=1)
    _, skewed = neighbours(spatial=0.0, skew=1.5, seed=1, level="ids")
    assert together > alone + 0.3 and skewed > 3 * flat


def test_corners(tmp_path):
    everything = SyntheticOptions(layers=2, experts=4, top_k=4, groups=1, topk_group=1, requests=1, blocks=1,
                                  block_length=2, prompt_tokens=0, level="scores")  # fmt: skip
    assert check(written(tmp_path / "a.trace", everything).path) == []
    wide = SyntheticOptions(layers=1, experts=300, groups=1, topk_group=1, requests=1, blocks=1, tokens=False)
    trace = written(tmp_path / "b.trace", wide)
    assert check(trace.path) == []
    assert next(trace.segments()).layer(1).expert_ids.dtype == np.uint16


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"temporal": 1.5}, "temporal is a chance"),
        ({"spatial": float("nan")}, "spatial is a chance"),
        ({"requests": 0}, "requests must be at least 1"),
        ({"layers": 0}, "layers must be at least 1, not 0"),
        ({"top_k": 200}, "4 of 8 groups of 256 experts cannot give 200"),
        ({"groups": 7}, "groups of 256 experts"),
        ({"level": "all"}, "level must be one of ids, active, scores, not 'all'"),
        ({"accepted_per_step": 0.5}, "accepted_per_step must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor must be above 0"),
    ],
)
def test_parameters(option, words):
    with pytest.raises(UserError, match=words):
        SyntheticOptions(**option)


def test_it_is_written_segment_by_segment(tmp_path):
    seen = []
    path = write_synthetic(tmp_path / "a.trace", SMALL, segment_forwards=1, progress=lambda *at: seen.append(at))
    trace = open_trace(path)
    assert trace.num_segments >= SMALL.requests * SMALL.blocks
    assert len(seen) == trace.num_forwards and seen == sorted(seen) and seen[-1] == (2 * 13, 2 * 13)
    with pytest.raises(UserError, match="exists"):
        write_synthetic(path, SMALL)
    assert write_synthetic(path, SMALL, force=True) == path


def run(*arguments):
    return CliRunner().invoke(app, ["synth", *map(str, arguments)])


def test_the_verb_has_every_option_with_its_default():
    taken = {name: parameter.default for name, parameter in inspect.signature(synth).parameters.items()}
    for option in dataclasses.fields(SyntheticOptions):
        assert taken[option.name] == option.default, option.name


def test_the_verb(tmp_path):
    path = tmp_path / "a.trace"
    options = ("--out", path, "--layers", 2, "--experts", 16, "--top-k", 3, "--groups", 1, "--topk-group", 1)
    result = run(*options, "--requests", 1, "--level", "scores", "--no-kv-cache")
    trace = open_trace(path)
    words = f"{path}: 1 made-up request in {trace.num_forwards} forwards, {trace.num_decisions:,} decisions, "
    assert result.exit_code == 0 and result.stdout.startswith(words) and result.stdout.endswith(" MB\n")
    assert check(path) == []
    (run_of,) = replay(trace, ["dmoe"], ["lru:budget=4"]).runs
    assert run_of.summary["unique_experts"] <= 16
    document = json.loads(run(*options, "--force", "--json").stdout)
    assert document["counts"]["decisions"] == open_trace(path).num_decisions and document["options"]["experts"] == 16
    again = run(*options)
    assert again.exit_code == 2 and "--force replaces the trace" in again.stderr
    nonsense = run("--out", tmp_path / "b.trace", "--top-k", 300)
    assert nonsense.exit_code == 2 and nonsense.stderr.count("\n") == 1 and "cannot give 300 experts" in nonsense.stderr
    assert not (tmp_path / "b.trace").exists()
