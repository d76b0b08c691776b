"""The blocks of rows that decide together: rows of one request and branch whose positions fall in one block."""

from __future__ import annotations

import numpy as np

from simulator.policy import Trajectory
from tracer.jit import njit
from tracer.schema import PADDING


@njit
def _chunk_rows(start, stop, span, kv_tokens, block, position, state, branch, count, length, own_only, rows, keys):
    """List the rows that compute and a key of their chunk; how many, and whether the keys ascend.

    A chunk is (part, branch, position // length). Without positions (an empty array) the rows of a branch, ``span`` of them,
    follow the cached prefix.
    """
    found = 0
    ascending = True
    for n in range(len(start)):
        for t in range(start[n], stop[n]):
            at = np.int64(position[t]) if len(position) else kv_tokens[n] + (t - start[n]) % span[n]
            if count[t] == 0 or at < 0 or (len(state) and state[t] == PADDING):
                continue
            copy = np.int64(branch[t]) if len(branch) else (t - start[n]) // span[n]
            chunk = at // length
            if own_only and chunk != block[n]:
                continue
            key = (n << 40) + (copy << 32) + chunk
            ascending = ascending and (found == 0 or keys[found - 1] <= key)
            rows[found] = t
            keys[found] = key
            found += 1
    return found, ascending


def chunk_rows(
    trajectory: Trajectory, count: np.ndarray, block_length: int, own_only: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Rows that compute, chunk by chunk; padding left out.

    Parameters
    ----------
    trajectory : Trajectory
        Without positions (no tokens table) a part's rows are taken to follow its cached prefix in order, without padding.
    count : np.ndarray
        uint8 [R], 0 where a row computes nothing.
    block_length : int
        Positions of a chunk.
    own_only : bool
        Only the rows of the forward's own block.

    Returns
    -------
    tuple
        Rows int64 [M], and where each chunk begins and the last ends, int64 [C + 1].
    """
    forwards = trajectory.forwards
    start, stop = forwards.part_rows
    unknown = np.empty(0, np.uint8)
    rows, keys = np.empty(len(count), np.int64), np.empty(len(count), np.int64)
    found, ascending = _chunk_rows(
        start,
        stop,
        np.maximum(1, forwards.num_tokens // np.maximum(1, forwards.branches)),
        np.maximum(forwards.kv_tokens, 0),
        forwards.block,
        np.empty(0, np.int32) if trajectory.position is None else trajectory.position,
        unknown if trajectory.state is None else trajectory.state,
        unknown if trajectory.branch is None else trajectory.branch,
        count,
        block_length,
        own_only,
        rows,
        keys,
    )
    rows, keys = rows[:found], keys[:found]
    if not ascending:
        order = np.argsort(keys, kind="stable")
        rows, keys = rows[order], keys[order]
    if not found:
        return rows, np.zeros(1, np.int64)
    begins = np.flatnonzero(keys[1:] != keys[:-1]) + 1
    return rows, np.concatenate(([0], begins, [found])).astype(np.int64)
