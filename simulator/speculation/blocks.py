"""The denoise forwards of each block side by side: what was known, predicted and accepted at every position and step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tracer.errors import UserError
from tracer.jit import njit
from tracer.schema import COMMIT, DECODED, DENOISE, PROMPT, undecided
from tracer.trace import ForwardTable, Segment, TokenTable


@dataclass(frozen=True, slots=True)
class BlockTable:
    """Vanilla decoding of a segment, block by block. S denoise forwards in C blocks of up to B positions.

    Steps of a block follow each other in execution order; blocks in that of their first forward. ``row`` is -1 where a block
    has no such position, and its commit row -1 where it has no commit forward.
    """

    offsets: np.ndarray  # int64 [C + 1], steps of each block
    forward: np.ndarray  # int64 [S], forward 0..F-1 of each step
    commit: np.ndarray  # int64 [C], the block's commit forward, -1 without one
    row: np.ndarray  # int64 [S, B], row of each position
    commit_row: np.ndarray  # int64 [C, B]
    known: np.ndarray  # bool [S, B], not masked in the call's input; positions a block lacks count as known
    accepted: np.ndarray  # bool [S, B]
    predicted: np.ndarray  # int32 [S, B]
    confidence: np.ndarray  # float32 [S, B], NaN where nothing was predicted

    @property
    def block_of_step(self) -> np.ndarray:
        """int64 [S]: the block of each step."""
        return np.repeat(np.arange(len(self.commit)), np.diff(self.offsets))

    @property
    def final(self) -> np.ndarray:
        """bool [C, B]: known once the block's last step has accepted."""
        last = self.offsets[1:] - 1
        return self.known[last] | self.accepted[last]


@njit
def _locate(row_offsets, forward, block, position, length, rows):
    """Write the row of each position of the forward's block to ``rows`` [S, B], -1 where it has none."""
    rows[:] = -1
    for s in range(len(forward)):
        f = forward[s]
        for t in range(row_offsets[f], row_offsets[f + 1]):
            at = np.int64(position[t]) - np.int64(block[s]) * length
            if at >= 0 and at < length:
                rows[s, at] = t


def block_table(segment: Segment, block_length: int, policy: str, confidence: bool = True) -> BlockTable:
    """Gather a segment's denoise forwards by block.

    Parameters
    ----------
    segment : Segment
        One request a call, no speculative branches.
    block_length : int
        B.
    policy : str
        Who asks, for the error.
    confidence : bool
        Whether masked positions must have one.

    Raises
    ------
    UserError
        No tokens table or blocks, several requests or branches in a call, a block whose calls hold different positions, or a
        masked position without a confidence.
    """
    tokens, forwards = segment.tokens, segment.forwards
    if tokens is None:
        raise UserError(f"{policy} needs token states, which this trace does not hold; capture it with a tokens table.")
    if block_length < 1:
        raise UserError(f"{policy} works on blocks, which this trace does not have; capture a block-diffusion run.")
    refuse_batches(forwards, policy)
    if (forwards.branches > 1).any():
        found = forwards.forward_id[np.flatnonzero(forwards.branches > 1)[0]]
        raise UserError(f"{policy} starts from a vanilla run, but forward {found} has several branches; capture one.")
    keys, rank, offsets, steps = ordered_steps(forwards, policy)
    key = block_key(forwards)
    commit = np.full(len(keys), -1, np.int64)
    commits = np.flatnonzero(forwards.kind == COMMIT)[::-1]
    if len(keys):
        at = np.minimum(np.searchsorted(keys, key[commits]), len(keys) - 1)
        mine = keys[at] == key[commits]
        # Backwards, so that a block's first commit forward stays.
        commit[rank[at[mine]]] = commits[mine]
    row = _rows(forwards, steps, tokens.position, block_length)
    commit_row = np.full((len(keys), block_length), -1, np.int64)
    commit_row[commit >= 0] = _rows(forwards, commit[commit >= 0], tokens.position, block_length)
    return _gather(forwards, tokens, (offsets, steps, commit), (row, commit_row), policy, confidence)


def refuse_batches(forwards: ForwardTable, policy: str) -> None:
    """Raise a UserError where a call holds several requests; ``policy`` is who asks."""
    parts = np.diff(forwards.part_offsets)
    if (parts != 1).any():
        found = forwards.forward_id[np.flatnonzero(parts != 1)[0]]
        raise UserError(f"{policy} replays one request a call, but forward {found} holds several; capture at batch 1.")


def refuse_edits(tokens: TokenTable, policy: str) -> None:
    """Raise a UserError where a decided token changes; ``policy`` is who asks."""
    if tokens.edited.any():
        raise UserError(
            f"{policy} takes decided tokens to stay, and this trace edits them; replay it with another policy."
        )


def block_key(forwards: ForwardTable) -> np.ndarray:
    """int64 [N]: one number a (request, block)."""
    return (forwards.request_id.astype(np.int64) << 32) + forwards.block


