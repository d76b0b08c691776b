"""Synthetic traces: valid, seeded, with the consistency that was asked for and ids that follow from the scores."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from tests.builders import route_row
from tracer.checking import check
from tracer.errors import UserError
from tracer.parquet import open_trace
from tracer.synthetic import synthesize

SMALL = {"num_experts": 16, "top_k": 3, "layers": 2, "requests": 2, "blocks": 2, "block_length": 8, "prompt_tokens": 11,
         "n_group": 4, "topk_group": 2}  # fmt: skip


@pytest.mark.parametrize("level", ["ids", "active", "scores"])
@pytest.mark.parametrize("kv_cache", [True, False])
@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_valid_and_true_to_its_scores(tmp_path, level, kv_cache, score_function):
    path = synthesize(
        tmp_path / "a.trace", **SMALL, level=level, kv_cache=kv_cache, score_function=score_function, seed=3
    )
    assert check(path) == []
    trace = open_trace(path)
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


def digest(path):
    content = hashlib.sha256()
    for part in sorted(path.glob("*/*.parquet")):
        content.update(part.read_bytes())
    return content.hexdigest()


def test_seeded(tmp_path):
    first, again, other = (synthesize(tmp_path / n, **SMALL, seed=s) for n, s in (("a", 1), ("b", 1), ("c", 2)))
    assert digest(first) == digest(again) != digest(other)


@pytest.mark.parametrize("temporal", [0.0, 0.7, 1.0])
def test_temporal_consistency(tmp_path, temporal):
    path = synthesize(tmp_path / "a.trace", layers=3, requests=2, blocks=2, temporal=temporal, accepted_per_step=2)
    stays = []
    for segment in open_trace(path).segments():
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
    def neighbours(**options):
        path = synthesize(
            tmp_path / str(len(options)), **SMALL | {"num_experts": 64, "blocks": 6}, temporal=0, **options
        )
        (segment,) = open_trace(path).segments()
        ids = segment.layer(1).expert_ids
        row = np.arange(len(ids)) - np.repeat(segment.forwards.row_offsets[:-1], np.diff(segment.forwards.row_offsets))
        shared = (ids[1:, :, None] == ids[:-1, None, :]).any(axis=2)[row[1:] > 0].mean()
        return shared, np.bincount(ids.reshape(-1), minlength=64).max() / ids.size

    alone, flat = neighbours(spatial=0.0, skew=0.0)
    together, _ = neighbours(spatial=0.8, skew=0.0, seed=1)
    _, skewed = neighbours(spatial=0.0, skew=1.5, seed=1, level="ids")
    assert together > alone + 0.3 and skewed > 3 * flat


def test_corners(tmp_path):
    everything = synthesize(tmp_path / "a.trace", num_experts=4, top_k=4, layers=[0, 2], n_group=1, topk_group=1,
                            requests=1, blocks=1, block_length=2, prompt_tokens=0, level="scores")  # fmt: skip
    assert check(everything) == []
    wide = synthesize(tmp_path / "b.trace", num_experts=300, n_group=1, topk_group=1, layers=1, requests=1, blocks=1,
                      tokens=False)  # fmt: skip
    assert check(wide) == []
    assert next(open_trace(wide).segments()).layer(1).expert_ids.dtype == np.uint16


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"temporal": 1.5}, "temporal is a chance"),
        ({"requests": 0}, "requests must be at least 1"),
        ({"layers": 0}, "layers must name at least one"),
        ({"top_k": 200}, "4 of 8 groups of 256 experts cannot give 200"),
        ({"n_group": 7}, "groups of 256 experts"),
        ({"level": "all"}, "level must be one of ids, active, scores"),
        ({"accepted_per_step": 0.5}, "accepted_per_step at least 1"),
    ],
)
def test_parameters(tmp_path, option, words):
    with pytest.raises(UserError, match=words):
        synthesize(tmp_path / "a.trace", **option)
    assert not (tmp_path / "a.trace").exists()
