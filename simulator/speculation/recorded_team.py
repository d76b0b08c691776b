"""Row states of recorded forwards by TEAM's rules, and whether a run recorded under TEAM itself followed them.

Source: arXiv 2602.08404 and its released loop (github PKU-SEC-Lab/TEAM-MoE-dLLM @e9c502e). Everything the rules decide on is in
the trace of a TEAM run: what each branch knew, predicted and accepted, and how sure it was. So every decision is made again and
held against the recorded one; a replay of such a run is no estimate, and a run of other rules is refused.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import numpy as np

from simulator.policy import Geometry, Trajectory
from tracer.decoding.accepting import AcceptRule, accept, accept_rule, quotas
from tracer.decoding.blocks import BlockTable
from tracer.decoding.team_rules import (
    GUESSES,
    TeamRules,
    chosen_branch,
    fill_in,
    gained,
    join,
    mark_cold,
    put,
    surest,
)
from tracer.errors import UserError
from tracer.jit import njit
from tracer.schema import PADDING
from tracer.trace import ForwardTable, LayerTrace

LOOP = "team"

# The threshold of TEAM's released SDAR configuration, for traces that do not say theirs.
THRESHOLD = 0.95

HOT = ("hot_probability", "hot_distance")

# What may be otherwise than the rules say, by the code of :func:`_first_fault`.
FAULTS = {
    1: "holds another number of branches",
    2: "accepted other tokens",
    3: "knew other tokens",
    4: "kept another branch",
    5: "gained another number of tokens",
}


def recorded_under_team(decoding: dict[str, Any]) -> bool:
    """Whether the trace holds TEAM's own run."""
    return decoding.get("loop") == LOOP


def other_parameters(rules: TeamRules, geometry: Geometry) -> dict[str, Any]:
    """Parameters of the recorded run that these rules have otherwise; empty when they are that very run's."""
    steps, others = quotas_of(geometry), {}
    for name in ("reuse", "limit", "speculate", *(HOT if rules.limit else ()), "threshold"):
        ran, asked = geometry.decoding.get(name), getattr(rules, name)
        if None not in (ran, asked) and ran != asked:
            others[name] = ran
    if rules.quota is not None and (steps != rules.quota).any():
        others["quota"] = int(steps[0])
    return others


def quotas_of(geometry: Geometry) -> np.ndarray:
    """int64 [steps]: tokens a block gains at least at each of its steps, by the rule of the decoding loops."""
    steps = max(1, int(geometry.decoding.get("steps") or geometry.block_length or 1))
    return np.array(quotas(geometry.block_length, steps), np.int64)


def accept_rule_of(rules: TeamRules, geometry: Geometry) -> AcceptRule:
    """The accept rule that is asked for; threshold and quota are the rules', the trace's or the released ones."""
    threshold = rules.threshold if rules.threshold is not None else geometry.decoding.get("threshold")
    step_quotas = quotas_of(geometry) if rules.quota is None else [rules.quota]
    return accept_rule(THRESHOLD if threshold is None else threshold, step_quotas)


class Steps(NamedTuple):
    """What the trace says of each of S denoise forwards, besides its rows."""

    branches: np.ndarray  # uint8 [S]
    chosen: np.ndarray  # int16 [S], 0 in forwards of one branch
    gained: np.ndarray  # int64 [S], tokens, -1 unknown


def recorded_steps(forwards: ForwardTable, table: BlockTable) -> Steps:
    """The denoise forwards of a block table."""
    branches, chosen = forwards.branches[table.forward], forwards.chosen_branch[table.forward]
    return Steps(branches, np.where(branches > 1, chosen, np.int16(0)), forwards.num_accepted[table.forward])


def refuse_other_rules(forwards: ForwardTable, table: BlockTable, rules: TeamRules, rule: AcceptRule) -> None:
    """Make every decision of a TEAM run again.

    Raises
    ------
    UserError
        Naming the first forward that the rules would not have made.
    """
    at, fault = _first_fault(table, recorded_steps(forwards, table), rule, rules.speculate)
    if fault:
        _refuse(int(forwards.forward_id[table.forward[at]]), FAULTS[fault])


