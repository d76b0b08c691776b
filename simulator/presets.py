"""Machines as TOML files in which every number says where it comes from; one without a source does not load.

A machine file names parts (``gpu``, ``cpu``, ``dram``, ``nvme``, ``line``: files in the folders of those names), gives numbers
of its own (``[key]`` with ``value`` and ``source``) that win over its parts, or both. GPU and CPU both say how fast the bus
between them may be; the slower one counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from simulator.preset_files import Text, preset_model, read_preset
from tracer.errors import UserError, unknown

FOLDER = Path(__file__).parent / "presets" / "hardware"
BUS = ("h2d_bytes_per_s", "d2h_bytes_per_s")
PARTS = {
    "gpu": ("gpu_memory_bytes", "gpu_bytes_per_s", "gpu_flops", "gpu_overhead_s", *BUS, "copy_latency_s"),
    "cpu": ("cpu_flops", "cpu_overhead_s", *BUS),
    "dram": ("cpu_bytes_per_s",),
    "nvme": ("nvme_bytes_per_s", "nvme_latency_s"),
    "line": ("line_intercept_us", "line_slope_us"),
}
"""Kinds of parts, and the numbers each gives."""
OPTIONAL_PARTS = ("nvme", "line")
MAY_BE_ZERO = ("gpu_overhead_s", "cpu_overhead_s", "copy_latency_s", "nvme_latency_s", *PARTS["line"])
MEASUREMENTS = "measurements"
"""A table a file may have for its readers; nothing is computed from it."""

MEASURED = "measured on"
"""What the source of a measured number says, and that of no other."""


@dataclass(frozen=True, slots=True)
class Line:
    """Microseconds the GPU takes for all experts of one MoE layer, as a straight line over how many there are.

    It stands in for the roofline of single experts where somebody has measured the whole layer, whose kernels are launched
    once and not once an expert; it holds for the model, engine and machine it was measured with.
    """

    intercept_us: float
    slope_us: float

    def seconds(self, experts: np.ndarray) -> np.ndarray:
        """Seconds of a layer, float64 [C], for int64 [C] experts on the GPU; a layer without any launches nothing: 0."""
        return np.where(experts > 0, 1e-6 * (self.intercept_us + self.slope_us * experts), 0.0)


@dataclass(frozen=True, slots=True)
class Hardware:
    """One GPU and its host. Bytes per second, FLOP per second (BF16, dense), seconds, bytes.

    ``nvme_*`` is None without a drive; ``line`` is None where experts are timed one by one. ``sources`` maps every given
    number to where it comes from, ``parts`` each kind of part that numbers were taken from to its name.
    """

    name: str
    description: str
    gpu_memory_bytes: float
    gpu_bytes_per_s: float
    gpu_flops: float
    gpu_overhead_s: float
    cpu_bytes_per_s: float
    cpu_flops: float
    cpu_overhead_s: float
    h2d_bytes_per_s: float
    d2h_bytes_per_s: float
    copy_latency_s: float
    sources: dict[str, str]
    nvme_bytes_per_s: float | None = None
    nvme_latency_s: float | None = None
    line: Line | None = None
    parts: dict[str, str] = field(default_factory=dict)


NO_VALUES = ("name", "description", "sources", "line", "parts")
OPTIONAL = tuple(key for kind in OPTIONAL_PARTS for key in PARTS[kind])
VALUES = tuple(f.name for f in fields(Hardware) if f.name not in (*NO_VALUES, *OPTIONAL))
"""Numbers every machine has."""

_Number = Annotated[float, Field(gt=0, allow_inf_nan=False, description="a number above 0")]
_Zero = Annotated[float, Field(ge=0, allow_inf_nan=False, description="a number of at least 0")]
_NUMBERS = {key: _Zero if key in MAY_BE_ZERO else _Number for key in (*VALUES, *OPTIONAL)}
_FILES = {kind: preset_model({key: _NUMBERS[key] for key in keys}) for kind, keys in PARTS.items()}
_FILES["machine"] = preset_model(_NUMBERS, dict.fromkeys(PARTS, Text))


@dataclass(frozen=True, slots=True)
class HardwareInfo:
    """A preset as a list shows it: ``kind`` is "machine" or that of a part, ``line`` says what it is.

    ``values`` and ``sources`` have the same keys, those of the TOML files; ``parts`` are those of a machine, kind to name.
    """

    kind: str
    name: str
    line: str
    parts: dict[str, str]
    values: dict[str, float]
    sources: dict[str, str]

    @property
    def spec(self) -> str:
        """Its name; of a part as a machine takes it: ``gpu=h200``."""
        return self.name if self.kind == "machine" else f"{self.kind}={self.name}"


def hardware_names() -> list[str]:
    """Names of the machines that come with the package."""
    return sorted(p.stem for p in FOLDER.glob("*.toml"))


def part_names(kind: str) -> list[str]:
    """Names of the parts of a kind (``"gpu"``, ``"cpu"``, ``"dram"``, ``"nvme"``, ``"line"``) that come with the package."""
    return sorted(p.stem for p in (FOLDER / kind).glob("*.toml"))


def list_hardware() -> list[HardwareInfo]:
    """Every machine of the package: name, description, parts, numbers and their sources."""
    return [_info(load_hardware(name)) for name in hardware_names()]


def list_parts(kind: str) -> list[HardwareInfo]:
    """Every part of a kind: name, description, numbers and their sources."""
    return [_part_info(kind, name) for name in part_names(kind)]


def find_hardware(name: str, parts: Mapping[str, str] | None = None) -> HardwareInfo:
    """One machine or part as a list shows it.

    Parameters
    ----------
    name : str
        A machine as in :func:`load_hardware`, ``KIND=NAME`` of a part, or the name of a part that only one kind has.
    parts : mapping, optional
        Other parts for a machine.

    Raises
    ------
    UserError
        As :func:`load_hardware` does.
    """
    kind, equals, part = name.partition("=")
    if equals and kind in PARTS:
        if part not in part_names(kind):
            raise unknown(f"{kind} part", part, part_names(kind))
        return _part_info(kind, part)
    kinds = [kind for kind in PARTS if name in part_names(kind)]
    if len(kinds) == 1 and name not in hardware_names() and not parts:
        return _part_info(kinds[0], name)
    return _info(load_hardware(name, parts))


def _info(machine: Hardware) -> HardwareInfo:
    values = {key: getattr(machine, key) for key in machine.sources if key not in PARTS["line"]}
    if machine.line is not None:
        values |= {"line_intercept_us": machine.line.intercept_us, "line_slope_us": machine.line.slope_us}
    sources = {key: machine.sources[key] for key in values}
    return HardwareInfo("machine", machine.name, machine.description, machine.parts, values, sources)


def _part_info(kind: str, name: str) -> HardwareInfo:
    texts, given = _read(FOLDER / kind / f"{name}.toml", kind)
    values = {key: value for key, (value, _) in given.items()}
    sources = {key: source for key, (_, source) in given.items()}
    return HardwareInfo(kind, name, texts["description"], {}, values, sources)


def load_hardware(name: str, parts: Mapping[str, str] | None = None) -> Hardware:
    """A machine by preset name or path to a .toml file, with other parts where asked.

    Parameters
    ----------
    name : str
        One of :func:`hardware_names`, or a path.
    parts : mapping, optional
        Kind of part to one of :func:`part_names`, in place of the machine's own part and of its own numbers of that kind. For
        ``"line"`` also ``"INTERCEPT+SLOPE"`` in microseconds.

    Raises
    ------
    UserError
        No such preset, part or file, or a value missing, not a number, or without a source.
    """
    own = name.endswith(".toml")
    path = Path(name) if own else FOLDER / f"{name}.toml"
    if not (path.is_file() if own else name in hardware_names()):
        if own:
            raise UserError(f"There is no hardware file {name}; check the path.")
        raise unknown("hardware preset", name, hardware_names(), ", or give a .toml file")
    asked = dict(parts or {})
    for kind in asked:
        if kind not in PARTS:
            raise UserError(f"A machine has no part {kind!r}; its parts are {', '.join(PARTS)}.")
    named, given = _read(path, "machine")
    description = named.pop("description")
    merged: dict[str, tuple[float, str]] = {}
    for kind, keys in PARTS.items():
        chosen = _part(kind, asked[kind]) if kind in asked else _part(kind, named[kind]) if kind in named else {}
        if kind not in asked:
            chosen |= {key: given[key] for key in keys if key in given}
        for key, entry in chosen.items():
            # Only the bus is given twice, by both its ends.
            merged[key] = min(merged[key], entry, key=lambda e: e[0]) if key in merged else entry
    faults: list[str] = []
    told: set[str] = set()
    for kind, keys in PARTS.items():
        lacking = [key for key in keys if key not in merged and key not in told]
        if lacking and (len(lacking) < len(keys) or kind not in OPTIONAL_PARTS):
            told.update(lacking)
            more = " and so on" if len(lacking) > 1 else ""
            faults.append(
                f"no {', '.join(lacking)}; add [{lacking[0]}] with value and source{more}, or a part: {kind} = NAME"
            )
    if faults:
        raise UserError(f"The hardware file {path.name} has {'; and '.join(faults)}.")
    line = None
    if PARTS["line"][0] in merged:
        line = Line(*(merged[key][0] for key in PARTS["line"]))
    numbers: dict[str, float] = {key: value for key, (value, _) in merged.items() if key not in PARTS["line"]}
    changes = ",".join(f"{kind}={part}" for kind, part in asked.items())
    return Hardware(
        name=f"{path.stem}:{changes}" if asked else path.stem,
        description=f"{description}; here with {changes}" if asked else description,
        sources={key: source for key, (_, source) in merged.items()},
        line=line,
        parts={kind: asked.get(kind) or named[kind] for kind in PARTS if kind in asked or kind in named},
        **numbers,
    )


def _part(kind: str, name: str) -> dict[str, tuple[float, str]]:
    """The numbers of a part, each with its source."""
    if kind == "line" and "+" in name:
        intercept, _, slope = name.partition("+")
        try:
            values = [float(text) for text in (intercept, slope)]
        except ValueError:
            values = [math.nan]
        if not all(math.isfinite(value) and value >= 0 for value in values):
            raise UserError(f"line={name} is no line; give INTERCEPT+SLOPE in microseconds, as line=278.96+1.25.")
        return {key: (value, f"given as line={name}") for key, value in zip(PARTS[kind], values, strict=True)}
    if name not in part_names(kind):
        raise unknown(f"{kind} part", name, part_names(kind))
    return _read(FOLDER / kind / f"{name}.toml", kind)[1]


def _read(path: Path, kind: str) -> tuple[dict[str, str], dict[str, tuple[float, str]]]:
    """The description and parts that a file names, and its numbers with their sources."""
    return read_preset(path, "hardware", _FILES[kind], MEASUREMENTS if kind == "machine" else None)
