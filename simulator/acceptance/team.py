"""TEAM: which rows are reused or cold, and speculative forwards of four branches of a block.

Source: arXiv 2602.08404 and its released loop (github PKU-SEC-Lab/TEAM-MoE-dLLM @e9c502e). Without speculation the states are
vanilla's own, so row states are exact. With it, states vanilla never saw take predictions, probabilities and router rows from
the latest vanilla step of the block whose known set they contain; a position known there but masked at that step takes its
router row from its first forward as a real token, see :mod:`simulator.speculation.simulated`. Rows outside the current block
(no KV cache) are computed in a block's first forward and reused until its commit forward. A run recorded under TEAM itself
keeps its forwards, see :mod:`simulator.speculation.recorded_team`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from simulator.acceptance.recorded import Recorded
from simulator.policy import CONFIDENCE, TOKENS, Geometry, Trajectory
from simulator.speculation.recorded_team import (
    LOOP,
    accept_rule_of,
    kept_branch,
    other_parameters,
    recorded_under_team,
    refuse_other_rules,
    row_states,
)
from simulator.speculation.simulated import simulated_trajectory
from simulator.speculation.walk import Walk, fewest_forwards, walked
from tracer.decoding.blocks import BlockTable, block_table
from tracer.decoding.team_rules import BRANCHES, TeamRules
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
class TeamAcceptance(TeamRules):
    """Reuse decoded rows, mark cold ones, and speculate on the surest positions; parameters as in :class:`TeamRules`."""

    requires: ClassVar[frozenset[str]] = frozenset({TOKENS, CONFIDENCE})

    def __post_init__(self) -> None:
        TeamRules.__post_init__(self)
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
        recorded, ran = Recorded().unroll(segment, geometry), recorded_under_team(geometry.decoding)
        if ran:
            self._refuse_other_parameters(geometry)
        elif not (self.reuse or self.limit or self.speculate):
            return recorded
        confidence = ran or self.limit or self.speculate
        table = block_table(segment, geometry.block_length, LOOP, BRANCHES if ran and self.speculate else 1, confidence)
        rule = accept_rule_of(self, geometry)
        if self.speculate and not ran:
            return self._simulated(segment, table, walked(table, rule, self))
        walk = walked(table, rule, self, kept_branch(segment.forwards, table))
        if ran:
            refuse_other_rules(segment.forwards, table, walk)
        reused, cold = row_states(segment.forwards, table, walk)
        return replace(recorded, reused=reused if self.reuse else None, cold=cold if self.limit else None)

    def _refuse_other_parameters(self, geometry: Geometry) -> None:
        others = other_parameters(self, geometry)
        if others:
            ran = ",".join(f"{name}={str(value).lower()}" for name, value in others.items())
            raise UserError(
                f"This trace was recorded under TEAM with {ran}; replay it with routing team:{ran} or vanilla, or capture a "
                "vanilla run for other parameters."
            )

    def _simulated(self, segment: Segment, table: BlockTable, walk: Walk) -> Trajectory:
        trajectory, rows = simulated_trajectory(segment, table, walk)
        computed = ~rows.reused if self.reuse else np.ones(len(rows.reused), bool)
        return replace(
            trajectory,
            reused=rows.reused if self.reuse else None,
            cold=rows.cold if self.limit else None,
            notes=(SURROGATE, BOUNDS, LAST_STEP) if rows.stand_in.any() else (SURROGATE, BOUNDS),
            bounds=_token_bounds(table, walk),
            bound_rows=(computed & (trajectory.branch == 0) & ~rows.cold, computed),
        )


def _token_bounds(table: BlockTable, walk: Walk) -> dict[str, tuple[int, int]]:
    """Tokens and forwards of the scenarios with the fewest and with the most tokens per forward.

    No guess holds: vanilla. Every guess holds that may: :func:`fewest_forwards`, which stays at vanilla's states. With a quota
    above 1, another threshold or quota than the run's, or a block cut short, the walk leaves them and may do better or worse;
    such a block counts with the walk's own figures on that side. Summed by block, whatever the segments.
    """
    blocks, vanilla = len(table.commit), np.diff(table.offsets)
    accepted, gained = np.zeros((2, blocks), np.int64)
    np.add.at(accepted, np.repeat(np.arange(blocks), vanilla), table.accepted.sum(axis=(1, 2), dtype=np.int64))
    np.add.at(gained, walk.block, walk.gained)
    simulated, fewest = np.bincount(walk.block, minlength=blocks), fewest_forwards(table)
    return {
        "accepted": (int(np.minimum(accepted, gained).sum()), int(np.maximum(accepted, gained).sum())),
        "denoise_forwards": (int(np.maximum(vanilla, simulated).sum()), int(np.minimum(fewest, simulated).sum())),
    }
