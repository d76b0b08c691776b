"""The open segment: what calls bring, copied into arrays that grow.

Copies cost what a memcpy costs; everything that can wait until the segment is encoded is left to the background thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tracer.errors import UserError
from tracer.trace import TraceMeta

TOKEN_TYPES: dict[str, Any] = {
    "position": np.int32,
    "token_id": np.int32,
    "state": np.uint8,
    "predicted_id": np.int32,
    "confidence": np.float32,
    "argmax_id": np.int32,
    "argmax_confidence": np.float32,
    "accepted": np.bool_,
}
# the argmax columns repeat the predicted ones where they are not given
TOKEN_LIKE = {"argmax_id": "predicted_id", "argmax_confidence": "confidence"}
FIRST_ROWS = 4096


class Rows:
    """An array that grows along its first axis; rows that were never put are 0."""

    __slots__ = ("values",)

    def __init__(self, width: tuple[int, ...], dtype: Any) -> None:
        self.values = np.zeros((0, *width), dtype)

    def put(self, start: int, end: int, values: np.ndarray) -> None:
        """Set rows ``start`` to ``end - 1``, converting to the array's type."""
        if end > len(self.values):
            self._grow(end)
        self.values[start:end] = values

    def first(self, rows: int) -> np.ndarray:
        """The first ``rows`` rows."""
        if rows > len(self.values):
            self._grow(rows)
        return self.values[:rows]

    def _grow(self, rows: int) -> None:
        grown = np.zeros((max(rows, 2 * len(self.values), FIRST_ROWS), *self.values.shape[1:]), self.values.dtype)
        grown[: len(self.values)] = self.values
        self.values = grown


@dataclass(slots=True)
class LayerRows:
    """One layer's rows, at the same places as the segment's token rows; calls without the layer leave theirs alone.

    ``calls`` are the calls that have the layer, counted in the segment; of these, ``unweighted`` gave no gate_weights and
    ``routed`` holds the masks of those that did not route every row. ``scores`` and ``score_experts`` go by ``calls``.
    """

    ids: Rows
    weights: Rows
    calls: list[int] = field(default_factory=list)
    unweighted: list[int] = field(default_factory=list)
    routed: dict[int, np.ndarray] = field(default_factory=dict)
    scores: list[np.ndarray] = field(default_factory=list)
    score_experts: list[np.ndarray | None] = field(default_factory=list)

    def put(self, call: int, start: int, end: int, given: Mapping[str, Any]) -> None:
        """Copy one call's rows in, but for the scores; a UserError says which column is of the wrong shape or type."""
        values = self.ids.values
        shape = (end - start, values.shape[1])
        ids, weights, routed = given.get("expert_ids"), given.get("gate_weights"), given.get("routed")
        if ids.__class__ is not np.ndarray or ids.shape != shape or ids.dtype is not values.dtype:
            ids = self._checked_ids(ids, shape)
        self.ids.put(start, end, ids)
        if weights is not None:
            if weights.__class__ is not np.ndarray or weights.shape != shape or weights.dtype.kind != "f":
                weights = _array("gate_weights", weights, shape, "f", "floats")
            self.weights.put(start, end, weights)
        else:
            self.unweighted.append(call)
        if routed is not None:
            routed = np.array(_array("routed", routed, shape[:1], "b", "booleans"))
            if not routed.all():
                self.routed[call] = routed
        self.calls.append(call)

    def put_scores(self, level: str, experts: int, rows: int, given: Mapping[str, Any]) -> int:
        """Copy one call's scores in, as the capture level has them; their bytes."""
        scores, columns = given.get("router_scores"), given.get("score_experts")
        if scores is None or (columns is None) != (level == "scores"):
            wanted = "router_scores of all experts" if level == "scores" else "router_scores and score_experts"
            raise UserError(f"capture level {level} needs {wanted}")
        width = experts
        if columns is not None:
            columns = np.array(columns)
            width = len(columns)
            wrong = columns.ndim != 1 or columns.dtype.kind not in "iu"
            if wrong or (width and (columns[0] < 0 or columns[-1] >= experts or (columns[1:] <= columns[:-1]).any())):
                raise UserError(f"score_experts must be ascending expert ids below {experts}")
        scores = _array("router_scores", scores, (rows, width), "f", "floats")
        self.scores.append(np.array(scores, np.float32, order="C"))
        self.score_experts.append(columns)
        return rows * width * 4

    def forget(self, call: int) -> None:
        """Undo what a call that was refused halfway has left."""
        self.routed.pop(call, None)
        for calls in (self.calls, self.unweighted):
            if calls and calls[-1] == call:
                calls.pop()
        del self.scores[len(self.calls) :], self.score_experts[len(self.calls) :]

    def _checked_ids(self, given: Any, shape: tuple[int, ...]) -> np.ndarray:
        """Ids whose type fits the rows, which are widened where it would not."""
        ids = _array("expert_ids", given, shape, "iu", "whole numbers")
        if len(self.ids.values) == 0:
            self.ids = Rows(shape[1:], ids.dtype)
        elif not np.can_cast(ids.dtype, self.ids.values.dtype):
            self.ids.values = self.ids.values.astype(np.int64)
        return ids


