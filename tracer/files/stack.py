"""A finished segment's ids and weights, gathered by layer and checked: what the slots are given and the parts hold.

Shapes: L layers, F calls, T token rows of the segment, K experts a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tracer.errors import UserError
from tracer.files.buffer import OpenSegment
from tracer.files.row_kernels import HALF_EXPONENT, HALF_MAGNITUDE, first_invalid_row, weight_fault, widest_bits


@dataclass(frozen=True, slots=True)
class LayerStack:
    """Ids and weights, 0 where a row has none; rows of calls without a layer have ``count`` 0 there."""

    layers: tuple[int, ...]
    ids: np.ndarray  # uint8 | uint16 [L, T, K]
    weights: np.ndarray  # float16 [L, T, K], no rows where no call has weights
    count: np.ndarray  # uint8 [L, T]
    present: np.ndarray  # bool [L, F]
    unweighted: frozenset[int]  # places of the layers without weights


def row_fault(segment: OpenSegment, row: int, layer: int | None, message: str) -> UserError:
    """A fault of a token row of the segment."""
    call = int(np.searchsorted(segment.row_ends, row, "right"))
    where = "" if layer is None else f", layer {layer}"
    first = segment.row_ends[call - 1] if call else 0
    return UserError(f"call {segment.forward_ids[call]}{where}, row {row - first}: {message}.")


def stack_layers(segment: OpenSegment) -> LayerStack:
    """All calls of a segment, layer by layer.

    Raises
    ------
    UserError
        Naming call, layer and row of the first ids or weights that break the format.
    """
    model, calls, offsets = segment.meta.model, segment.calls, [0, *segment.row_ends]
    layers = tuple(sorted(set().union(*(call.layers for call in calls))))
    ids, weights = _gathered(segment, layers)
    count = np.zeros(ids.shape[:2], np.uint8)
    present = np.zeros((len(layers), len(calls)), np.bool_)
    for number, call in enumerate(calls):
        own = slice(None) if call.layers == layers else [layers.index(layer) for layer in call.layers]
        present[own, number] = True
        count[own, offsets[number] : offsets[number + 1]] = model.top_k if call.count is None else call.count
    beyond = None
    if not (count == model.top_k).all():
        beyond = np.arange(model.top_k) >= count[..., None]
        ids[beyond] = 0
    bad = first_invalid_row(ids.reshape(-1, model.top_k), count.reshape(-1), model.num_experts)
    if bad >= 0:
        layer, row = divmod(bad, segment.num_rows)
        real = ids[layer, row, : count[layer, row]].tolist()
        wrong = f"must lie in 0..{model.num_experts - 1}" if max(real) >= model.num_experts else "are not distinct"
        raise row_fault(segment, row, layers[layer], f"expert ids {real} {wrong}")
    unweighted = frozenset(range(len(layers)))
    if weights.size:
        if beyond is not None:
            weights[beyond] = 0
        unweighted = _without_weights(weights, count)
        weights[list(unweighted)] = 0
        signed = any(router.bias_in_weights for router in segment.meta.routers.values())
        fault = weight_fault(weights.reshape(-1, model.top_k), signed)
        if fault:
            layer, row = divmod(fault[0], segment.num_rows)
            raise row_fault(segment, row, layers[layer], f"float16 {fault[1]}")
    return LayerStack(layers, ids, weights, count, present, unweighted)


def _gathered(segment: OpenSegment, layers: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Ids [L, T, K] and weights (NaN where a call has none, no rows where none has), 0 where a call has not the layer."""
    calls, top_k = segment.calls, segment.meta.model.top_k
    weighted = sum(call.gate_weights is not None for call in calls)
    if calls and all(call.layers == layers for call in calls) and weighted in (0, len(calls)):
        ids = np.concatenate([call.expert_ids for call in calls], axis=1)
        given = [call.gate_weights for call in calls if call.gate_weights is not None]
        return ids, np.concatenate(given, axis=1) if given else np.empty((len(layers), 0, top_k), np.float16)
    dtype = calls[0].expert_ids.dtype if calls else np.dtype(np.uint8)
    ids = np.zeros((len(layers), segment.num_rows, top_k), dtype)
    weights = np.zeros((len(layers), segment.num_rows if weighted else 0, top_k), np.float16)
    for call, first, end in zip(calls, [0, *segment.row_ends], segment.row_ends, strict=False):
        own = [layers.index(layer) for layer in call.layers]
        ids[own, first:end] = call.expert_ids
        if weighted:
            weights[own, first:end] = np.nan if call.gate_weights is None else call.gate_weights
    return ids, weights


def _without_weights(weights: np.ndarray, count: np.ndarray) -> frozenset[int]:
    """Places of the layers whose weights [L, T, K] are not known, NaN in every real slot."""
    largest, _ = widest_bits(weights.reshape(-1).view(np.uint16), HALF_MAGNITUDE)
    if largest < HALF_EXPONENT:
        return frozenset()
    real = np.arange(weights.shape[2]) < count[..., None]
    return frozenset(n for n in range(len(weights)) if real[n].any() and np.isnan(weights[n][real[n]]).all())
