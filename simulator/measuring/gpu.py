"""How fast this machine's GPU is at what an expert needs: copies from and to the host, reading weights, multiplying.

torch is an option of the capture side and nothing else of this package asks for it; it is imported here alone, by name and on
demand, so that simulating needs none.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from itertools import cycle
from statistics import median
from typing import Any

from simulator.measuring.host import HIDDEN, INTERMEDIATE, Limits, repeat

WEIGHT_BYTES = 2
EXPERT_BYTES = 3 * HIDDEN * INTERMEDIATE * WEIGHT_BYTES
EXPERT_FLOPS = 6.0 * HIDDEN * INTERMEDIATE
LAUNCHES = 200


def cuda_torch() -> Any | None:
    """The torch module where it is installed and sees a CUDA device, otherwise None."""
    if importlib.util.find_spec("torch") is None:
        return None
    torch = importlib.import_module("torch")
    return torch if torch.cuda.is_available() else None


def gpu_speed(torch: Any, limits: Limits, device: str = "cuda") -> dict[str, float]:
    """The GPU's numbers of a hardware preset, each by what its key says; bus speeds are those of pinned memory.

    Parameters
    ----------
    torch : module
        From :func:`cuda_torch`.
    limits : Limits
        Bytes and seconds it may take.
    device : str
        A torch device. Anything but a CUDA device is measured as if it were one, from memory that is not pinned.
    """
    cuda = device.startswith("cuda")
    wait: Callable[[], None] = torch.cuda.synchronize if cuda else lambda: None
    free = torch.cuda.mem_get_info()[0] if cuda else limits.buffer_bytes
    total = torch.cuda.get_device_properties(0).total_memory if cuda else limits.buffer_bytes
    found = {"gpu_memory_bytes": float(total)}
    found |= _copies(torch, limits, device, cuda, wait)
    number = max(2, min(limits.buffer_bytes, free // 4) // EXPERT_BYTES)
    weights = torch.zeros((number, 3 * HIDDEN * INTERMEDIATE), dtype=torch.bfloat16, device=device)
    # A sum reads every byte once and writes next to nothing; as whole words it is not bound by arithmetic.
    words = weights.view(torch.int32)
    reading = _timed(lambda: words.amax(), wait, limits.seconds)
    found["gpu_bytes_per_s"] = words.numel() * 4 / min(reading)
    found["gpu_flops"] = _matrix_speed(torch, limits, device, wait)
    one = _one_token_seconds(torch, weights, limits, device, wait)
    floor = max(EXPERT_BYTES / found["gpu_bytes_per_s"], EXPERT_FLOPS / found["gpu_flops"])
    found["gpu_overhead_s"] = max(0.0, one - floor)
    return found


def _timed(run: Callable[[], object], wait: Callable[[], None], seconds: float) -> list[float]:
    """Seconds of runs that end when the device is done."""

    def whole() -> None:
        run()
        wait()

    return repeat(whole, seconds)


def _copies(torch: Any, limits: Limits, device: str, cuda: bool, wait: Callable[[], None]) -> dict[str, float]:
    size = min(limits.buffer_bytes, 1 << 28)
    host = torch.zeros(size, dtype=torch.uint8, pin_memory=cuda)
    there = torch.zeros(size, dtype=torch.uint8, device=device)
    to_gpu = _timed(lambda: there.copy_(host, non_blocking=True), wait, limits.seconds)
    to_host = _timed(lambda: host.copy_(there, non_blocking=True), wait, limits.seconds)
    few, there_few = host[:64], there[:64]

    def submit() -> None:
        for _ in range(LAUNCHES):
            there_few.copy_(few, non_blocking=True)

    submitting = _timed(submit, wait, limits.seconds / 4)
    return {
        "h2d_bytes_per_s": size / min(to_gpu),
        "d2h_bytes_per_s": size / min(to_host),
        "copy_latency_s": median(submitting) / LAUNCHES,
    }


def _matrix_speed(torch: Any, limits: Limits, device: str, wait: Callable[[], None]) -> float:
    size = limits.matrix
    left = torch.zeros((size, size), dtype=torch.bfloat16, device=device)
    right = torch.zeros_like(left)
    # Zeros draw less power than weights and would clock higher.
    left.normal_(), right.normal_()
    return 2.0 * size**3 / median(_timed(lambda: left @ right, wait, limits.seconds))


def _one_token_seconds(torch: Any, weights: Any, limits: Limits, device: str, wait: Callable[[], None]) -> float:
    """Seconds of an expert of one token among many launched one after the other; experts take turns."""
    rows = torch.zeros((1, HIDDEN), dtype=torch.bfloat16, device=device)
    part = HIDDEN * INTERMEDIATE
    experts = [
        (
            one[:part].view(HIDDEN, INTERMEDIATE),
            one[part : 2 * part].view(HIDDEN, INTERMEDIATE),
            one[2 * part :].view(INTERMEDIATE, HIDDEN),
        )
        for one in weights
    ]
    turns = cycle(experts)
    times = min(LAUNCHES, len(experts))

    def run() -> None:
        for _ in range(times):
            gate, up, down = next(turns)
            torch.nn.functional.silu(rows @ gate).mul_(rows @ up) @ down

    return median(_timed(run, wait, limits.seconds)) / times
