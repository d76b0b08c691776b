"""The bundled demo models: their cards tell the truth, they decode in parallel, and their routing is consistent in time."""

from __future__ import annotations

import itertools
import json
import platform
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tracer.capture import run_capture
from tracer.capture_plan import DEMO_OPTIONS, demo_prompts, plan_capture
from tracer.checking import check
from tracer.demo.card import card_markdown
from tracer.demo.corpus import fingerprint, read_corpus
from tracer.demo.objective import WINDOW, Routers, evaluate
from tracer.models import load_model
from tracer.parquet import open_trace
from tracer.schema import DENOISE

DEMO = Path(__file__).parent.parent.parent / "tracer" / "demo"
FAMILIES = ("llada2", "sdar")


@pytest.fixture(scope="module", params=FAMILIES)
def trace(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / f"{request.param}.trace"
    plan = plan_capture(f"demo:{request.param}", path, demo_prompts()[:6:2], DEMO_OPTIONS)
    run_capture(plan)
    assert check(path) == []
    return open_trace(path)


def test_weights_fit_the_budget():
    sizes = {family: (DEMO / family / "model.safetensors").stat().st_size for family in FAMILIES}
    assert sum(sizes.values()) <= 16e6, sizes


@pytest.mark.parametrize("family", FAMILIES)
def test_card_is_printed_from_its_figures(family):
    card = json.loads((DEMO / family / "card.json").read_text())
    assert card_markdown(card) == (DEMO / family / "README.md").read_text()
    if platform.python_version() == card["python"]:
        assert fingerprint(read_corpus()) == card["corpus_sha256"]


@pytest.mark.parametrize("family", FAMILIES)
def test_card_accuracy_is_reproduced(family):
    card = json.loads((DEMO / family / "card.json").read_text())
    if platform.python_version() != card["python"]:
        pytest.skip(f"the held-out text is that of Python {card['python']}")
    loaded = load_model(f"demo:{family}", device="cpu")
    ids = [
        token
        for _, text in read_corpus()["held_out_tables"]
        for token in [*loaded.tokenizer.encode(text), loaded.eos_id]
    ]
    windows = torch.tensor(ids).unfold(0, WINDOW, WINDOW)[: card["held_out"]["tables"]["windows"]].contiguous()
    held = evaluate(loaded.model, Routers(loaded.model), windows)
    for ratio in (0.15, 0.5, 0.9):
        # The card is written from float32 arithmetic on the same bfloat16 weights; only summation order may differ.
        assert held[f"accuracy_{ratio}"] == pytest.approx(card["held_out"]["tables"][f"accuracy_{ratio}"], abs=0.002)
    assert held["accuracy_0.5"] > 0.3


def blocks_of(trace):
    """Denoise forwards of each (request, block), as (segment, forward index) in step order."""
    for segment in trace.segments():
        forwards = segment.forwards
        keys = [
            (int(r), int(b), f)
            for f, (r, b, k) in enumerate(zip(forwards.request_id, forwards.block, forwards.kind, strict=True))
            if k == DENOISE
        ]
        for _, group in itertools.groupby(keys, key=lambda key: key[:2]):
            yield segment, [f for _, _, f in group]


def test_several_tokens_are_accepted_a_step_on_some_blocks(trace):
    rates = [
        segment.forwards.num_accepted[members].sum() / len(members) for segment, members in blocks_of(trace) if members
    ]
    assert max(rates) >= 2


def test_routing_is_consistent_in_time(trace):
    """Same position, next step, against a shuffle over positions of the same two forwards."""
    same, shuffled = [], []
    rng = np.random.default_rng(0)
    layers = {}
    for segment, members in blocks_of(trace):
        for layer in segment.layers:
            routing = layers.get((id(segment), layer)) or segment.layer(layer)
            layers[id(segment), layer] = routing
            for before, after in itertools.pairwise(members):
                rows = [
                    routing.expert_ids[segment.forwards.row_offsets[f] : segment.forwards.row_offsets[f + 1]]
                    for f in (before, after)
                ]
                for t, other in enumerate(rng.permutation(len(rows[0]))):
                    one = set(rows[0][t].tolist())
                    same.append(len(one & set(rows[1][t].tolist())) / len(one))
                    shuffled.append(len(one & set(rows[1][other].tolist())) / len(one))
    assert np.mean(same) > np.mean(shuffled) + 0.2


def rows_by_place(trace):
    """{(request, block, step, position, layer): (expert set, gap between the K-th and the next selection score)}."""
    rows = {}
    for segment in trace.segments():
        forwards, tokens = segment.forwards, segment.tokens
        for layer in segment.layers:
            routing = segment.layer(layer, with_scores=True)
            selection = routing.router_scores + routing.router.expert_bias
            for f in np.flatnonzero(forwards.kind == DENOISE):
                low, high = forwards.row_offsets[f], forwards.row_offsets[f + 1]
                place = (int(forwards.request_id[f]), int(forwards.block[f]), int(forwards.step[f]))
                for row in range(low, high):
                    chosen = set(routing.expert_ids[row].tolist())
                    size = routing.router.num_experts // routing.router.n_group
                    kept = {e // size for e in chosen}
                    others = [selection[row, e] for e in range(routing.router.num_experts) if e not in chosen]
                    inside = [
                        selection[row, e]
                        for e in range(routing.router.num_experts)
                        if e not in chosen and e // size in kept
                    ]
                    worst = min(selection[row, e] for e in chosen)
                    gap = min(abs(worst - max(inside)), min(abs(worst - score) for score in others))
                    rows[(*place, int(tokens.position[row]), layer)] = (chosen, float(gap))
    return rows


def test_cached_and_full_window_decoding_choose_the_same_experts(tmp_path):
    seen = {}
    for kv_cache in (True, False):
        path = tmp_path / f"{kv_cache}.trace"
        run_capture(plan_capture("demo:llada2", path, demo_prompts()[:1], replace(DEMO_OPTIONS, kv_cache=kv_cache)))
        assert check(path) == []
        seen[kv_cache] = rows_by_place(open_trace(path))
    assert set(seen[True]) < set(seen[False])
    differing = [(key, gap) for key, (chosen, gap) in seen[True].items() if chosen != seen[False][key][0]]
    print(f"{len(seen[True])} rows compared, {len(differing)} differ at a gap under 1e-5")
    assert all(gap < 1e-5 for _, gap in differing)
    assert len(seen[True]) > 1000
