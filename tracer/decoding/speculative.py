"""What a speculative loop adds to the recorder's calls: branches, the one kept, and rows that ran no router.

The recorder takes a call's rows as they come. A loop that runs several copies of a block in a call, or leaves rows out of the
MoE layers, says so here for every call, in order, before the recorder writes it. Format: trace-format.md, "Speculative calls".
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from tracer.errors import UserError
from tracer.trace import CallRouting


@dataclass(frozen=True, slots=True)
class Branches:
    """What a recorded call was. T rows, branch-major.

    ``routed`` bool [T] marks the rows the MoE layers got, None where all; the routers then fired on those rows only.
    """

    branches: int
    chosen_branch: int | None
    num_accepted: int
    routed: np.ndarray | None


class SpeculativeCalls:
    """Stands between the recorder's states and its writer while a loop runs.

    Parameters
    ----------
    recorder : tracer.recording.recorder.Recorder
        With a request just begun, so that no earlier call is waiting.
    """

    def __init__(self, recorder: Any) -> None:
        self._recorder, self._queue = recorder, deque[Branches | None]()
        self._write = recorder.states.write_call
        recorder.states.write_call = self._amend

    def expect(self, call: Branches | None) -> None:
        """Say what the next call to be written was; None for a plain one."""
        self._queue.append(call)

    def close(self, clean: bool) -> None:
        """Let go of the recorder; ``clean`` False after an exception, where a call may have got stuck."""
        try:
            if not clean:
                self._recorder.hooks.abandon_call()
                self._recorder.catch_up()
        finally:
            self._recorder.states.write_call = self._write

    def _amend(self, parts: list[dict], tokens: dict[str, np.ndarray], routing: CallRouting) -> None:
        call = self._queue.popleft()
        if call is not None:
            parts = [
                {
                    **parts[0],
                    "branches": call.branches,
                    "chosen_branch": call.chosen_branch,
                    "num_accepted": call.num_accepted,
                }
            ]
            if call.routed is not None:
                routing = _spread(routing, call.routed)
        self._write(parts, tokens, routing)


def _spread(routing: CallRouting, routed: np.ndarray) -> CallRouting:
    """Routing of the routed rows alone as that of all rows, zeros elsewhere."""

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


def tell_decoding(recorder: Any, section: dict[str, Any]) -> None:
    """Put a loop's parameters into the section ``decoding`` of meta.json.

    Raises
    ------
    UserError
        The trace is open already and says something else.
    """
    if recorder.sink.writer is None:
        recorder.decoding.update(section)
        return
    for name, value in section.items():
        if recorder.decoding.get(name) != value:
            raise UserError(
                f"This trace was begun with {name}={recorder.decoding.get(name)}, not {value}; record runs of other "
                "parameters into a trace of their own."
            )
