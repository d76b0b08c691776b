"""Runs: block-diffusion decoding, calls of any kind, sets and states written out by hand, and a long one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from tests.made_up.routers import route_row, router, scores
from tests.made_up.tables import MemoryTrace, forward_table, in_memory, layer_of, layer_of_rows, meta_of, token_table
from tracer.schema import COMMIT, DECODE, DECODED, DENOISE, MASKED, PREFILL, PROMPT
from tracer.trace import RouterSpec


def block_run(
    rng,
    *,
    requests=1,
    blocks=2,
    block_length=4,
    prompt=5,
    kv_cache=True,
    specs=None,
    first_forward=0,
    ties=False,
    num_layers=2,
    max_accept=3,
    vocabulary=7,
):
    """Vanilla block-diffusion decoding of a few requests, batch 1, with random routers and confidences.

    With ``kv_cache``: prefill of whole prompt blocks, denoise forwards of one block, a commit forward a block. Without: denoise
    forwards over everything up to the end of the current block. Returns (segment, first_block by request).
    """
    specs = specs or {layer: router(rng) for layer in range(1, 1 + num_layers)}
    first, whole = prompt // block_length, prompt // block_length * block_length
    calls, kv_tokens, rows = [], [], []

    def call(kind, block, step, positions, known, accepted, kv):
        for p in positions:
            state = PROMPT if p < prompt else DECODED if p in known else MASKED
            in_block = block >= 0 and p // block_length == block
            right = p in known or p in accepted or rng.random() < 0.6
            predicted = final[p] if right else int(rng.integers(2, 2 + vocabulary))
            guess = (predicted, np.float32(rng.random())) if in_block else (-1, np.float32(np.nan))
            rows.append((p, final[p] if state != MASKED else 1, state, *guess, p in accepted))
        masked = sum(p >= prompt and p not in known for p in positions)
        calls.append([(request, kind, block, step, len(positions), masked, len(accepted))])
        kv_tokens.append(kv)

    for request in range(requests):  # noqa: B007, call reads it
        final = rng.integers(2, 2 + vocabulary, whole + (blocks + 1) * block_length).tolist()
        if kv_cache and whole:
            call(PREFILL, -1, -1, range(whole), set(range(whole)), (), 0)
        for block in range(first, first + blocks):
            start, end = block * block_length, (block + 1) * block_length
            seen, cached = (range(start, end), start) if kv_cache else (range(end), 0)
            known, step = set(range(max(start, prompt))), 0
            while masked := [p for p in range(start, end) if p not in known]:
                take = min(len(masked), int(rng.integers(1, max_accept + 1)))
                accepted = set(rng.choice(masked, take, replace=False).tolist())
                call(DENOISE, block, step, seen, known, accepted, cached)
                known |= accepted
                step += 1
            if kv_cache:
                call(COMMIT, block, -1, seen, known, (), cached)
    names = ("token_id", "state", "predicted_id", "confidence", "accepted")
    position, *columns = zip(*rows, strict=True)
    tokens = token_table(position, **dict(zip(names, columns, strict=True)))
    layers = {}
    for layer, spec in specs.items():
        score = scores(rng, len(rows), spec, ties)
        layers[layer] = layer_of_rows(rng, layer, spec, [route_row(s, spec) for s in score], len(calls), score)
    segment = in_memory(forward_table(calls, first_forward, kv_tokens=kv_tokens), tokens, layers)
    return segment, dict.fromkeys(range(requests), first)


def decoded_trace(seed, *, requests=2, blocks=2, block_length=4, experts=9, top_k=2, layers=2, pieces=1, **kwargs):
    """A trace of :func:`block_run`, cut into ``pieces`` segments by request where there are enough of them."""
    rng = np.random.default_rng(seed)
    specs = {layer: router(rng, num_experts=experts, top_k=top_k) for layer in range(1, 1 + layers)}
    shape = {"blocks": blocks, "block_length": block_length, "specs": specs}
    segments, first, before = [], 0, 0
    for piece in range(pieces):
        share = requests // pieces + (piece < requests % pieces)
        if share:
            segment, _ = block_run(rng, requests=share, first_forward=first, **shape, **kwargs)
            segment.forwards.request_id[:] += before
            first, before = first + segment.forwards.num_forwards, before + share
            segments.append(segment)
    return MemoryTrace(meta_of(specs, block_length=block_length), {}, segments)


def random_calls(rng, calls, requests, block_length, batch):
    """Calls of one or, with ``batch``, two parts, of any kind; decode and prefill forwards have no block."""
    made = []
    for _ in range(calls):
        kind = int(rng.choice([PREFILL, DENOISE, DENOISE, DENOISE, COMMIT, DECODE]))
        call = []
        for request in rng.choice(requests, int(rng.integers(1, 3)) if batch and requests > 1 else 1, replace=False):
            rows = int(rng.integers(1, 2 * block_length))
            in_blocks = kind in (DENOISE, COMMIT)
            block = int(rng.integers(0, 4)) if in_blocks else -1
            step = int(rng.integers(0, 5)) if kind == DENOISE else -1
            accepted = int(rng.integers(0, 3)) if kind in (DENOISE, DECODE) else 0
            call.append((int(request), kind, block, step, rows, rows if kind == DENOISE else 0, accepted))
        made.append(call)
    return made


def random_layer(rng, layer, forwards, spec, *, weights=True, ties=True, short_rows=True, present=None):
    """A layer of random distinct experts; rows use 0 to K of them, weights repeat with ``ties``."""
    rows = forwards.num_rows
    ids = np.stack([rng.permutation(spec.num_experts)[: spec.top_k] for _ in range(rows)])
    count = rng.integers(0 if short_rows else spec.top_k, spec.top_k + 1, rows)
    if present is not None:
        count[~np.repeat(present, np.diff(forwards.row_offsets))] = 0
    drawn = rng.integers(0, 4, ids.shape) / 4 if ties else rng.random(ids.shape)
    calls = forwards.num_forwards
    return layer_of(layer, spec, ids, calls, count=count, weights=drawn if weights else None, present=present)


def random_trace(
    seed,
    *,
    segments=2,
    calls=5,
    requests=2,
    num_layers=2,
    num_experts=7,
    top_k=3,
    block_length=4,
    batch=True,
    weights=True,
    ties=True,
    short_rows=True,
    absent=True,
    **meta,
):
    """A trace of random forwards and experts; with ``absent`` prefills lack the last layer."""
    rng = np.random.default_rng(seed)
    specs = {1 + i: RouterSpec(num_experts, top_k) for i in range(num_layers)}
    pieces = []
    for number in range(segments):
        forwards = forward_table(random_calls(rng, calls, requests, block_length, batch), number * calls)
        block = np.repeat(forwards.block, forwards.num_tokens)
        near = np.maximum(block, 0) * block_length + rng.integers(-block_length, block_length, len(block))
        layers = {}
        for layer, spec in specs.items():
            lacks = absent and layer == num_layers and num_layers > 1
            present = forwards.forward_kind != PREFILL if lacks else None
            layers[layer] = random_layer(
                rng, layer, forwards, spec, weights=weights, ties=ties, short_rows=short_rows, present=present
            )
        pieces.append(in_memory(forwards, token_table(np.maximum(near, 0)), layers))
    first_block = {r: int(rng.integers(-1, 4)) for r in range(requests)}
    return MemoryTrace(meta_of(specs, block_length=block_length, **meta), first_block, pieces)


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
    states = np.asarray(states)
    forwards, width = states.shape
    blocks = np.zeros(forwards, int) if blocks is None else np.asarray(blocks)
    requests = np.zeros(forwards, int) if requests is None else np.asarray(requests)
    predicted = np.full(states.shape, 5) if predicted is None else np.asarray(predicted)
    confidence = np.full(states.shape, 0.5) if confidence is None else np.asarray(confidence)
    accepted, calls = np.zeros(states.shape, bool), []
    for f in range(forwards):
        same = (blocks == blocks[f]) & (requests == requests[f])
        later = np.flatnonzero(same[f + 1 :])
        known = states[f + 1 + later[0]] == DECODED if len(later) else np.ones(width, bool)
        accepted[f] = (states[f] == MASKED) & known
        counts = width, np.count_nonzero(states[f] == MASKED), np.count_nonzero(accepted[f])
        calls.append([(requests[f], DENOISE, blocks[f], np.count_nonzero(same[:f]), *counts)])
    position = blocks[:, None] * block_length + np.arange(width)
    specs = {layer: RouterSpec(experts, ids.shape[2]) for layer, ids in sets.items()}
    segments = []
    for first, last in pairwise([0, *(cut or ()), forwards]):
        piece = slice(first, last)
        tokens = token_table(
            position[piece],
            state=states[piece],
            predicted_id=predicted[piece],
            confidence=confidence[piece],
            accepted=accepted[piece],
        )
        layers = {}
        for layer, spec in specs.items():
            ids = sets[layer][piece].reshape(-1, spec.top_k)
            count = (ids >= 0).sum(axis=1)
            layers[layer] = layer_of(layer, spec, np.maximum(ids, 0), last - first, count=count)
        segments.append(in_memory(forward_table(calls[piece], first), tokens, layers))
    return MemoryTrace(meta_of(specs, block_length=block_length), {}, segments)


EXPERTS, TOP_K, ROWS, STEPS = 256, 8, 32, 32


def long_run(blocks=8, layers=1, requests=1, redrawn=0.2, seed=0, experts=EXPERTS, steps=STEPS):
    """A trace of ``requests`` x ``blocks`` blocks of 32 rows and K = 8; a step draws ``redrawn`` of its rows anew.

    The shape is LLaDA2.0-mini's (256 experts, 8 of them a token, blocks of 32 decoded in 32 steps): popular experts, blocks
    with favourites, steps that change little.
    """
    rng = np.random.default_rng(seed)
    calls = [
        [(r, DENOISE, b, s, ROWS, 0, 0)] for r in range(requests) for b in range(1, 1 + blocks) for s in range(steps)
    ]
    spec, made = RouterSpec(experts, TOP_K), {}
    for layer in range(1, 1 + layers):
        popular = rng.gumbel(size=experts)
        ids = np.empty((requests * blocks, steps, ROWS, TOP_K), np.uint8)
        for block in ids:
            favour = popular + 1.5 * rng.gumbel(size=experts)
            drawn = favour + 1.2 * rng.gumbel(size=(steps, ROWS, experts)).astype(np.float32)
            block[:] = np.argpartition(-drawn, TOP_K, axis=2)[:, :, :TOP_K]
            stays = rng.random((steps, ROWS)) >= redrawn
            for step in range(1, steps):
                block[step, stays[step]] = block[step - 1, stays[step]]
        ids = ids.reshape(-1, TOP_K)
        made[layer] = layer_of(layer, spec, ids, len(calls), weights=rng.random(ids.shape))
    model = {"hidden_size": 2048, "moe_intermediate_size": 512, "dense_bytes": 3 << 30}
    meta = meta_of(dict.fromkeys(made, spec), block_length=ROWS, expert_bytes=dict.fromkeys(made, 6291456), **model)
    return MemoryTrace(meta, dict.fromkeys(range(requests), 0), [in_memory(forward_table(calls), None, made)])
