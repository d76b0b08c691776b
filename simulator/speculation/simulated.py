"""From a walk over vanilla's states to a trajectory: simulated forwards, and the recorded row each of their rows takes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from simulator.policy import Trajectory
from simulator.speculation.walk import Walk
from tracer.decoding.blocks import BlockTable, rows_of
from tracer.decoding.team_rules import BRANCHES
from tracer.jit import njit
from tracer.schema import DECODED, DENOISE, PROMPT, undecided
from tracer.trace import ForwardTable, Segment


class SimulatedRows(NamedTuple):
    """R rows of a trajectory."""

    source: np.ndarray  # int64 [R], recorded row
    known: np.ndarray  # bool [R], a real token to its branch, whatever the recorded row is
    reused: np.ndarray  # bool [R]
    cold: np.ndarray  # bool [R]
    stand_in: np.ndarray  # bool [R], where the trace holds no forward of the position as a real token
    branch: np.ndarray  # uint8 [R]


def simulated_trajectory(segment: Segment, table: BlockTable, walk: Walk) -> tuple[Trajectory, SimulatedRows]:
    """The forwards of a walk among the recorded prefill and commit forwards.

    A block's first forward is the recorded one. A speculative forward holds the rows outside its block once (reused, as its
    branch 0 sees them), then its branches, branch-major. Forwards are numbered from 0.

    Parameters
    ----------
    segment : Segment
    table : BlockTable
        Its blocks, one branch.
    walk : Walk
        N simulated forwards.

    Returns
    -------
    tuple of (Trajectory, SimulatedRows)
        The trajectory, without reused and cold rows, bounds and notes.
    """
    forwards, tokens = segment.forwards, segment.tokens
    assert tokens is not None
    # Items: every recorded forward that is not a denoise one, then every simulated one where its block began.
    others = np.flatnonzero(forwards.kind != DENOISE)
    anchor = np.concatenate((others, table.forward[table.offsets[:-1]][walk.block]))
    like = np.concatenate((others, table.forward[walk.step[:, 0]]))
    which = np.concatenate((np.full(len(others), -1), np.arange(len(walk.block))))
    order = np.lexsort((which, anchor))
    like, which = like[order], which[order]
    copies = np.zeros(len(like), np.int64)
    width = table.here.sum(axis=1, dtype=np.int64)
    copies[which >= 0] = np.where(walk.chosen >= 0, width[walk.block], 0)[which[which >= 0]]
    sizes = np.diff(forwards.row_offsets)[like] + (BRANCHES - 1) * copies
    offsets = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    inside = np.zeros(forwards.num_rows, bool)
    inside[table.row[table.row >= 0]] = True
    real, recorded_as_real, following = _real_rows(segment, table)
    number = int(offsets[-1])
    flags = np.zeros((4, number), bool)
    rows = SimulatedRows(np.empty(number, np.int64), flags[0], flags[1], flags[2], flags[3], np.zeros(number, np.uint8))
    _write_rows(table, walk, (like, which, forwards.row_offsets, inside), (real, recorded_as_real), offsets, rows)
    position, state = tokens.position, tokens.state
    if following is not None and rows.source.max() >= forwards.num_rows:
        assert following.tokens is not None
        position = np.append(position, following.tokens.position)
        state = np.append(state, following.tokens.state)
    else:
        following = None
    state = state[rows.source]
    state[rows.known & undecided(state)] = DECODED
    trajectory = Trajectory(
        forwards=_forward_table(forwards, walk, (like, which), offsets, state),
        position=position[rows.source],
        state=state,
        branch=rows.branch,
        source=rows.source,
        following=following,
    )
    return trajectory, rows


@njit
def _write_rows(table, walk, items, real, offsets, rows):
    """Write the rows of every item, a recorded forward or, where ``which`` has a speculative one, its branches."""
    like, which, row_offsets, inside = items
    for n in range(len(like)):
        to, i = offsets[n], which[n]
        special = i >= 0 and walk.chosen[i] >= 0
        for t in range(row_offsets[like[n]], row_offsets[like[n] + 1]):
            if not special or not inside[t]:
                rows.source[to] = t
                rows.reused[to] = special
                to += 1
        for r in range(BRANCHES if special else 0):
            c, s = walk.block[i], walk.step[i, r]
            for j in range(len(table.here[c])):
                if not table.here[c, j]:
                    continue
                known = walk.state[i, r, j] == 1
                late = known and not table.known[s, 0, j]
                rows.source[to] = real[0][c, j] if late else table.row[s, 0, j]
                rows.known[to] = known
                rows.stand_in[to] = late and not real[1][c, j]
                rows.reused[to] = walk.state[i, 0, j] and not walk.accepted[i - 1, max(walk.chosen[i - 1], 0), j]
                rows.cold[to] = walk.cold[i, j]
                rows.branch[to] = r
                to += 1


def _real_rows(segment: Segment, table: BlockTable) -> tuple[np.ndarray, np.ndarray, Segment | None]:
    """Row of each position's first forward as a real token, and the segment's following call where one was looked at.

    Where it became known in the block's last step, that is the block's commit forward or, without one, the model call right
    after: without a KV cache that is the next block's first, which holds all tokens before it. The call may be the one after
    the segment, but none further, so that the answer does not depend on where the trace is cut and no more than a call is read
    beyond a segment.

    Returns
    -------
    tuple
        int64 [C, B], from the segment's rows on those of the following call; bool [C, B], False where no such call holds the
        position as a real token of the block's request, so that its row of the last step stands in; the following call.
    """
    forwards, steps = segment.forwards, len(table.forward)
    known_at = np.where(table.known[:, 0] == 1, np.arange(steps)[:, None], steps)
    first = np.minimum.reduceat(known_at, table.offsets[:-1], axis=0) if steps else known_at
    last = table.offsets[1:] - 1
    after = np.where(table.commit >= 0, table.commit, table.forward[last] + 1)
    beyond = after == forwards.num_forwards
    following = segment.following() if beyond.any() and segment.following is not None else None
    rows = np.full(first.shape, -1, np.int64)
    rows[~beyond] = _rows_after(segment, table, after, ~beyond, forwards)
    if following is not None:
        rows[beyond] = _rows_after(following, table, np.zeros_like(after), beyond, forwards)
        rows[beyond] += np.where(rows[beyond] >= 0, forwards.num_rows, 0)
    earlier = np.take_along_axis(table.row[:, 0], np.minimum(first, steps - 1), axis=0)
    rows = np.where(first < steps, earlier, rows)
    return np.where(rows >= 0, rows, table.row[last, 0]), rows >= 0, following


def _rows_after(
    segment: Segment, table: BlockTable, calls: np.ndarray, which: np.ndarray, forwards: ForwardTable
) -> np.ndarray:
    """Row of each position of the blocks ``which`` bool [C] in ``calls`` [C] of a segment, int64 [N, B].

    -1 where a call that is no commit forward does not hold the position as a real token, or is not one of the block's request
    alone. ``forwards`` are those of the blocks.
    """
    ran, tokens = segment.forwards, segment.tokens
    assert tokens is not None
    calls, last = calls[which], table.forward[table.offsets[1:] - 1][which]
    one = np.ones(len(calls), np.uint8)
    rows = rows_of(segment, calls, one, forwards.block[last], (1, table.known.shape[2]))[:, 0]
    part = ran.part_offsets[calls]
    alone = (ran.part_offsets[calls + 1] == part + 1) & (ran.request_id[part] == forwards.request_id[last])
    real = (tokens.state[rows] == PROMPT) | (tokens.state[rows] == DECODED)
    committed = table.commit[which] >= 0
    return np.where(committed[:, None] | (alone[:, None] & (rows >= 0) & real), rows, -1)


def _forward_table(
    recorded: ForwardTable,
    walk: Walk,
    items: tuple[np.ndarray, np.ndarray],
    offsets: np.ndarray,
    state: np.ndarray,
) -> ForwardTable:
    like, which = items
    simulated = which >= 0
    special = np.zeros(len(like), bool)
    special[simulated] = walk.chosen[which[simulated]] >= 0
    masked = np.concatenate(([0], np.cumsum(undecided(state))))
    taken = ("request_id", "kind", "block", "kv_tokens", "step", "num_accepted", "chosen_branch", "duration_ns")
    columns = {name: getattr(recorded, name)[like] for name in taken}
    i = which[simulated]
    columns["step"][simulated] = i - np.searchsorted(walk.block, walk.block[i])
    columns["num_accepted"][simulated] = walk.gained[i]
    columns["chosen_branch"][special] = walk.chosen[which[special]]
    columns["duration_ns"][special] = -1
    return ForwardTable(
        forward_id=np.arange(len(like), dtype=np.uint32),
        row_offsets=offsets,
        part_offsets=np.arange(len(like) + 1, dtype=np.int64),
        row_start=np.zeros(len(like), np.int64),
        num_tokens=np.diff(offsets),
        num_masked=masked[offsets[1:]] - masked[offsets[:-1]],
        num_edited=np.zeros(len(like), np.int64),
        branches=np.where(special, BRANCHES, 1).astype(np.uint8),
        **columns,
    )
