"""Routers that return ids, weights and logits as a tuple, in whatever order: read by what the tensors are.

In transformers 5 most native routers return ``(router_logits [N, E], weights [N, K], ids [N, K])``. An integer tensor with K
columns is the ids, a float one with K columns the weights, a float one with E columns the logits or scores.
"""

from __future__ import annotations

import torch
from torch import nn

from tracer.adapters.gate import Reader, Routing, rows


def places(output, num_experts: int, top_k: int) -> tuple[int | None, int | None, int | None]:
    """Where an output holds ids, weights and scores; None for what it does not hold."""
    ids = weights = scores = None
    for place, item in enumerate(output if isinstance(output, tuple | list) else ()):
        if not isinstance(item, torch.Tensor) or item.dim() < 2:
            continue
        last = item.shape[-1]
        if not item.is_floating_point():
            if last == top_k and item.dtype != torch.bool and ids is None:
                ids = place
        # With E == K the logits come first, as in every native router.
        elif last == num_experts and scores is None:
            scores = place
        elif last == top_k and weights is None:
            weights = place
    return ids, weights, scores


def reader_for(output, num_experts: int, top_k: int) -> Reader | None:
    """A reader for outputs shaped like ``output``, or None when it holds no ids."""
    ids, weights, scores = places(output, num_experts, top_k)
    if ids is None:
        return None

    def read(module: nn.Module, args: tuple, output) -> Routing:
        return Routing(
            rows(output[ids]),
            None if weights is None else rows(output[weights]),
            None if scores is None else rows(output[scores]),
        )

    return read
