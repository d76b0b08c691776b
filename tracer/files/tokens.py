"""The ``tokens`` table of a range of calls, read and checked.

Its rows are those of ``forwards``, in the same order: where a row stands tells whose it is, and its keys must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from tracer.errors import TraceError
from tracer.files.columns import numbers
from tracer.files.forwards import StoredForwards
from tracer.files.parts import PartFile, part_names
from tracer.schema import PADDING, STATES, TABLES
from tracer.trace import TokenTable

COLUMNS = tuple(column.name for column in TABLES["tokens"])


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Columns of the token rows of some calls, and the parts they come from: (row of the first, part, its row there)."""

    columns: dict[str, np.ndarray]
    pieces: list[tuple[int, PartFile, int]]

    def fault(self, row: int, message: str) -> str:
        """What is wrong with a row, naming its part."""
        first, part, low = next(piece for piece in reversed(self.pieces) if piece[0] <= row)
        return str(part.fault(low + row - first, f"{message}."))


class StoredTokens:
    """The parts of the table and the rows they begin with; a TraceError when they are not as many as ``forwards`` counts."""

    def __init__(self, stored: StoredForwards, open_part: Callable[[str, str], PartFile]) -> None:
        self._stored, self._open = stored, open_part
        self._names = part_names(stored.path, "tokens")
        rows = [open_part("tokens", name).num_rows for name in self._names]
        self._bounds = np.concatenate(([0], np.cumsum(np.array(rows, np.int64)))).astype(np.int64)
        total, wanted = int(self._bounds[-1]), int(stored.row_offsets[-1])
        # an unfinished trace may hold rows of a segment whose forwards were never written
        if total < wanted or (stored.meta.complete and total != wanted):
            last = f"up to {self._names[-1].removesuffix('.parquet')} " if self._names else ""
            raise TraceError(f"{stored.path}: tokens {last}has {total} rows where forwards counts {wanted}.")

    def read(self, first: int, last: int, names: tuple[str, ...] = COLUMNS) -> TokenRows:
        """Columns of the rows of calls ``first`` to ``last - 1``; nothing is compared yet."""
        low, high = int(self._stored.row_offsets[first]), int(self._stored.row_offsets[last])
        pieces: list[tuple[int, PartFile, int]] = []
        found: dict[str, list[np.ndarray]] = {name: [] for name in names}
        number = int(np.searchsorted(self._bounds, low, "right")) - 1
        at = low
        while at < high:
            part, begin = self._open("tokens", self._names[number]), int(self._bounds[number])
            end = min(high, begin + part.num_rows)
            if at < end:
                pieces.append((at - low, part, at - begin))
                for name, values in _read(part, names, at - begin, end - begin).items():
                    found[name].append(values)
                at = end
            number += 1
        columns = {name: np.concatenate(arrays) if arrays else np.empty(0) for name, arrays in found.items()}
        return TokenRows(columns, pieces)


def _read(part: PartFile, names: tuple[str, ...], low: int, high: int) -> dict[str, np.ndarray]:
    """Columns of rows ``low`` to ``high - 1`` of a part."""
    groups = range(int(np.searchsorted(part.groups, low, "right")) - 1, int(np.searchsorted(part.groups, high, "left")))
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for group in groups:
        begin = int(part.groups[group])
        table = part.read([name for name in names if name in part.present], group)
        for name in names:
            found[name].append(numbers(part, name, table, begin)[max(low - begin, 0) : high - begin])
    return {name: np.concatenate(arrays) for name, arrays in found.items()}


def token_faults(stored: StoredForwards, first: int, last: int, rows: TokenRows) -> Iterator[str]:
    """Faults of the rows of calls ``first`` to ``last - 1``."""
    columns = rows.columns

    def at(wrong: np.ndarray, message: Callable[[int], str]) -> Iterator[str]:
        if wrong.any():
            row = int(np.argmax(wrong))
            yield rows.fault(row, message(row))

    offsets = stored.row_offsets[first : last + 1] - stored.row_offsets[first]
    forward, row = row_keys(stored.call_ids[first:last], offsets)
    found = columns["forward_id"]
    yield from at(found != forward, lambda i: f"forward_id is {found[i]} where forwards has rows of {forward[i]}")
    yield from at(columns["row"] != row, lambda i: f"row is {columns['row'][i]} and must be {row[i]}")
    state, position = columns["state"], columns["position"]
    yield from at(state >= len(STATES), lambda i: f"state {state[i]} must be 0 to {len(STATES) - 1}")
    yield from at(position < -1, lambda i: f"position {position[i]} must be -1 or more")
    yield from at(
        (position == -1) != (state == PADDING),
        lambda i: f"position is {position[i]} in state {state[i]}, padding and nothing else has position -1",
    )
    if offsets[-1]:
        twice = repeated_positions(position, branch_starts(stored, first, last))
        if twice >= 0:
            yield rows.fault(twice, f"position {position[twice]} stands twice in one forward, request and branch")


def row_keys(forward_id: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """forward_id and row, uint32, of the token rows of calls whose rows ``offsets`` bound, int64 [F + 1]."""
    rows = np.diff(offsets)
    row = np.arange(offsets[-1]) - np.repeat(offsets[:-1], rows)
    return np.repeat(forward_id, rows), row.astype(np.uint32)


def branch_starts(stored: StoredForwards, first: int, last: int) -> np.ndarray:
    """Token rows at which a branch of a (call, request) begins, counted from call ``first``, and the end. int64."""
    rows = slice(stored.call_parts[first], stored.call_parts[last])
    tokens, branches = stored.columns["num_tokens"][rows], stored.columns["branches"][rows]
    lengths = np.repeat(tokens // np.maximum(branches, 1), branches)
    return np.concatenate(([0], np.cumsum(lengths)))


def repeated_positions(position: np.ndarray, starts: np.ndarray) -> int:
    """First row whose position stood in the same group before, -1 if none. Groups are bounded by ``starts``.

    Rows mostly ascend within a group, which settles it at once; only groups that do not are sorted.
    """
    if len(position) < 2:
        return -1
    step = np.diff(position.astype(np.int64))
    step[starts[1:-1] - 1] = 1
    suspicious = np.unique(np.searchsorted(starts, np.flatnonzero(step <= 0), "right") - 1)
    for group in suspicious:
        own = position[starts[group] : starts[group + 1]]
        order = np.argsort(own, kind="stable")
        repeats = order[1:][(own[order[1:]] == own[order[:-1]]) & (own[order[1:]] >= 0)]
        if len(repeats):
            return int(starts[group] + repeats.min())
    return -1


def token_table(columns: dict[str, np.ndarray]) -> TokenTable:
    """Checked columns as the table; the argmax columns repeat the predicted ones where they are null."""
    joined = {name: values for name, values in columns.items() if name not in ("forward_id", "row")}
    predicted, confidence = joined["predicted_id"], joined["confidence"]
    same = joined["argmax_id"] < 0
    joined["argmax_id"] = np.where(same, predicted, joined["argmax_id"]).astype(np.int32)
    unknown = np.isnan(joined["argmax_confidence"])
    joined["argmax_confidence"] = np.where(unknown, confidence, joined["argmax_confidence"])
    return TokenTable(**joined)
