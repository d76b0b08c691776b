"""Machines as TOML files in which every number says where it comes from; one without a source does not load.

A machine file names parts (``gpu``, ``cpu``, ``dram``, ``nvme``, ``kernel``: files in the folders of those names), gives
numbers of its own (``[key]`` with ``value`` and ``source``) that win over its parts, or both. GPU and CPU both say how fast
the bus between them may be; the slower one counts. A machine without a kernel takes the one that its GPU's file names, or
else :data:`DEFAULT_KERNEL`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

from pydantic import Field

from simulator.preset_files import Text, preset_model, preset_text, read_preset
from tracer.errors import UserError, unknown

FOLDER = Path(__file__).parent / "presets" / "hardware"
BUS = ("h2d_bytes_per_s", "d2h_bytes_per_s")
PARTS = {
    "gpu": ("gpu_memory_bytes", "gpu_bytes_per_s", "gpu_flops", *BUS, "copy_latency_s"),
    "cpu": ("cpu_flops", "cpu_overhead_s", *BUS),
    "dram": ("cpu_bytes_per_s",),
    "nvme": ("nvme_bytes_per_s", "nvme_latency_s"),
    "kernel": ("floor_s", "bandwidth_efficiency", "overhead_s", "flops_efficiency", "row_s"),
}
"""Kinds of parts, and the numbers each gives."""
MAY_BE_ZERO = ("cpu_overhead_s", "copy_latency_s", "nvme_latency_s", "floor_s", "overhead_s", "row_s")
DEFAULT_KERNEL = "grouped_mm"
BAND = ("grouped_mm", "vllm_fused")
"""The kernels whose speed-ups are the ends of a band."""
ALIASES = {"h100": "h100-pcie5", "a100": "a100-80gb", "4090": "rtx-4090"}
"""What people call a machine, and the preset it stands for."""
MEASUREMENTS = "measurements"
"""A table a file may have for its readers; nothing is computed from it."""

MEASURED = "measured on"
"""What the source of a measured number says, and that of no other."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """What runs the experts of a layer on the GPU, and how far from the GPU's peaks.

    A layer with any expert on the GPU takes ``floor_s`` seconds, and for each of these, of b bytes and n rows,
    ``max(b / (bandwidth_efficiency BW), flops / (flops_efficiency FLOPS)) + overhead_s + n row_s``. ``gpu`` is the GPU part
    that the numbers come from, None where they come from none.
    """

    name: str
    floor_s: float
    bandwidth_efficiency: float
    overhead_s: float
    flops_efficiency: float
    row_s: float = 0.0
    description: str = ""
    gpu: str | None = None


@dataclass(frozen=True, slots=True)
class Hardware:
    """One GPU, its kernel and its host. Bytes per second, FLOP per second (BF16, dense), seconds, bytes.

    ``nvme_*`` is None without a drive. ``sources`` maps every given number, the kernel's too, to where it comes from, ``parts``
    each kind of part that numbers were taken from to its name.
    """

    name: str
    description: str
    gpu_memory_bytes: float
    gpu_bytes_per_s: float
    gpu_flops: float
    cpu_bytes_per_s: float
    cpu_flops: float
    cpu_overhead_s: float
    h2d_bytes_per_s: float
    d2h_bytes_per_s: float
    copy_latency_s: float
    kernel: Kernel
    sources: dict[str, str]
    nvme_bytes_per_s: float | None = None
    nvme_latency_s: float | None = None
    parts: dict[str, str] = field(default_factory=dict)


NO_VALUES = ("name", "description", "sources", "kernel", "parts")
OPTIONAL = (*PARTS["nvme"], *PARTS["kernel"])
VALUES = tuple(f.name for f in fields(Hardware) if f.name not in (*NO_VALUES, *OPTIONAL))
"""Numbers every machine has."""

_Number = Annotated[float, Field(gt=0, allow_inf_nan=False, description="a number above 0")]
_Zero = Annotated[float, Field(ge=0, allow_inf_nan=False, description="a number of at least 0")]
_NUMBERS = {key: _Zero if key in MAY_BE_ZERO else _Number for key in (*VALUES, *OPTIONAL)}
_NAMED = {"gpu": {"kernel": Text}, "kernel": {"gpu": Text}}
_FILES = {kind: preset_model({key: _NUMBERS[key] for key in keys}, _NAMED.get(kind)) for kind, keys in PARTS.items()}
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
    """Names of the parts of a kind (``"gpu"``, ``"cpu"``, ``"dram"``, ``"nvme"``, ``"kernel"``) that come with the package."""
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
        return _part_info(kind, part)
    kinds = [kind for kind in PARTS if name in part_names(kind)]
    if len(kinds) == 1 and name not in (*hardware_names(), *ALIASES) and not parts:
        return _part_info(kinds[0], name)
    return _info(load_hardware(name, parts))


def hardware_text(info: HardwareInfo) -> str:
    """A machine as the text of a hardware file to start from: its parts, and every number that one of them gave.

    The kernel's numbers stay with the kernel where it is a part.

    Raises
    ------
    UserError
        It is a part.
    """
    if info.kind != "machine":
        raise UserError(f"{info.spec} is a part and makes no hardware file; name a machine, as {hardware_names()[0]}.")
    kept = [key for key in info.values if key not in PARTS["kernel"] or "kernel" not in info.parts]
    entries = {key: (info.values[key], info.sources[key]) for key in kept}
    return preset_text({"description": info.line, **info.parts}, entries)


def _info(machine: Hardware) -> HardwareInfo:
    values = {key: getattr(machine.kernel if key in PARTS["kernel"] else machine, key) for key in machine.sources}
    return HardwareInfo("machine", machine.name, machine.description, machine.parts, values, machine.sources)


def _part_info(kind: str, name: str) -> HardwareInfo:
    texts, given = _part(kind, name)
    values = {key: value for key, (value, _) in given.items()}
    sources = {key: source for key, (_, source) in given.items()}
    return HardwareInfo(kind, name, texts["description"], {}, values, sources)


def load_hardware(name: str, parts: Mapping[str, str] | None = None) -> Hardware:
    """A machine by preset name or path to a .toml file, with other parts where asked.

    Parameters
    ----------
    name : str
        One of :func:`hardware_names`, one of :data:`ALIASES`, or a path.
    parts : mapping, optional
        Kind of part to one of :func:`part_names`, in place of the machine's own part and of its own numbers of that kind. The
        kernel goes with another GPU, unless the file names it.

    Raises
    ------
    UserError
        No such preset, part or file, or a value missing, not a number, or without a source.
    """
    own = name.endswith(".toml")
    whole = ALIASES.get(name, name)
    path = Path(name) if own else FOLDER / f"{whole}.toml"
    if not (path.is_file() if own else whole in hardware_names()):
        if own:
            raise UserError(f"There is no hardware file {name}; check the path.")
        raise unknown("hardware preset", name, hardware_names(), ", or give a .toml file")
    asked = dict(parts or {})
    for kind in asked:
        if kind not in PARTS:
            raise UserError(f"A machine has no part {kind!r}; its parts are {', '.join(PARTS)}.")
    named, given = _read(path, "machine")
    description = named.pop("description")
    named |= asked
    if "kernel" not in named and not any(key in given for key in PARTS["kernel"]):
        named["kernel"] = _kernel_of_gpu(named.get("gpu"))
    merged: dict[str, tuple[float, str]] = {}
    for kind, keys in PARTS.items():
        chosen = _part(kind, named[kind])[1] if kind in named else {}
        if kind not in asked:
            chosen |= {key: given[key] for key in keys if key in given}
        for key, entry in chosen.items():
            # Only the bus is given twice, by both its ends.
            merged[key] = min(merged[key], entry, key=lambda e: e[0]) if key in merged else entry
    if faults := _lacking(merged):
        raise UserError(f"The hardware file {path.name} has {'; and '.join(faults)}.")
    numbers: dict[str, float] = {key: value for key, (value, _) in merged.items() if key not in PARTS["kernel"]}
    changes = ",".join(f"{kind}={part}" for kind, part in asked.items())
    return Hardware(
        name=f"{path.stem}:{changes}" if asked else path.stem,
        description=f"{description}; here with {changes}" if asked else description,
        sources={key: source for key, (_, source) in merged.items()},
        kernel=_kernel(named.get("kernel", path.stem), merged, "kernel" in named),
        parts={kind: named[kind] for kind in PARTS if kind in named},
        **numbers,
    )


def load_kernel(name: str) -> Kernel:
    """A kernel by the name of its part; a UserError where there is none of that name."""
    return _kernel(name, _part("kernel", name)[1], True)


def _kernel(name: str, entries: Mapping[str, tuple[float, str]], part: bool) -> Kernel:
    """A kernel of these numbers, which are those of a part or a machine file's own."""
    texts = _part("kernel", name)[0] if part else {"description": f"the numbers of {name}.toml"}
    floor, reading, overhead, computing, row = (entries.get(key, (0.0, ""))[0] for key in PARTS["kernel"])
    return Kernel(name, floor, reading, overhead, computing, row, texts["description"], texts.get("gpu"))


