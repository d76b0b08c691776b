"""A run recorded under TEAM itself: its row states from the recorded tables by the released rules, and whether they are TEAM's.

Source: arXiv 2602.08404 and its released loop (github PKU-SEC-Lab/TEAM-MoE-dLLM @e9c502e). Everything the rules decide on is in
the trace: what each branch knew, predicted and accepted, and how sure it was. So every decision is made again and held against
the recorded one; a replay of such a run is no estimate, and a run of other rules is refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NoReturn

import numpy as np

from simulator.policy import Geometry, Trajectory
from simulator.speculation.branch_table import BranchTable, branch_table
from simulator.speculation.walk import accept, mark_cold, two_surest
from tracer.decoding.quotas import quotas
from tracer.errors import UserError
from tracer.jit import njit
from tracer.schema import PADDING
from tracer.trace import LayerTrace, Segment

LOOP = "team"

# The threshold of TEAM's released SDAR configuration, for traces that do not say theirs.
THRESHOLD = 0.95

SWITCHES = ("reuse", "limit", "speculate")
HOT = ("hot_probability", "hot_distance")

# What may be otherwise than the rules say, by the code of :func:`_follow`.
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


def other_parameters(policy: Any, geometry: Geometry) -> dict[str, Any]:
    """Parameters of the recorded run that a TEAM policy has otherwise; empty when it is that very policy.

    Parameters
    ----------
    policy
        Has the fields of :class:`simulator.acceptance.team.TeamAcceptance`; ``threshold`` and ``quota`` None take the trace's.
    geometry : Geometry
    """
    decoding = geometry.decoding
    names = [*SWITCHES, *(HOT if policy.limit else ()), *(("threshold",) if policy.threshold is not None else ())]
    others = {
        name: decoding[name]
        for name in names
        if decoding.get(name) is not None and decoding[name] != getattr(policy, name)
    }
    own = quotas_of(geometry)
    if policy.quota is not None and (own != policy.quota).any():
        others["quota"] = int(own[0])
    return others


def quotas_of(geometry: Geometry) -> np.ndarray:
    """int64 [steps]: tokens a block gains at least at each of its steps, by the rule of the decoding loops."""
    steps = max(1, int(geometry.decoding.get("steps") or geometry.block_length or 1))
    return np.array(quotas(geometry.block_length, steps), np.int64)


def threshold_of(policy: Any, geometry: Geometry) -> np.float32:
    """Probability above which a token is accepted: the policy's, the trace's or the released one."""
    threshold = policy.threshold if policy.threshold is not None else geometry.decoding.get("threshold")
    threshold = THRESHOLD if threshold is None else threshold
    # From 1 on the threshold accepts nothing, whatever a probability rounds to.
    return np.float32(np.inf if threshold >= 1 else threshold)


@njit
def _follow(
    offsets, here, known, accepted, predicted, confidence, branches, chosen, gained, threshold, quotas,
    hot_probability, hot_distance, speculate, reused, cold,
):  # fmt: skip
    """Walk every block by the rules; return the first (step, fault) where the record is otherwise, (-1, 0) if nowhere.

    Of each step are written: ``reused`` and ``cold`` uint8 [S, B], the same in every branch. ``chosen`` int64 [S] is -1 in
    calls of one branch. Ties go to the lowest position.
    """
    width = known.shape[2]
    taken = np.empty((known.shape[1], width), np.uint8)
    count = np.empty(known.shape[1], np.int64)
    distance = np.empty(width, np.int64)
    for c in range(len(offsets) - 1):
        kept = 0
        for s in range(offsets[c], offsets[c + 1]):
            later = s > offsets[c]
            wanted = known.shape[1] if later and speculate else 1
            if branches[s] != wanted:
                return s, 1
            quota = quotas[min(s - offsets[c], len(quotas) - 1)]
            for r in range(wanted):
                count[r] = accept(known[s, r], confidence[s, r], threshold, quota, taken[r])
                for j in range(width):
                    if taken[r, j] != accepted[s, r, j]:
                        return s, 2
            right, extra = 0, 0
            if later:
                before, just = known[s - 1, kept], accepted[s - 1, kept]
                sure, guess = confidence[s - 1, kept], predicted[s - 1, kept]
                a, b = two_surest(known[s, 0], sure)
                for r in range(wanted):
                    for j in range(width):
                        guessed = (r & 1 and j == a) or (r & 2 and j == b)
                        if known[s, r, j] != (before[j] | just[j] | guessed):
                            return s, 3
                for j in range(width):
                    # A guess that held was computed as a real token already, so only accepted tokens are computed anew.
                    reused[s, j] = before[j] and not just[j] and here[c, j]
                mark_cold(known[s, wanted - 1], here[c], sure, a, b, hot_probability, hot_distance, distance, cold[s])
                if wanted > 1 and a >= 0:
                    first = taken[0, a] == 1 and predicted[s, 0, a] == guess[a]
                    second, second_after, first_after = False, False, False
                    if b >= 0:
                        second = taken[0, b] == 1 and predicted[s, 0, b] == guess[b]
                        second_after = taken[1, b] == 1 and predicted[s, 1, b] == guess[b]
                        first_after = second and taken[2, a] == 1 and predicted[s, 2, a] == guess[a]
                    if (first and (second or second_after)) or (second and first_after):
                        right, extra = 3, 2
                    elif first:
                        right, extra = 1, 1
                    elif second:
                        right, extra = 2, 1
            if wanted > 1 and chosen[s] != right:
                return s, 4
            if gained[s] >= 0 and gained[s] != count[right] + extra:
                return s, 5
            kept = right
    return -1, 0


def recorded_team(segment: Segment, geometry: Geometry, policy: Any, recorded: Trajectory) -> Trajectory:
    """The recorded forwards of a TEAM run with the row states its rules give.

    Parameters
    ----------
    segment : Segment
        One request a call.
    geometry : Geometry
        Of a trace whose decoding says ``loop: team``.
    policy
        Has the fields of :class:`simulator.acceptance.team.TeamAcceptance`.
    recorded : Trajectory
        The identity.

    Raises
    ------
    UserError
        Other parameters than the run's, no token states, blocks or confidences, or a call that the rules would not have made.
    """
    others = other_parameters(policy, geometry)
    if others:
        told = ",".join(f"{name}={str(value).lower()}" for name, value in others.items())
        raise UserError(
            f"This trace was recorded under TEAM with {told}; replay it with routing team:{told} or vanilla, or capture a "
            "vanilla run for other parameters."
        )
    forwards = segment.forwards
    table = branch_table(segment, geometry.block_length, LOOP)
    here = table.row[table.offsets[:-1], 0] >= 0
    reused, cold = np.zeros((2, len(table.forward), geometry.block_length), np.uint8)
    at, fault = _follow(
        table.offsets,
        here.view(np.uint8),
        table.known.view(np.uint8),
        table.accepted.view(np.uint8),
        table.predicted,
        table.confidence,
        forwards.branches[table.forward].astype(np.int64),
        forwards.chosen_branch[table.forward].astype(np.int64),
        forwards.num_accepted[table.forward],
        threshold_of(policy, geometry),
        quotas_of(geometry),
        np.float32(policy.hot_probability),
        policy.hot_distance,
        policy.speculate,
        reused,
        cold,
    )
    if fault:
        _refuse(int(forwards.forward_id[table.forward[at]]), FAULTS[fault])
    return replace(
        recorded,
        reused=_by_row(segment, table, reused, True) if policy.reuse else None,
        cold=_by_row(segment, table, cold, False) if policy.limit else None,
    )


def _by_row(segment: Segment, table: BranchTable, states: np.ndarray, outside: bool) -> np.ndarray:
    """Bool [T] from uint8 [S, B]; ``outside``: rows outside the block have it in every step of a block but its first."""
    forwards = segment.forwards
    found = np.zeros(forwards.num_rows, bool)
    if outside:
        later = np.ones(len(table.forward), bool)
        later[table.offsets[:-1]] = False
        of_forward = np.zeros(forwards.num_forwards, bool)
        of_forward[table.forward] = later
        found = np.repeat(of_forward, np.diff(forwards.row_offsets))
    here = table.row >= 0
    found[table.row[here]] = np.broadcast_to(states[:, None].astype(bool), here.shape)[here]
    return found


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
        found = _forward_of(trajectory, int(np.argmax(wrong)))
        _refuse(found, f"computed other rows in layer {layer.layer}")


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
        found = _forward_of(trajectory, int(rows[np.argmin(same)]))
        raise UserError(
            f"team: cold rows of forward {found}, layer {layer.layer}, choose other experts by their recorded scores than the "
            "trace holds; use team:reselect=false, which keeps the recorded ones."
        )


def _forward_of(trajectory: Trajectory, row: int) -> int:
    found = int(np.searchsorted(trajectory.forwards.row_offsets, row, side="right")) - 1
    return int(trajectory.forwards.forward_id[found])
