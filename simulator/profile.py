"""Measure this machine and write it down as a hardware preset whose numbers all say that they were measured, on what and when.

What is measured is what the cost model multiplies (``cost.py``): streams from memory, matrix products, one expert, the bus, the
drive. It takes some ten seconds on an idle machine and, by default, at most 1 GiB of memory and 256 MiB of disk, given back
afterwards.
"""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from simulator.measuring.gpu import cuda_torch, gpu_speed
from simulator.measuring.host import (
    EXPERT_BYTES,
    HIDDEN,
    INTERMEDIATE,
    Limits,
    disk_speed,
    expert_seconds,
    load_average,
    matrix_speed,
    memory_speed,
    processor,
    threads,
)
from simulator.preset_files import preset_text
from simulator.presets import MEASURED, MEASUREMENTS, PARTS, part_names
from tracer.errors import UserError, unknown

Progress = Callable[[int, int], None]
STEPS = 5
BUSY = 0.25
"""Share of its threads a machine may have had at work before it was measured."""
EXPERT = f"a float32 expert of {HIDDEN} x {INTERMEDIATE}"
HOW = {
    "cpu_bytes_per_s": "all threads reading memory as a stream",
    "cpu_flops": "the largest float32 matrix product of NumPy with all threads; not BF16",
    "cpu_overhead_s": f"{EXPERT} with one token, less its roofline at the measured speeds",
    "nvme_bytes_per_s": "direct reads of 6 MiB from a file, one after the other",
    "nvme_latency_s": "direct reads of 4 KiB from random places of a file, one after the other",
    "gpu_memory_bytes": "as the device says",
    "gpu_bytes_per_s": "the largest of many words, every one read once",
    "gpu_flops": "a BF16 matrix product",
    "h2d_bytes_per_s": "a copy of 256 MiB from pinned memory",
    "d2h_bytes_per_s": "a copy of 256 MiB to pinned memory",
    "copy_latency_s": "copies of 64 bytes from pinned memory, launched one after the other",
}


def profile_machine(
    progress: Progress | None = None, folder: str | Path = ".", limits: Limits | None = None
) -> dict[str, Any]:
    """Measure this machine.

    Parameters
    ----------
    progress : callable, optional
        ``progress(done, total)`` after every step.
    folder : str or Path
        Where a file may be put to measure the drive; it is removed again.
    limits : Limits, optional
        Bytes and seconds it may take.

    Returns
    -------
    dict
        ``cpu`` and ``gpu`` (names; the latter None without torch or a CUDA device), ``date``, ``threads``, ``values`` and
        ``sources`` (key of a hardware file to number and to text), ``measurements``: what no formula uses, the speed of
        copies in memory, seconds of an expert on the CPU by its tokens and ``gpu_overhead_s``, what a BF16 expert of one token
        takes on the GPU beyond its roofline, and ``notes``: sentences, where something was
        not as it should be.

    Raises
    ------
    UserError
        ``folder`` cannot be written to.
    """
    limits = limits or Limits()
    where = Path(folder)
    if not where.is_dir():
        raise UserError(f"There is no folder {where} to measure the drive in; give one that exists.")

    def step(done: int) -> None:
        if progress is not None:
            progress(done, STEPS)

    load, workers = load_average(), threads()
    notes = []
    if load is not None and load > BUSY * workers:
        notes.append(
            f"The machine was busy (load average {load:.1f} on {workers} threads), so these numbers are too low; "
            "measure again when it is idle."
        )
    step(0)
    reading, copying = memory_speed(limits)
    step(1)
    flops = matrix_speed(limits)
    step(2)
    experts = expert_seconds(limits)
    floor = max(EXPERT_BYTES / reading, 6.0 * HIDDEN * INTERMEDIATE / flops)
    values = {"cpu_bytes_per_s": reading, "cpu_flops": flops, "cpu_overhead_s": max(0.0, experts[1] - floor)}
    step(3)
    try:
        disk = disk_speed(where, limits)
    except OSError as error:
        raise UserError(f"{where} cannot be written to ({error.strerror}); give another folder.") from error
    if disk is not None:
        values |= dict(zip(PARTS["nvme"], disk, strict=True))
    else:
        notes.append(
            "The drive was not measured: it takes Linux, a file system that knows O_DIRECT, and room for a file."
        )
    step(4)
    torch = cuda_torch()
    of_gpu: dict[str, float] = {}
    if torch is not None:
        of_gpu = gpu_speed(torch, limits)
        values |= {key: of_gpu[key] for key in PARTS["gpu"]}
    step(5)
    cpu, date = processor(), datetime.date.today().isoformat()
    gpu = None if torch is None else str(torch.cuda.get_device_name(0))
    sources = {
        key: f"{MEASURED} {gpu if key in of_gpu else cpu}, {date}, by moetrace profile: {HOW[key]}" for key in values
    }
    return {
        "cpu": cpu,
        "gpu": gpu,
        "date": date,
        "threads": workers,
        "values": {key: float(f"{value:.4g}") for key, value in values.items()},
        "sources": sources,
        "measurements": {
            "memcpy_bytes_per_s": float(f"{copying:.4g}"),
            "expert_hidden_size": HIDDEN,
            "expert_intermediate_size": INTERMEDIATE,
            "cpu_expert_tokens": list(experts),
            "cpu_expert_seconds": [float(f"{seconds:.4g}") for seconds in experts.values()],
            **{key: float(f"{value:.4g}") for key, value in of_gpu.items() if key not in values},
        },
        "notes": notes,
    }


