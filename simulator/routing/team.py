"""TEAM: decoded rows reuse their experts' outputs, cold rows choose among the experts the others use, four branches speculate.

Source: arXiv 2602.08404 and its released layer (github PKU-SEC-Lab/TEAM-MoE-dLLM @e9c502e, modeling_sdar_moe_mark.py): if any
computed row of a forward is cold, N is the union of the vanilla experts of those that are not, and every computed row takes
its top-K inside N by the model's own rule. Without groups that changes nothing for the others, which keep their recorded
experts and weights. Where N has fewer than K experts the release fills up with zero weights; here a row takes
min(K, reachable).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np

from simulator.acceptance import team as team_acceptance
from simulator.kernels import router_arrays, select_experts
from simulator.policy import ACTIVE, CONFIDENCE, SCORES, TOKENS, Geometry, Selection, Trajectory
from simulator.registry import describe
from simulator.selecting.reselect import copied_selection, recorded_scores, recorded_selection, refuse_missing_score
from simulator.speculation.recorded_team import check_experts, check_rows, other_parameters, recorded_under_team
from simulator.tallies.counting import union_sets
from tracer.decoding.team_rules import TeamRules
from tracer.errors import UserError
from tracer.jit import njit
from tracer.trace import LayerTrace


@njit
def _drop_outside(rows, row_offsets, members, member_offsets, num_experts, ids, count, weights):
    """Drop from every row the experts that are not in its set; the others keep order and weight."""
    inside = np.zeros(num_experts, np.uint8)
    for s in range(len(row_offsets) - 1):
        own = members[member_offsets[s] : member_offsets[s + 1]]
        for e in own:
            inside[e] = 1
        for i in range(row_offsets[s], row_offsets[s + 1]):
            t = rows[i]
            kept = 0
            for k in range(count[t]):
                if inside[ids[t, k]]:
                    ids[t, kept] = ids[t, k]
                    weights[t, kept] = weights[t, k]
                    kept += 1
            count[t] = kept
            ids[t, kept:] = 0
            weights[t, kept:] = 0
        for e in own:
            inside[e] = 0


@dataclass(frozen=True)
class Team(TeamRules):
    """Reuse decoded rows, keep cold rows inside what the others use, speculate in four branches.

    Brings its acceptance along. Parameters are those of :class:`TeamRules`, and:

    Parameters
    ----------
    reselect : bool
        Let cold rows choose anew, by router scores. False needs none and only drops their experts outside N: unique experts
        stay exact for routers without groups, but the tokens of an expert are a lower bound. On a run recorded under TEAM it
        keeps what is recorded.
    """

    reselect: bool = True
    requires: ClassVar[frozenset[str]] = frozenset({TOKENS, CONFIDENCE, SCORES})

    def __post_init__(self) -> None:
        TeamRules.__post_init__(self)
        needed = self.acceptance().requires
        if self.limit and self.reselect:
            # Speculative forwards mix rows of several calls, whose columns at level "active" differ.
            needed |= {SCORES if self.speculate else ACTIVE}
        object.__setattr__(self, "requires", needed)

    def acceptance(self) -> team_acceptance.TeamAcceptance:
        """The acceptance policy of the same parameters."""
        return team_acceptance.TeamAcceptance(**{rule.name: getattr(self, rule.name) for rule in fields(TeamRules)})

    def accepting(self, asked: Any) -> Any:
        """The acceptance policy to use where another than its own is asked for: its reuse and limit on that one's forwards.

        Raises
        ------
        UserError
            It is to speculate on forwards that are not TEAM's.
        """
        if isinstance(asked, team_acceptance.TeamAcceptance):
            return asked
        if self.speculate:
            raise UserError(
                "team speculates on forwards of its own; give --routing team:speculate=false for its reuse and limit on "
                f"those of acceptance {describe(asked)['name']}, or leave --acceptance out."
            )
        return self.acceptance()

    def recorded_in(self, geometry: Geometry) -> bool:
        """Whether the trace's run was decoded under this very policy, so that its replay is no estimate."""
        return recorded_under_team(geometry.decoding) and not other_parameters(self, geometry)

    def select(self, layer: LayerTrace, trajectory: Trajectory, geometry: Geometry) -> Selection:
        """Experts of the rows that compute, cold ones inside what the others of their forward use.

        Raises
        ------
        UserError
            A router score is not held, ``reselect`` is off and the router has groups, or a run recorded under TEAM computed
            other rows or used other experts.
        """
        kept = recorded_selection(layer, trajectory)
        own = recorded_under_team(geometry.decoding)
        if own:
            check_rows(layer, trajectory)
            if not self.reselect:
                return kept
        if not self.limit or trajectory.cold is None:
            return kept
        offsets = trajectory.forwards.row_offsets
        cold = trajectory.cold & (kept.count > 0)
        running = np.concatenate(([0], np.cumsum(cold)))
        limited = running[offsets[1:]] > running[offsets[:-1]]
        if not limited.any():
            return kept
        router = router_arrays(layer.router)
        if router.n_group > 1:
            if not self.reselect:
                raise UserError("team: reselect=false is exact for routers without groups only; use reselect=true.")
            # Restricting the set moves group scores, so rows that are not cold may change as well.
            again = np.repeat(limited, np.diff(offsets)) & (kept.count > 0)
        else:
            again = cold
        warm = np.where(cold, np.uint8(0), kept.count)
        members, member_offsets = union_sets(
            np.ascontiguousarray(layer.expert_ids), warm, offsets, layer.router.num_experts
        )
        rows = np.flatnonzero(again)
        row_offsets = np.searchsorted(rows, offsets)
        ids, count, weights = copied_selection(layer, trajectory)
        if not self.reselect:
            _drop_outside(rows, row_offsets, members, member_offsets, layer.router.num_experts, ids, count, weights)
            return Selection(ids, count, weights)
        scores = recorded_scores(layer, "team")
        missing = select_experts(scores, rows, row_offsets, members, member_offsets, router, ids, count, weights)
        if missing >= 0:
            refuse_missing_score("team", layer, trajectory, missing)
        if own:
            check_experts(layer, trajectory, ids, count)
        return Selection(ids, count, weights)
