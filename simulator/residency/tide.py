"""TIDE: every few steps the experts of most tokens move to the GPU; every other expert runs on the CPU where it lives.

Source: arXiv 2605.20179 and its released code (github ims-kdks/TIDE). The released code has denoise forwards only; elsewhere a
prefill refreshes, a commit never does, and a "decode" forward takes its index in the request as its step. Experts the code
demotes are picked in the order of a Python set; here they go by ascending id, which is the same whenever at least B experts are
active.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from simulator.budget import Budgeted
from simulator.caching.refresh import refreshed_placement
from simulator.policy import ExpertStream, Geometry, Placement
from simulator.walk import Watcher
from tracer.errors import UserError
from tracer.schema import COMMIT, DECODE, PREFILL
from tracer.trace import ForwardTable


@dataclass(frozen=True)
class Tide(Budgeted):
    """Refresh the resident set to the most loaded experts every refresh_interval steps and all through the first block.

    Parameters
    ----------
    refresh_interval : int
        tau (``jump_steps`` in the released code, 2 in its example).
    copy_back : bool
        Whether a demoted expert crosses the bus again, as in the released code; an engine with a host copy moves nothing.
    """

    refresh_interval: int = 2
    copy_back: bool = True

    requires: ClassVar[frozenset[str]] = frozenset()
    passes: ClassVar[int] = 1
    scope: ClassVar[str] = "layer"
    ordered: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refresh_interval < 1:
            raise UserError(f"refresh_interval={self.refresh_interval} is no interval; give 1 or more steps.")

    def many(self) -> type[Watcher]:
        """What serves many intervals and budgets in one pass."""
        from simulator.caching.tide_grid import TideGrid

        return TideGrid

    def start(self, geometry: Geometry, layer: int | None) -> tuple[np.ndarray, dict[int, int]]:
        """The first B experts by index, bool [E], and the decode forwards each request has had."""
        return np.arange(geometry.num_experts) < self.experts_per_layer(geometry, layer or 0), {}

    def place(
        self, stream: ExpertStream, forwards: ForwardTable, geometry: Geometry, state: Any
    ) -> tuple[Placement, Any]:
        """Serve one layer's cells in order; the resident set persists over blocks and requests."""
        resident, decoded = state[0].copy(), dict(state[1])
        refresh = refreshes(forwards, geometry.first_block, self.refresh_interval, decoded)
        return refreshed_placement(stream, refresh, resident, self.copy_back), (resident, decoded)


def refreshes(
    forwards: ForwardTable, first_block: dict[int, int], interval: int, decoded: dict[int, int]
) -> np.ndarray:
    """Which model calls refresh, bool [F]: any request in it would.

    Parameters
    ----------
    forwards : ForwardTable
        Of the segment.
    first_block : dict
        Request to its first generated block; the first-block rule holds only where that is >= 0.
    interval : int
        Steps between refreshes.
    decoded : dict
        Request to its decode forwards so far; brought up to date.
    """
    requests, of_part = np.unique(forwards.request_id, return_inverse=True)
    first = np.array([first_block.get(int(r), -1) for r in requests], np.int64)[of_part]
    step = forwards.step.astype(np.int64)
    decode = np.flatnonzero(forwards.kind == DECODE)
    for n in decode.tolist():
        request = int(forwards.request_id[n])
        step[n] = decoded.get(request, 0)
        decoded[request] = int(step[n]) + 1
    wanted = ((first >= 0) & (forwards.block == first)) | (step % interval == 0)
    wanted = np.where(forwards.kind == PREFILL, True, wanted & (forwards.kind != COMMIT))
    if not len(wanted):
        return wanted
    return np.logical_or.reduceat(wanted, forwards.part_offsets[:-1])
