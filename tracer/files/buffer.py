"""The open segment: what calls bring, copied into arrays that grow.

A call's layers are copied in one go, in stored order; everything that can wait until the segment is encoded is left to the
background thread.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from tracer.errors import UserError
from tracer.trace import TraceMeta

TOKEN_TYPES: dict[str, np.dtype[Any]] = {
    "position": np.dtype(np.int32),
    "token_id": np.dtype(np.int32),
    "state": np.dtype(np.uint8),
    "predicted_id": np.dtype(np.int32),
    "confidence": np.dtype(np.float32),
    "argmax_id": np.dtype(np.int32),
    "argmax_confidence": np.dtype(np.float32),
    "accepted": np.dtype(np.bool_),
}
TOKEN_BYTES = sum(dtype.itemsize for dtype in TOKEN_TYPES.values())
# the argmax columns repeat the predicted ones, which come before them, where they are not given
TOKEN_LIKE = {"argmax_id": "predicted_id", "argmax_confidence": "confidence"}
FIRST_ROWS = 4096
# arrays up to this size are joined faster as bytes, in half the time, than as arrays
JOINED_BYTES = 4096


class Rows:
    """An array that grows along its first axis; ``raw`` are its bytes."""

    __slots__ = ("raw", "values")
    values: np.ndarray
    raw: memoryview

    def __init__(self, values: np.ndarray) -> None:
        self._take(values)

    def _take(self, values: np.ndarray) -> None:
        self.values = values
        self.raw = values.reshape(-1).view(np.uint8).data

    def room(self, start: int, end: int) -> np.ndarray:
        """Rows ``start`` to ``end - 1``, to be filled."""
        if end > len(self.values):
            rows = max(end, 2 * len(self.values), FIRST_ROWS)
            grown = np.empty((rows, *self.values.shape[1:]), self.values.dtype)
            grown[:start] = self.values[:start]
            self._take(grown)
        return self.values[start:end]


class OpenSegment:
    """Calls and ended requests not written yet.

    Token rows: ``row_ends`` is where each call's rows end, ``forward_ids`` their numbers, ``parts`` the ``forwards`` rows,
    ``call_parts`` how many of them each call has; :meth:`tokens` has the columns. Cells, one a call and layer, stand in stored
    order, layers ascending in a call: ``ids`` and ``weights`` hold their rows one after the other (no weights until a cell has
    some), ``layers`` the layers of each call, ``routed`` the masks of cells that did not route every row, ``unweighted`` the
    cells without gate_weights. ``num_bytes`` counts what was put.

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
        rows = like.num_cell_rows if like else 0
        weight_rows = rows if like and len(like.weights.values) else 0
        self.ids: Rows = Rows(np.empty((rows, top_k), like.ids.values.dtype if like else np.uint8))
        self.weights: Rows = Rows(np.empty((weight_rows, top_k), np.float16))
        self.unweighted: list[int] = []
        self.routed: dict[int, np.ndarray] = {}
        self.scores: list[np.ndarray] = []
        self.score_experts: list[np.ndarray | None] = []
        # the bytes of each column
        self._tokens = {name: bytearray() for name in TOKEN_TYPES} if "tokens" in meta.tables else None
        self._ascending: dict[tuple[int, ...], tuple[int, ...]] = {}

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
        columns = {} if self._tokens is None else _tokens(name, (rows,), tokens or {})
        size = 0
        given = tuple(routing)
        layers = self._ascending.get(given) or self._ascending.setdefault(given, tuple(sorted(given)))
        cells = [routing[layer] for layer in layers]
        # which columns the cells have at all: most calls lack most of them
        there: set[str] = set().union(*cells)
        first, last = self.num_cell_rows, self.num_cell_rows + rows * len(layers)
        shape = (rows, self.meta.model.top_k)
        self._put_ids(name, layers, _column(cells, there, "expert_ids"), shape, first, last)
        unweighted = self._put_weights(name, layers, _column(cells, there, "gate_weights"), shape, first, last)
        routed = {}
        for n, mask in enumerate(_column(cells, there, "routed") if "routed" in there else ()):
            if mask is not None:
                mask = _array(f"{name}, layer {layers[n]}", "routed", mask, shape[:1], "b", "booleans")
                if not mask.all():
                    routed[self.num_cells + n] = np.array(mask)
        level, experts = self.meta.capture_level, self.meta.model.num_experts
        if level != "ids":
            pairs = zip(layers, cells, strict=True)
            found = [_scores(f"{name}, layer {layer}", level, experts, rows, cell) for layer, cell in pairs]
            self.scores += [scores for scores, _ in found]
            self.score_experts += [columns for _, columns in found]
            size += sum(scores.nbytes for scores, _ in found)
        elif "router_scores" in there:
            for n, scores in enumerate(_column(cells, there, "router_scores")):
                if scores is not None:
                    raise UserError(f"{name}, layer {layers[n]}: capture level ids keeps no router_scores.")
        if self._tokens is not None:
            # nothing can fail any more
            for column, values in columns.items():
                self._tokens[column].extend(values)
            size += rows * TOKEN_BYTES
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
        if _stack(self.ids, first, last, given, shape):
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
            self.ids = Rows(np.empty((0, shape[1]), wide))
        elif not np.can_cast(wide, self.ids.values.dtype):
            self.ids = Rows(self.ids.values.astype(np.int64))
        np.concatenate(found, out=self.ids.room(first, last), casting="unsafe")

    def _put_weights(
        self, name: str, layers: tuple[int, ...], given: list[Any], shape: tuple[int, int], first: int, last: int
    ) -> list[int]:
        """Copy weights in, 0 where a layer has none; which layers of the call these are."""
        missing = [n for n, weights in enumerate(given) if weights is None]
        weighted = len(self.unweighted) < self.num_cells
        if len(missing) == len(given):
            if weighted:
                self.weights.room(first, last)[:] = 0
            return missing
        if not weighted:
            self.weights.room(0, first)[:] = 0
        if _stack(self.weights, first, last, given, shape):
            return missing
        found = [
            np.zeros(shape, np.float16)
            if weights is None
            else weights
            if weights.__class__ is np.ndarray and weights.shape == shape and weights.dtype.kind == "f"
            else _array(f"{name}, layer {layer}", "gate_weights", weights, shape, "f", "floats")
            for layer, weights in zip(layers, given, strict=True)
        ]
        # weights too large for float16 become infinite here and are reported when the segment is encoded
        with np.errstate(over="ignore"):
            np.concatenate(found, out=self.weights.room(first, last), casting="same_kind")
        return missing


