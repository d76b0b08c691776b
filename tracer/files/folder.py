"""The folder a writer works in: new, beside what it will replace, or one to go on with after the last writer stopped."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

from tracer.errors import TraceError, UserError
from tracer.files.commit import COMPACT, part_name, put_part, write_part
from tracer.files.forwards import StoredForwards, read_forwards, structure_faults
from tracer.files.parts import PartFile, part_names
from tracer.meta import META_FILE, TEMPORARY_META, read_meta, sync_folder, under_way, write_meta
from tracer.schema import TABLES
from tracer.trace import TraceMeta

if TYPE_CHECKING:
    import filelock

# what must be the same in a trace and in what is appended to it
SAME_ON_APPEND = ("schema_version", "capture_level", "model", "router", "tables", "decoding", "writer")
OWN_NAMES = (META_FILE, TEMPORARY_META, *TABLES)


def _beside(path: Path, what: str) -> Path:
    """A hidden name beside a trace: "lock" while a writer is at work, "new" what will replace it, "old" what it replaces."""
    return path.absolute().with_name(f".{path.absolute().name}.{what}")


def earlier_trace(path: Path) -> Path | None:
    """Where the trace is that a replacement, killed between its last two steps, left beside ``path``."""
    old = _beside(path, "old")
    return old if not path.exists() and (old / META_FILE).exists() else None


def _clear_old(path: Path) -> None:
    """Remove the trace that was replaced; what else was in its folder comes along."""
    old = _beside(path, "old")
    for entry in list(old.iterdir()):
        if entry.name not in OWN_NAMES and not (path / entry.name).exists():
            os.rename(entry, path / entry.name)
    shutil.rmtree(old)


@dataclass(slots=True)
class Place:
    """Where a writer begins: ``held`` are the requests the trace has forwards of, ``ended`` those that have their row."""

    path: Path
    folder: Path
    document: dict[str, Any]
    lock: filelock.BaseFileLock
    part: int = 0
    forward: int = 0
    held: frozenset[int] = frozenset()
    ended: frozenset[int] = frozenset()
    made: bool = False

    def finish(self) -> None:
        """Let what was written beside the trace take its place; other files of the folder come along."""
        if self.folder == self.path:
            return
        if self.path.exists():
            os.rename(self.path, _beside(self.path, "old"))
            os.rename(self.folder, self.path)
            _clear_old(self.path)
        else:
            os.rename(self.folder, self.path)
        self.folder = self.path
        sync_folder(self.path.absolute().parent)

    def release(self, keep: bool) -> None:
        """Let the next writer in. What never took its place is removed, or with ``keep`` left under a name of its own."""
        if self.folder != self.path and self.folder.exists():
            if keep:
                self.folder = self.folder.rename(_free_name(self.path))
            else:
                shutil.rmtree(self.folder, ignore_errors=True)
        if self.lock.is_locked:
            # while it is held: who waits for the old file sees that it is gone and makes a new one
            Path(self.lock.lock_file).unlink(missing_ok=True)
            self.lock.release()

    def give_up(self) -> None:
        """Undo what taking the place did."""
        if self.made:
            shutil.rmtree(self.path, ignore_errors=True)
        self.release(keep=False)


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.stem}.partial{n}{path.suffix}") for n in ("", *(f"-{n}" for n in range(2, 1000))))
    return next(name for name in names if not name.exists())


def take_folder(path: Path, document: dict[str, Any], force: bool, append: bool, whole: bool = False) -> Place:
    """Make a folder ready for a writer; ``document`` is the new ``meta.json``.

    Raises
    ------
    UserError
        When something is there that may not be replaced, another writer is at work, or a trace of another model or capture is
        to be appended to.
    OSError
        When the folder cannot be written.
    """
    # readers need none
    import filelock

    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file: choose another name for the trace.")
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
    lock = filelock.FileLock(_beside(path, "lock"), timeout=0, thread_local=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f"{path} is being written by another process: wait for it, or give another name.") from None
    place = Place(path, path, document, lock)
    try:
        earlier = earlier_trace(path)
        if earlier is not None:
            os.rename(earlier, path)
        there = (path / META_FILE).exists()
        if there and _beside(path, "old").exists():
            # left by a writer that was killed as soon as the new trace was in its place
            _clear_old(path)
        if append and there:
            _resume(place)
            return place
        if path.exists():
            refuse_unless_trace(path)
        if there and not force:
            raise there_already(path)
        if there or whole:
            place.folder = _beside(path, "new")
            if place.folder.exists():
                # left by a writer that was killed; whoever is at work holds the lock
                shutil.rmtree(place.folder)
            place.folder.mkdir()
        else:
            place.made = not path.exists()
            path.mkdir(exist_ok=True)
            _remove_left_overs(path, kept=())
        return place
    except BaseException:
        place.give_up()
        raise


def there_already(path: Path) -> UserError:
    """What is said of a trace that is neither to be replaced nor to be gone on with."""
    return UserError(
        f"{path} exists: replace the trace with force=True, go on with it with append=True, or give another name."
    )


def refuse_unless_trace(path: Path) -> None:
    """Refuse a folder that is neither empty nor a trace, sound or not, so that no other folder is ever replaced."""
    if not (path / META_FILE).exists():
        if any(entry.name not in OWN_NAMES for entry in path.iterdir()):
            raise UserError(f"{path} is there and is not a trace: choose another name.")
        return
    try:
        document = json.loads((path / META_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        document = None
    if not isinstance(document, dict) or not {"schema_version", "capture_level"} <= set(document):
        raise UserError(f"{path} is left alone, it is not a trace: its {META_FILE} is another's.")


def _remove_left_overs(path: Path, kept: tuple[str, ...]) -> None:
    """Delete the parts of other names than ``kept`` and every temporary file, which only a stopped writer leaves."""
    # forwards first: a segment without its forwards part does not exist
    for table in sorted(TABLES, key=lambda table: table != "forwards"):
        left_over = [path / table / name for name in reversed(part_names(path, table)) if name not in kept]
        for file in (*left_over, *(path / table).glob(".*.parquet.tmp")):
            file.unlink()
    (path / TEMPORARY_META).unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class LastState:
    """What a trace holds that can be gone on with: requests that ended, and where its calls end without those under way.

    ``calls`` counts the calls to keep: after them there are only calls of requests that never ended. ``parts`` counts the
    parts to keep, those with a call to keep or the row of a request.
    """

    stored: StoredForwards
    ended: frozenset[int]
    calls: int
    parts: int

    @property
    def held(self) -> frozenset[int]:
        """Requests with forwards among the calls to keep."""
        rows = self.stored.call_parts[self.calls]
        return frozenset(self.stored.columns["request_id"][:rows].tolist())


def last_state(path: Path, meta: TraceMeta) -> LastState:
    """Where a writer that goes on with a trace begins; nothing is changed."""
    stored = read_forwards(path, meta)
    for fault in structure_faults(stored):
        raise TraceError(fault)
    ended: set[int] = set()
    parts = 0
    for number, name in enumerate(request_parts(stored), 1):
        rows = PartFile(path, "requests", name, meta).arrays(["request_id"])["request_id"].tolist()
        ended.update(rows)
        parts = number if rows else parts
    of_ended = np.flatnonzero(np.isin(stored.columns["request_id"], list(ended)))
    calls = int(np.searchsorted(stored.call_parts, of_ended[-1], "right")) if len(of_ended) else 0
    parts = max(parts, int(np.searchsorted(stored.part_calls[:-1], calls, "left")))
    return LastState(stored, frozenset(ended), calls, parts)


def request_parts(stored: StoredForwards) -> list[str]:
    """Parts of ``requests`` that count: of an unfinished trace as many as ``forwards`` has, the next are of a lost segment."""
    names = part_names(stored.path, "requests")
    return names if stored.meta.complete else names[: len(stored.names)]


def _resume(place: Place) -> None:
    path, document = place.path, place.document
    meta = read_meta(path)
    for key in SAME_ON_APPEND:
        if meta.raw.get(key) != document.get(key):
            what = "options or prompts" if key == "writer" else key
            raise UserError(
                f"{path} was recorded with another {what}, so nothing can be appended to it: write a new trace."
            )
    state = last_state(path, meta)
    names = state.stored.names
    if names != tuple(map(part_name, range(len(names)))):
        raise UserError(f"{path} has parts of other names than this writer gives, so nothing can be appended to it.")
    place.document = under_way(meta.raw)
    # first of all: from here on the trace is under way again
    if meta.complete:
        write_meta(path, place.document)
    last_call = int(state.stored.call_ids[state.calls - 1]) if state.calls else -1
    _cut(path, meta, state, last_call)
    place.part, place.forward, place.held, place.ended = state.parts, last_call + 1, state.held, state.ended


def _cut(path: Path, meta: TraceMeta, state: LastState, last_call: int) -> None:
    """Remove left-overs, and the calls after those to keep.

    A part that holds both is written anew, ``forwards`` first and the last part first: whatever else is there beyond them is a
    left-over from then on, so the trace is whole at any moment. Left-overs of a writer killed here go too.
    """
    names = state.stored.names[: state.parts]
    _remove_left_overs(path, kept=names)
    # the parts before hold calls to keep alone and were never cut
    first = max(0, int(np.searchsorted(state.stored.part_calls, state.calls, "left")) - 1)
    for table in sorted(set(meta.tables) - {"requests"}):
        for name in reversed(names[first:]):
            part = PartFile(path, table, name, meta)
            groups = [
                rows.filter(pc.less_equal(rows["forward_id"], last_call)) for _, rows in part.tables(part.schema.names)
            ]
            if sum(len(group) for group in groups) < part.num_rows:
                encodings = {name: part.chunk(name, 0).encodings for name in part.present & COMPACT.keys()}
                write_part(path, table, name, iter(groups), any("BYTE_STREAM_SPLIT" in e for e in encodings.values()))
                put_part(path, table, name)
