"""``njit`` with a disk cache that notices every edited kernel.

Numba's own cache looks at the file of the compiled function only, so an edited callee in another file would go on being
served from disk. Here the cache folder is named after the package version and a hash of all sources that hold kernels: any edit
of any of them starts a new folder.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numba

# Numba fills its settings in at run time.
config: Any = numba.config

PACKAGES = ("tracer", "simulator", "analysis")


def kernel_key(folders: Iterable[Path]) -> str:
    """Package version and a hash of every Python source under ``folders`` that mentions njit."""
    digest = hashlib.sha256(numba.__version__.encode())
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            source = path.read_bytes()
            if b"njit" in source:
                digest.update(f"{folder.name}/{path.relative_to(folder).as_posix()}".encode())
                digest.update(hashlib.sha256(source).digest())
    try:
        package = version("moetrace")
    except PackageNotFoundError:
        package = "source"
    return f"{package}-{digest.hexdigest()[:16]}"


def user_cache() -> Path:
    """Folder of the user's caches on this platform."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def writable(folder: Path) -> bool:
    """Whether ``folder`` exists or can be made, belongs to the user and takes a file.

    Cached kernels are pickles: a folder that somebody else owns or may write to is not read from.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if hasattr(os, "getuid"):
            stat = folder.stat()
            if stat.st_uid != os.getuid() or stat.st_mode & 0o022:
                return False
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def cache_folder(key: str) -> Path | None:
    """The folder compiled kernels are kept in: ``NUMBA_CACHE_DIR``, the user's cache, or a temporary folder.

    None where none of them can be written to; kernels are then compiled anew in every process.
    """
    owner = f"moetrace-{os.getuid()}" if hasattr(os, "getuid") else "moetrace"
    asked = config.CACHE_DIR
    bases = [Path(asked)] if asked else [user_cache() / "moetrace"]
    for base in (*bases, Path(tempfile.gettempdir()) / owner):
        if writable(base / key):
            return base / key
    return None


def folders() -> list[Path]:
    """The packages whose kernels share a cache folder."""
    root = Path(__file__).resolve().parent.parent
    return [root / name for name in PACKAGES if (root / name).is_dir()]


@lru_cache(maxsize=1)
def _folder() -> Path | None:
    return cache_folder(kernel_key(folders()))


def njit(function: Callable[..., Any]) -> Any:
    """Compile on first call, without the GIL and with exact floating point; keep the machine code on disk."""
    folder = _folder()
    before = config.CACHE_DIR
    config.CACHE_DIR = str(folder or "")
    try:
        # Nothing calls kernels through C, and a wrapper for it takes its share of every compilation.
        options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}
        return numba.njit(cache=folder is not None, **options)(function)
    finally:
        config.CACHE_DIR = before
