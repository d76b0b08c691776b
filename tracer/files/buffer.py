"""The open segment: what calls bring, copied as it comes; everything that can wait is left to the background thread."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tracer.errors import UserError
from tracer.files.row_kernels import active_columns
from tracer.schema import TABLES, id_type
from tracer.trace import CallRouting, TraceMeta

TOKEN_TYPES = {c.name: np.dtype(c.type) for c in TABLES["tokens"] if c.name not in ("forward_id", "row")}
# the argmax columns repeat the predicted ones, which come before them, where they are not given
TOKEN_LIKE = {"argmax_id": "predicted_id", "argmax_confidence": "confidence"}


class OpenSegment:
    """Calls and ended requests not written yet.

    ``parts`` are the ``forwards`` rows, ``forward_ids`` the numbers of the calls, ``calls`` their routing in the types it is
    stored in (``types``), ``active`` per call and layer the kept experts and their scores [rows, C] at level "active".
    ``num_bytes`` counts what was put.
    """

    def __init__(self, meta: TraceMeta) -> None:
        self.meta = meta
        self.types = {
            "expert_ids": np.dtype(id_type(meta.model.num_experts)),
            "gate_weights": np.dtype(np.float16),
            "router_scores": np.dtype(np.float32),
            "count": np.dtype(np.uint8),
        }
        self.parts: list[dict[str, Any]] = []
        self.requests: list[dict[str, Any]] = []
        self.forward_ids: list[int] = []
        self.calls: list[CallRouting] = []
        self.active: list[list[tuple[np.ndarray, np.ndarray]]] = []
        self.num_bytes = 0
        self._row_ends = [0]
        # the bytes of each column
        self._tokens = {name: bytearray() for name in (TOKEN_TYPES if "tokens" in meta.tables else ())}

    @property
    def num_calls(self) -> int:
        return len(self.forward_ids)

    @property
    def num_rows(self) -> int:
        return self._row_ends[-1]

    @property
    def offsets(self) -> np.ndarray:
        """int64 [F + 1]: the token rows of each call."""
        return np.array(self._row_ends, np.int64)

    @property
    def layers(self) -> tuple[int, ...]:
        """Those of all calls, ascending."""
        return tuple(sorted(set().union(*{call.layers for call in self.calls})))

    def tokens(self) -> dict[str, np.ndarray]:
        """The token columns, [num_rows] each; none where the trace has no such table."""
        return {name: np.frombuffer(content, TOKEN_TYPES[name]) for name, content in self._tokens.items()}

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
        columns = _tokens(name, (rows,), tokens or {}) if self._tokens else {}
        call = self._stored(name, routing, rows)
        active: list[tuple[np.ndarray, np.ndarray]] = []
        if self.meta.capture_level == "active":
            active = _active(call, self.meta, parts[0]["kind"])
            call = replace(call, router_scores=None)
        arrays = [call.expert_ids, call.gate_weights, call.router_scores, *columns.values(), *itertools.chain(*active)]
        size = sum([array.nbytes for array in arrays if array is not None])
        # nothing can fail any more
        for column, values in columns.items():
            self._tokens[column].extend(values)
        self.calls.append(call)
        self.active.append(active)
        for part in parts:
            part["forward_id"] = forward_id
        self.parts += parts
        self._row_ends.append(self.num_rows + rows)
        self.num_bytes += size
        self.forward_ids.append(forward_id)

    def _stored(self, name: str, given: CallRouting, rows: int) -> CallRouting:
        """A copy of a call's routing in the types it is stored in, its shapes held against rows and model."""
        model, level = self.meta.model, self.meta.capture_level
        shape = (len(given.layers), rows)
        ids = _array(name, "expert_ids", given.expert_ids, (*shape, model.top_k), "iu", "whole numbers")
        count = None
        if given.count is not None:
            count = _array(name, "count", given.count, shape, "iu", "whole numbers")
            if count.size and not 0 <= count.min() <= count.max() <= model.top_k:
                raise UserError(f"{name}: count must lie in 0..{model.top_k}.")
            count = None if (count == model.top_k).all() else count.astype(np.uint8)
        if ids.dtype != self.types["expert_ids"] or model.num_experts not in (256, 65536):
            real = ids if count is None else np.where(np.arange(model.top_k) < count[..., None], ids, 0)
            if real.size and not 0 <= real.min() <= real.max() < model.num_experts:
                wrong = np.argwhere(((real < 0) | (real >= model.num_experts)).any(axis=2))[0]
                where = f"layer {given.layers[wrong[0]]}, row {wrong[1]}"
                message = f"expert ids {real[tuple(wrong)].tolist()} must lie in 0..{model.num_experts - 1}"
                raise UserError(f"{name}, {where}: {message}.")
        if (given.router_scores is None) != (level == "ids"):
            wanted = "keeps no router_scores" if level == "ids" else "needs router_scores of all experts"
            raise UserError(f"{name}: capture level {level} {wanted}.")
        floats: dict[str, np.ndarray | None] = {}
        for column, width in (("gate_weights", model.top_k), ("router_scores", model.num_experts)):
            values = getattr(given, column)
            if values is not None:
                values = _array(name, column, values, (*shape, width), "f", "floats")
                # weights too large for float16 become infinite here and are reported when the segment is encoded
                with np.errstate(over="ignore"):
                    values = np.array(values, self.types[column], order="C")
            floats[column] = values
        if list(given.layers) != sorted(set(given.layers)):
            raise UserError(f"{name}: layers must ascend, not {list(given.layers)}.")
        return CallRouting(
            tuple(given.layers), np.array(ids, self.types["expert_ids"], order="C"), count=count, **floats
        )


def _active(call: CallRouting, meta: TraceMeta, kind: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per layer the experts whose scores level "active" keeps, and these scores; NaN rows stay NaN."""
    assert call.router_scores is not None
    active = []
    for n, layer in enumerate(call.layers):
        scores, ids = call.router_scores[n], call.expert_ids[n]
        routed = ~np.isnan(scores).all(axis=1)
        if call.count is not None:
            routed &= call.count[n] > 0
            ids = np.where(np.arange(ids.shape[1]) < call.count[n][:, None], ids, ids[:, :1])
        experts = active_columns(ids, scores, meta.router_of(kind, layer).expert_bias, routed)
        active.append((experts.astype(ids.dtype), np.ascontiguousarray(scores[:, experts])))
    return active


def _tokens(name: str, shape: tuple[int], given: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The columns :data:`TOKEN_TYPES` of a call, in their types and without gaps."""
    columns: dict[str, np.ndarray] = {}
    for column, dtype in TOKEN_TYPES.items():
        values = given.get(column)
        if values is None:
            if column in TOKEN_LIKE:
                columns[column] = columns[TOKEN_LIKE[column]]
                continue
            if column != "edited":
                raise UserError(f"{name}: tokens {column} is missing.")
            values = np.zeros(shape, np.bool_)
        if values.__class__ is not np.ndarray:
            values = np.asarray(values)
        if values.shape != shape:
            raise UserError(f"{name}: tokens {column} must have shape {shape}, not {values.shape}.")
        if values.dtype is not dtype or not values.flags.c_contiguous:
            values = values.astype(dtype, "C")
        columns[column] = values
    return columns


def _array(name: str, column: str, given: Any, shape: tuple[int, ...], kinds: str, wanted: str) -> np.ndarray:
    array = np.asarray(given)
    if array.shape != shape or array.dtype.kind not in kinds:
        what = f"{array.dtype} of shape {array.shape}"
        raise UserError(f"{name}: {column} must be {wanted} of shape {shape}, not {what}.")
    return array