@njit
def _first_fault(table, steps, rule, speculate):
    """The first (step, fault) where the record is otherwise than the rules have it, (-1, 0) if nowhere."""
    known, accepted, predicted = table.known, table.accepted, table.predicted
    most, width = known.shape[1], known.shape[2]
    taken, states = np.empty(width, np.uint8), np.empty((most, width), np.uint8)
    state, guesses = np.empty(width, np.uint8), np.empty(GUESSES, np.int64)
    for c in range(len(table.commit)):
        kept = 0
        for s in range(table.offsets[c], table.offsets[c + 1]):
            step = s - table.offsets[c]
            wanted = most if step and speculate else 1
            if steps.branches[s] != wanted:
                return s, 1
            for r in range(wanted):
                accept(rule, step, known[s, r], table.confidence[s, r], taken)
                for j in range(width):
                    if taken[j] != accepted[s, r, j]:
                        return s, 2
            right = 0
            if step:
                put(state, known[s - 1, kept])
                join(state, accepted[s - 1, kept])
                surest(state, table.confidence[s - 1, kept], guesses)
                fill_in(state, guesses, states)
                for r in range(wanted):
                    for j in range(width):
                        if known[s, r, j] != states[r, j]:
                            return s, 3
                right = chosen_branch(guesses, predicted[s - 1, kept], predicted[s, :wanted], accepted[s])
            if wanted > 1 and steps.chosen[s] != right:
                return s, 4
            if steps.gained[s] >= 0 and steps.gained[s] != gained(known[s, 0], known[s, right], accepted[s, right]):
                return s, 5
            kept = right
    return -1, 0


def row_states(forwards: ForwardTable, table: BlockTable, rules: TeamRules) -> tuple[np.ndarray, np.ndarray]:
    """Rows of recorded forwards that are reused, and those that are cold, bool [T].

    A block's first step computes everything. Later, what was known and not just accepted is reused, as is every row outside the
    block: a guess that held was computed as a real token already. Masked positions are cold by their probability in the step
    before and their distance to what is known now.
    """
    reused, cold = np.zeros((2, len(table.forward), table.known.shape[2]), np.uint8)
    _row_states(table, recorded_steps(forwards, table).chosen, rules.hot, reused, cold)
    later = np.zeros(forwards.num_forwards, bool)
    later[table.forward] = True
    later[table.forward[table.offsets[:-1]]] = False
    here = table.row >= 0
    reused_rows, cold_rows = np.repeat(later, np.diff(forwards.row_offsets)), np.zeros(forwards.num_rows, bool)
    for rows, states in ((reused_rows, reused), (cold_rows, cold)):
        rows[table.row[here]] = np.broadcast_to(states[:, None], here.shape)[here]
    return reused_rows, cold_rows


@njit
def _row_states(table, chosen, hot, reused, cold):
    """Of each step write ``reused`` and ``cold`` uint8 [S, B], the same in every branch."""
    guesses = np.empty(GUESSES, np.int64)
    for c in range(len(table.commit)):
        for s in range(table.offsets[c] + 1, table.offsets[c + 1]):
            just, sure = table.accepted[s - 1, chosen[s - 1]], table.confidence[s - 1, chosen[s - 1]]
            surest(table.known[s, 0], sure, guesses)
            mark_cold(table.known[s, -1], table.here[c], sure, guesses, hot, cold[s])
            for j in range(len(just)):
                reused[s, j] = table.known[s, 0, j] and not just[j]


def _refuse(forward: int, what: str) -> NoReturn:
    raise UserError(
        f"team: forward {forward} {what} than TEAM's rules give with the parameters of this trace; replay it with routing "
        "vanilla, or capture it again."
    )


def check_rows(layer: LayerTrace, trajectory: Trajectory) -> None:
    """Hold the rows a layer got in a recorded TEAM run against those that compute.

    Raises
    ------
    UserError
        Naming the first forward where they differ.
    """
    idle = np.zeros(len(layer.count), bool) if trajectory.reused is None else trajectory.reused
    if trajectory.state is not None:
        # padding counts as not routed, whatever the rules say of its row
        idle = idle | (trajectory.state == PADDING)
    present = np.repeat(layer.present, np.diff(trajectory.forwards.row_offsets))
    wrong = present & ((layer.count == 0) != idle)
    if wrong.any():
        _refuse(_forward_of(trajectory, int(np.argmax(wrong))), f"computed other rows in layer {layer.layer}")


def check_experts(layer: LayerTrace, trajectory: Trajectory, ids: np.ndarray, count: np.ndarray) -> None:
    """Hold the experts cold rows choose anew against the recorded ones; ``ids`` [T, K], ``count`` uint8 [T].

    Raises
    ------
    UserError
        Naming the first forward where they differ.
    """
    if trajectory.cold is None:
        return
    rows = np.flatnonzero(trajectory.cold & (count > 0))
    # Slots past the count would meet real ids of the other side.
    same = count[rows] == layer.count[rows]
    same &= (np.sort(ids[rows], axis=1) == np.sort(layer.expert_ids[rows], axis=1)).all(axis=1)
    if not same.all():
        forward = _forward_of(trajectory, int(rows[np.argmin(same)]))
        raise UserError(
            f"team: cold rows of forward {forward}, layer {layer.layer}, choose other experts by their recorded scores than "
            "the trace holds; use team:reselect=false, which keeps the recorded ones."
        )


def _forward_of(trajectory: Trajectory, row: int) -> int:
    forward = int(np.searchsorted(trajectory.forwards.row_offsets, row, side="right")) - 1
    return int(trajectory.forwards.forward_id[forward])
