"""The denoise forwards of each block of a speculative run: what every branch knew, predicted and accepted at every position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simulator.speculation.blocks import ordered_steps, refuse_batches, refuse_edits
from simulator.speculation.walk import BRANCHES
from tracer.errors import UserError
from tracer.jit import njit
from tracer.schema import undecided
from tracer.trace import Segment


@dataclass(frozen=True, slots=True)
class BranchTable:
    """The denoise forwards of a TEAM run, block by block. S forwards in C blocks of up to B positions, R = 4 branches.

    Branches that a forward does not have repeat its first.
    """

    offsets: np.ndarray  # int64 [C + 1]
    forward: np.ndarray  # int64 [S]
    row: np.ndarray  # int64 [S, R, B], -1 where a block has no such position
    known: np.ndarray  # bool [S, R, B]; positions a block lacks count as known
    accepted: np.ndarray  # bool [S, R, B]
    predicted: np.ndarray  # int32 [S, R, B]
    confidence: np.ndarray  # float32 [S, R, B]


@njit
def _locate(row_offsets, forward, branches, block, position, length, rows):
    """Write the row of each position of the forward's block in each branch to ``rows`` [S, R, B], -1 where it has none."""
    rows[:] = -1
    for s in range(len(forward)):
        f = forward[s]
        first = row_offsets[f]
        span = max((row_offsets[f + 1] - first) // branches[s], 1)
        for t in range(first, row_offsets[f + 1]):
            at = np.int64(position[t]) - np.int64(block[s]) * length
            if at >= 0 and at < length:
                rows[s, (t - first) // span, at] = t
        for r in range(branches[s], rows.shape[1]):
            rows[s, r] = rows[s, 0]


def branch_table(segment: Segment, block_length: int, policy: str) -> BranchTable:
    """Gather a segment's denoise forwards by block and branch.

    Parameters
    ----------
    segment : Segment
        One request a call.
    block_length : int
        B.
    policy : str
        Who asks, for the error.

    Raises
    ------
    UserError
        No tokens table or blocks, several requests in a call, neither one nor four branches, a block whose calls and branches
        hold different positions, or a masked position without a confidence.
    """
    tokens, forwards, length = segment.tokens, segment.forwards, block_length
    if tokens is None:
        raise UserError(f"{policy} needs token states, which this trace does not hold; capture it with a tokens table.")
    if block_length < 1:
        raise UserError(f"{policy} works on blocks, which this trace does not have; capture a block-diffusion run.")
    refuse_batches(forwards, policy)
    _, _, offsets, steps = ordered_steps(forwards, policy)
    branches = forwards.branches[steps].astype(np.int64)
    odd = (branches != 1) & (branches != BRANCHES)
    if odd.any():
        found, number = forwards.forward_id[steps[odd][0]], int(branches[odd][0])
        raise UserError(
            f"{policy} runs 1 or {BRANCHES} branches, but forward {found} has {number}; use routing vanilla."
        )
    row = np.empty((len(steps), BRANCHES, length), np.int64)
    _locate(forwards.row_offsets, steps, branches, forwards.block[steps], tokens.position, length, row)
    absent = row < 0
    first = np.repeat(offsets[:-1], np.diff(offsets))
    uneven = (absent != absent[first, :1]).any(axis=(1, 2)) if len(row) else np.zeros(0, bool)
    if uneven.any():
        found = forwards.forward_id[steps[np.flatnonzero(uneven)[0]]]
        raise UserError(
            f"{policy} needs every call and branch of a block to hold the same positions, but forward {found} does not; "
            "capture the run again."
        )
    refuse_edits(tokens, policy)
    masked = ~absent & undecided(tokens.state[row])
    sure = np.where(absent, np.float32(np.nan), tokens.confidence[row])
    unsure = (masked & np.isnan(sure)).any(axis=(1, 2))
    if unsure.any():
        found = forwards.forward_id[steps[np.flatnonzero(unsure)[0]]]
        raise UserError(
            f"{policy} needs the confidence of every masked token, which forward {found} lacks; "
            "capture it from a decoding loop."
        )
    return BranchTable(
        offsets=offsets,
        forward=steps,
        row=row,
        known=~masked,
        accepted=~absent & tokens.accepted[row],
        predicted=np.where(absent, np.int32(-1), tokens.predicted_id[row]),
        confidence=sure,
    )
