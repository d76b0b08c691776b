"""Segments and traces in memory, from their columns; what is not given gets a plain value."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from simulator.policy import ExpertStream, Geometry
from tracer.schema import DENOISE, MASKED, id_type
from tracer.trace import ForwardTable, LayerTrace, ModelInfo, RouterSpec, Segment, TokenTable, TraceMeta


def forward_table(calls, first=0, **columns):
    """A ForwardTable of calls, each a list of parts (request, kind, block, step, rows, masked, accepted).

    ``columns``: others of [N]; by default the cache holds nothing, nothing is edited, one branch, times unknown.
    """
    parts = [part for call in calls for part in call]
    column = list(zip(*parts, strict=True)) if parts else [()] * 7
    rows = [[part[4] for part in call] for call in calls]
    starts = [sum(call[:i]) for call in rows for i in range(len(call))]
    given = {
        "request_id": column[0],
        "kind": column[1],
        "block": column[2],
        "step": column[3],
        "row_start": starts,
        "num_tokens": column[4],
        "kv_tokens": [0] * len(parts),
        "num_masked": column[5],
        "num_accepted": column[6],
        "num_edited": [0] * len(parts),
        "branches": [1] * len(parts),
        "chosen_branch": [-1] * len(parts),
        "duration_ns": [-1] * len(parts),
    }
    types = {"request_id": np.uint32, "kind": np.uint8, "block": np.int32, "step": np.int32}
    types |= {"branches": np.uint8, "chosen_branch": np.int16}
    return ForwardTable(
        forward_id=np.arange(first, first + len(calls), dtype=np.uint32),
        row_offsets=np.cumsum([0, *map(sum, rows)]).astype(np.int64),
        part_offsets=np.cumsum([0, *map(len, rows)]).astype(np.int64),
        **{name: np.array(values, types.get(name, np.int64)) for name, values in (given | columns).items()},
    )


def token_table(position, **columns):
    """A TokenTable of rows at these positions; by default masked tokens 1 that nothing is predicted for."""
    given = {
        "token_id": 1,
        "state": MASKED,
        "predicted_id": -1,
        "confidence": np.nan,
        "accepted": False,
        "edited": False,
    }
    given |= columns
    given = {"argmax_id": given["predicted_id"], "argmax_confidence": given["confidence"]} | given
    types = dict.fromkeys(("token_id", "predicted_id", "argmax_id"), np.int32) | {"state": np.uint8}
    types |= dict.fromkeys(("confidence", "argmax_confidence"), np.float32) | dict.fromkeys(
        ("accepted", "edited"), bool
    )
    position = np.asarray(position, np.int32).reshape(-1)
    spread = {n: np.array(np.broadcast_to(np.reshape(v, -1), position.shape), types[n]) for n, v in given.items()}
    return TokenTable(position=position, **spread)


def layer_of(layer, spec, ids, calls, *, count=None, weights=None, scores=None, present=None):
    """A LayerTrace; by default rows have all K experts and the layer runs in all ``calls``."""
    ids = np.asarray(ids)
    return LayerTrace(
        layer=layer,
        expert_ids=ids.astype(id_type(spec.num_experts)),
        count=np.full(len(ids), spec.top_k, np.uint8) if count is None else np.asarray(count).astype(np.uint8),
        gate_weights=None if weights is None else np.asarray(weights).astype(np.float16),
        router_scores=scores,
        present=np.ones(calls, bool) if present is None else np.asarray(present, bool),
        router=spec,
    )


def layer_of_rows(rng, layer, spec, rows, calls, scores, present=None):
    """A LayerTrace of rows (ids, weights), each in slots of random order; None is a row that was not routed."""
    ids, weights = np.zeros((len(rows), spec.top_k), int), np.zeros((len(rows), spec.top_k))
    for t, row in enumerate(rows):
        if row is not None:
            order = rng.permutation(len(row[0]))
            ids[t, : len(order)], weights[t, : len(order)] = np.array(row[0])[order], np.array(row[1])[order]
    count = [0 if row is None else len(row[0]) for row in rows]
    return layer_of(layer, spec, ids, calls, count=count, weights=weights, scores=scores, present=present)


def in_memory(forwards, tokens, layers):
    """A Segment over tables that are already there; ``layers`` {number: LayerTrace}."""

    def load(layer, with_scores, with_weights):
        whole = layers[layer]
        return replace(
            whole,
            gate_weights=whole.gate_weights if with_weights else None,
            router_scores=whole.router_scores if with_scores else None,
        )

    return Segment(forwards=forwards, tokens=tokens, layers=tuple(layers), load=load)


@dataclass
class MemoryTrace:
    """What an opened trace offers to a replay and to the figures, over segments in memory."""

    meta: TraceMeta
    first_block: dict[int, int]
    pieces: list[Segment]
    holds: frozenset[str] = frozenset({"weights", "active", "scores", "confidence", "tokens"})
    requests: pl.DataFrame | None = None  # by default those of the pieces, of no data set

    def __post_init__(self):
        if self.requests is None:
            numbers = sorted({int(r) for piece in self.pieces for r in piece.forwards.request_id})
            schema = {"request_id": pl.UInt32, "dataset": pl.String}
            self.requests = pl.DataFrame({"request_id": numbers, "dataset": [None] * len(numbers)}, schema)

    @property
    def num_forwards(self):
        return sum(piece.forwards.num_forwards for piece in self.pieces)

    def segments(self):
        return iter(self.pieces)

    def has(self, requirement):
        return requirement in self.holds


def meta_of(specs, *, block_length=4, expert_bytes=None, level="scores", **model):
    """A TraceMeta for layers ``specs`` {layer: RouterSpec}."""
    geometry = {"hidden_size": 64, "moe_intermediate_size": 32, "dense_bytes": 1 << 20, "dtype": "bfloat16"} | model
    return TraceMeta(
        schema_version=2,
        complete=True,
        capture_level=level,
        model=ModelInfo(
            id="test",
            num_layers=max(specs) + 1,
            moe_layers=tuple(specs),
            num_experts=max(spec.num_experts for spec in specs.values()),
            top_k=max(spec.top_k for spec in specs.values()),
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


def geometry_of(segment, block_length=4, **decoding):
    """The Geometry of a segment."""
    routers = {layer: segment.layer(layer).router for layer in segment.layers}
    first = next(iter(routers.values()))
    plain = geometry(first.num_experts, segment.layers, dict.fromkeys(segment.layers, 1), top_k=first.top_k)
    return replace(plain, routers=routers, block_length=block_length, decoding=decoding)


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
