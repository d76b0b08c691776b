"""In-memory traces of any shape for replay tests: batches of requests, absent layers, every kind of forward, ties."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from simulator.policy import ExpertStream, Geometry
from tests.builders import in_memory
from tracer.schema import COMMIT, DECODE, DENOISE, KINDS, MASKED, PREFILL
from tracer.trace import ForwardTable, LayerTrace, ModelInfo, RouterSpec, Segment, TokenTable, TraceMeta


@dataclass
class MemoryTrace:
    """What ``replay`` asks of an opened trace."""

    meta: TraceMeta
    first_block: dict[int, int]
    pieces: list[Segment]
    holds: frozenset[str] = frozenset({"weights", "active", "scores", "confidence", "tokens"})
    num_forwards: int = field(init=False)

    def __post_init__(self):
        self.num_forwards = sum(piece.forwards.num_forwards for piece in self.pieces)

    def segments(self):
        return iter(self.pieces)

    def has(self, requirement):
        return requirement in self.holds


def meta_of(specs, *, block_length=4, expert_bytes=None, level="scores", **model):
    """A TraceMeta for layers ``specs`` {layer: RouterSpec}."""
    first = next(iter(specs.values()))
    geometry = {"hidden_size": 64, "moe_intermediate_size": 32, "dense_bytes": 1 << 20, "dtype": "bfloat16"} | model
    return TraceMeta(
        schema_version=2,
        complete=True,
        capture_level=level,
        model=ModelInfo(
            id="tiny",
            num_layers=max(specs) + 1,
            moe_layers=tuple(specs),
            num_experts=first.num_experts,
            top_k=first.top_k,
            num_shared_experts=0,
            expert_bytes=expert_bytes or {layer: 1000 + 100 * layer for layer in specs},
            **geometry,
        ),
        routers=specs,
        tables=("requests", "forwards", "tokens", "routing"),
        decoding={"loop": "own", "block_length": block_length, "kv_cache": True},
        provenance={},
        segments=None,
        raw={},
    )


def geometry(num_experts=8, layers=(1,), expert_bytes=None, first_block=None, dense_bytes=None, top_k=2):
    """A Geometry without a trace."""
    return Geometry(
        layers=tuple(layers),
        num_experts=num_experts,
        top_k=top_k,
        routers={layer: RouterSpec(num_experts, top_k) for layer in layers},
        expert_bytes=expert_bytes or dict.fromkeys(layers, 10),
        block_length=4,
        first_block=first_block or {},
        decoding={},
        dense_bytes=dense_bytes,
    )


def forward_table(calls, first=0):
    """A ForwardTable of calls, each a list of parts (request, kind, block, step, rows, masked, accepted)."""
    parts = [part for call in calls for part in call]
    column = list(zip(*parts, strict=True)) if parts else [()] * 7
    rows = [[part[4] for part in call] for call in calls]
    starts = [sum(call[:i]) for call in rows for i in range(len(call))]
    return ForwardTable(
        forward_id=np.arange(first, first + len(calls), dtype=np.uint32),
        row_offsets=np.cumsum([0, *map(sum, rows)]).astype(np.int64),
        part_offsets=np.cumsum([0, *map(len, rows)]).astype(np.int64),
        request_id=np.array(column[0], np.uint32),
        kind=np.array(column[1], np.uint8),
        block=np.array(column[2], np.int32),
        step=np.array(column[3], np.int32),
        row_start=np.array(starts, np.int64),
        num_tokens=np.array(column[4], np.int64),
        kv_tokens=np.zeros(len(parts), np.int64),
        num_masked=np.array(column[5], np.int64),
        num_accepted=np.array(column[6], np.int64),
        num_edited=np.zeros(len(parts), np.int64),
        branches=np.ones(len(parts), np.uint8),
        chosen_branch=np.full(len(parts), -1, np.int16),
        duration_ns=np.full(len(parts), -1, np.int64),
    )


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
    dtype = np.uint8 if spec.num_experts <= 256 else np.uint16
    ids = np.stack([rng.permutation(spec.num_experts)[: spec.top_k] for _ in range(rows)]).astype(dtype)
    count = rng.integers(0 if short_rows else spec.top_k, spec.top_k + 1, rows).astype(np.uint8)
    present = np.ones(forwards.num_forwards, bool) if present is None else present
    count[~np.repeat(present, np.diff(forwards.row_offsets))] = 0
    drawn = rng.integers(0, 4, ids.shape) / 4 if ties else rng.random(ids.shape)
    return LayerTrace(
        layer=layer,
        expert_ids=ids,
        count=count,
        gate_weights=drawn.astype(np.float16) if weights else None,
        router_scores=None,
        present=present,
        router=spec,
    )


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
    pieces, first = [], 0
    for _ in range(segments):
        forwards = forward_table(random_calls(rng, calls, requests, block_length, batch), first)
        first += calls
        rows = forwards.num_rows
        block = np.concatenate([np.full(n, b) for n, b in zip(forwards.num_tokens, forwards.block, strict=True)])
        near = np.maximum(block, 0) * block_length + rng.integers(-block_length, block_length, rows)
        tokens = TokenTable(
            position=np.maximum(near, 0).astype(np.int32),
            token_id=np.full(rows, 1, np.int32),
            state=np.full(rows, MASKED, np.uint8),
            predicted_id=np.full(rows, -1, np.int32),
            confidence=np.full(rows, np.nan, np.float32),
            argmax_id=np.full(rows, -1, np.int32),
            argmax_confidence=np.full(rows, np.nan, np.float32),
            accepted=np.zeros(rows, bool),
            edited=np.zeros(rows, bool),
        )
        layers = {}
        for layer, spec in specs.items():
            lacks = absent and layer == num_layers and num_layers > 1
            present = forwards.forward_kind != PREFILL if lacks else None
            layers[layer] = random_layer(
                rng, layer, forwards, spec, weights=weights, ties=ties, short_rows=short_rows, present=present
            )
        pieces.append(in_memory(forwards, tokens, layers))
    first_block = {r: int(rng.integers(-1, 4)) for r in range(requests)}
    return MemoryTrace(meta_of(specs, block_length=block_length, **meta), first_block, pieces)


def joined(trace):
    """The same trace as one segment."""
    tables = [piece.forwards for piece in trace.pieces]
    rows = np.cumsum([0, *(t.num_rows for t in tables)])
    parts = np.cumsum([0, *(len(t.block) for t in tables)])
    columns = {}
    for name in ForwardTable.__slots__:
        columns[name] = np.concatenate([getattr(t, name) for t in tables])
    for name, shifts in (("row_offsets", rows), ("part_offsets", parts)):
        found = [getattr(t, name)[:-1] + shift for t, shift in zip(tables, shifts, strict=False)]
        columns[name] = np.concatenate([*found, shifts[-1:]]).astype(np.int64)
    tokens = {
        name: np.concatenate([getattr(piece.tokens, name) for piece in trace.pieces]) for name in TokenTable.__slots__
    }
    layers = {}
    for layer in trace.pieces[0].layers:
        found = [piece.layer(layer, True) for piece in trace.pieces]
        whole = {"layer": layer, "router": found[0].router}
        for name in ("expert_ids", "count", "gate_weights", "router_scores", "present"):
            values = [getattr(one, name) for one in found]
            whole[name] = None if values[0] is None else np.concatenate(values)
        layers[layer] = LayerTrace(**whole)
    whole = in_memory(ForwardTable(**columns), TokenTable(**tokens), layers)
    return MemoryTrace(trace.meta, trace.first_block, [whole], trace.holds)


def stream_of(cells, layers=None):
    """An ExpertStream of cells, each a list of rows, each a list of distinct experts in the order they are touched."""
    ordered = [naive_cell(rows) for rows in cells]
    return ExpertStream(
        cell_forward=np.arange(len(cells), dtype=np.int64),
        cell_layer=np.array([0] * len(cells) if layers is None else layers, np.int32),
        offsets=np.cumsum([0, *(len(first) for first, _, _ in ordered)]).astype(np.int64),
        experts=np.array([e for first, _, _ in ordered for e in first], np.uint16),
        tokens=np.array([counts[e] for first, counts, _ in ordered for e in first], np.uint32),
        last_touch=np.array([last.index(e) for first, _, last in ordered for e in first], np.uint16),
    )


def naive_cell(rows):
    """Distinct experts in order of first touch, tokens of each, distinct experts in order of last touch."""
    first, counts, last = [], {}, []
    for row in rows:
        for expert in row:
            if expert not in counts:
                first.append(expert)
                counts[expert] = 0
            else:
                last.remove(expert)
            counts[expert] += 1
            last.append(expert)
    return first, counts, last


def plain_forwards(cells, kind=DENOISE):
    """A forwards table with a call of one part a cell; nothing in it matters to a cache."""
    return forward_table([[(0, kind, 0, i, len(rows), 0, 0)] for i, rows in enumerate(cells)])


def kind_name(code):
    """The name of a forward's kind."""
    return KINDS[code]
