"""The ``tokens`` table of a range of calls, checked: keys as they are read, values here."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tracer.files.forwards import StoredForwards
from tracer.files.rows import Rows
from tracer.schema import PADDING, STATES, TABLES
from tracer.trace import TokenTable

TOKEN_COLUMNS = [column.name for column in TABLES["tokens"] if column.name not in ("forward_id", "row")]


def token_faults(rows: Rows, columns: dict[str, np.ndarray]) -> Iterator[str]:
    """Faults of states and positions of token rows."""
    state, position = columns["state"], columns["position"]
    for wrong, words in (
        (state >= len(STATES), f"state {{state}} must be 0 to {len(STATES) - 1}"),
        (position < -1, "position {position} must be -1 or more"),
        (
            (position == -1) != (state == PADDING),
            "position is {position} in state {state}, padding and nothing else has position -1",
        ),
    ):
        yield from token_fault(rows, columns, wrong, words)
    twice = repeated_positions(position, branch_starts(rows.table.stored, rows.first, rows.last))
    yield from token_fault(rows, columns, twice, "position {position} stands twice in one forward, request and branch")


def token_fault(rows: Rows, columns: dict[str, np.ndarray], wrong: np.ndarray, words: str) -> Iterator[str]:
    """One fault, of the first row where ``wrong`` [T] holds; ``words`` may name columns."""
    if wrong.any():
        row = int(np.argmax(wrong))
        yield str(rows.fault(row, words.format(**{name: values[row] for name, values in columns.items()})))


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


def repeated_positions(position: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """bool [T]: rows whose position, padding apart, stood in the same group before. Groups are bounded by ``starts``.

    Rows mostly ascend within a group, which settles it at once; only where they do not are they sorted.
    """
    repeated = np.zeros(len(position), np.bool_)
    falls = np.diff(position) <= 0
    falls[starts[1:-1] - 1] = False
    if falls.any():
        group = np.searchsorted(starts, np.arange(len(position)), "right")
        order = np.lexsort((position, group))
        same = (np.diff(position[order]) == 0) & (np.diff(group[order]) == 0)
        repeated[order[1:]] = same & (position[order[1:]] >= 0)
    return repeated


def token_table(columns: dict[str, np.ndarray]) -> TokenTable:
    """Checked columns as the table; the argmax columns repeat the predicted ones where they are null."""
    argmax, confidence = columns["argmax_id"], columns["argmax_confidence"]
    repeats = {
        "argmax_id": np.where(argmax < 0, columns["predicted_id"], argmax).astype(np.int32),
        "argmax_confidence": np.where(np.isnan(confidence), columns["confidence"], confidence),
    }
    return TokenTable(**{**columns, **repeats})
