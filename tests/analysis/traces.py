"""Traces in memory for the consistency figures: what an opened trace offers, over segments that are already there."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import polars as pl
from hypothesis import strategies as st

from tests.builders import block_run, in_memory, router
from tracer.schema import DECODED, DENOISE, MASKED, PADDING, PROMPT
from tracer.trace import ForwardTable, LayerTrace, ModelInfo, RouterSpec, Segment, TokenTable, TraceMeta


@dataclass(frozen=True)
class MemoryTrace:
    """Segments with the meta and requests they need."""

    meta: TraceMeta
    requests: pl.DataFrame
    parts: tuple[Segment, ...]

    def segments(self):
        yield from self.parts


def memory_trace(segments, routers, block_length, datasets=None, tables=("requests", "forwards", "tokens", "routing")):
    """A trace over ``segments``; ``routers`` {layer: RouterSpec}, ``datasets`` {request: name}."""
    layers = tuple(sorted(routers))
    model = ModelInfo(
        id="test",
        num_layers=max(layers, default=0) + 1,
        moe_layers=layers,
        num_experts=max((spec.num_experts for spec in routers.values()), default=1),
        top_k=max((spec.top_k for spec in routers.values()), default=1),
        hidden_size=8,
        moe_intermediate_size=8,
        num_shared_experts=0,
        expert_bytes=dict.fromkeys(layers, 1),
        dense_bytes=None,
        dtype="float32",
    )
    meta = TraceMeta(
        schema_version=2,
        complete=True,
        capture_level="ids",
        model=model,
        routers=routers,
        tables=tables,
        decoding={"block_length": block_length},
        provenance={},
        segments=None,
        raw={},
    )
    found = sorted({int(r) for segment in segments for r in segment.forwards.request_id})
    named = datasets or {}
    requests = pl.DataFrame(
        {"request_id": found, "dataset": [named.get(r) for r in found]},
        schema={"request_id": pl.UInt32, "dataset": pl.String},
    )
    return MemoryTrace(meta, requests, tuple(segments))


def random_trace(seed, *, requests=2, blocks=2, block_length=4, experts=9, top_k=2, layers=2, pieces=1, **kwargs):
    """Vanilla decoding with random routers, cut into ``pieces`` segments by request where there are enough of them."""
    rng = np.random.default_rng(seed)
    specs = {layer: router(rng, num_experts=experts, top_k=top_k) for layer in range(1, 1 + layers)}
    segments, first = [], 0
    for piece in range(pieces):
        share = requests // pieces + (piece < requests % pieces)
        if not share:
            continue
        segment, _ = block_run(
            rng,
            requests=share,
            blocks=blocks,
            block_length=block_length,
            specs=specs,
            first_forward=first,
            **kwargs,
        )
        first += segment.forwards.num_forwards
        segment.forwards.request_id[:] += sum(len(np.unique(s.forwards.request_id)) for s in segments)
        segments.append(segment)
    return memory_trace(segments, specs, block_length)


def written_trace(
    sets, states, *, block_length, experts, blocks=None, requests=None, predicted=None, confidence=None, cut=None
):
    """A trace written out by hand: one part a forward, the block's rows in position order.

    Parameters
    ----------
    sets : dict
        layer -> int array [F, S, K]; -1 from a slot on leaves the rest of the row unused, and a row of -1 is not routed.
    states : array
        uint8 [F, S], codes of :data:`tracer.schema.STATES`. A masked row that the next forward of its run knows is accepted,
        and so is every row still masked in the run's last forward.
    blocks, requests : array, optional
        int [F]; all 0 by default. Steps count up inside (request, block).
    predicted, confidence : array, optional
        [F, S].
    cut : sequence of int, optional
        Forwards at which a new segment begins.
    """
    states = np.asarray(states, np.uint8)
    forwards, width = states.shape
    blocks = np.zeros(forwards, int) if blocks is None else np.asarray(blocks)
    requests = np.zeros(forwards, int) if requests is None else np.asarray(requests)
    predicted = np.full(states.shape, 5) if predicted is None else np.asarray(predicted)
    confidence = np.full(states.shape, 0.5) if confidence is None else np.asarray(confidence)
    step = np.zeros(forwards, int)
    accepted = np.zeros(states.shape, bool)
    for f in range(forwards):
        same = (blocks == blocks[f]) & (requests == requests[f])
        step[f] = np.count_nonzero(same[:f])
        later = np.flatnonzero(same[f + 1 :])
        known = states[f + 1 + later[0]] == DECODED if len(later) else np.ones(width, bool)
        accepted[f] = (states[f] == MASKED) & known
    k = next(iter(sets.values())).shape[2]
    specs = {layer: RouterSpec(num_experts=experts, top_k=k) for layer in sets}
    bounds = [0, *(cut or ()), forwards]
    segments = []
    for first, last in pairwise(bounds):
        piece, count = slice(first, last), last - first
        position = blocks[piece, None] * block_length + np.arange(width)
        table = ForwardTable(
            forward_id=np.arange(first, last, dtype=np.uint32),
            row_offsets=np.arange(count + 1, dtype=np.int64) * width,
            part_offsets=np.arange(count + 1, dtype=np.int64),
            request_id=requests[piece].astype(np.uint32),
            kind=np.full(count, DENOISE, np.uint8),
            block=blocks[piece].astype(np.int32),
            step=step[piece].astype(np.int32),
            row_start=np.zeros(count, np.int64),
            num_tokens=np.full(count, width, np.int64),
            kv_tokens=np.zeros(count, np.int64),
            num_masked=(states[piece] == MASKED).sum(axis=1).astype(np.int64),
            num_accepted=accepted[piece].sum(axis=1).astype(np.int64),
            num_edited=np.zeros(count, np.int64),
            branches=np.ones(count, np.uint8),
            chosen_branch=np.full(count, -1, np.int16),
            duration_ns=np.full(count, -1, np.int64),
        )
        tokens = TokenTable(
            position=position.reshape(-1).astype(np.int32),
            token_id=np.full(count * width, 1, np.int32),
            state=states[piece].reshape(-1),
            predicted_id=predicted[piece].reshape(-1).astype(np.int32),
            confidence=confidence[piece].reshape(-1).astype(np.float32),
            argmax_id=predicted[piece].reshape(-1).astype(np.int32),
            argmax_confidence=confidence[piece].reshape(-1).astype(np.float32),
            accepted=accepted[piece].reshape(-1),
            edited=np.zeros(count * width, bool),
        )
        routing = {}
        for layer, all_sets in sets.items():
            ids = all_sets[piece].reshape(count * width, k)
            routing[layer] = LayerTrace(
                layer=layer,
                expert_ids=np.maximum(ids, 0).astype(np.uint8 if experts <= 256 else np.uint16),
                count=(ids >= 0).sum(axis=1).astype(np.uint8),
                gate_weights=None,
                router_scores=None,
                present=np.ones(count, bool),
                router=specs[layer],
            )
        segments.append(in_memory(table, tokens, routing))
    return memory_trace(segments, specs, block_length)


def naive_runs(trace):
    """Blocks of requests in the order the figures add them up: (unit, request, block, steps).

    Each step is {offset: (row, state, {layer: set or None})} over the block's rows; ``state`` is "masked" or "known". A
    layer's set is None where the row was not routed. The step itself carries its segment and part.
    """
    number = {}
    for segment in trace.segments():
        forwards = segment.forwards
        starts, _ = forwards.part_rows
        denoise = [n for n in range(len(forwards.kind)) if forwards.kind[n] == DENOISE]
        for n in denoise:
            number.setdefault(int(forwards.request_id[n]), len(number))
        routing = {layer: segment.layer(layer) for layer in segment.layers}
        blocks = {}
        for n in denoise:
            blocks.setdefault((int(forwards.request_id[n]), int(forwards.block[n])), []).append(n)
        for (request, block), parts in sorted(blocks.items()):
            steps = []
            for n in sorted(parts, key=lambda n: int(forwards.step[n])):
                step = Step(segment=segment, part=n, routing=routing)
                branches = max(1, int(forwards.branches[n]))
                rows = int(forwards.num_tokens[n]) // branches
                first = int(starts[n]) + rows * max(0, int(forwards.chosen_branch[n]))
                length = trace.meta.block_length
                for row in range(first, first + rows):
                    position, state = int(segment.tokens.position[row]), int(segment.tokens.state[row])
                    if state != PADDING and position // length == block:
                        step[position % length] = (
                            row,
                            "masked" if state == MASKED else "known",
                            row_sets(routing, row),
                        )
                steps.append(step)
            yield number[request], request, block, steps


class Step(dict):
    """Rows of a step by offset, and where the step lies."""

    def __init__(self, segment, part, routing):
        super().__init__()
        self.segment, self.part, self.routing = segment, part, routing

    def sets(self, layer):
        """{offset: set} of the routed rows in one layer."""
        return {j: sets[layer] for j, (_, _, sets) in self.items() if sets.get(layer)}


def row_sets(routing, row):
    """{layer: frozenset of experts, or None} of one row."""
    return {
        layer: frozenset(int(e) for e in routed.expert_ids[row, : routed.count[row]]) or None
        for layer, routed in routing.items()
    }


def add_up(numbers):
    """Sum from first to last, without the compensation newer Pythons' ``sum`` uses."""
    total = 0
    for number in numbers:
        total = total + number
    return total


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
        return random_trace(
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


def fields(frame, *names):
    """{named columns: the rest of the row} of a frame, each combination once."""
    out = {}
    for row in frame.iter_rows(named=True):
        key = tuple(row.pop(name) for name in names)
        assert key not in out, key
        out[key] = row
    return out


QUICK = {"replicates": 7, "sample_rows": 40, "sample_forwards": 6, "pairs": 30}
"""Bootstrap and sample sizes of tests that are not about them."""
