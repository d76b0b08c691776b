"""How fast this machine's processor, memory and disk are at what an expert needs: reading weights, multiplying, loading a file.

Everything is timed with the wall clock and bounded: by the bytes it touches and by the seconds it repeats. Of repeated runs the
fastest counts where only other processes can make one slower.
"""

from __future__ import annotations

import mmap
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import cycle, pairwise
from pathlib import Path
from statistics import median

import numpy as np

from tracer.jit import njit

HIDDEN, INTERMEDIATE = 2048, 512
"""The expert that is timed, that of LLaDA2.0-mini (its config.json), in float32."""
EXPERT_BYTES = 3 * HIDDEN * INTERMEDIATE * 4
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PAGE = 4096


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a measurement may take: bytes of memory and of disk, and seconds each thing is repeated."""

    buffer_bytes: int = 1 << 30
    disk_bytes: int = 1 << 28
    seconds: float = 0.4
    matrix: int = 8192  # rows of the largest matrix product


def processor() -> str:
    """The processor's name as its vendor gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def threads() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> int:
    """Bytes of memory that are free or can be freed; 2 GiB where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 2 << 30


def load_average() -> float | None:
    """Processes that wanted to run over the last minute; None where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def repeat(run: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each of at least three runs, after one that is not counted, for about ``seconds``."""
    run()
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < seconds:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return taken


def memory_speed(limits: Limits) -> tuple[float, float]:
    """Bytes per second that all threads together read as a stream, and copy (each byte counted once)."""
    workers = threads()
    words = max(PAGE, min(limits.buffer_bytes, free_memory() // 4) // 16)
    source, target = np.empty(words, np.int64), np.empty(words, np.int64)
    bounds = np.linspace(0, words, workers + 1).astype(int)
    pieces = [slice(a, b) for a, b in pairwise(bounds.tolist())]

    def touch(piece: slice) -> None:
        source[piece] = target[piece] = 1

    with ThreadPoolExecutor(workers) as pool:
        # Each thread touches its own piece first, which puts the pages beside its core.
        list(pool.map(touch, pieces))
        reading = repeat(lambda: list(pool.map(lambda piece: _total(source[piece]), pieces)), limits.seconds)
        copying = repeat(
            lambda: list(pool.map(lambda piece: np.copyto(target[piece], source[piece]), pieces)), limits.seconds
        )
    return source.nbytes / min(reading), source.nbytes / min(copying)


def matrix_speed(limits: Limits) -> float:
    """FLOP per second of a float32 matrix product with all threads, the largest of squares that double in size."""
    best, size = 0.0, min(512, limits.matrix)
    while True:
        left = np.ones((size, size), np.float32)
        right, out = np.ones_like(left), np.empty_like(left)
        taken = min(repeat(partial(np.matmul, left, right, out=out), limits.seconds / 2))
        best = max(best, 2.0 * size**3 / taken)
        # The next product takes eight times as long.
        if 2 * size > limits.matrix or 32 * taken > limits.seconds:
            return best
        size *= 2


def expert_seconds(limits: Limits) -> dict[int, float]:
    """Least seconds of one expert in float32 by its tokens; experts take turns, so their weights come from memory.

    One of fewer tokens is never slower than one of more, whose rows it could be padded to.
    """
    number = max(2, min(limits.buffer_bytes, free_memory() // 4) // EXPERT_BYTES)
    rng = np.random.default_rng(0)
    shapes = ((HIDDEN, INTERMEDIATE), (HIDDEN, INTERMEDIATE), (INTERMEDIATE, HIDDEN))
    first = [rng.standard_normal(shape, np.float32) * np.float32(0.02) for shape in shapes]
    experts = cycle([[matrix.copy() for matrix in first] for _ in range(number)])
    found = {}
    for tokens in TOKENS:
        rows = rng.standard_normal((tokens, HIDDEN), np.float32)

        def run(rows: np.ndarray = rows) -> None:
            _expert(rows, *next(experts))

        found[tokens] = min(repeat(run, limits.seconds / 4))
    return {tokens: min(found[more] for more in TOKENS if more >= tokens) for tokens in TOKENS}


def disk_speed(folder: Path, limits: Limits) -> tuple[float, float] | None:
    """Bytes per second of reading one expert after the other from a file, and seconds of reading a page.

    Reads go past the page cache (``O_DIRECT``). None where that or room for the file is lacking: on systems other than Linux,
    on file systems that do not know it.
    """
    if not hasattr(os, "O_DIRECT") or shutil.disk_usage(folder).free < 4 * limits.disk_bytes:
        return None
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".moetrace-profile-") as file:
        rng = np.random.default_rng(0)
        piece = min(6 << 20, limits.disk_bytes) // PAGE * PAGE
        for _ in range(limits.disk_bytes // piece):
            file.write(rng.bytes(piece))
        file.flush()
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
        try:
            direct = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
        except OSError:
            return None
        try:
            return _read_speed(direct, size, piece, rng, limits.seconds)
        except OSError:
            return None
        finally:
            os.close(direct)


def _read_speed(file: int, size: int, piece: int, rng: np.random.Generator, seconds: float) -> tuple[float, float]:
    # A mapping starts on a page, as direct reads demand.
    with mmap.mmap(-1, piece) as large, mmap.mmap(-1, PAGE) as page:

        def pieces() -> Iterator[int]:
            yield from cycle(range(0, size, piece))

        at = pieces()
        reading = repeat(lambda: os.preadv(file, [large], next(at)), 2 * seconds)
        pages = cycle(rng.permutation(size // PAGE)[:1024].tolist())
        finding = repeat(lambda: os.preadv(file, [page], PAGE * next(pages)), seconds / 4)
    return piece / median(reading), median(finding)


def _expert(rows: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    gated = rows @ gate
    gated /= 1.0 + np.exp(-gated)
    gated *= rows @ up
    return gated @ down


@njit
def _total(words):
    total = np.int64(0)
    for i in range(len(words)):
        total += words[i]
    return total
