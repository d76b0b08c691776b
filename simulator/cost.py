"""What a replay costs on a machine: seconds of each (forward, layer) by roofline and bus, estimates throughout.

Source: arXiv 2605.20179 (TIDE), section on latency, and its released code for the serial order. With b bytes of one expert, n
its tokens, H hidden size, I expert intermediate size and w bytes a weight:

* ``g(n) = max(b / BW_hbm, 6 H I n / FLOPS_gpu) + gpu overhead``, an expert on the GPU;
* ``c(n) = max(b / BW_dram, 6 H I n / FLOPS_cpu) + cpu overhead + 2 beta + w H n (1 / BW_d2h + 1 / BW_h2d)``, an expert on the
  CPU with its activations there and back;
* ``beta + b / BW`` each expert moved; ``dense(W) = max(dense_bytes / BW_hbm, 2 (dense_bytes / w) W / FLOPS_gpu)`` for W rows,
  attention over the cached prefix left out. FLOPS are BF16 peaks whatever the weights' type.

A forward is dense(W) plus, over layers, what moved plus GPU and CPU experts one after the other (the released code) or side by
side (``overlap``, the paper).

Two departures, both asked for in the hardware spec:

* A ``line`` replaces the sum of g(n) over a layer's GPU experts by ``intercept + slope * experts``, as dMoE (arXiv 2605.30876)
  measured it for SGLang; a layer without an expert on the GPU takes no time.
* ``host_gib`` puts a drive below the host: of all routed experts the share ``s = min(1, host_gib / their bytes)`` is in host
  memory, the others are read from NVMe each time they are needed and not kept. Which experts those are is not modelled: every
  expert moved to the GPU or run on the CPU is read with probability 1 - s, so each costs ``(1 - s) * (NVMe latency + b /
  BW_nvme)`` more. That is the mean over host memories filled at random; one filled by popularity reads less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from simulator.budget import GIB
from simulator.policy import ExpertStream, Placement
from simulator.presets import MEASURED, VALUES, Hardware, load_hardware, part_names
from simulator.presets import PARTS as KINDS
from tracer.errors import UserError
from tracer.jit import njit
from tracer.trace import ModelInfo

BYTES_OF = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}
PARTS = ("dense", "to_gpu", "to_host", "gpu_experts", "cpu_experts")
OPTIONS = ("overlap", "host_gib", *KINDS)
"""What a hardware spec takes after its name."""


@dataclass(frozen=True, slots=True)
class CostModel:
    """A machine and a model. ``overlap``: CPU and GPU experts of a layer run side by side and join at its end.

    ``host_share`` of the routed experts are in host memory, the others on the machine's NVMe drive.
    """

    hardware: Hardware
    hidden_size: int
    moe_intermediate_size: int
    dense_bytes: int
    weight_bytes: int
    overlap: bool = False
    host_share: float = 1.0

    def dense_seconds(self, rows: np.ndarray) -> np.ndarray:
        """Everything but routed experts, float64 [F], for int64 [F] rows."""
        machine = self.hardware
        compute = 2.0 * (self.dense_bytes / self.weight_bytes) * rows / machine.gpu_flops
        return np.maximum(self.dense_bytes / machine.gpu_bytes_per_s, compute)

    def cell_seconds(self, stream: ExpertStream, placement: Placement, expert_bytes: np.ndarray) -> np.ndarray:
        """Seconds of each cell, float64 [C, 4]: to_gpu, to_host, gpu_experts, cpu_experts; reads from NVMe where they lead to.

        Parameters
        ----------
        stream, placement
            What was needed and where it was.
        expert_bytes : np.ndarray
            int64 [C], bytes of one expert of the cell's layer.
        """
        machine = self.hardware
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
            size / machine.gpu_bytes_per_s,
            flops / machine.gpu_flops,
            machine.gpu_overhead_s,
            size / machine.cpu_bytes_per_s,
            flops / machine.cpu_flops,
            machine.cpu_overhead_s + 2.0 * machine.copy_latency_s,
            there_and_back,
            seconds,
        )
        if machine.line is not None or self.host_share < 1.0:
            ends = np.concatenate(([0], np.cumsum(placement.on_gpu, dtype=np.int64)))
            on_gpu = np.diff(ends[stream.offsets])
            seconds[:, 3] += (np.diff(stream.offsets) - on_gpu) * read
            if machine.line is not None:
                seconds[:, 2] = machine.line.seconds(on_gpu)
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


def cost_model(
    hardware: Hardware, model: ModelInfo, overlap: bool = False, host_gib: float | None = None
) -> tuple[CostModel | None, str]:
    """The cost model of a machine and a traced model, and the note that goes with it.

    None where the trace does not say what the formulas need; the note then names it.

    Parameters
    ----------
    hardware, model
        The machine and what the trace says of its model.
    overlap : bool
        CPU and GPU experts of a layer run side by side.
    host_gib : float, optional
        GiB of host memory for routed experts; those that do not fit are on the machine's NVMe drive. By default all fit.

    Raises
    ------
    UserError
        ``host_gib`` is no amount of memory, or the machine has no NVMe drive.
    """
    if host_gib is not None:
        if not 0 <= host_gib < math.inf:
            raise UserError(f"host_gib={host_gib} is no amount of memory; give a number of GiB of 0 or more.")
        if hardware.nvme_bytes_per_s is None:
            raise UserError(
                f"host_gib needs a drive to read from and {hardware.name} has none; add nvme={part_names('nvme')[0]}."
            )
    fields = {
        "hidden_size": model.hidden_size,
        "moe_intermediate_size": model.moe_intermediate_size,
        "dense_bytes": model.dense_bytes,
        "dtype": BYTES_OF.get((model.dtype or "").removeprefix("torch.")),
    }
    missing = [name for name, value in fields.items() if value is None]
    if missing:
        return None, f"No latency: the trace's meta.json does not say {', '.join(missing)} of the model."
    share = 1.0
    if host_gib is not None:
        every = model.num_experts * sum(model.expert_bytes[layer] for layer in model.moe_layers)
        share = min(1.0, host_gib * GIB / every)
    cost = CostModel(
        hardware,
        int(fields["hidden_size"] or 0),
        int(fields["moe_intermediate_size"] or 0),
        int(fields["dense_bytes"] or 0),
        int(fields["dtype"] or 0),
        overlap,
        share,
    )
    return cost, _note(cost, host_gib)


def priced_on(spec: str, model: ModelInfo) -> tuple[CostModel | None, str]:
    """The cost model of a hardware spec, and its note, as :func:`cost_model`.

    Parameters
    ----------
    spec : str
        ``name`` or ``name:key=value,key=value``; name is a preset or a .toml file. Keys: ``overlap=true|false``,
        ``host_gib=GIB``, and other parts for the machine, ``gpu=``, ``cpu=``, ``dram=``, ``nvme=`` and ``line=NAME`` or
        ``line=INTERCEPT+SLOPE`` in microseconds.
    model : ModelInfo
        What the trace says of its model.

    Raises
    ------
    UserError
        A spec that does not load.
    """
    name, options = split_spec(spec)
    overlap = options.pop("overlap", "false")
    if overlap not in ("true", "false"):
        raise UserError(f"overlap={overlap} is neither true nor false; give one of them.")
    host_gib: float | None = None
    if "host_gib" in options:
        text = options.pop("host_gib")
        try:
            host_gib = float(text)
        except ValueError as error:
            raise UserError(f"host_gib={text} is no amount of memory; give a number of GiB of 0 or more.") from error
    return cost_model(load_hardware(name, options), model, overlap == "true", host_gib)


def split_spec(spec: str) -> tuple[str, dict[str, str]]:
    """A hardware spec's name or path, and its options as texts.

    Raises
    ------
    UserError
        An option that is unknown, given twice, or has no value.
    """
    # A path may hold colons of its own; a file's options come after its ending.
    stem, ending, rest = spec.partition(".toml:")
    name = stem + ending.rstrip(":")
    if not ending and not spec.endswith(".toml"):
        name, _, rest = spec.partition(":")
    options: dict[str, str] = {}
    for item in rest.split(",") if rest else ():
        key, _, value = (text.strip() for text in item.partition("="))
        if key not in OPTIONS or not value:
            raise UserError(
                f"Hardware {name} has no option {item.strip()!r}; it takes {', '.join(OPTIONS)}, each as key=value."
            )
        if key in options:
            raise UserError(f"Hardware {name} is given {key} twice; give it once.")
        options[key] = value
    return name, options


def _note(cost: CostModel, host_gib: float | None) -> str:
    machine = cost.hardware
    measured = {MEASURED in machine.sources.get(key, "") for key in VALUES}
    basis = {True: "measured", False: "data-sheet"}
    peaks = " and ".join(basis[kind] for kind in sorted(measured))
    order = "side by side" if cost.overlap else "one after the other"
    note = (
        f"Latency, tokens per second and speed-up are estimates: roofline of {machine.name}'s {peaks} peaks, copies before "
        f"compute, GPU and CPU experts {order}, attention over cached tokens left out."
    )
    if machine.line is not None:
        note += (
            f" A layer's GPU experts take {machine.line.intercept_us:g} us + {machine.line.slope_us:g} us each, a line from: "
            f"{machine.sources.get('line_slope_us', 'the caller')}."
        )
    if host_gib is not None and cost.host_share == 1.0:
        note += f" All routed experts fit in {host_gib:g} GiB of host memory."
    elif host_gib is not None:
        note += (
            f" {100 * cost.host_share:.1f}% of the routed experts are in {host_gib:g} GiB of host memory, the others are read "
            "from NVMe whenever they are needed, whichever they are: an estimate; a host filled by popularity reads less."
        )
    return note


@njit
def _expert_seconds(
    offsets, tokens, on_gpu, gpu_floor, gpu_token, gpu_fixed, cpu_floor, cpu_token, cpu_fixed, bus_token, seconds
):
    for c in range(len(offsets) - 1):
        for i in range(offsets[c], offsets[c + 1]):
            n = np.float64(tokens[i])
            if on_gpu[i]:
                seconds[c, 2] += max(gpu_floor[c], gpu_token * n) + gpu_fixed
            else:
                seconds[c, 3] += max(cpu_floor[c], cpu_token * n) + cpu_fixed + bus_token * n
