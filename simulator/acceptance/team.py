"""TEAM: which rows are reused or cold, and speculative forwards of four branches of a block.

Source: arXiv 2602.08404 and its released loop (github PKU-SEC-Lab/TEAM-MoE-dLLM @e9c502e). Without speculation the states are
vanilla's own, so row states are exact. With it, states vanilla never saw take predictions, probabilities and router rows from
the latest vanilla step of the block whose known set they contain; a position known there but masked at that step takes its
router row from its first forward as a real token, see :func:`simulator.speculation.blocks.rows_when_done`. Rows outside the
current block (no KV cache) are computed in a block's first forward and reused until its commit forward. A run recorded under
TEAM itself keeps its forwards, see :mod:`simulator.speculation.recorded_team`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from simulator.acceptance.recorded import Recorded
from simulator.policy import CONFIDENCE, TOKENS, Geometry, Trajectory
from simulator.speculation.blocks import BlockTable, block_table
from simulator.speculation.recorded_team import quotas_of, recorded_team, recorded_under_team, threshold_of
from simulator.speculation.simulated import Walk, simulated_trajectory
from simulator.speculation.walk import BRANCHES, fewest_forwards, row_states, walk
from tracer.errors import UserError
from tracer.trace import Segment

SURROGATE = (
    "Speculated states take predictions and router rows from the latest vanilla step whose known tokens they contain."
)
BOUNDS = (
    "Bounds: tokens per forward from no guess held (vanilla) to every guess right that vanilla's own states allow, widened to "
    "the replay's own figure in blocks where it leaves those states; unique experts from branch 0's, cold rows left out, to "
    "all branches' without limit. A live run may leave either."
)
LAST_STEP = (
    "Tokens that a block's last step accepts are real tokens in its commit forward or the call right after; where neither is "
    "in the trace, as after a request's last block without a KV cache, their router rows of that step stand in."
)


@dataclass(frozen=True)
class TeamAcceptance:
    """Reuse decoded rows, mark cold ones, and speculate on the two surest positions.

    Parameters
    ----------
    reuse : bool
        Decoded rows keep their previous expert outputs (the paper's delayed caching).
    limit : bool
        Rows far from known tokens and unsure are cold (limited activation).
    speculate : bool
        Run four branches of the block a forward (speculative exploration).
    threshold : float, optional
        Probability above which a token is accepted; None takes the trace's, or 0.95.
    quota : int, optional
        Tokens a forward accepts at least; None takes the trace's block length / steps, the remainder to the first steps as
        in its loop, or 1.
    hot_probability : float
        A row at least this sure of its token is never cold: 0.7 in the release, 0.6 best in the paper.
    hot_distance : int
        Positions from the nearest known token at which a row may be cold.
    """

    reuse: bool = True
    limit: bool = True
    speculate: bool = True
    threshold: float | None = None
    quota: int | None = None
    hot_probability: float = 0.7
    hot_distance: int = 4
    requires: ClassVar[frozenset[str]] = frozenset({TOKENS, CONFIDENCE})

    def __post_init__(self) -> None:
        if self.threshold is not None and not self.threshold >= 0:
            raise UserError(f"team: threshold must be 0 or more, not {self.threshold}.")
        if self.quota is not None and self.quota < 1:
            raise UserError(f"team: quota must be 1 or more, not {self.quota}.")
        if not 0 <= self.hot_probability <= 1:
            raise UserError(f"team: hot_probability must be between 0 and 1, not {self.hot_probability}.")
        if self.hot_distance < 1:
            raise UserError(f"team: hot_distance must be 1 or more, not {self.hot_distance}.")
        if not (self.limit or self.speculate):
            needed = frozenset({TOKENS}) if self.reuse else frozenset()
            object.__setattr__(self, "requires", needed)

    def unroll(self, segment: Segment, geometry: Geometry) -> Trajectory:
        """Recorded forwards with row states, or simulated forwards of four branches.

        Raises
        ------
        UserError
            Several requests in a call, no token states, blocks or confidences, several branches in a trace of another loop
            than TEAM's, or a TEAM run of other parameters.
        """
        recorded = Recorded().unroll(segment, geometry)
        if recorded_under_team(geometry.decoding):
            return recorded_team(segment, geometry, self, recorded)
        if not (self.reuse or self.limit or self.speculate):
            return recorded
        table = block_table(segment, geometry.block_length, "team", self.limit or self.speculate)
        if self.speculate:
            return self._simulated(segment, geometry, table)
        return self._states(segment, recorded, table)

    def _states(self, segment: Segment, recorded: Trajectory, table: BlockTable) -> Trajectory:
        here, rows = table.row >= 0, segment.forwards.num_rows
        reused, cold = np.zeros(here.shape, np.uint8), np.zeros(here.shape, np.uint8)
        row_states(
            table.offsets,
            table.known.view(np.uint8),
            here[table.offsets[:-1]].view(np.uint8),
            table.accepted.view(np.uint8),
            table.confidence,
            np.float32(self.hot_probability),
            self.hot_distance,
            reused,
            cold,
        )
        kept = None
        if self.reuse:
            # Rows outside the block are reused in every step but its first.
            later = np.ones(len(table.forward), bool)
            later[table.offsets[:-1]] = False
            of_forward = np.zeros(segment.forwards.num_forwards, bool)
            of_forward[table.forward] = later
            kept = np.repeat(of_forward, np.diff(segment.forwards.row_offsets))
            kept[table.row[here]] = reused[here]
        chilled = None
        if self.limit:
            chilled = np.zeros(rows, bool)
            chilled[table.row[here]] = cold[here]
        return replace(recorded, reused=kept, cold=chilled)

    def _simulated(self, segment: Segment, geometry: Geometry, table: BlockTable) -> Trajectory:
        walked = self._walk(geometry, table)
        trajectory, cold, stand_in = simulated_trajectory(segment, table, walked, self.reuse)
        computed = np.ones(trajectory.forwards.num_rows, bool) if trajectory.reused is None else ~trajectory.reused
        return replace(
            trajectory,
            cold=cold if self.limit else None,
            notes=(SURROGATE, BOUNDS, LAST_STEP) if stand_in else (SURROGATE, BOUNDS),
            bounds=self._token_bounds(table, walked),
            bound_rows=(computed & (trajectory.branch == 0) & ~cold, computed),
        )

    def _token_bounds(self, table: BlockTable, walked: Walk) -> dict[str, tuple[int, int]]:
        """Tokens and forwards of the scenarios with the fewest and with the most tokens per forward.

        No guess holds: vanilla. Every guess holds that may: :func:`fewest_forwards`, which stays at vanilla's states. With a
        quota above 1, another threshold or quota than the run's, or a block cut short, the walk leaves them and may do better
        or worse; such a block counts with the walk's own figures on that side. Summed by block, whatever the segments.
        """
        blocks = len(table.commit)
        fewest = fewest_forwards(
            table.offsets,
            table.known.view(np.uint8),
            table.final.view(np.uint8),
            table.accepted.view(np.uint8),
            table.predicted,
            table.confidence,
        )
        accepted, gained = np.zeros((2, blocks), np.int64)
        np.add.at(accepted, table.block_of_step, table.accepted.sum(axis=1))
        np.add.at(gained, walked.block, walked.gained)
        vanilla, own = np.diff(table.offsets), np.bincount(walked.block, minlength=blocks)
        return {
            "accepted": (int(np.minimum(accepted, gained).sum()), int(np.maximum(accepted, gained).sum())),
            "denoise_forwards": (int(np.maximum(vanilla, own).sum()), int(np.minimum(fewest, own).sum())),
        }

    def _walk(self, geometry: Geometry, table: BlockTable) -> Walk:
        width = table.row.shape[1]
        first = table.offsets[:-1]
        room = int((~table.known[first]).sum()) + 2 * len(first)
        walked = Walk(
            block=np.empty(room, np.int64),
            step=np.empty((room, BRANCHES), np.int64),
            state=np.zeros((room, BRANCHES, width), np.uint8),
            fresh=np.zeros((room, width), np.uint8),
            cold=np.zeros((room, width), np.uint8),
            gained=np.empty(room, np.int64),
            chosen=np.empty(room, np.int64),
        )
        total = walk(
            table.offsets,
            table.known.view(np.uint8),
            (table.row[first] >= 0).view(np.uint8),
            table.final.view(np.uint8),
            table.predicted,
            table.confidence,
            threshold_of(self, geometry),
            quotas_of(geometry) if self.quota is None else np.array([self.quota], np.int64),
            np.float32(self.hot_probability),
            self.hot_distance,
            self.limit,
            *walked.arrays,
        )
        return walked.upto(total)
