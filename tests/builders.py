"""In-memory traces for tests: small, random, with every corner of the format reachable from the arguments."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tracer.schema import COMMIT, DECODED, DENOISE, MASKED, PADDING, PREFILL, PROMPT
from tracer.trace import ForwardTable, LayerTrace, RouterSpec, Segment, TokenTable


def router(rng, num_experts=9, top_k=2, score_function="softmax", n_group=1, topk_group=1, bias=False, **kwargs):
    """A RouterSpec; ``bias`` adds a random selection bias."""
    return RouterSpec(
        num_experts=num_experts,
        top_k=top_k,
        score_function=score_function,
        n_group=n_group,
        topk_group=topk_group,
        expert_bias=(rng.standard_normal(num_experts) * 0.2).astype(np.float32) if bias else None,
        **kwargs,
    )


def scores(rng, rows, spec, ties=False):
    """Router scores float32 [rows, E], after the score function; ``ties`` draws them from a few values."""
    logits = rng.standard_normal((rows, spec.num_experts)).astype(np.float32) * 2
    if ties:
        logits = np.round(logits)
    if spec.score_function == "sigmoid":
        return (1 / (1 + np.exp(-logits))).astype(np.float32)
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (shifted / shifted.sum(axis=1, keepdims=True)).astype(np.float32)


def route_row(score, spec):
    """The vanilla rule for one row, written out; returns (ids, float32 weights). Ties: lowest expert, lowest group."""
    selection = score + (spec.expert_bias if spec.expert_bias is not None else np.float32(0))
    size = spec.num_experts // spec.n_group
    members = [list(range(g * size, (g + 1) * size)) for g in range(spec.n_group)]
    if spec.n_group > 1:

        def group_score(g):
            best = sorted((selection[e] for e in members[g]), reverse=True)
            if spec.group_score == "max":
                return best[0]
            return np.float32(best[0] + best[1]) if len(best) > 1 else np.float32(-np.inf)

        ranked = sorted(range(spec.n_group), key=lambda g: (-group_score(g), g))[: spec.topk_group]
        allowed = sorted(e for g in ranked for e in members[g])
    else:
        allowed = list(range(spec.num_experts))
    ids = sorted(allowed, key=lambda e: (-selection[e], e))[: spec.top_k]
    weights = np.array([(selection if spec.bias_in_weights else score)[e] for e in ids], np.float32)
    if spec.norm_topk_prob:
        weights = weights / (weights.sum() + np.float32(1e-20))
    weights = weights * np.float32(spec.routed_scaling_factor)
    if spec.expert_scale is not None:
        weights = weights * spec.expert_scale[ids]
    return ids, weights.astype(np.float32)


def layer_trace(rng, layer, rows, spec, present, row_offsets, ties=False, shuffle_slots=True):
    """A layer whose ids and weights follow from random scores by the vanilla rule."""
    score = scores(rng, rows, spec, ties)
    ids = np.zeros((rows, spec.top_k), np.uint8 if spec.num_experts <= 256 else np.uint16)
    weights = np.zeros((rows, spec.top_k), np.float16)
    count = np.zeros(rows, np.uint8)
    for f in range(len(present)):
        for t in range(row_offsets[f], row_offsets[f + 1]) if present[f] else ():
            chosen, weight = route_row(score[t], spec)
            order = rng.permutation(len(chosen)) if shuffle_slots else np.arange(len(chosen))
            ids[t, : len(chosen)] = np.array(chosen)[order]
            weights[t, : len(chosen)] = weight[order].astype(np.float16)
            count[t] = len(chosen)
    return LayerTrace(
        layer=layer,
        expert_ids=ids,
        count=count,
        gate_weights=weights,
        router_scores=score,
        present=np.asarray(present, bool),
        router=spec,
    )


def in_memory(forwards, tokens, layers):
    """A Segment over arrays that are already there."""

    def load(layer, with_scores, with_weights):
        found = layers[layer]
        return replace(
            found,
            gate_weights=found.gate_weights if with_weights else None,
            router_scores=found.router_scores if with_scores else None,
        )

    return Segment(forwards=forwards, tokens=tokens, layers=tuple(layers), load=load)


def add_padding(rng, segment, most=3):
    """The segment with 1 to ``most`` rows of padding among those of each call, routed as other rows are; a request a call."""
    forwards, tokens = segment.forwards, segment.tokens
    sizes, rows = np.diff(forwards.row_offsets), forwards.num_rows
    added = rng.integers(1, most + 1, len(sizes))
    calls = np.arange(len(sizes))
    call = np.concatenate((np.repeat(calls, sizes), np.repeat(calls, added)))
    first, size = (np.repeat(column, added) for column in (forwards.row_offsets[:-1], sizes))
    place = np.concatenate((np.arange(rows), first + size * rng.random(len(first))))
    order = np.lexsort((place, call))
    padding = order >= rows
    source = np.where(padding, rng.integers(0, rows, len(order)), order)
    table = replace(
        forwards,
        row_offsets=np.concatenate(([0], np.cumsum(sizes + added))),
        num_tokens=forwards.num_tokens + added,
    )
    blank = {"position": -1, "token_id": 0, "state": PADDING, "predicted_id": -1, "argmax_id": -1}
    blank |= {"confidence": np.nan, "argmax_confidence": np.nan, "accepted": False, "edited": False}
    columns = {name: getattr(tokens, name)[source] for name in blank}
    for name, value in blank.items():
        columns[name][padding] = value
    layers = {}
    for number in segment.layers:
        found = segment.layer(number, True)
        arrays = {n: getattr(found, n) for n in ("expert_ids", "count", "gate_weights", "router_scores")}
        taken = {name: None if array is None else array[source] for name, array in arrays.items()}
        layers[number] = replace(found, **taken)
    return in_memory(table, TokenTable(**columns), layers)


def block_run(
    rng,
    *,
    requests=1,
    blocks=2,
    block_length=4,
    prompt=5,
    quota=2,
    kv_cache=True,
    specs=None,
    first_forward=0,
    ties=False,
    num_layers=2,
    max_accept=3,
    vocabulary=7,
):
    """Simulate vanilla block-diffusion decoding of a few requests, batch 1, with random routers and confidences.

    With ``kv_cache``: prefill of whole prompt blocks, denoise forwards of one block, a commit forward a block. Without: denoise
    forwards over everything up to the end of the current block. Returns (segment, first_block by request).
    """
    specs = specs or {layer: router(rng) for layer in range(1, 1 + num_layers)}
    parts, rows = [], []
    first_block = {}
    forward = first_forward
    for request in range(requests):
        length = max(1, prompt)
        first = length // block_length
        first_block[request] = first
        whole = first * block_length
        final = {p: int(rng.integers(2, 2 + vocabulary)) for p in range(whole + blocks * block_length + block_length)}

        def emit(kind, block, step, positions, known, accepted, kv, request=request, length=length, final=final):
            nonlocal forward
            parts.append(
                (forward, request, kind, block, step, len(positions), kv, positions, set(known), set(accepted))
            )
            for p in positions:
                state = PROMPT if p < length else DECODED if p in known else MASKED
                in_block = block >= 0 and p // block_length == block
                right = p in known or p in accepted or rng.random() < 0.6
                predicted = final[p] if right else int(rng.integers(2, 2 + vocabulary))
                rows.append(
                    (
                        p,
                        final[p] if state != MASKED else 1,
                        state,
                        predicted if in_block else -1,
                        np.float32(rng.random()) if in_block else np.float32(np.nan),
                        p in accepted,
                    )
                )
            forward += 1

        if kv_cache and whole:
            emit(PREFILL, -1, -1, list(range(whole)), set(range(whole)), (), 0)
        for b in range(first, first + blocks):
            own = list(range(b * block_length, (b + 1) * block_length))
            known = {p for p in range((b + 1) * block_length) if p < b * block_length or p < length}
            step = 0
            while any(p not in known for p in own):
                masked = [p for p in own if p not in known]
                take = int(min(len(masked), rng.integers(1, max_accept + 1)))
                accepted = set(rng.choice(masked, take, replace=False).tolist())
                positions = own if kv_cache else list(range((b + 1) * block_length))
                emit(DENOISE, b, step, positions, known, accepted, b * block_length if kv_cache else 0)
                known |= accepted
                step += 1
            if kv_cache:
                emit(COMMIT, b, -1, own, known, (), b * block_length)
    count = len(parts)
    lengths = np.array([p[5] for p in parts], np.int64)
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    column = list(zip(*rows, strict=True))
    state = np.array(column[2], np.uint8)
    accepted = np.array(column[5], bool)
    forwards = ForwardTable(
        forward_id=np.array([p[0] for p in parts], np.uint32),
        row_offsets=offsets,
        part_offsets=np.arange(count + 1, dtype=np.int64),
        request_id=np.array([p[1] for p in parts], np.uint32),
        kind=np.array([p[2] for p in parts], np.uint8),
        block=np.array([p[3] for p in parts], np.int32),
        step=np.array([p[4] for p in parts], np.int32),
        row_start=np.zeros(count, np.int64),
        num_tokens=lengths,
        kv_tokens=np.array([p[6] for p in parts], np.int64),
        num_masked=np.add.reduceat(state == MASKED, offsets[:-1]).astype(np.int64),
        num_accepted=np.add.reduceat(accepted, offsets[:-1]).astype(np.int64),
        num_edited=np.zeros(count, np.int64),
        branches=np.ones(count, np.uint8),
        chosen_branch=np.full(count, -1, np.int16),
        duration_ns=np.full(count, -1, np.int64),
    )
    tokens = TokenTable(
        position=np.array(column[0], np.int32),
        token_id=np.array(column[1], np.int32),
        state=state,
        predicted_id=np.array(column[3], np.int32),
        confidence=np.array(column[4], np.float32),
        argmax_id=np.array(column[3], np.int32),
        argmax_confidence=np.array(column[4], np.float32),
        accepted=accepted,
        edited=np.zeros(len(accepted), bool),
    )
    layers = {
        layer: layer_trace(rng, layer, len(rows), spec, np.ones(count, bool), offsets, ties)
        for layer, spec in specs.items()
    }
    return in_memory(forwards, tokens, layers), first_block
