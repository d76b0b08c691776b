"""Which rows of earlier calls the rows of a call go on from, by the ``forwards`` table alone.

Encoding "changes" (:mod:`tracer.schema`) stores what differs from a linked row: the row of the same request, branch and place,
``kv_tokens`` + index in its branch, in the request's last call before, if that call stands in the same row group of the
routing part. A branch goes on from itself, or from the first where the earlier call had fewer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from tracer.jit import njit

# columns of forwards that links follow from
LINKED = ("request_id", "num_tokens", "kv_tokens", "branches")
FIRST, LAST, LINK, LINK_CALL = range(4)


class Links(NamedTuple):
    """Runs of consecutive rows linked to consecutive rows, R in all, for F calls.

    ``runs`` int64 [R, 4] holds the first row of each run, the row after its last, the row the first is linked with and the call
    of that row; -1 for both where there is none. Rows count from the first call's first. The runs of a call tile its rows.
    """

    runs: np.ndarray
    bounds: np.ndarray  # int64 [F + 1], runs of each call


def link_rows(columns: Mapping[str, np.ndarray], call_parts: np.ndarray, group_starts: np.ndarray) -> Links:
    """Links of consecutive calls.

    Parameters
    ----------
    columns : dict of int [N]
        Columns :data:`LINKED` of ``forwards``, in order.
    call_parts : int64 [F + 1]
        Bounds of each call's rows of ``forwards``.
    group_starts : int64 [F]
        First token row of the row group each call is stored in.
    """
    _, request = np.unique(columns["request_id"], return_inverse=True)
    num_tokens, kv_tokens, branches = (columns[name].astype(np.int64) for name in LINKED[1:])
    branches = np.maximum(branches, 1)
    # no branch has more than three runs
    room = 3 * int(branches.sum()) + len(request)
    runs, bounds = np.empty((room, 4), np.int64), np.zeros(len(call_parts), np.int64)
    count = _link(request.astype(np.int64), num_tokens, kv_tokens, branches, call_parts, group_starts, runs, bounds)
    return Links(runs[:count], bounds)


@njit
def _link(request, num_tokens, kv_tokens, branches, call_parts, group_starts, runs, bounds):
    last = np.full(len(request) + 1, -1, np.int64)
    begin = np.empty(len(request), np.int64)
    count, row = 0, 0
    for call in range(len(call_parts) - 1):
        for part in range(call_parts[call], call_parts[call + 1]):
            begin[part] = row
            own = num_tokens[part] // branches[part]
            end = row + num_tokens[part]
            before = last[request[part]]
            if before >= 0 and begin[before] >= group_starts[call]:
                earlier = num_tokens[before] // branches[before]
                # place j of this branch is place j + shift of the earlier one
                shift = kv_tokens[part] - kv_tokens[before]
                low, high = min(max(-shift, 0), own), max(min(earlier - shift, own), 0)
                call_before = np.searchsorted(call_parts, before, "right") - 1
                for branch in range(branches[part] if low < high else 0):
                    source = branch if branch < branches[before] else 0
                    link = begin[before] + source * earlier + low + shift
                    count = _append(runs, count, row, row + low, -1, -1)
                    count = _append(runs, count, row + low, row + high, link, call_before)
                    count = _append(runs, count, row + high, row + own, -1, -1)
                    row += own
            count = _append(runs, count, row, end, -1, -1)
            row = end
        # only now: a request that stood twice in a call must not be linked with itself
        for part in range(call_parts[call], call_parts[call + 1]):
            last[request[part]] = part
        bounds[call + 1] = count
    return count


@njit
def _append(runs, count, first, last, link, call):
    """Add a run unless it is empty; the new number of runs."""
    if first < last:
        runs[count, FIRST], runs[count, LAST], runs[count, LINK], runs[count, LINK_CALL] = first, last, link, call
        return count + 1
    return count