def ordered_steps(forwards: ForwardTable, policy: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Denoise forwards by block: blocks in the order of their first forward, their steps in execution order.

    Returns
    -------
    tuple of np.ndarray
        int64: keys of the C blocks, ascending, see :func:`block_key`; their ranks [C]; offsets [C + 1] of the blocks in rank
        order; the forwards [S].

    Raises
    ------
    UserError
        A denoise forward without a block; ``policy`` is who asks.
    """
    denoise = np.flatnonzero(forwards.kind == DENOISE)
    if (forwards.block[denoise] < 0).any():
        found = forwards.forward_id[denoise[forwards.block[denoise] < 0][0]]
        raise UserError(
            f"{policy} works on blocks, but denoise forward {found} has none; capture a block-diffusion run."
        )
    keys, first, of_step = np.unique(block_key(forwards)[denoise], return_index=True, return_inverse=True)
    rank = np.empty(len(keys), np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(keys))
    order = np.argsort(rank[of_step], kind="stable")
    offsets = np.concatenate(([0], np.cumsum(np.bincount(rank[of_step], minlength=len(keys))))).astype(np.int64)
    return keys, rank, offsets, denoise[order]


def _rows(forwards: ForwardTable, which: np.ndarray, position: np.ndarray, length: int) -> np.ndarray:
    rows = np.empty((len(which), length), np.int64)
    _locate(forwards.row_offsets, which, forwards.block[which], position, length, rows)
    return rows


def rows_when_done(segment: Segment, table: BlockTable) -> tuple[np.ndarray, Segment | None]:
    """Row of each position as a real token once its block is done, and the segment's following call where one is in it.

    That is in the block's commit forward or, without one, in the model call right after its last step: without a KV cache that
    is the next block's first, which holds all tokens before it. The call may be the one after the segment, but none further,
    so that the answer does not depend on where the trace is cut and no more than a call is read beyond a segment.

    Returns
    -------
    tuple
        int64 [C, B], from the segment's rows on those of the following call, -1 where neither call holds the position as a
        real token of the block's request; the following call.
    """
    forwards = segment.forwards
    rows = table.commit_row.copy()
    open_blocks = np.flatnonzero(table.commit < 0)
    after = table.forward[table.offsets[1:] - 1] + 1
    inside = open_blocks[after[open_blocks] < forwards.num_forwards]
    rows[inside] = _real_rows(segment, after[inside], forwards, after[inside] - 1, rows.shape[1])
    at_end = open_blocks[after[open_blocks] == forwards.num_forwards]
    following = segment.following() if len(at_end) and segment.following is not None else None
    if following is None:
        return rows, None
    found = _real_rows(following, np.zeros(len(at_end), np.int64), forwards, after[at_end] - 1, rows.shape[1])
    rows[at_end] = np.where(found >= 0, found + forwards.num_rows, -1)
    return rows, following


def _real_rows(
    segment: Segment, calls: np.ndarray, forwards: ForwardTable, last: np.ndarray, length: int
) -> np.ndarray:
    """Row of each position of the block of forwards ``last`` in ``calls`` [N] of a segment, int64 [N, B].

    -1 where the call does not hold the position as a real token, or is not one of the block's request alone.
    """
    table, tokens = segment.forwards, segment.tokens
    assert tokens is not None
    rows = np.empty((len(calls), length), np.int64)
    _locate(table.row_offsets, calls, forwards.block[last], tokens.position, length, rows)
    part = table.part_offsets[calls]
    own = (table.part_offsets[calls + 1] == part + 1) & (table.request_id[part] == forwards.request_id[last])
    real = (tokens.state[rows] == PROMPT) | (tokens.state[rows] == DECODED)
    return np.where(own[:, None] & (rows >= 0) & real, rows, -1)


def _gather(
    forwards: ForwardTable,
    tokens: TokenTable,
    steps: tuple[np.ndarray, np.ndarray, np.ndarray],
    rows: tuple[np.ndarray, np.ndarray],
    policy: str,
    confidence: bool,
) -> BlockTable:
    offsets, forward, commit = steps
    row, commit_row = rows
    absent = row < 0
    first = np.repeat(offsets[:-1], np.diff(offsets))
    uneven = (absent != absent[first]).any(axis=1) if len(row) else np.zeros(0, bool)
    if uneven.any():
        found = forwards.forward_id[forward[np.flatnonzero(uneven)[0]]]
        raise UserError(
            f"{policy} needs every call of a block to hold the same positions, but forward {found} does not; "
            "capture the run again."
        )
    refuse_edits(tokens, policy)
    masked = ~absent & undecided(tokens.state[row])
    sure = np.where(absent, np.float32(np.nan), tokens.confidence[row])
    unsure = (masked & np.isnan(sure)).any(axis=1)
    if confidence and unsure.any():
        found = forwards.forward_id[forward[np.flatnonzero(unsure)[0]]]
        raise UserError(
            f"{policy} needs the confidence of every masked token, which forward {found} lacks; "
            "capture it from a decoding loop."
        )
    return BlockTable(
        offsets=offsets,
        forward=forward,
        commit=commit,
        row=row,
        commit_row=commit_row,
        known=~masked,
        accepted=~absent & tokens.accepted[row],
        predicted=np.where(absent, np.int32(-1), tokens.predicted_id[row]),
        confidence=sure,
    )
