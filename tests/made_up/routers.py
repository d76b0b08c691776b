"""Routers, their scores, and what they choose for one row, written out."""

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
