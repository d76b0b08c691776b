"""From how many tokens on copying an expert to the GPU beats computing it on the CPU, on a given machine.

Source: the decision of Fiddler (arXiv 2402.07033, section on the execution strategy): a missing expert goes where its latency
is lower, the transfer counted on the GPU's side. Latencies are those of ``cost.py``, without the kernel's floor, which a
layer pays once for all its experts.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from simulator.cost import CostModel
from simulator.policy import ExpertStream, Placement

# Token counts are looked at in runs of this many, up to the last one.
RUN, LAST = 1 << 12, 1 << 20
NEVER = int(np.iinfo(np.uint32).max)


def expert_seconds(cost: CostModel, expert_bytes: int, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What one expert takes: on the CPU, on the GPU, and to be copied there first; float64 [N] each, seconds.

    On the GPU it takes what one more expert adds to its layer.

    Parameters
    ----------
    cost : CostModel
        Machine and model.
    expert_bytes : int
        Of the expert.
    tokens : np.ndarray
        [N], rows that use it.
    """
    hardware, cells = cost.hardware, len(tokens)
    cost = replace(cost, hardware=replace(hardware, kernel=replace(hardware.kernel, floor_s=0.0)))
    stream = ExpertStream(
        cell_forward=np.arange(cells),
        cell_layer=np.zeros(cells, np.int32),
        offsets=np.arange(cells + 1),
        experts=np.zeros(cells, np.uint16),
        tokens=np.asarray(tokens).astype(np.uint32),
        last_touch=np.zeros(cells, np.uint16),
    )
    one, none = np.ones(cells, np.int64), np.zeros(cells, np.int64)
    size = np.full(cells, expert_bytes, np.int64)
    here, there = np.zeros(cells, bool), np.ones(cells, bool)
    on_cpu = cost.cell_seconds(stream, Placement(here, here, none, none, none, none), size)
    on_gpu = cost.cell_seconds(stream, Placement(here, there, one, one, none, one), size)
    return on_cpu[:, 3], on_gpu[:, 2], on_gpu[:, 0]


def break_even_tokens(cost: CostModel, expert_bytes: int) -> int:
    """The most tokens an expert may have for the CPU to be faster than copying it in and computing it on the GPU.

    0 where copying always wins, 2 ** 32 - 1 where it never does up to 2 ** 20 tokens. Where a GPU is no slower than its CPU
    there is one such number; elsewhere it is the one before copying wins for the first time.

    Parameters
    ----------
    cost : CostModel
        Machine and model.
    expert_bytes : int
        Of the expert.
    """
    for first in range(1, LAST, RUN):
        tokens = np.arange(first, first + RUN)
        on_cpu, on_gpu, copied = expert_seconds(cost, expert_bytes, tokens)
        worse = np.flatnonzero(on_cpu >= copied + on_gpu)
        if len(worse):
            return first + int(worse[0]) - 1
    return NEVER
