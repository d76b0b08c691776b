"""From a hardware spec and a traced model to a cost model, and the note that says what its figures rest on."""

from __future__ import annotations

import math
import re
from dataclasses import replace

from simulator.budget import GIB
from simulator.cost import CostModel
from simulator.presets import ALIASES, BAND, MEASURED, PARTS, VALUES, Hardware, load_hardware, load_kernel, part_names
from simulator.spec import parse
from tracer.errors import UserError
from tracer.trace import ModelInfo

BYTES_OF = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}
OPTIONS = ("overlap", "host_gib", *PARTS)
"""What a hardware spec takes after its name."""


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
    weight_bytes, heads = int(fields["dtype"] or 0), (model.num_heads, model.num_kv_heads, model.head_dim)
    cost = CostModel(
        hardware,
        int(fields["hidden_size"] or 0),
        int(fields["moe_intermediate_size"] or 0),
        int(fields["dense_bytes"] or 0),
        weight_bytes,
        overlap,
        share,
        **({} if None in heads else _attention(model.num_layers, weight_bytes, *(int(n or 0) for n in heads))),
    )
    return cost, _note(cost, host_gib)


def _attention(layers: int, weight_bytes: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, int]:
    """Keys and values of a cached token, and two products of a row with a token it sees, over all layers."""
    return {
        "cached_bytes": layers * 2 * kv_heads * head_dim * weight_bytes,
        "pair_flops": layers * 4 * heads * head_dim,
    }


def priced_on(spec: str, model: ModelInfo) -> tuple[CostModel | None, str]:
    """The cost model of a hardware spec, and its note, as :func:`cost_model`.

    Parameters
    ----------
    spec : str
        ``name`` or ``name:key=value,key=value``; name is a preset or a .toml file. Keys: ``overlap=true|false``,
        ``host_gib=GIB``, and other parts for the machine, ``gpu=``, ``cpu=``, ``dram=``, ``nvme=`` and ``kernel=``.
    model : ModelInfo
        What the trace says of its model.

    Raises
    ------
    UserError
        A spec that does not load.
    """
    name, options = hardware_options(spec)
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
    machine = load_hardware(name, options)
    cost, note = cost_model(machine, model, overlap == "true", host_gib)
    return cost, f"{name} is {machine.name}: {machine.description}. {note}" if name in ALIASES else note


def kernel_band(cost: CostModel) -> tuple[CostModel, ...]:
    """The same machine and model with each kernel of :data:`simulator.presets.BAND`."""
    hardware = cost.hardware
    kernels = (hardware.kernel if hardware.kernel.name == name else load_kernel(name) for name in BAND)
    return tuple(replace(cost, hardware=replace(hardware, kernel=kernel)) for kernel in kernels)


def hardware_options(spec: str) -> tuple[str, dict[str, str]]:
    """A hardware spec's name or path, and its options as texts; a UserError for an option that is none."""
    if re.search(r"(^|[:,])\s*line\s*=", spec):
        raise UserError(
            f"A machine has no line any more; give it a kernel, kernel={', kernel='.join(part_names('kernel'))}."
        )
    return parse(spec, "hardware", OPTIONS)


def _note(cost: CostModel, host_gib: float | None) -> str:
    machine = cost.hardware
    measured = {MEASURED in machine.sources.get(key, "") for key in VALUES}
    basis = {True: "measured", False: "data-sheet"}
    peaks = " and ".join(basis[kind] for kind in sorted(measured))
    order = "side by side" if cost.overlap else "one after the other"
    note = (
        f"Latency, tokens per second and speed-up are estimates: roofline of {machine.name}'s {peaks} peaks, copies before "
        f"compute, GPU and CPU experts {order}. Tokens per second count accepted tokens, also those of a last block that lie "
        "beyond the length asked for."
    )
    if not cost.pair_flops:
        note += " Attention is left out: the trace's meta.json does not say how many heads the model has."
    kernel = machine.kernel
    note += f" A layer's GPU experts run in the kernel {kernel.name}: {kernel.description}"
    # The same card may be a part of this machine, or of none that is known.
    elsewhere = kernel.gpu is not None and machine.parts.get("gpu") != kernel.gpu
    note += f"; its constants are those of {kernel.gpu} and stand in here." if elsewhere else "."
    if host_gib is not None and cost.host_share == 1.0:
        note += f" All routed experts fit in {host_gib:g} GiB of host memory."
    elif host_gib is not None:
        note += (
            f" {100 * cost.host_share:.1f}% of the routed experts are in {host_gib:g} GiB of host memory, the others are read "
            "from NVMe whenever they are needed, whichever they are: an estimate; a host filled by popularity reads less."
        )
    return note