def write_profile(
    path: str | Path,
    force: bool = False,
    progress: Progress | None = None,
    gpu: str | None = None,
    limits: Limits | None = None,
) -> dict[str, Any]:
    """Measure this machine and write a hardware file that ``--hardware`` takes; returns what :func:`profile_machine` does.

    Parameters
    ----------
    path : str or Path
        A .toml file; its folder is where the drive is measured.
    force : bool
        Overwrite the file.
    progress : callable, optional
        ``progress(done, total)`` after every step.
    gpu : str, optional
        One of the package's GPUs to stand beside this host where it has none of its own; without one such a file asks for
        ``:gpu=NAME`` when it is used.
    limits : Limits, optional
        Bytes and seconds it may take.

    Raises
    ------
    UserError
        The file exists, is no .toml, its folder does not, or the GPU is none of the package.
    """
    target = Path(path)
    if target.suffix != ".toml":
        raise UserError(f"A hardware file ends in .toml and {target.name} does not; name it {target.stem}.toml.")
    if target.exists() and not force:
        raise UserError(f"{target} exists already; choose another name, or overwrite it with --force.")
    if gpu is not None and gpu not in part_names("gpu"):
        raise unknown("gpu part", gpu, part_names("gpu"))
    found = profile_machine(progress, target.parent, limits)
    target.write_text(profile_text(found, gpu), encoding="utf-8")
    return found


def profile_text(found: dict[str, Any], gpu: str | None = None) -> str:
    """A profile as the text of a hardware file; ``gpu`` as in :func:`write_profile`, unless the machine has its own."""
    beside = found["gpu"] or (f"the data sheet of {gpu}" if gpu else "no GPU")
    title = (
        f"{found['cpu']} ({found['threads']} threads) beside {beside}, measured {found['date']} on {platform.system()}"
    )
    texts = {"description": " ".join([title, *(f"({note})" for note in found["notes"])])}
    if gpu is not None and found["gpu"] is None:
        texts["gpu"] = gpu
    lines = ["", f"[{MEASUREMENTS}]", *(f"{key} = {json.dumps(value)}" for key, value in found["measurements"].items())]
    entries = {key: (value, found["sources"][key]) for key, value in found["values"].items()}
    return preset_text(texts, entries) + "\n".join(lines) + "\n"