def _column(cells: list[Mapping[str, Any]], there: Collection[str], column: str) -> list[Any]:
    """A column of cells, of which ``there`` are the columns that any of them has."""
    return [cell.get(column) for cell in cells] if column in there else [None] * len(cells)


def _stack(rows: Rows, first: int, last: int, arrays: list[Any], shape: tuple[int, ...]) -> bool:
    """Copy arrays of one shape and of the type of ``rows``, one after the other; False where there are others."""
    dtype = rows.values.dtype
    try:
        if arrays[0].dtype is not dtype:
            return False
        if any([array.shape != shape or array.dtype is not dtype for array in arrays]):
            return False
        room = rows.room(first, last)
        if arrays[0].nbytes > JOINED_BYTES:
            np.concatenate(arrays, out=room)
        else:
            size = room.nbytes // (last - first)
            rows.raw[first * size : last * size] = b"".join(arrays)
    except (AttributeError, TypeError, BufferError):
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


def _tokens(name: str, shape: tuple[int], given: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The columns :data:`TOKEN_TYPES` of a call, in their types and without gaps."""
    found: dict[str, np.ndarray] = {}
    for column, dtype in TOKEN_TYPES.items():
        values = given.get(column)
        if values is None:
            if column not in TOKEN_LIKE:
                raise UserError(f"{name}: tokens {column} is missing.")
            found[column] = found[TOKEN_LIKE[column]]
            continue
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
