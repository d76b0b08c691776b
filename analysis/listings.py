"""Machines and their parts as lists, and anything with the source of its every value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from analysis.tables import Sheet
from analysis.terminal import frame_table
from simulator.presets import HardwareInfo

HOW = (
    "moetrace hardware NAME has the source of every value, of a part as gpu=h200. In --hardware a machine takes other "
    "parts, as h100-pcie5:gpu=h200,kernel=grouped_mm, overlap=true for CPU and GPU experts side by side, and host_gib=64 for "
    "experts beyond that much host memory on the drive. moetrace hardware NAME --toml prints a file to start your own from."
)
MACHINE_FIGURES = {
    "GPU GB": ("gpu_memory_bytes", 1e9),
    "GPU GB/s": ("gpu_bytes_per_s", 1e9),
    "GPU TFLOP/s": ("gpu_flops", 1e12),
    "bus GB/s": ("h2d_bytes_per_s", 1e9),
    "host GB/s": ("cpu_bytes_per_s", 1e9),
    "host TFLOP/s": ("cpu_flops", 1e12),
    "drive GB/s": ("nvme_bytes_per_s", 1e9),
}
UNITS = {
    "_bytes_per_s": (1e9, "GB/s"),
    "_bytes": (1e9, "GB"),
    "_flops": (1e12, "TFLOP/s"),
    "_s": (1e-6, "us"),
    "_efficiency": (0.01, "% of the peak"),
}
SHORT = {
    "gpu_memory_bytes": "{}",
    "gpu_bytes_per_s": "{}",
    "gpu_flops": "{}",
    "cpu_flops": "{}",
    "cpu_bytes_per_s": "{}",
    "nvme_bytes_per_s": "{}",
    "nvme_latency_s": "after {}",
    "floor_s": "{} a layer",
    "bandwidth_efficiency": "reads at {}",
    "overhead_s": "{} an expert",
    "row_s": "{} a row",
    "h2d_bytes_per_s": "bus {}",
}
"""What a list says of a part."""


def machine_table(machines: Sequence[HardwareInfo]) -> Sheet:
    """One row a machine: the figures that set its speed, and what it is."""
    columns = ("name", *MACHINE_FIGURES, "what it is")
    rows = [
        (info.name, *(_scaled(info, *figure) for figure in MACHINE_FIGURES.values()), info.line) for info in machines
    ]
    return frame_table(columns, rows, columns[:1], ("name", "what it is", *MACHINE_FIGURES))


def part_table(parts: Sequence[HardwareInfo]) -> Sheet:
    """One row a part, named as ``--hardware`` takes it."""
    rows = [(info.spec, info.line, _summary(info)) for info in parts]
    return frame_table(("part", "what it is", "values"), rows, ("part", "what it is", "values"))


def hardware_values(info: HardwareInfo) -> Sheet:
    """Every value of a machine or part with its source."""
    return values_table([(key, amount(key, value), info.sources[key]) for key, value in info.values.items()])


def amount(key: str, value: float) -> str:
    """A number of a hardware file in the unit people use, by the ending of its key."""
    scale, unit = next(unit for ending, unit in UNITS.items() if key.endswith(ending))
    return f"{value / scale:,.6g} {unit}"


def values_table(rows: Sequence[Sequence[Any]]) -> Sheet:
    """(name, value, source), one row a value."""
    columns = ("value", "is", "source")
    sheet = frame_table(columns, rows, columns)
    sheet.columns = [*frame_table(columns[:2], [row[:2] for row in rows], folds=0).columns, sheet.columns[2]]
    return sheet


def _scaled(info: HardwareInfo, key: str, scale: float) -> float | None:
    return info.values[key] / scale if key in info.values else None


def _summary(info: HardwareInfo) -> str:
    return ", ".join(text.format(amount(key, info.values[key])) for key, text in SHORT.items() if key in info.values)
