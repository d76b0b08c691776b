"""The open segment: what calls bring, copied as it comes; everything that can wait is left to the background thread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tracer.errors import UserError
from tracer.files.row_kernels import active_columns
from tracer.schema import TABLES, id_type
from tracer.trace import CallRouting, TraceMeta

TOKEN_TYPES = {c.name: np.dtype(c.type) for c in TABLES["tokens"] if c.name not in ("forward_id", "row")}
TOKEN_BYTES = sum(dtype.itemsize for dtype in TOKEN_TYPES.values())
# the argmax columns repeat the predicted ones, which come before them, where they are not given
TOKEN_LIKE = {"argmax_id": "predicted_id", "argmax_confidence": "confidence"}


class OpenSegment:
    """Calls and ended requests not written yet.

    ``parts`` are the ``forwards`` rows, ``call_parts`` how many of them each call has, ``row_ends`` where each call's rows end,
    ``forward_ids`` their numbers; ``calls`` their routing, ids and weights in stored types; ``active`` per call and layer the
    kept experts and their scores [rows, C] at level "active". ``num_bytes`` counts what was put.
    """

    def __init__(self, meta: TraceMeta) -> None:
        self.meta = meta
        self.parts: list[dict[str, Any]] = []
        self.requests: list[dict[str, Any]] = []
        self.forward_ids: list[int] = []
        self.row_ends: list[int] = []
        self.call_parts: list[int] = []
        self.calls: list[CallRouting] = []
        self.active: list[list[tuple[np.ndarray, np.ndarray]]] = []
        self.num_bytes = 0
        # the bytes of each column
        self._tokens = {name: bytearray() for name in TOKEN_TYPES} if "tokens" in meta.tables else None

    @property
    def num_calls(self) -> int:
        return len(self.forward_ids)

    @property
    def num_rows(self) -> int:
        return self.row_ends[-1] if self.row_ends else 0

    def tokens(self) -> dict[str, np.ndarray] | None:
        """The token columns, [num_rows] each; None where the trace has no such table."""
        if self._tokens is None:
            return None
        return {name: np.frombuffer(data, TOKEN_TYPES[name]) for name, data in self._tokens.items()}

    def put(
        self,
        forward_id: int,
        parts: list[dict[str, Any]],
        rows: int,
        tokens: Mapping[str, Any] | None,
        routing: CallRouting,
    ) -> None:
        """Copy a call in. Shapes and types are checked, values are not.

        Raises
        ------
        UserError
            Naming call and column; the segment is as before then.
        """
        name = f"call {forward_id}"
        columns = {} if self._tokens is None else _tokens(name, (rows,), tokens or {})
        call = stored_routing(name, routing, rows, self.meta)
        active: list[tuple[np.ndarray, np.ndarray]] = []
        if self.meta.capture_level == "active":
            active = _active(call, self.meta, parts[0]["kind"])
            call = CallRouting(call.layers, call.expert_ids, call.gate_weights, None, call.count)
        size = call.expert_ids.nbytes
        size += 0 if call.gate_weights is None else call.gate_weights.nbytes
        size += 0 if call.router_scores is None else call.router_scores.nbytes
        for experts, scores in active:
            size += experts.nbytes + scores.nbytes
        # nothing can fail any more
        if self._tokens is not None:
            for column, values in columns.items():
                self._tokens[column].extend(values)
            size += rows * TOKEN_BYTES
        self.calls.append(call)
        self.active.append(active)
        for part in parts:
            part["forward_id"] = forward_id
        self.parts += parts
        self.row_ends.append(self.num_rows + rows)
        self.call_parts.append(len(parts))
        self.num_bytes += size
        self.forward_ids.append(forward_id)


def stored_routing(name: str, given: CallRouting, rows: int, meta: TraceMeta) -> CallRouting:
    """A copy of a call's routing in the types it is stored in, its shapes held against rows and model.

    Raises
    ------
    UserError
        Naming the column; also for ids that do not fit the stored type.
    """
    model, level = meta.model, meta.capture_level
    layers, shape = len(given.layers), (len(given.layers), rows)
    dtype = id_type(model.num_experts)
    ids = _array(name, "expert_ids", given.expert_ids, (*shape, model.top_k), "iu", "whole numbers")
    count = None
    if given.count is not None:
        count = _array(name, "count", given.count, shape, "iu", "whole numbers")
        if count.size and not 0 <= count.min() <= count.max() <= model.top_k:
            raise UserError(f"{name}: count must lie in 0..{model.top_k}.")
        count = None if (count == model.top_k).all() else count.astype(np.uint8)
    if ids.dtype != dtype or model.num_experts not in (256, 65536):
        real = ids if count is None else np.where(np.arange(model.top_k) < count[..., None], ids, 0)
        if real.size and not 0 <= real.min() <= real.max() < model.num_experts:
            wrong = np.argwhere(((real < 0) | (real >= model.num_experts)).any(axis=2))[0]
            where = f"layer {given.layers[wrong[0]]}, row {wrong[1]}"
            message = f"expert ids {real[tuple(wrong)].tolist()} must lie in 0..{model.num_experts - 1}"
            raise UserError(f"{name}, {where}: {message}.")
    weights = given.gate_weights
    if weights is not None:
        weights = _array(name, "gate_weights", weights, (*shape, model.top_k), "f", "floats")
        # weights too large for float16 become infinite here and are reported when the segment is encoded
        with np.errstate(over="ignore"):
            weights = np.array(weights, np.float16, order="C")
    scores = given.router_scores
    if (scores is None) != (level == "ids"):
        wanted = "keeps no router_scores" if level == "ids" else "needs router_scores of all experts"
        raise UserError(f"{name}: capture level {level} {wanted}.")
    if scores is not None:
        scores = np.array(_array(name, "router_scores", scores, (*shape, model.num_experts), "f", "floats"), np.float32)
    if layers != len(set(given.layers)) or list(given.layers) != sorted(given.layers):
        raise UserError(f"{name}: layers must ascend, not {list(given.layers)}.")
    return CallRouting(tuple(given.layers), np.array(ids, dtype, order="C"), weights, scores, count)


def _active(call: CallRouting, meta: TraceMeta, kind: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per layer the experts whose scores level "active" keeps, and these scores; NaN rows stay NaN."""
    assert call.router_scores is not None
    found = []
    for n, layer in enumerate(call.layers):
        scores = call.router_scores[n]
        routed = ~np.isnan(scores).all(axis=1)
        if call.count is not None:
            routed &= call.count[n] > 0
        ids = call.expert_ids[n]
        if call.count is not None:
            ids = np.where(np.arange(ids.shape[1]) < call.count[n][:, None], ids, ids[:, :1])
        experts = active_columns(ids, scores, meta.router_of(kind, layer).expert_bias, routed)
        found.append((experts.astype(call.expert_ids.dtype), np.ascontiguousarray(scores[:, experts])))
    return found


def _tokens(name: str, shape: tuple[int], given: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The columns :data:`TOKEN_TYPES` of a call, in their types and without gaps."""
    found: dict[str, np.ndarray] = {}
    for column, dtype in TOKEN_TYPES.items():
        values = given.get(column)
        if values is None:
            if column == "edited":
                values = np.zeros(shape, np.bool_)
            elif column in TOKEN_LIKE:
                found[column] = found[TOKEN_LIKE[column]]
                continue
            else:
                raise UserError(f"{name}: tokens {column} is missing.")
        if values.__class__ is not np.ndarray:
            values = np.asarray(values)
        if values.shape != shape:
            raise UserError(f"{name}: tokens {column} must have shape {shape}, not {values.shape}.")
        if values.dtype is not dtype or not values.flags.c_contiguous:
            values = values.astype(dtype, "C")
        found[column] = values
    return found


def _array(name: str, column: str, given: Any, shape: tuple[int, ...], kinds: str, wanted: str) -> np.ndarray:
    found = np.asarray(given)
    if found.shape != shape or found.dtype.kind not in kinds:
        what = f"{found.dtype} of shape {found.shape}"
        raise UserError(f"{name}: {column} must be {wanted} of shape {shape}, not {what}.")
    return found