class OpenSegment:
    """Calls and ended requests not written yet.

    ``num_bytes`` counts the rows put; ``row_ends`` is where each call's rows end, ``forward_ids`` their numbers, ``parts`` the
    ``forwards`` rows, ``tokens`` None where the trace has no such table.
    """

    def __init__(self, meta: TraceMeta) -> None:
        self.meta = meta
        self.parts: list[dict[str, Any]] = []
        self.requests: list[dict[str, Any]] = []
        self.forward_ids: list[int] = []
        self.row_ends: list[int] = []
        self.layers: dict[int, LayerRows] = {}
        self.tokens: dict[str, Rows] | None = None
        if "tokens" in meta.tables:
            self.tokens = {name: Rows((), dtype) for name, dtype in TOKEN_TYPES.items()}
        self.num_bytes = 0

    @property
    def num_calls(self) -> int:
        return len(self.forward_ids)

    @property
    def num_rows(self) -> int:
        return self.row_ends[-1] if self.row_ends else 0

    def put(
        self,
        forward_id: int,
        parts: list[dict[str, Any]],
        rows: int,
        tokens: Mapping[str, Any] | None,
        routing: Mapping[int, Mapping[str, Any]],
    ) -> None:
        """Copy a call in. Shapes and types are checked, values are not.

        Raises
        ------
        UserError
            Naming call, layer and column; the segment is as before then.
        """
        start, call = self.num_rows, self.num_calls
        end = start + rows
        top_k, level, experts = self.meta.model.top_k, self.meta.capture_level, self.meta.model.num_experts
        size = 0 if self.tokens is None else _put_tokens(f"call {forward_id}", self.tokens, start, end, tokens or {})
        layers = self.layers
        layer = -1
        try:
            # weights too large for float16 become infinite here and are reported when the segment is encoded
            with np.errstate(over="ignore"):
                for layer, given in routing.items():
                    own = layers.get(layer)
                    if own is None:
                        own = layers[layer] = LayerRows(Rows((top_k,), np.uint8), Rows((top_k,), np.float16))
                    own.put(call, start, end, given)
                    if level != "ids":
                        size += own.put_scores(level, experts, rows, given)
                    elif given.get("router_scores") is not None:
                        raise UserError("capture level ids keeps no router_scores")
        except UserError as error:
            for own in layers.values():
                own.forget(call)
            raise UserError(f"call {forward_id}, layer {layer}: {error}.") from None
        self.parts += [{"forward_id": forward_id, **part} for part in parts]
        self.forward_ids.append(forward_id)
        self.row_ends.append(end)
        self.num_bytes += size + rows * top_k * sum(layers[layer].ids.values.itemsize + 2 for layer in routing)


def _put_tokens(name: str, own: dict[str, Rows], start: int, end: int, given: Mapping[str, Any]) -> int:
    size = 0
    shape = (end - start,)
    for column, rows in own.items():
        values = given.get(column)
        if values is None:
            values = given.get(TOKEN_LIKE.get(column, column))
        if values is None:
            raise UserError(f"{name}: tokens {column} is missing.")
        if np.shape(values) != shape:
            raise UserError(f"{name}: tokens {column} must have shape {shape}, not {np.shape(values)}.")
        rows.put(start, end, values)
        size += (end - start) * rows.values.itemsize
    return size


def _array(column: str, given: Any, shape: tuple[int, ...], kinds: str, wanted: str) -> np.ndarray:
    found = np.asarray(given)
    if found.shape != shape or found.dtype.kind not in kinds:
        raise UserError(f"{column} must be {wanted} of shape {shape}, not {found.dtype} of shape {found.shape}")
    return found
