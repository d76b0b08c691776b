"""Sets and loops that the naive definitions of routing policies are made of; a row is {expert: float32 weight}."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tests.made_up import routers
from tests.made_up.changes import active_layer
from tests.made_up.routers import naive_choose
from tracer.schema import PADDING


def naive_chunks(case, own_only=False, length=None):
    """Rows that decide together: those of one part whose positions fall in one block. Sets and loops."""
    forwards, layer = case.trajectory.forwards, case.layer
    length = length or case.geometry.block_length
    chunks = {}
    start, stop = forwards.part_rows
    for n in range(len(start)):
        for t in range(start[n], stop[n]):
            at = int(case.trajectory.position[t])
            reused = case.trajectory.reused is not None and case.trajectory.reused[t]
            if layer.count[t] == 0 or reused or case.trajectory.state[t] == PADDING:
                continue
            if own_only and at // length != forwards.block[n]:
                continue
            chunks.setdefault((n, at // length), []).append(int(t))
    return list(chunks.values())


def selection_scores(case, t):
    """Selection scores of a row, bias included, float32 [E]."""
    spec = case.layer.router
    score = case.layer.router_scores[t]
    return score if spec.expert_bias is None else score + spec.expert_bias


def naive_top(values, k, allowed=None):
    """The k best, ties to the lowest id."""
    allowed = range(len(values)) if allowed is None else allowed
    return sorted(allowed, key=lambda e: (-values[e], e))[:k]


def naive_inside(case, t, allowed):
    """A row's experts by the model's own rule inside a set; a set of ids."""
    return set(naive_choose(case.layer.router_scores[t], allowed, case.layer.router)[0])


def naive_weights(case, t, ids):
    """A row's experts with their weights: {expert: float32 weight}."""
    ids = sorted(ids)
    return dict(zip(ids, map(np.float32, routers.naive_weights(case.layer.router_scores[t], ids, case.layer.router))))


def recorded_rows(case):
    """What the trace says of every row that computes: a list of {expert: float32 weight}."""
    layer, reused = case.layer, case.trajectory.reused
    rows = []
    for t in range(len(layer.count)):
        n = 0 if reused is not None and reused[t] else layer.count[t]
        rows.append({int(layer.expert_ids[t, k]): np.float32(layer.gate_weights[t, k]) for k in range(n)})
    return rows


def naive_kept(case, row, kept):
    """A recorded row {expert: weight} cut to the experts ``kept``; weights scaled up where the router normalises."""
    spec = case.layer.router
    if not spec.norm_topk_prob or set(kept) == set(row):
        return {e: row[e] for e in row if e in kept}
    whole = part = np.float32(0)
    for e, w in row.items():
        share = np.float32(w / (np.float32(1) if spec.expert_scale is None else spec.expert_scale[e]))
        whole = np.float32(whole + share)
        part = np.float32(part + share) if e in kept else part
    factor = np.float32(whole / part) if part != 0 else np.float32(1)
    return {e: np.float32(w * factor) for e, w in row.items() if e in kept}


def selected_rows(selection):
    """A Selection as a list of {expert: float32 weight}; slots that are not used must be 0."""
    rows = []
    for t in range(len(selection.count)):
        n = int(selection.count[t])
        ids = [int(e) for e in selection.expert_ids[t, :n]]
        assert len(set(ids)) == n
        rows.append({e: np.float32(w) for e, w in zip(ids, selection.gate_weights[t, :n], strict=True)})
    return rows


def id_sets(selection):
    """A Selection's sets of experts."""
    return [set(map(int, ids[:n])) for ids, n in zip(selection.expert_ids, selection.count, strict=True)]


def rows_of(selection):
    """A selection as plain lists: per row its ids and weights, in slot order."""
    weights = selection.gate_weights
    return [
        (selection.expert_ids[t, :n].tolist(), None if weights is None else weights[t, :n].tolist())
        for t, n in enumerate(selection.count)
    ]


def at_level_active(case):
    """The case as a trace of capture level "active" holds it."""
    return replace(case, layer=active_layer(case.layer, case.trajectory.forwards.row_offsets))
