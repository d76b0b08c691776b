"""Kernels over the rows of ``routing``: check ids, weights and scores, choose the score columns of level "active".

Shapes: T = rows of a layer over a segment, K = experts a row, E = experts of a layer, C = score columns of a call.
"""

from __future__ import annotations

import numpy as np

from tracer.jit import njit
from tracer.top import plain_top

HALF_MAGNITUDE, HALF_EXPONENT, HALF_SIGN = np.uint16(0x7FFF), 0x7C00, 0x8000
SINGLE_MAGNITUDE, SINGLE_EXPONENT = np.uint32(0x7FFFFFFF), 0x7F800000


@njit
def repeats_in_eights(rows):
    """Whether any row of eight uint8 ids, read as one uint64 [T], holds an id twice.

    Each rotation by 1 to 4 bytes lines up every pair of slots once; a zero byte in the exclusive or is a repeat.
    """
    ones = np.uint64(0x0101010101010101)
    high = np.uint64(0x8080808080808080)
    found = np.uint64(0)
    for t in range(len(rows)):
        ids = rows[t]
        for shift in (8, 16, 24, 32):
            other = ids ^ ((ids << np.uint64(shift)) | (ids >> np.uint64(64 - shift)))
            found |= (other - ones) & ~other & high
    return found != 0


@njit
def first_bad_row(expert_ids, count, num_experts):
    """First row whose ids are out of range or not distinct, -1 if none. ``expert_ids`` [T, K], ``count`` uint8 [T]."""
    seen = np.full(num_experts, -1, np.int64)
    for t in range(expert_ids.shape[0]):
        bad = False
        for k in range(count[t]):
            expert = expert_ids[t, k]
            if expert >= num_experts:
                return t
            bad |= seen[expert] == t
            seen[expert] = t
        if bad:
            return t
    return -1


@njit
def widest_bits(bits, magnitude):
    """Largest magnitude pattern and largest raw pattern of floats given as unsigned ``bits`` [any].

    A float is finite when its magnitude bits stay under the exponent mask, and negative when its raw bits exceed the
    sign bit; both follow from two maxima.
    """
    largest = bits[0] & magnitude
    raw = bits[0]
    for i in range(len(bits)):
        largest = max(largest, bits[i] & magnitude)
        raw = max(raw, bits[i])
    return largest, raw


def first_invalid_row(expert_ids: np.ndarray, count: np.ndarray, num_experts: int) -> int:
    """First row whose real ids are not distinct or not below ``num_experts``, -1 if none.

    ``expert_ids`` uint8 or uint16 [T, K], ``count`` uint8 [T].
    """
    top_k = expert_ids.shape[1]
    if top_k == 8 and expert_ids.dtype == np.uint8 and expert_ids.size and (count == top_k).all():
        in_range = num_experts == 256 or int(expert_ids.max()) < num_experts
        if in_range and not repeats_in_eights(expert_ids.reshape(-1).view(np.uint64)):
            return -1
    return int(first_bad_row(expert_ids, count, num_experts))


def weight_fault(gate_weights: np.ndarray, signed: bool) -> tuple[int, str] | None:
    """First row of float16 [T, K] weights that are not finite, or negative unless ``signed``, and what is wrong with it."""
    if gate_weights.size == 0:
        return None
    largest, raw = widest_bits(gate_weights.reshape(-1).view(np.uint16), HALF_MAGNITUDE)
    if largest >= HALF_EXPONENT:
        bad = int(np.argmax(~np.isfinite(gate_weights).all(axis=1)))
        return bad, f"weights {gate_weights[bad].tolist()} are not finite"
    if raw > HALF_SIGN and not signed:
        bad = int(np.argmax((gate_weights < 0).any(axis=1)))
        return bad, f"weights {gate_weights[bad].tolist()} must not be negative"
    return None


def half_scored_row(scores: np.ndarray) -> int:
    """First row of float32 [T, C] scores that are neither all finite nor all NaN (not recorded), -1 if none."""
    if scores.size == 0:
        return -1
    largest, _ = widest_bits(scores.reshape(-1).view(np.uint32), SINGLE_MAGNITUDE)
    if largest < SINGLE_EXPONENT:
        return -1
    wrong = ~np.isfinite(scores).all(axis=1) & ~np.isnan(scores).all(axis=1)
    return int(np.argmax(wrong)) if wrong.any() else -1


@njit
def _mark_active(expert_ids, scores, bias, top_k, routed, active):
    best, chosen = np.empty(top_k, np.float32), np.empty(top_k, np.int64)
    for t in range(len(scores)):
        if not routed[t]:
            continue
        for k in range(expert_ids.shape[1]):
            active[expert_ids[t, k]] = True
        for k in range(plain_top(scores[t] + bias, top_k, best, chosen)):
            active[chosen[k]] = True


def active_columns(
    expert_ids: np.ndarray, router_scores: np.ndarray, expert_bias: np.ndarray | None, routed: np.ndarray
) -> np.ndarray:
    """Experts, ascending, int64 [C], whose scores capture level "active" keeps for one call and layer.

    The union over the rows that were ``routed``, bool [n], of the recorded ids, int [n, K], and of the plain top-K (no groups)
    by selection score, that is score plus bias; ties go to the lowest expert id (trace-format.md, level "active").
    ``router_scores`` float32 [n, E] are those after the score function, before ``expert_bias``, float32 [E] or None.
    """
    num_experts = router_scores.shape[1]
    bias = np.zeros(num_experts, np.float32) if expert_bias is None else expert_bias
    active = np.zeros(num_experts, np.bool_)
    top_k = min(expert_ids.shape[1], num_experts)
    _mark_active(expert_ids.astype(np.int64), np.ascontiguousarray(router_scores), bias, top_k, routed, active)
    return np.flatnonzero(active)
