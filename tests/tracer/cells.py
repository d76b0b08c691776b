"""Routing of a recorded call layer by layer, as tests like to look at it."""

from __future__ import annotations

from tracer.trace import CallRouting


def cells(routing: CallRouting) -> dict[int, dict]:
    """``{layer: {expert_ids, gate_weights, router_scores, count}}``; columns a call has not are None."""
    columns = ("expert_ids", "gate_weights", "router_scores", "count")
    return {
        layer: {name: None if (own := getattr(routing, name)) is None else own[n] for name in columns}
        for n, layer in enumerate(routing.layers)
    }
