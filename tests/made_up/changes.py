"""Segments with something changed: rows that are padding or not routed, scores left out, calls left out or joined."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise

import numpy as np

from tests.made_up.tables import MemoryTrace, in_memory
from tracer.schema import PADDING
from tracer.trace import ForwardTable, LayerTrace, Segment, TokenTable

ROWS = ("expert_ids", "count", "gate_weights", "router_scores")


def with_layers(segment, change):
    """The segment with ``change(layer_trace)`` in the place of each layer."""
    layers = {layer: change(segment.layer(layer, True)) for layer in segment.layers}
    return in_memory(segment.forwards, segment.tokens, layers)


def of_rows(table, rows, names=None):
    """A table of tokens or of a layer with the rows ``rows`` only, in that order."""
    columns = {name: getattr(table, name) for name in names or [f.name for f in fields(table)]}
    return replace(table, **{name: None if column is None else column[rows] for name, column in columns.items()})


def calls_of(segment, calls):
    """A segment of the model calls ``calls`` of another, in that order, of one request each."""
    forwards, calls = segment.forwards, np.array(calls, np.int64)
    rows = np.concatenate([np.arange(*forwards.row_offsets[f : f + 2]) for f in calls])
    per_call = [f.name for f in fields(forwards) if f.name not in ("row_offsets", "part_offsets")]
    table = replace(
        forwards,
        row_offsets=np.concatenate(([0], np.cumsum(np.diff(forwards.row_offsets)[calls]))),
        part_offsets=np.arange(len(calls) + 1),
        **{name: getattr(forwards, name)[calls] for name in per_call},
    )

    def load(*asked):
        layer = segment.load(*asked)
        return replace(of_rows(layer, rows, ROWS), present=layer.present[calls])

    return Segment(forwards=table, tokens=of_rows(segment.tokens, rows), layers=segment.layers, load=load)


def with_padding(segment, rng, share=0.2):
    """Some rows turned into padding: position -1, state padding."""
    tokens = segment.tokens
    hit = rng.random(len(tokens.position)) < share
    tokens = replace(
        tokens,
        position=np.where(hit, np.int32(-1), tokens.position),
        state=np.where(hit, np.uint8(PADDING), tokens.state),
        accepted=tokens.accepted & ~hit,
    )
    return replace(segment, tokens=tokens)


def add_padding(rng, segment, most=3):
    """The segment with 1 to ``most`` rows of padding among those of each call, routed as other rows are; a request a call."""
    forwards = segment.forwards
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
    tokens = of_rows(segment.tokens, source)
    blank = {"position": -1, "token_id": 0, "state": PADDING, "predicted_id": -1, "argmax_id": -1}
    blank |= {"confidence": np.nan, "argmax_confidence": np.nan, "accepted": False, "edited": False}
    for name, value in blank.items():
        getattr(tokens, name)[padding] = value
    return in_memory(table, tokens, {n: of_rows(segment.layer(n, True), source, ROWS) for n in segment.layers})


def unrouted(rng, share=0.2):
    """A change for :func:`with_layers`: some rows were not routed."""

    def change(layer):
        return replace(layer, count=np.where(rng.random(len(layer.count)) < share, np.uint8(0), layer.count))

    return change


def active_layer(layer, offsets):
    """The layer as capture level "active" holds it: NaN but for experts that a row of the call uses or would without groups."""
    spec, scores = layer.router, np.full_like(layer.router_scores, np.nan)
    bias = 0 if spec.expert_bias is None else spec.expert_bias
    used = np.arange(spec.top_k) < layer.count[:, None]
    for first, last in pairwise(offsets):
        rows = slice(first, last)
        plain = np.argsort(-(layer.router_scores[rows] + bias), axis=1, kind="stable")[:, : spec.top_k]
        columns = np.union1d(plain, layer.expert_ids[rows][used[rows]]).astype(int)
        scores[rows, columns] = layer.router_scores[rows, columns]
    return replace(layer, router_scores=scores)


def active_only(segment):
    """The segment at capture level "active"."""
    return with_layers(segment, lambda layer: active_layer(layer, segment.forwards.row_offsets))


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
