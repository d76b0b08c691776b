"""Which GPU of an expert-parallel group holds which expert of a layer.

Three placements: "contiguous" (E / G consecutive experts each, the first E mod G GPUs one more: vLLM's linear placement),
"round_robin" (expert e on GPU e mod G) and "balanced" (the packing of EPLB, github deepseek-ai/EPLB, ``balanced_packing``:
experts of a layer by falling load, each to the least loaded GPU with a free slot, ceil(E / G) slots each, ties to the lowest
id). EPLB also replicates hot experts and takes past loads; we replicate nothing and take the loads of the very run, so that
"balanced" is what a static placement can know at best.
"""

from __future__ import annotations

import numpy as np

from tracer.errors import UserError, unknown

PLACEMENTS = ("contiguous", "round_robin", "balanced")


def place_experts(num_experts: int, gpus: int, placement: str, load: np.ndarray | None = None) -> np.ndarray:
    """The GPU of every expert of a layer, int64 [E].

    Parameters
    ----------
    num_experts : int
        E.
    gpus : int
        G, 1 to E.
    placement : str
        One of :data:`PLACEMENTS`.
    load : np.ndarray, optional
        [E], tokens of each expert; for "balanced".

    Raises
    ------
    UserError
        Unknown placement, or G out of range.
    """
    if placement not in PLACEMENTS:
        raise unknown("expert placement", placement, PLACEMENTS)
    if not 1 <= gpus <= num_experts:
        raise UserError(f"gpus must be 1 to {num_experts}, the experts of a layer, not {gpus}.")
    experts = np.arange(num_experts)
    if placement == "round_robin":
        return experts % gpus
    if placement == "contiguous":
        sizes = np.full(gpus, num_experts // gpus)
        sizes[: num_experts % gpus] += 1
        return np.repeat(np.arange(gpus), sizes)
    load = np.zeros(num_experts, np.int64) if load is None else np.asarray(load)
    gpu_of_expert = np.empty(num_experts, np.int64)
    carried, free = np.zeros(gpus, load.dtype), np.full(gpus, -(-num_experts // gpus))
    for expert in np.lexsort((experts, -load)):
        open_gpus = np.flatnonzero(free)
        gpu = open_gpus[np.argmin(carried[open_gpus])]
        gpu_of_expert[expert] = gpu
        carried[gpu] += load[expert]
        free[gpu] -= 1
    return gpu_of_expert
