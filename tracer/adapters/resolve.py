"""Settle how a router is read, from its first call, or refuse.

Order: the callable the user gave, the gate's class name, the kind of its outputs, a plain linear gate, the inputs of a fused
experts module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch

from tracer.adapters import experts_input, gemma, linear_gate, llada2, router_tuple
from tracer.adapters.first_call import FirstCall
from tracer.adapters.gate import Gate, Routing, refuse, setting
from tracer.adapters.rules import candidates, fit_rule, with_own_vectors
from tracer.trace import RouterSpec

BY_CLASS = {name: module for module in (llada2, gemma) for name in module.CLASSES}


def resolve(
    gate: Gate,
    first: FirstCall,
    config,
    top_k: int,
    num_rows: int,
    adapter: Callable | None = None,
    like: Gate | None = None,
) -> Routing:
    """Choose the reader of a gate and check it.

    Parameters
    ----------
    gate : Gate
        ``adapter``, ``source``, ``read``, ``router``, ``scores_are`` and ``verified`` are set.
    first : FirstCall
        What was seen during the call.
    config
        The language model's configuration, or None.
    top_k, num_rows : int
        Experts a row, rows of the call.
    adapter : callable, optional
        The user's own reader: (gate module, args, output) -> (expert_ids, gate_weights or None, scores or None).
    like : Gate, optional
        A router of the same model whose rule is known; a trace holds one rule for all layers.

    Returns
    -------
    Routing
        Of this first call.

    Raises
    ------
    UserError
        Nothing could be read, or what was read is not what ran.
    """
    routing = None
    if adapter is not None:
        gate.adapter, gate.read = "user", _wrap(adapter)
    elif type(gate.module).__name__ in BY_CLASS:
        family = BY_CLASS[type(gate.module).__name__]
        gate.adapter, gate.read = family.__name__.rpartition(".")[2], family.read
    elif gate.module is not None and (reader := router_tuple.reader_for(first.output, gate.num_experts, top_k)):
        gate.adapter, gate.read = "router_tuple", reader
    elif first.experts_call is not None:
        args, kwargs = first.experts_call
        routing = experts_input.read(args, kwargs, first.output, gate.num_experts, top_k)
        gate.adapter, gate.source = "experts_input", "experts"
    elif gate.module is not None and linear_gate.applies(gate, first.output):
        routing = _resolve_linear(gate, first, config, top_k, like)
    if gate.read is not None and routing is None:
        try:
            routing = gate.read(gate.module, first.args, first.output)
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            raise refuse(
                gate, f"its output is not what {type(gate.module).__name__} is known to return ({error})"
            ) from None
    if routing is None:
        kind = (
            "no module beside its experts routes to them"
            if gate.module is None
            else f"{type(gate.module).__name__} returns no ids"
        )
        raise refuse(gate, f"{kind}, and its experts receive no ids either")
    _check_shapes(gate, routing, top_k, num_rows)
    reason = first.disagreement(routing, top_k)
    if reason is not None:
        raise refuse(gate, reason)
    if gate.router is None:
        find_rule(gate, routing, config, top_k, like)
        if gate.adapter in ("llada2", "gemma") and not gate.verified:
            raise refuse(
                gate, f"its choice does not follow from its scores by the rule of {type(gate.module).__name__}"
            )
    return routing


def _wrap(adapter: Callable):
    def read(module, args, output) -> Routing:
        expert_ids, gate_weights, scores = adapter(module, args, output)
        return Routing(expert_ids, gate_weights, scores)

    return read


def _resolve_linear(gate: Gate, first: FirstCall, config, top_k: int, like: Gate | None) -> Routing:
    if not first.calls:
        raise refuse(gate, "it returns logits only and its experts could not be watched, so its rule cannot be checked")
    reason = ""
    for read, router in linear_gate.rules(gate, config, top_k):
        if like is not None and like.router is not None and router.norm_topk_prob != like.router.norm_topk_prob:
            continue
        routing = read(gate.module, first.args, first.output)
        reason = first.disagreement(routing, top_k) or ""
        if reason:
            continue
        distance = first.unexplained(routing)
        if distance is not None and distance > (1e-3 if first.args[0].dtype == torch.float32 else 5e-2):
            reason = "the experts' outputs, weighted by its rule, are not what its block returns"
            continue
        if distance is None and setting(("norm_topk_prob",), gate.block, config) is None:
            reason = "nothing tells whether its block divides the weights by their sum"
            continue
        gate.adapter, gate.read, gate.router, gate.verified = "linear_gate", read, router, True
        return routing
    raise refuse(gate, reason)


def _check_shapes(gate: Gate, routing: Routing, top_k: int, num_rows: int) -> None:
    ids = routing.expert_ids
    if ids.shape != (num_rows, top_k):
        raise refuse(
            gate, f"it gave ids of shape {tuple(ids.shape)} in a call of {num_rows} rows and {top_k} experts a row"
        )
    if routing.gate_weights is not None and routing.gate_weights.shape != ids.shape:
        raise refuse(gate, f"its weights have shape {tuple(routing.gate_weights.shape)}, its ids {tuple(ids.shape)}")
    if routing.scores is not None and routing.scores.shape != (num_rows, gate.num_experts):
        wanted = (num_rows, gate.num_experts)
        raise refuse(gate, f"its scores have shape {tuple(routing.scores.shape)} and should have {wanted}")
    host = np.sort(ids.detach().cpu().numpy(), axis=1)
    if host.size and (host[:, 0].min() < 0 or host[:, -1].max() >= gate.num_experts):
        raise refuse(gate, f"it gave an expert id outside 0..{gate.num_experts - 1}")
    if (host[:, 1:] == host[:, :-1]).any():
        raise refuse(gate, "it gave the same expert twice for one row")


def find_rule(gate: Gate, routing: Routing, config, top_k: int, like: Gate | None = None) -> None:
    """Settle the rule of a gate, where one is known that leads to what it selected in its first call."""
    if routing.scores is None:
        return
    weights = None if routing.gate_weights is None else routing.gate_weights.detach().float().cpu().numpy()
    dtypes = [t.dtype for t in (routing.scores, routing.gate_weights) if t is not None]
    rounding = max(torch.finfo(dtype).eps for dtype in dtypes)
    ids = routing.expert_ids.detach().cpu().numpy().astype(np.int64)
    offered: Iterable[tuple[RouterSpec, str]] = candidates(gate, config, top_k, routing.scores)
    if like is not None and like.router is not None:
        offered = [(with_own_vectors(like.router, gate), like.scores_are)]
    found = fit_rule(offered, routing.scores, ids, weights, rounding)
    if found is not None:
        gate.router, gate.scores_are = found
        gate.verified = True
