"""Routers, runs and traces for hypothesis, small and with every corner of the format.

Between them: up to 9 experts (traces: 3 to 300), K 1 to 3 (traces: up to 8), any number of groups, 1 to 3 layers, 1 to 3
requests, 1 to 3 blocks of 1 to 6 tokens, prompts of 1 to 9 tokens with and without a tail in the first block, with and
without a prefix cache, ties, rows that are padding, reused or not routed, rows of fewer than K experts, several segments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from hypothesis import strategies as st

from simulator.acceptance.recorded import Recorded
from simulator.policy import Geometry, Trajectory
from tests.made_up.routers import router
from tests.made_up.runs import block_run, decoded_trace, written_trace
from tests.made_up.tables import geometry_of
from tracer.schema import DECODED, MASKED, PADDING, PROMPT

seeds = st.integers(0, 2**32 - 1)


@st.composite
def specs(draw, groups=True, short=False):
    """A RouterSpec of 3 to 9 experts, K <= 3, every option reachable.

    ``short``: groups may hold fewer than K experts in all, so that rows have fewer than K.
    """
    experts = draw(st.integers(3, 9))
    divisors = [g for g in range(2, experts + 1) if experts % g == 0] if groups else []
    n_group, topk_group = draw(st.sampled_from([(1, 1), *((g, kept) for g in divisors for kept in range(1, g + 1))]))
    most = 3 if short else min(3, topk_group * (experts // n_group))
    rng = np.random.default_rng(draw(seeds))
    return router(
        rng,
        num_experts=experts,
        top_k=draw(st.integers(1, most)),
        score_function=draw(st.sampled_from(["softmax", "sigmoid"])),
        n_group=n_group,
        topk_group=topk_group,
        bias=draw(st.booleans()),
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        bias_in_weights=draw(st.booleans()),
        group_score=draw(st.sampled_from(["top2_sum", "max"])),
        expert_scale=rng.random(experts).astype(np.float32) if draw(st.booleans()) else None,
    )


@st.composite
def runs(draw, spec=None, layers=2, **kwargs):
    """A vanilla run of one to ``layers`` layers: (segment, geometry)."""
    rng = np.random.default_rng(draw(seeds))
    block_length = draw(st.integers(2, 6))
    routers = {layer: spec or draw(specs()) for layer in range(1, 1 + draw(st.integers(1, layers)))}
    options = {
        "requests": draw(st.integers(1, 2)),
        "blocks": draw(st.integers(1, 2)),
        "block_length": block_length,
        "prompt": draw(st.integers(1, 9)),
        "kv_cache": draw(st.booleans()),
        "max_accept": draw(st.integers(1, 3)),
        "ties": draw(st.booleans()),
    }
    segment, _ = block_run(rng, specs=routers, **(options | kwargs))
    return segment, geometry_of(segment, block_length)


@dataclass
class Case:
    """One layer of a small run, gathered to a recorded trajectory: what a routing policy is asked about."""

    layer: object
    trajectory: Trajectory
    geometry: Geometry

    def ask(self, policy):
        """The policy's answer."""
        return policy.select(self.layer, self.trajectory, self.geometry)


def case_of(segment, geometry, rng=None):
    """Layer 1 of a segment; with ``rng`` some rows are padding, reused or not routed."""
    layer, tokens = segment.layer(1, True), segment.tokens
    position, state, reused = tokens.position, tokens.state, None
    if rng is not None:
        padding = rng.random(len(position)) < 0.15
        position = np.where(padding, -1, position).astype(np.int32)
        state = np.where(padding, PADDING, state).astype(np.uint8)
        reused = rng.random(len(position)) < 0.15
        layer = replace(layer, count=np.where(rng.random(len(position)) < 0.15, 0, layer.count).astype(np.uint8))
    return Case(layer, Trajectory(segment.forwards, position, state, reused=reused), geometry)


def recorded(segment, geometry):
    """The trajectory of the recorded run."""
    return Recorded().unroll(segment, geometry)


def make_case(seed, spec, *, mess=False, block_length=4, **run):
    """A case of one router; ``mess`` as in :func:`case_of`."""
    rng = np.random.default_rng(seed)
    segment, _ = block_run(rng, specs={1: spec}, block_length=block_length, **run)
    return case_of(segment, geometry_of(segment, block_length), rng if mess else None)


@st.composite
def cases(draw, groups=True, mess=True):
    """Cases of every kind of router."""
    segment, geometry = draw(runs(draw(specs(groups, short=True)), layers=1))
    rng = np.random.default_rng(draw(seeds)) if mess and draw(st.booleans()) else None
    return case_of(segment, geometry, rng)


def large_case(seed=0, *, score_function="sigmoid", ties=False):
    """One block of 32 rows a forward, in the shape of LLaDA2.0-mini (sigmoid) or SDAR-30B-A3B (softmax)."""
    rng = np.random.default_rng(seed)
    if score_function == "sigmoid":
        groups = {"n_group": 8, "topk_group": 4, "bias": True, "routed_scaling_factor": 2.5}
        spec = router(rng, num_experts=256, top_k=8, score_function="sigmoid", **groups)
    else:
        spec = router(rng, num_experts=128, top_k=8)
    return make_case(seed, spec, ties=ties, blocks=1, block_length=32, prompt=40)


@st.composite
def traces(draw, min_requests=1):
    """Small traces with the corners of the format: prompt tails, unrouted rows, remasked rows, padding, cuts, no KV cache."""
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    experts = draw(st.sampled_from([3, 5, 9, 70, 300]))
    top_k = min(draw(st.sampled_from([1, 2, 3, 8])), experts)
    layers = draw(st.integers(1, 3))
    requests = draw(st.integers(min_requests, 3))
    width = draw(st.integers(1, 5))
    if draw(st.booleans()):
        return decoded_trace(
            seed,
            requests=requests,
            blocks=draw(st.integers(1, 3)),
            block_length=width,
            experts=min(experts, 9),
            top_k=top_k,
            layers=layers,
            pieces=draw(st.integers(1, requests)),
            kv_cache=draw(st.booleans()),
            prompt=draw(st.integers(1, 6)),
            max_accept=draw(st.integers(1, 3)),
        )
    runs = [(r, b) for r in range(requests) for b in range(draw(st.integers(1, 3)))]
    lengths = [draw(st.integers(1, 11 if width < 3 else 5)) for _ in runs]
    owner = np.repeat(np.arange(len(runs)), lengths)
    forwards = len(owner)
    states = rng.choice([PROMPT, DECODED, MASKED, PADDING], (forwards, width), p=[0.1, 0.4, 0.45, 0.05]).astype(
        np.uint8
    )
    sets = {}
    for layer in range(2, 2 + layers):
        ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(forwards * width)]).reshape(
            forwards, width, top_k
        )
        for f in range(1, forwards):
            stays = rng.random(width) < 0.5
            ids[f, stays] = ids[f - 1, stays][:, rng.permutation(top_k)]
        ids[rng.random((forwards, width)) < 0.1, 1:] = -1
        ids[rng.random((forwards, width)) < 0.1] = -1
        sets[layer] = ids
    bounds = np.cumsum(lengths)[:-1]
    return written_trace(
        sets,
        states,
        block_length=width,
        experts=experts,
        requests=np.array([runs[o][0] for o in owner]),
        blocks=np.array([runs[o][1] for o in owner]),
        predicted=rng.integers(-1, 4, states.shape),
        confidence=np.where(rng.random(states.shape) < 0.1, np.nan, rng.random(states.shape)),
        cut=sorted({int(b) for b in bounds if rng.random() < 0.4}),
    )
