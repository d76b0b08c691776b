"""A model call on the host: what the hooks and the loop said of it, and its rows as the trace will hold them.

B sequences a call, T rows each, R rows of the current block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tracer.recording.sequences import Sequence
from tracer.schema import undecided
from tracer.trace import CallRouting


@dataclass(frozen=True, slots=True)
class Branches:
    """What a speculative loop says of a call of T rows, branch-major. Format: trace-format.md, "Speculative calls"."""

    branches: int
    chosen_branch: int | None
    num_accepted: int
    routed: np.ndarray | None = None  # bool [T], rows that the MoE layers got, so that routers fired on; None: all

    def spread(self, routing: CallRouting) -> CallRouting:
        """Routing of the routed rows alone as that of all rows, zeros elsewhere."""
        routed = self.routed
        if routed is None:
            return routing

        def whole(array: np.ndarray | None) -> np.ndarray | None:
            if array is None:
                return None
            spread = np.zeros((len(array), len(routed), array.shape[2]), array.dtype)
            spread[:, routed] = array
            return spread

        ids = whole(routing.expert_ids)
        assert ids is not None
        count = np.broadcast_to(np.where(routed, ids.shape[2], 0), ids.shape[:2])
        return CallRouting(routing.layers, ids, whole(routing.gate_weights), whole(routing.router_scores), count)


@dataclass(slots=True)
class HostCall:
    """One model call on the host. ``positions`` is -1 at padding.

    Prediction arrays are [B, R], for the rows from ``first_row`` [B] on (None: the last R). ``argmax_ids`` without
    ``predicted_ids``, or the other way round, stands for both. ``written`` holds, for the prediction rows of the call before,
    the token each now has (-1: not held) and the probability that call gave it.
    """

    token_ids: np.ndarray  # int32 [B, T]
    positions: np.ndarray  # int32 [B, T]
    kv_tokens: int
    routing: CallRouting
    duration_ns: int | None = None
    announced: tuple[str, int, int] | None = None
    first_row: np.ndarray | None = None
    argmax_ids: np.ndarray | None = None
    argmax_confidence: np.ndarray | None = None
    predicted_ids: np.ndarray | None = None
    confidence: np.ndarray | None = None
    accepted: np.ndarray | None = None
    kept: np.ndarray | None = None
    settle: bool = False
    branches: Branches | None = None
    written: tuple[np.ndarray, np.ndarray] | None = None


@dataclass(slots=True)
class Part:
    """One sequence's rows of a call, [T] each. ``open`` marks masked rows whose acceptance is not known yet.

    ``number`` counts calls; ``first_row`` is the first row that has a prediction.
    """

    sequence: Sequence
    kind: str
    block: int
    step: int
    kv_tokens: int
    positions: np.ndarray
    token_ids: np.ndarray
    state: np.ndarray
    predicted_ids: np.ndarray
    confidence: np.ndarray
    argmax_ids: np.ndarray
    argmax_confidence: np.ndarray
    accepted: np.ndarray
    open: np.ndarray
    branches: Branches | None = None
    number: int = 0
    first_row: int = 0
    settle: bool = False

    def accept(self, rows: np.ndarray, token_ids: np.ndarray, probability: np.ndarray) -> None:
        """Mark ``rows`` [T] bool as accepted with these tokens and the probabilities the call gave them."""
        self.accepted |= rows
        self.predicted_ids[rows] = token_ids[rows]
        self.confidence[rows] = probability[rows]

    def settle_rest(self) -> None:
        """The canvas ended after this call: whatever was still masked is kept as the argmax."""
        self.settle = False
        rest = undecided(self.state) & ~self.accepted
        self.accept(rest, self.argmax_ids, self.argmax_confidence)
        self.sequence.learn(self.positions[rest], self.argmax_ids[rest])


def as_rows(parts: list[Part], duration_ns: int | None) -> tuple[list[dict], dict[str, np.ndarray]]:
    """The rows of ``forwards`` and the columns of ``tokens`` that a call's parts make."""
    start = 0
    rows: list[dict] = []
    for part in parts:
        branches = part.branches or Branches(1, None, int(np.count_nonzero(part.accepted)))
        rows.append(
            {
                "request_id": part.sequence.request_id,
                "kind": part.kind,
                "block": part.block,
                "step": part.step,
                "row_start": start,
                "num_tokens": len(part.positions),
                "kv_tokens": part.kv_tokens,
                "num_masked": int(np.count_nonzero(undecided(part.state))),
                "num_accepted": branches.num_accepted,
                "branches": branches.branches,
                "chosen_branch": branches.chosen_branch,
                "duration_ns": duration_ns,
            }
        )
        start += len(part.positions)
    columns = {
        "position": [part.positions for part in parts],
        "token_id": [part.token_ids for part in parts],
        "state": [part.state for part in parts],
        "predicted_id": [part.predicted_ids for part in parts],
        "confidence": [part.confidence for part in parts],
        "argmax_id": [part.argmax_ids for part in parts],
        "argmax_confidence": [part.argmax_confidence for part in parts],
        "accepted": [part.accepted for part in parts],
    }
    return rows, {name: given[0] if len(given) == 1 else np.concatenate(given) for name, given in columns.items()}
