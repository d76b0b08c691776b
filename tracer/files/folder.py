"""The folder a writer takes over: empty, replaced, or one to go on with after whatever stopped the last writer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracer.errors import UserError
from tracer.files.forwards import read_forwards
from tracer.files.parts import PART_NAME, committed_parts, open_part
from tracer.meta import META_FILE, TEMPORARY_META, read_meta
from tracer.schema import TABLES

# what must be the same in a trace and in what is appended to it
SAME_ON_APPEND = (
    "schema_version",
    "capture_level",
    "model",
    "router",
    "score_dtype",
    "tables",
    "decoding",
    "encodings",
)


@dataclass(frozen=True, slots=True)
class Start:
    """Where a writer begins: ``held`` are the requests the trace has forwards of, ``ended`` those that have their row."""

    document: dict[str, Any]
    part: int = 0
    forward: int = 0
    held: frozenset[int] = frozenset()
    ended: frozenset[int] = frozenset()


def take_folder(path: Path, document: dict[str, Any], force: bool, append: bool) -> Start:
    """Make a folder ready for a writer; ``document`` is the new ``meta.json``.

    Raises
    ------
    UserError
        When something is there that may not be replaced, or a trace of another model or capture is to be appended to.
    OSError
        When the folder cannot be written.
    """
    if append and (path / META_FILE).exists():
        return _resume(path, document)
    if path.exists():
        if not path.is_dir():
            raise UserError(f"{path} is a file: choose another name for the trace.")
        if (path / META_FILE).exists():
            read_meta_or_refuse(path)
            if not force:
                raise there_already(path)
        elif holds_others(path):
            raise UserError(f"{path} exists and is not a trace: choose another name.")
        remove_parts(path, 0)
        (path / META_FILE).unlink(missing_ok=True)
    path.mkdir(parents=True, exist_ok=True)
    return Start(document)


def there_already(path: Path) -> UserError:
    """What is said of a trace that is neither to be replaced nor to be gone on with."""
    return UserError(
        f"{path} exists: replace the trace with force=True, go on with it with append=True, or give another name."
    )


def holds_others(path: Path) -> bool:
    """Whether a folder holds anything but what a writer leaves that was stopped before its first segment."""
    return any(entry.name not in (TEMPORARY_META, *TABLES) for entry in path.iterdir())


def read_meta_or_refuse(path: Path) -> None:
    """Refuse a folder whose ``meta.json`` is not that of a trace, so that no other folder is ever replaced."""
    try:
        read_meta(path)
    except UserError as error:
        raise UserError(f"{path} is left alone, it is not a readable trace: {error}") from None


def remove_parts(path: Path, first: int) -> None:
    """Delete parts from number ``first`` on and every temporary file, which only a stopped writer leaves."""
    # forwards first: a segment without its forwards part does not exist
    for table in sorted(TABLES, key=lambda table: table != "forwards"):
        folder = path / table
        for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
            match = PART_NAME.fullmatch(entry.name)
            temporary = entry.name.startswith(".part-") and entry.name.endswith(".parquet.tmp")
            if temporary or (match and int(match.group(1)) >= first):
                entry.unlink()
    (path / TEMPORARY_META).unlink(missing_ok=True)


def _resume(path: Path, document: Mapping[str, Any]) -> Start:
    stored = read_meta(path).raw
    for key in SAME_ON_APPEND:
        if stored.get(key) != document.get(key):
            raise UserError(
                f"{path} was recorded with another {key}, so nothing can be appended to it: write a new trace."
            )
    segments = committed_parts(path)
    remove_parts(path, segments)
    forwards = read_forwards(path)
    ended = [
        request
        for number in range(segments)
        for request in open_part(path, "requests", number).arrays(["request_id"])["request_id"].tolist()
    ]
    last = int(forwards.call_ids[-1]) + 1 if forwards.num_calls else 0
    return Start(
        document={**stored, "complete": False},
        part=segments,
        forward=last,
        held=frozenset(forwards.columns["request_id"].tolist()),
        ended=frozenset(ended),
    )
