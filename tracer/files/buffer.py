"""The open segment: what calls bring, copied into arrays that grow.

A call's layers are copied in one go, in stored order; everything that can wait until the segment is encoded is left to the
background thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """An array that grows along its first axis."""

    __slots__ = ("values",)

    def __init__(self, width: tuple[int, ...], dtype: Any, rows: int = 0) -> None:
        self.values = np.empty((rows, *width), dtype)

    def room(self, start: int, end: int) -> np.ndarray:
        """Rows ``start`` to ``end - 1``, to be filled."""
        if end > len(self.values):
            grown = np.empty((max(end, 2 * len(self.values), FIRST_ROWS), *self.values.shape[1:]), self.values.dtype)
            grown[:start] = self.values[:start]
            self.values = grown
        return self.values[start:end]


class OpenSegment:
    """Calls and ended requests not written yet.

    Token rows: ``row_ends`` is where each call's rows end, ``forward_ids`` their numbers, ``parts`` the ``forwards`` rows,
    ``call_parts`` how many of them each call has, ``tokens`` None where the trace has no such table. Cells, one a call and
    layer, stand in stored order, layers ascending in a call: ``ids`` and ``weights`` hold their rows one after the other,
    ``layers`` the layers of each call, ``routed`` the masks of cells that did not route every row, ``unweighted`` the cells
    without gate_weights. ``num_bytes`` counts what was put.

    Parameters
    ----------
    meta : TraceMeta
    like : OpenSegment or None
        A segment of about the size that this one will have.
    """

    def __init__(self, meta: TraceMeta, like: OpenSegment | None = None) -> None:
        self.meta = meta
        self.parts: list[dict[str, Any]] = []
        self.requests: list[dict[str, Any]] = []
        self.forward_ids: list[int] = []
        self.row_ends: list[int] = []
        self.call_parts: list[int] = []
        self.layers: list[tuple[int, ...]] = []
        self.num_cells = self.num_cell_rows = self.num_bytes = 0
        top_k = meta.model.top_k
        self.ids: Rows = Rows((top_k,), like.ids.values.dtype if like else np.uint8, like.num_cell_rows if like else 0)
        self.weights = Rows((top_k,), np.float16, like.num_cell_rows if like else 0)
        self.unweighted: list[int] = []
        self.routed: dict[int, np.ndarray] = {}
        self.scores: list[np.ndarray] = []
        self.score_experts: list[np.ndarray | None] = []
        self.tokens: dict[str, Rows] | None = None
        if "tokens" in meta.tables:
            rows = like.num_rows if like else 0
            self.tokens = {name: Rows((), dtype, rows) for name, dtype in TOKEN_TYPES.items()}
        self._ascending: dict[tuple[int, ...], tuple[int, ...]] = {}

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
        start = self.num_rows
        name = f"call {forward_id}"
        size = 0 if self.tokens is None else _put_tokens(name, self.tokens, start, start + rows, tokens or {})
        given = tuple(routing)
        layers = self._ascending.setdefault(given, tuple(sorted(given)))
        cells = [routing[layer] for layer in layers]
        first, last = self.num_cell_rows, self.num_cell_rows + rows * len(layers)
        shape = (rows, self.meta.model.top_k)
        self._put_ids(name, layers, [cell.get("expert_ids") for cell in cells], shape, first, last)
        unweighted = self._put_weights(name, layers, [cell.get("gate_weights") for cell in cells], shape, first, last)
        routed = {}
        level, experts = self.meta.capture_level, self.meta.model.num_experts
        for n, cell in enumerate(cells):
            mask = cell.get("routed")
            if mask is not None:
                mask = _array(f"{name}, layer {layers[n]}", "routed", mask, shape[:1], "b", "booleans")
                if not mask.all():
                    routed[self.num_cells + n] = np.array(mask)
            if level == "ids" and cell.get("router_scores") is not None:
                raise UserError(f"{name}, layer {layers[n]}: capture level ids keeps no router_scores.")
        if level != "ids":
            pairs = zip(layers, cells, strict=True)
            found = [_scores(f"{name}, layer {layer}", level, experts, rows, cell) for layer, cell in pairs]
            self.scores += [scores for scores, _ in found]
            self.score_experts += [columns for _, columns in found]
            size += sum(scores.nbytes for scores, _ in found)
        self.unweighted += [self.num_cells + n for n in unweighted]
        self.routed |= routed
        self.parts += [{"forward_id": forward_id, **part} for part in parts]
        self.forward_ids.append(forward_id)
        self.row_ends.append(start + rows)
        self.call_parts.append(len(parts))
        self.layers.append(layers)
        self.num_cells += len(layers)
        self.num_cell_rows = last
        self.num_bytes += size + (last - first) * shape[1] * (self.ids.values.itemsize + 2)

    def _put_ids(
        self, name: str, layers: tuple[int, ...], given: list[Any], shape: tuple[int, int], first: int, last: int
    ) -> None:
        if _stack(self.ids.room(first, last), given, shape, "no"):
            return
        found = [
            _array(f"{name}, layer {layer}", "expert_ids", ids, shape, "iu", "whole numbers")
            for layer, ids in zip(layers, given, strict=True)
        ]
        wide = np.result_type(*found)
        if wide.kind == "f":
            # unsigned beside signed words
            wide = np.dtype(np.int64)
        if first == 0:
            self.ids = Rows(shape[1:], wide)
        elif not np.can_cast(wide, self.ids.values.dtype):
            self.ids.values = self.ids.values.astype(np.int64)
        np.concatenate(found, out=self.ids.room(first, last), casting="unsafe")

    def _put_weights(
        self, name: str, layers: tuple[int, ...], given: list[Any], shape: tuple[int, int], first: int, last: int
    ) -> Sequence[int]:
        """Copy weights in, 0 where a layer has none; which layers of the call these are."""
        room = self.weights.room(first, last)
        if all(weights is None for weights in given):
            room[:] = 0
            return range(len(given))
        # weights too large for float16 become infinite here and are reported when the segment is encoded
        with np.errstate(over="ignore"):
            if _stack(room, given, shape, "same_kind", "f"):
                return ()
            missing = [n for n, weights in enumerate(given) if weights is None]
            for n, weights in enumerate(given):
                if weights is not None:
                    weights = _array(f"{name}, layer {layers[n]}", "gate_weights", weights, shape, "f", "floats")
                room[n * shape[0] : (n + 1) * shape[0]] = 0 if weights is None else weights
        return missing


def _stack(room: np.ndarray, arrays: list[Any], shape: tuple[int, ...], casting: Any, kind: str = "") -> bool:
    """Copy arrays of one shape, one after the other; False, ``room`` in any state, where they do not fit without looking."""
    try:
        for array in arrays:
            if array.shape != shape or (kind and array.dtype.kind != kind):
                return False
        np.concatenate(arrays, out=room, casting=casting)
    except (AttributeError, TypeError, ValueError):
        return False
    return True


def _scores(
    name: str, level: str, experts: int, rows: int, given: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Copies of one cell's scores and their columns, as the capture level has them."""
    scores, columns = given.get("router_scores"), given.get("score_experts")
    if scores is None or (columns is None) != (level == "scores"):
        wanted = "router_scores of all experts" if level == "scores" else "router_scores and score_experts"
        raise UserError(f"{name}: capture level {level} needs {wanted}.")
    width = experts
    if columns is not None:
        columns = np.array(columns)
        width = len(columns)
        wrong = columns.ndim != 1 or columns.dtype.kind not in "iu"
        if wrong or (width and (columns[0] < 0 or columns[-1] >= experts or (columns[1:] <= columns[:-1]).any())):
            raise UserError(f"{name}: score_experts must be ascending expert ids below {experts}.")
    scores = _array(name, "router_scores", scores, (rows, width), "f", "floats")
    return np.array(scores, np.float32, order="C"), columns


def _put_tokens(name: str, own: dict[str, Rows], start: int, end: int, given: Mapping[str, Any]) -> int:
    """Copy a call's token columns in; their bytes."""
    size = 0
    shape = (end - start,)
    for column, rows in own.items():
        values = given.get(column)
        if values is None:
            values = given.get(TOKEN_LIKE.get(column, column))
        if values is None:
            raise UserError(f"{name}: tokens {column} is missing.")
        if values.__class__ is not np.ndarray:
            values = np.asarray(values)
        if values.shape != shape:
            raise UserError(f"{name}: tokens {column} must have shape {shape}, not {values.shape}.")
        room = rows.room(start, end)
        room[:] = values
        size += room.nbytes
    return size


def _array(name: str, column: str, given: Any, shape: tuple[int, ...], kinds: str, wanted: str) -> np.ndarray:
    found = np.asarray(given)
    if found.shape != shape or found.dtype.kind not in kinds:
        what = f"{found.dtype} of shape {found.shape}"
        raise UserError(f"{name}: {column} must be {wanted} of shape {shape}, not {what}.")
    return found
