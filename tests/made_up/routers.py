"""Routers, their scores, and what they choose for one row, written out: the one definition of the router's rule in tests."""

from __future__ import annotations

import numpy as np

from tracer.trace import RouterSpec


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


def naive_choose(score, allowed, spec, top_k=None):
    """Group-limited top-K of one row inside ``allowed``: ids ascending, float32 weights. Ties: lowest expert, lowest group."""
    values = (score if spec.expert_bias is None else score + spec.expert_bias).tolist()
    selection = {e: values[e] for e in sorted(allowed)}
    size = spec.num_experts // spec.n_group

    def group_score(g):
        best = sorted((selection[e] for e in range(g * size, (g + 1) * size) if e in selection), reverse=True)
        if spec.group_score == "max":
            return best[0] if best else -np.inf
        return np.float32(best[0]) + np.float32(best[1]) if len(best) > 1 else -np.inf

    if spec.topk_group < spec.n_group:
        kept = sorted(range(spec.n_group), key=lambda g: (-group_score(g), g))[: spec.topk_group]
        selection = {e: v for e, v in selection.items() if e // size in kept}
    ids = sorted(sorted(selection, key=lambda e: (-selection[e], e))[: top_k or spec.top_k])
    return ids, naive_weights(score, ids, spec)


def naive_weights(score, ids, spec):
    """Float32 weights of a row's experts, summed one after the other by ascending id."""
    ids, bias = list(ids), spec.expert_bias
    weights = np.asarray(score + bias if spec.bias_in_weights and bias is not None else score)[ids]
    if spec.norm_topk_prob and ids:
        weights = weights / (np.cumsum(weights)[-1] + np.float32(1e-20))
    weights = weights * np.float32(spec.routed_scaling_factor)
    return (weights if spec.expert_scale is None else weights * spec.expert_scale[ids]).tolist()


def route_row(score, spec):
    """The vanilla rule for one row: (ids, float32 weights), heaviest first."""
    ids, weights = naive_choose(score, range(spec.num_experts), spec)
    order = sorted(range(len(ids)), key=lambda k: (-weights[k], k))
    return [ids[k] for k in order], np.array([weights[k] for k in order], np.float32)
