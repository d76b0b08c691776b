"""The ``tokens`` table of a range of calls, read and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from tracer.files.forwards import StoredForwards
from tracer.files.parts import PartFile, numbers, open_part
from tracer.schema import PADDING, STATES
from tracer.trace import TokenTable

COLUMNS = (
    "position",
    "token_id",
    "state",
    "predicted_id",
    "confidence",
    "argmax_id",
    "argmax_confidence",
    "accepted",
)


def read_tokens(
    stored: StoredForwards, number: int, first: int, last: int
) -> tuple[PartFile, int, dict[str, np.ndarray]]:
    """Stored columns of the token rows of calls ``first`` to ``last - 1``, all of part ``number``.

    Returns the part, the row of the part they begin at, and every column; nothing is compared yet. A TraceError when the part's
    row count is not that of ``forwards``.
    """
    part = open_part(stored.path, "tokens", number)
    begin, end = (int(stored.row_offsets[c]) for c in stored.part_calls[number : number + 2])
    if part.num_rows != end - begin:
        raise part.fault(None, f"the part has {part.num_rows} rows where forwards counts {end - begin}.")
    low, high = int(stored.row_offsets[first]) - begin, int(stored.row_offsets[last]) - begin
    names = ("forward_id", "row", *COLUMNS)
    table, offset = part.read_rows([name for name in names if name in part.present], low, high)
    columns = {name: numbers(part, name, table)[low - offset : high - offset] for name in names}
    return part, low, columns


def token_faults(
    stored: StoredForwards, first: int, last: int, part: PartFile, low: int, columns: dict[str, np.ndarray]
) -> Iterator[str]:
    """Faults of the rows of calls ``first`` to ``last - 1``, as :func:`read_tokens` returns them."""

    def at(wrong: np.ndarray, message: Callable[[int], str]) -> Iterator[str]:
        if wrong.any():
            row = int(np.argmax(wrong))
            yield str(part.fault(low + row, message(row) + "."))

    offsets = stored.row_offsets[first : last + 1] - stored.row_offsets[first]
    rows = np.diff(offsets)
    forward = np.repeat(stored.call_ids[first:last], rows)
    row = np.arange(offsets[-1]) - np.repeat(offsets[:-1], rows)
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
    twice = repeated_positions(position, branch_starts(stored, first, last))
    if twice >= 0:
        message = f"position {position[twice]} stands twice in one forward, request and branch."
        yield str(part.fault(low + twice, message))


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


def token_table(pieces: list[dict[str, np.ndarray]]) -> TokenTable:
    """Join the checked columns of consecutive parts."""
    joined = {name: np.concatenate([piece[name] for piece in pieces]) for name in COLUMNS}
    predicted, confidence = joined["predicted_id"], joined["confidence"]
    same = joined["argmax_id"] < 0
    joined["argmax_id"] = np.where(same, predicted, joined["argmax_id"]).astype(np.int32)
    unknown = np.isnan(joined["argmax_confidence"])
    joined["argmax_confidence"] = np.where(unknown, confidence, joined["argmax_confidence"])
    return TokenTable(**joined)
