"""What a replay costs on a machine: seconds of each (forward, layer) by roofline and bus, estimates throughout.

Source: arXiv 2605.20179 (TIDE), section on latency, and its released code for the serial order. With b bytes of one expert, n
its tokens, H hidden size, I expert intermediate size and w bytes a weight:

* ``g(n) = max(b / (e BW_hbm), 6 H I n / (f FLOPS_gpu)) + overhead + row n``, an expert on the GPU, and a floor for each layer
  with any there: what the machine's kernel says (:class:`simulator.presets.Kernel`: efficiencies e and f, floor, overhead,
  row);
* ``c(n) = max(b / BW_dram, 6 H I n / FLOPS_cpu) + cpu overhead + 2 beta + w H n (1 / BW_d2h + 1 / BW_h2d)``, an expert on the
  CPU with its activations there and back;
* ``beta + b / BW`` each expert moved; ``dense(W) = max(dense_bytes / BW_hbm, 2 (dense_bytes / w) W / FLOPS_gpu)`` for W rows;
* attention, as for FlashAttention (arXiv 2205.14135) forward: over each request's context of C tokens, p of them cached,
  ``layers * max(2 kv_heads d w p / BW_hbm, 4 heads d W C / FLOPS_gpu)`` with d values a head, where the trace says how many
  heads the model has. Every row sees the whole context, as in a block with a prefix cache; without one that is the most a
  block-causal mask leaves.

FLOPS are BF16 peaks whatever the weights' type. A forward is dense(W) and attention plus, over layers, what moved plus GPU and
CPU experts one after the other (the released code) or side by side (``overlap``, the paper).

Two departures: the kernel (the paper has a roofline and no floor, the kernel ``ideal``), and, where the hardware spec asks
for it, ``host_gib``, which puts a drive below the host: of all routed experts the share ``s = min(1, host_gib / their
bytes)`` is in host memory, the others are read from NVMe each time they are needed and not kept. Which experts those are is
not modelled: every expert moved to the GPU or run on the CPU is read with probability 1 - s, so each costs ``(1 - s) * (NVMe
latency + b / BW_nvme)`` more. That is the mean over host memories filled at random; one filled by popularity reads less.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simulator.policy import ExpertStream, Placement
from simulator.presets import Hardware
from tracer.jit import njit
from tracer.trace import ForwardTable

PARTS = ("dense", "to_gpu", "to_host", "gpu_experts", "cpu_experts")


@dataclass(frozen=True, slots=True)
class CostModel:
    """A machine and a model. ``overlap``: CPU and GPU experts of a layer run side by side and join at its end.

    ``host_share`` of the routed experts are in host memory, the others on the machine's NVMe drive. ``cached_bytes`` are the
    keys and values of one cached token and ``pair_flops`` the operations of one row with one token it sees, over all layers;
    0 leaves attention out.
    """

    hardware: Hardware
    hidden_size: int
    moe_intermediate_size: int
    dense_bytes: int
    weight_bytes: int
    overlap: bool = False
    host_share: float = 1.0
    cached_bytes: int = 0
    pair_flops: int = 0

    def dense_seconds(self, forwards: ForwardTable) -> np.ndarray:
        """Everything but routed experts, attention included, float64 [F]."""
        machine = self.hardware
        rows = np.diff(forwards.row_offsets)
        compute = 2.0 * (self.dense_bytes / self.weight_bytes) * rows / machine.gpu_flops
        seconds = np.maximum(self.dense_bytes / machine.gpu_bytes_per_s, compute)
        if not self.pair_flops or not len(rows):
            return seconds
        # A branch of a speculative call sees the cached tokens and itself.
        # where the prefix is not known, which a note says, it costs nothing
        prefix = np.maximum(forwards.kv_tokens, 0)
        context = prefix + forwards.num_tokens // np.maximum(forwards.branches, 1)
        starts = forwards.part_offsets[:-1]
        cached = np.add.reduceat(prefix, starts)
        pairs = np.add.reduceat(forwards.num_tokens * context, starts)
        moved = self.cached_bytes * cached / machine.gpu_bytes_per_s
        return seconds + np.maximum(moved, self.pair_flops * pairs / machine.gpu_flops)

    def cell_seconds(self, stream: ExpertStream, placement: Placement, expert_bytes: np.ndarray) -> np.ndarray:
        """Seconds of each cell, float64 [C, 4]: to_gpu, to_host, gpu_experts, cpu_experts; reads from NVMe where they lead to.

        Parameters
        ----------
        stream, placement
            What was needed and where it was.
        expert_bytes : np.ndarray
            int64 [C], bytes of one expert of the cell's layer.
        """
        machine, kernel = self.hardware, self.hardware.kernel
        size = expert_bytes.astype(np.float64)
        seconds = np.zeros((len(size), 4))
        read = self.read_seconds(size)
        seconds[:, 0] = placement.promotions * (machine.copy_latency_s + size / machine.h2d_bytes_per_s + read)
        seconds[:, 1] = placement.copied_back * (machine.copy_latency_s + size / machine.d2h_bytes_per_s)
        flops = 6.0 * self.hidden_size * self.moe_intermediate_size
        activations = float(self.weight_bytes * self.hidden_size)
        there_and_back = activations / machine.d2h_bytes_per_s + activations / machine.h2d_bytes_per_s
        _expert_seconds(
            stream.offsets,
            stream.tokens,
            placement.on_gpu,
            size / (kernel.bandwidth_efficiency * machine.gpu_bytes_per_s),
            flops / (kernel.flops_efficiency * machine.gpu_flops),
            kernel.overhead_s,
            kernel.row_s,
            kernel.floor_s,
            size / machine.cpu_bytes_per_s,
            flops / machine.cpu_flops,
            machine.cpu_overhead_s + 2.0 * machine.copy_latency_s,
            there_and_back,
            seconds,
        )
        if self.host_share < 1.0:
            ends = np.concatenate(([0], np.cumsum(placement.on_gpu, dtype=np.int64)))
            on_gpu = np.diff(ends[stream.offsets])
            seconds[:, 3] += (np.diff(stream.offsets) - on_gpu) * read
        return seconds

    def read_seconds(self, size: np.ndarray) -> np.ndarray:
        """Mean seconds of reading an expert that may be on NVMe, float64 [C], for float64 [C] bytes."""
        machine = self.hardware
        if self.host_share >= 1.0 or machine.nvme_bytes_per_s is None or machine.nvme_latency_s is None:
            return np.zeros(len(size))
        return (1.0 - self.host_share) * (machine.nvme_latency_s + size / machine.nvme_bytes_per_s)

    def layer_seconds(self, seconds: np.ndarray) -> np.ndarray:
        """A layer's time out of the parts of :meth:`cell_seconds`, float64 [...], for [..., 4]."""
        gpu, cpu = seconds[..., 2], seconds[..., 3]
        return seconds[..., 0] + seconds[..., 1] + (np.maximum(gpu, cpu) if self.overlap else gpu + cpu)


@njit
def _expert_seconds(
    offsets,
    tokens,
    on_gpu,
    gpu_read,
    gpu_token,
    gpu_fixed,
    gpu_row,
    gpu_layer,
    cpu_read,
    cpu_token,
    cpu_fixed,
    bus_token,
    seconds,
):
    for c in range(len(offsets) - 1):
        launched = False
        for i in range(offsets[c], offsets[c + 1]):
            n = np.float64(tokens[i])
            if on_gpu[i]:
                launched = True
                seconds[c, 2] += max(gpu_read[c], gpu_token * n) + gpu_fixed + gpu_row * n
            else:
                seconds[c, 3] += max(cpu_read[c], cpu_token * n) + cpu_fixed + bus_token * n
        if launched:
            seconds[c, 2] += gpu_layer
