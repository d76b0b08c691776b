"""Row states of recorded forwards by TEAM's rules, and whether a run recorded under TEAM itself followed them.

Source: arXiv 2602.08404 and its released loop (github PKU-SEC-Lab/TEAM-MoE-dLLM @e9c502e). Everything the rules decide on is in
the trace of a TEAM run: what each branch knew, predicted and accepted, and how sure it was. So every decision is made again and
held against the recorded one; a replay of such a run is no estimate, and a run of other rules is refused.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from simulator.policy import Geometry, Trajectory
from simulator.speculation.walk import Walk
from tracer.decoding.accepting import AcceptRule, accept_rule, quotas
from tracer.decoding.blocks import BlockTable
from tracer.decoding.team_rules import TeamRules
from tracer.errors import UserError
from tracer.schema import PADDING
from tracer.trace import ForwardTable, LayerTrace

LOOP = "team"

# The threshold of TEAM's released SDAR configuration, for traces that do not say theirs.
THRESHOLD = 0.95

HOT = ("hot_probability", "hot_distance")


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


def kept_branch(forwards: ForwardTable, table: BlockTable) -> np.ndarray:
    """int64 [S]: the branch each recorded denoise forward went on with."""
    several = forwards.branches[table.forward] > 1
    kept = np.where(several, forwards.chosen_branch[table.forward], 0)
    return np.clip(kept, 0, table.known.shape[1] - 1).astype(np.int64)


def refuse_other_rules(forwards: ForwardTable, table: BlockTable, walk: Walk) -> None:
    """Hold every decision of a TEAM run against the one the rules make from what the forward before left.

    Raises
    ------
    UserError
        Naming the first forward that the rules would not have made.
    """
    branches, gained = forwards.branches[table.forward], forwards.num_accepted[table.forward]
    later = walk.chosen >= 0
    known, accepted, kept = table.known, table.accepted, kept_branch(forwards, table)
    before = np.arange(len(kept)) - 1
    left = known[before, kept[before]] | accepted[before, kept[before]]
    faults = {
        "holds another number of branches": branches != np.where(later, known.shape[1], 1),
        "knew other tokens": (known != walk.state).any(axis=(1, 2)) | (later & (known[:, 0] != left).any(axis=1)),
        "accepted other tokens": (accepted != walk.accepted).any(axis=(1, 2)),
        "kept another branch": (branches > 1) & (forwards.chosen_branch[table.forward] != walk.chosen),
        "gained another number of tokens": (gained >= 0) & (gained != walk.gained),
    }
    wrong = np.stack(list(faults.values()))
    if wrong.any():
        at = int(np.argmax(wrong.any(axis=0)))
        _refuse(int(forwards.forward_id[table.forward[at]]), list(faults)[int(np.argmax(wrong[:, at]))])


def row_states(forwards: ForwardTable, table: BlockTable, walk: Walk) -> tuple[np.ndarray, np.ndarray]:
    """Rows of recorded forwards that are reused, and those that are cold, bool [T]; the same in every branch.

    A block's first step computes everything. Later, what was known and not just accepted is reused, as is every row outside the
    block: a guess that held was computed as a real token already. Masked positions are cold by their probability in the step
    before and their distance to what is known now.
    """
    later, kept = walk.chosen >= 0, kept_branch(forwards, table)
    before = np.arange(len(kept)) - 1
    reused = later[:, None] & (table.known[:, 0] > table.accepted[before, kept[before]])
    outside = np.zeros(forwards.num_forwards, bool)
    outside[table.forward[later]] = True
    here = table.row >= 0
    reused_rows, cold_rows = np.repeat(outside, np.diff(forwards.row_offsets)), np.zeros(forwards.num_rows, bool)
    for rows, states in ((reused_rows, reused), (cold_rows, walk.cold)):
        rows[table.row[here]] = np.broadcast_to(states[:, None], here.shape)[here]
    return reused_rows, cold_rows


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
