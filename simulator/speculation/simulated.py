"""From a walk over vanilla's states to a trajectory: simulated forwards and the recorded row each of their rows takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simulator.policy import Trajectory
from simulator.speculation.blocks import BlockTable, rows_when_done
from simulator.speculation.walk import BRANCHES
from tracer.schema import DECODED, DENOISE, undecided
from tracer.trace import ForwardTable, Segment


@dataclass(frozen=True, slots=True)
class Walk:
    """What :func:`simulator.speculation.walk.walk` writes: N simulated denoise forwards, block after block."""

    block: np.ndarray  # int64 [N]
    step: np.ndarray  # int64 [N, 4], the vanilla step each branch sees
    state: np.ndarray  # uint8 [N, 4, B], what each branch knows
    fresh: np.ndarray  # uint8 [N, B], accepted by the forward before
    cold: np.ndarray  # uint8 [N, B]
    gained: np.ndarray  # int64 [N]
    chosen: np.ndarray  # int64 [N], -1 in a block's first forward

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return (self.block, self.step, self.state, self.fresh, self.cold, self.gained, self.chosen)

    def upto(self, total: int) -> Walk:
        """The first ``total`` forwards."""
        return Walk(*(array[:total] for array in self.arrays))


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers ``start .. start + length - 1`` of every pair, one after the other."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


def _real_rows(segment: Segment, table: BlockTable) -> tuple[np.ndarray, np.ndarray, Segment | None]:
    """Row of each position's first vanilla forward as a real token, int64 [C, B]; where the last step's stands in, bool.

    Last, the call after the segment, whose rows go on after the segment's; None where there is none or no need of it.
    """
    steps = np.arange(len(table.forward))[:, None]
    first = np.minimum.reduceat(np.where(table.known, steps, len(steps)), table.offsets[:-1], axis=0)
    within = first < len(steps)
    rows = np.take_along_axis(table.row, np.minimum(first, len(steps) - 1), axis=0)
    done, following = rows_when_done(segment, table)
    rows = np.where(within, rows, done)
    stand_in = rows < 0
    return np.where(stand_in, table.row[table.offsets[1:] - 1], rows), stand_in, following


def simulated_trajectory(
    segment: Segment, table: BlockTable, walk: Walk, reuse: bool
) -> tuple[Trajectory, np.ndarray, bool]:
    """The forwards of a walk among the recorded prefill and commit forwards.

    A block's first forward is the recorded one. A speculative forward holds the rows outside its block once (reused, as its
    branch 0 sees them), then its four branches, branch-major. Forwards are numbered from 0.

    Parameters
    ----------
    segment : Segment
        T rows.
    table : BlockTable
        Its blocks.
    walk : Walk
        N simulated forwards.
    reuse : bool
        Whether decoded rows keep their previous outputs.

    Returns
    -------
    tuple
        The trajectory, without cold rows, bounds and notes; its cold rows, bool [R]; whether any row stands in for one the
        trace does not hold.
    """
    forwards, tokens = segment.forwards, segment.tokens
    assert tokens is not None
    spec = walk.chosen >= 0
    first_step = table.offsets[:-1]
    here = table.row[first_step] >= 0
    # Items: every recorded forward that is not a denoise one, then every simulated one where its block began.
    others = np.flatnonzero(forwards.kind != DENOISE)
    anchor = np.concatenate((others, table.forward[first_step][walk.block]))
    like = np.concatenate((others, table.forward[walk.step[:, 0]]))
    which = np.concatenate((np.full(len(others), -1), np.arange(len(walk.block))))
    order = np.lexsort((which, anchor))
    like, which = like[order], which[order]
    special = (which >= 0) & spec[which] if len(spec) else np.zeros(len(which), bool)
    lengths = np.diff(forwards.row_offsets)[like]
    width = here.sum(axis=1)
    in_block = np.where(special, width[walk.block[which]], 0) if len(spec) else np.zeros(len(which), np.int64)
    outside = lengths - in_block
    sizes = outside + BRANCHES * in_block
    offsets = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    rows = int(offsets[-1])
    source = np.empty(rows, np.int64)
    known = np.zeros(rows, bool)
    reused, cold = np.zeros(rows, bool), np.zeros(rows, bool)
    branch = np.zeros(rows, np.uint8)
    copied = ~special
    source[_ranges(offsets[:-1][copied], sizes[copied])] = _ranges(forwards.row_offsets[like[copied]], lengths[copied])
    inside = np.zeros(forwards.num_rows, bool)
    inside[table.row[table.row >= 0]] = True
    strangers = np.flatnonzero(~inside)
    begins = np.searchsorted(strangers, forwards.row_offsets[like[special]])
    to = _ranges(offsets[:-1][special], outside[special])
    source[to] = strangers[_ranges(begins, outside[special])]
    reused[to] = True
    i = which[special]
    real, stand_in, following = table.commit_row, np.zeros((0, 0), bool), None
    if len(first_step):
        real, stand_in, following = _real_rows(segment, table)
    late = walk.state[i].astype(bool) & ~table.known[walk.step[i]]
    own = np.where(late, real[walk.block[i]][:, None, :], table.row[walk.step[i]])
    mask = np.broadcast_to(here[walk.block[i]][:, None, :], own.shape)
    to = _ranges(offsets[:-1][special] + outside[special], BRANCHES * in_block[special])
    source[to] = own[mask]
    known[to] = walk.state[i].astype(bool)[mask]
    decoded = (walk.state[i, 0] & ~walk.fresh[i] & 1).astype(bool)
    reused[to] = np.broadcast_to(decoded[:, None, :], own.shape)[mask]
    cold[to] = np.broadcast_to(walk.cold[i].astype(bool)[:, None, :], own.shape)[mask]
    branch[to] = np.broadcast_to(np.arange(BRANCHES, dtype=np.uint8)[None, :, None], own.shape)[mask]
    position, state = tokens.position, tokens.state
    if following is not None and source.max() >= forwards.num_rows:
        assert following.tokens is not None
        position = np.append(position, following.tokens.position)
        state = np.append(state, following.tokens.state)
    else:
        following = None
    state = state[source]
    state[known & undecided(state)] = DECODED
    trajectory = Trajectory(
        forwards=_forward_table(forwards, table, walk, (like, which, special), offsets, state),
        position=position[source],
        state=state,
        branch=branch,
        source=source,
        reused=reused if reuse else None,
        following=following,
    )
    return trajectory, cold, bool((late & stand_in[walk.block[i]][:, None, :] & mask).any()) if len(i) else False


def _forward_table(
    recorded: ForwardTable,
    table: BlockTable,
    walk: Walk,
    items: tuple[np.ndarray, np.ndarray, np.ndarray],
    offsets: np.ndarray,
    state: np.ndarray,
) -> ForwardTable:
    like, which, special = items
    simulated = which >= 0
    masked = np.concatenate(([0], np.cumsum(undecided(state))))
    begin = np.zeros(len(table.commit), np.int64)
    begin[walk.block[::-1]] = np.arange(len(walk.block))[::-1]
    step, gained = recorded.step[like], recorded.num_accepted[like]
    i = which[simulated]
    step[simulated] = i - begin[walk.block[i]]
    gained[simulated] = walk.gained[i]
    chosen, duration = recorded.chosen_branch[like], recorded.duration_ns[like]
    chosen[special] = walk.chosen[which[special]]
    duration[special] = -1
    return ForwardTable(
        forward_id=np.arange(len(like), dtype=np.uint32),
        row_offsets=offsets,
        part_offsets=np.arange(len(like) + 1, dtype=np.int64),
        request_id=recorded.request_id[like],
        kind=recorded.kind[like],
        block=recorded.block[like],
        step=step,
        row_start=np.zeros(len(like), np.int64),
        num_tokens=np.diff(offsets),
        kv_tokens=recorded.kv_tokens[like],
        num_masked=masked[offsets[1:]] - masked[offsets[:-1]],
        num_accepted=gained,
        num_edited=np.zeros(len(like), np.int64),
        branches=np.where(special, BRANCHES, 1).astype(np.uint8),
        chosen_branch=chosen,
        duration_ns=duration,
    )