def _kernel_of_gpu(gpu: str | None) -> str:
    """The kernel a GPU part names, or the one of all others."""
    return DEFAULT_KERNEL if gpu is None else _part("gpu", gpu)[0].get("kernel", DEFAULT_KERNEL)


def _lacking(merged: Mapping[str, tuple[float, str]]) -> list[str]:
    """What a machine of these numbers lacks, in words, each key once."""
    faults: list[str] = []
    seen: set[str] = {"row_s"}
    for kind, keys in PARTS.items():
        lacking = [key for key in keys if key not in merged and key not in seen]
        if lacking and (len(lacking) < len(keys) or kind != "nvme"):
            seen.update(lacking)
            more = " and so on" if len(lacking) > 1 else ""
            faults.append(
                f"no {', '.join(lacking)}; add [{lacking[0]}] with value and source{more}, or a part: {kind} = NAME"
            )
    return faults


def _part(kind: str, name: str) -> tuple[dict[str, str], dict[str, tuple[float, str]]]:
    """The texts of a part, and its numbers, each with its source."""
    if name not in part_names(kind):
        raise unknown(f"{kind} part", name, part_names(kind))
    return _read(FOLDER / kind / f"{name}.toml", kind)


def _read(path: Path, kind: str) -> tuple[dict[str, str], dict[str, tuple[float, str]]]:
    """The description and parts that a file names, and its numbers with their sources."""
    return read_preset(path, "hardware", _FILES[kind], MEASUREMENTS if kind == "machine" else None)
