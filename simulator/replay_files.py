"""The files of a replay's folder: their names, and which of them are there."""

from __future__ import annotations

from pathlib import Path

CELLS, DOCUMENT, FORWARDS = REPLAY_FILES = ("replay.parquet", "replay.json", "forwards.parquet")


def files_in(folder: Path) -> list[str]:
    """Names of a replay's files that a folder holds."""
    return [name for name in REPLAY_FILES if (folder / name).exists()]
