"""The denoise forwards of each block side by side: what every branch knew, predicted and accepted at each position and step."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tracer.errors import UserError
from tracer.jit import njit
from tracer.schema import COMMIT, DENOISE, undecided
from tracer.trace import ForwardTable, Segment


class BlockTable(NamedTuple):
    """Decoding of a segment, block by block: S denoise forwards in C blocks of up to B positions, R branches of each.

    Steps of a block follow each other in execution order; blocks in that of their first forward. Branches that a forward does
    not have repeat its first. Kernels take the table as it is.
    """

    offsets: np.ndarray  # int64 [C + 1], steps of each block
    forward: np.ndarray  # int64 [S], forward 0..F-1 of each step
    commit: np.ndarray  # int64 [C], the block's first commit forward, -1 without one
    row: np.ndarray  # int64 [S, R, B], row of each position, -1 where a block has no such position
    here: np.ndarray  # uint8 [C, B], positions a block has
    known: np.ndarray  # uint8 [S, R, B], not masked in the call's input; positions a block lacks count as known
    accepted: np.ndarray  # uint8 [S, R, B]
    final: np.ndarray  # uint8 [C, B], known to branch 0 once the block's last step has accepted
    predicted: np.ndarray  # int32 [S, R, B]
    confidence: np.ndarray  # float32 [S, R, B], NaN where nothing was predicted


@njit
def _locate(row_offsets, forward, branches, block, position, length, rows):
    """Write the row of each position of the forward's block in each branch to ``rows`` [S, R, B], -1 where it has none."""
    rows[:] = -1
    for s in range(len(forward)):
        first, end = row_offsets[forward[s]], row_offsets[forward[s] + 1]
        span = max((end - first) // np.int64(branches[s]), 1)
        for t in range(first, end):
            at = np.int64(position[t]) - np.int64(block[s]) * length
            if at >= 0 and at < length:
                rows[s, (t - first) // span, at] = t
        for r in range(branches[s], rows.shape[1]):
            for j in range(length):
                rows[s, r, j] = rows[s, 0, j]


def rows_of(
    segment: Segment, calls: np.ndarray, branches: np.ndarray, block: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """Row of each position of a block in some calls of a segment, int64 [N, R, B], -1 where a call has none.

    Parameters
    ----------
    segment : Segment
    calls, branches, block : int [N]
        The calls, how many branches each has, at most R, and the block to look for.
    shape : tuple of int
        R and B.
    """
    assert segment.tokens is not None
    rows = np.empty((len(calls), *shape), np.int64)
    _locate(segment.forwards.row_offsets, calls, branches, block, segment.tokens.position, shape[1], rows)
    return rows


def block_table(
    segment: Segment, block_length: int, policy: str, branches: int = 1, confidence: bool = True
) -> BlockTable:
    """Gather a segment's denoise forwards by block and branch.

    Parameters
    ----------
    segment : Segment
        One request a call.
    block_length : int
        B.
    policy : str
        Who asks, for the error.
    branches : int
        R: 1 for a vanilla run; otherwise forwards have one branch or that many.
    confidence : bool
        Whether masked positions must have one.

    Raises
    ------
    UserError
        No tokens table or blocks, several requests in a call, another number of branches, a block whose calls and branches hold
        different positions, edited tokens, or a masked position without a confidence.
    """
    tokens, forwards = segment.tokens, segment.forwards
    if tokens is None:
        raise UserError(f"{policy} needs token states, which this trace does not hold; capture it with a tokens table.")
    if block_length < 1:
        raise UserError(f"{policy} works on blocks, which this trace does not have; capture a block-diffusion run.")
    _refuse(
        np.diff(forwards.part_offsets) != 1,
        forwards,
        policy,
        "replays one request a call, but forward {} holds several; capture at batch 1",
    )
    if branches == 1:
        why = "starts from a vanilla run, but forward {} has several branches; capture one"
    else:
        why = f"runs 1 or {branches} branches, but forward {{}} has {{}}; use routing vanilla"
    _refuse((forwards.branches != 1) & (forwards.branches != branches), forwards, policy, why)
    _refuse(
        (forwards.kind == DENOISE) & (forwards.block < 0),
        forwards,
        policy,
        "works on blocks, but denoise forward {} has none; capture a block-diffusion run",
    )
    offsets, steps, commit = _ordered(forwards)
    row = rows_of(segment, steps, forwards.branches[steps], forwards.block[steps], (branches, block_length))
    absent = row < 0
    first = np.repeat(offsets[:-1], np.diff(offsets))
    wrong = np.zeros(forwards.num_forwards, bool)
    wrong[steps] = (absent != absent[first, :1]).any(axis=(1, 2))
    _refuse(
        wrong,
        forwards,
        policy,
        "needs every call and branch of a block to hold the same positions, but forward {} does not; capture the run again",
    )
    if tokens.edited.any():
        raise UserError(
            f"{policy} takes decided tokens to stay, and this trace edits them; replay it with another policy."
        )
    masked = ~absent & undecided(tokens.state[row])
    sure = np.where(absent, np.float32(np.nan), tokens.confidence[row])
    wrong[steps] = confidence & (masked & np.isnan(sure)).any(axis=(1, 2))
    _refuse(
        wrong,
        forwards,
        policy,
        "needs the confidence of every masked token, which forward {} lacks; capture it from a decoding loop",
    )
    known = (~masked).view(np.uint8)
    accepted = (~absent & tokens.accepted[row]).view(np.uint8)
    last = offsets[1:] - 1
    return BlockTable(
        offsets=offsets,
        forward=steps,
        commit=commit,
        row=row,
        here=(~absent[offsets[:-1], 0]).view(np.uint8),
        known=known,
        accepted=accepted,
        final=known[last, 0] | accepted[last, 0],
        predicted=np.where(absent, np.int32(-1), tokens.predicted_id[row]),
        confidence=sure,
    )


def _refuse(wrong: np.ndarray, forwards: ForwardTable, policy: str, why: str) -> None:
    """Raise a UserError that names the first of the ``wrong`` forwards, bool [F], and its branches, if there is one."""
    if wrong.any():
        at = int(np.argmax(wrong))
        raise UserError(f"{policy} {why.format(forwards.forward_id[at], forwards.branches[at])}.")


def _ordered(forwards: ForwardTable) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``offsets``, ``forward`` and ``commit`` of a :class:`BlockTable`."""
    key = (forwards.request_id.astype(np.int64) << 32) + forwards.block
    denoise, commits = (np.flatnonzero(forwards.kind == kind) for kind in (DENOISE, COMMIT))
    keys, first, of_step = np.unique(key[denoise], return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    steps = denoise[np.argsort(rank[of_step], kind="stable")]
    offsets = np.concatenate(([0], np.cumsum(np.bincount(rank[of_step], minlength=len(keys))))).astype(np.int64)
    commit_keys, first_commit = np.unique(key[commits], return_index=True)
    _, mine, its = np.intersect1d(keys, commit_keys, assume_unique=True, return_indices=True)
    commit = np.full(len(keys), -1, np.int64)
    commit[rank[mine]] = commits[first_commit[its]]
    return offsets, steps, commit
