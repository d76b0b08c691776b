"""``TraceWriter``: model calls in, segments out."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tracer.errors import UserError
from tracer.files.buffer import OpenSegment
from tracer.files.commit import Committer
from tracer.files.folder import take_folder
from tracer.files.incoming import CallRules
from tracer.interrupts import undisturbed
from tracer.meta import as_document, parse_meta, under_way, write_meta
from tracer.schema import SCHEMA_VERSION, tables_of
from tracer.trace import CallRouting, TraceMeta


class TraceWriter:
    """Writes a trace, segment by segment, in the background; a context manager.

    A segment ends where the (request, block) of the calls changes, once it holds ``segment_forwards`` calls, is
    ``segment_seconds`` old or holds an eighth of ``max_buffer_bytes``; a block that goes on past half of these bytes is cut at
    the next call. Encoding takes about as much memory again as its segment. A process killed at any moment loses the open
    segment, and one on its way to the disk, at most; Ctrl-C loses nothing: it is held back until a call is in. Left by an
    exception, the context commits what it has and leaves ``complete`` false. One writer a folder: a second one is refused.

    Parameters
    ----------
    path : str or Path
        Folder to write; made with its parents.
    meta : dict
        ``meta.json`` without schema_version, created and complete. ``tables`` defaults to all that the capture level has.
    force : bool
        Replace a trace that is there, never another folder or file. The new one is written beside it and takes its place when
        it is complete; until then, and if it never is, the old one stays.
    append : bool
        Go on with a trace that is there, after removing what an interrupted writer left: parts that belong to no forwards,
        and the calls at its end whose requests never ended. A new one where there is none.
    whole : bool
        All or nothing: the trace appears when it is complete, and an exception leaves nothing behind.
    compact : bool
        Smaller weights and scores, in an encoding that pyarrow reads and polars and DuckDB do not.
    segment_forwards : int
        Calls after which a segment ends at the next block end.
    segment_seconds : float
        Seconds after which it does.
    max_buffer_bytes : int
        Bound on the bytes of calls held in memory; :meth:`add_call` waits for the disk beyond it. One call always fits.

    Attributes
    ----------
    folder : Path
        Where the parts are: ``path``, or beside it until they take the place of what is there.
    meta : TraceMeta
    next_forward : int
        forward_id of the next call.
    next_request : int
        A request_id above all that are in the trace when it is opened.
    ended : frozenset of int
        Requests that were complete in the trace when it was opened.

    Raises
    ------
    UserError
        When the path is taken or cannot be written, another writer is at work on it, or ``meta`` is not valid or not the one
        of the trace appended to.
    """

    def __init__(
        self,
        path: str | Path,
        meta: Mapping[str, Any],
        *,
        force: bool = False,
        append: bool = False,
        whole: bool = False,
        compact: bool = False,
        segment_forwards: int = 1024,
        segment_seconds: float = 5.0,
        max_buffer_bytes: int = 128 << 20,
    ) -> None:
        if force and append:
            raise UserError("force replaces a trace and append goes on with it: choose one of the two.")
        if segment_forwards < 1 or max_buffer_bytes < 1 or segment_seconds <= 0:
            raise UserError("segment_forwards, segment_seconds and max_buffer_bytes must be at least 1.")
        self.path = Path(path)
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        tables = tables_of(str(meta.get("capture_level")))
        given = {"tables": tables, **meta, "schema_version": SCHEMA_VERSION, "created": created}
        document = under_way(as_document(given))
        self.meta: TraceMeta = parse_meta(document)
        if "loads" in self.meta.tables:
            raise UserError("a trace of counts has no calls: write it with write_loads.")
        try:
            with undisturbed():
                self._place = take_folder(self.path, document, force, append, whole)
                self.folder = self._place.folder
                for table in self.meta.tables:
                    (self.folder / table).mkdir(exist_ok=True)
                write_meta(self.folder, self._place.document)
                self._whole = whole
                self.next_forward, self.ended = self._place.forward, self._place.ended
                before = self._place.held | self._place.ended
                self.next_request = max(before, default=-1) + 1
                self._rules = CallRules(self.meta, before)
                self._segment_forwards, self._segment_seconds = segment_forwards, segment_seconds
                self._soft_bytes, self._hard_bytes = max_buffer_bytes // 8, max_buffer_bytes // 2
                self._last_bytes = 0
                self._committer = Committer(self.folder, self._place.part, max_buffer_bytes, compact)
                self._begin_segment()
                self._open = True
        except BaseException as error:
            # an interrupt that was held back until here too: nobody will close this writer
            self._open = False
            if hasattr(self, "_place"):
                self._place.give_up()
            if isinstance(error, OSError):
                raise self._unwritable(error) from None
            raise

    @property
    def bytes_written(self) -> int:
        """Bytes of the parts this writer has committed so far."""
        return self._committer.bytes_written

    def add_call(
        self, parts: Sequence[Mapping[str, Any]], tokens: Mapping[str, Any] | None, routing: CallRouting
    ) -> int:
        """Add one model call. Everything is copied.

        Parameters
        ----------
        parts : list of dict
            One a request of the call, in row order: the columns of ``forwards`` without forward_id; branches (1), num_edited
            (0), chosen_branch and duration_ns (None) may be left out; kv_tokens, num_masked and num_accepted may be None.
        tokens : dict of arrays [rows] or None
            The columns of ``tokens`` without forward_id and row; the argmax columns and ``edited`` may be left out. None
            exactly when ``meta.tables`` does not list the table.
        routing : CallRouting
            All layers of the call, stacked; ``router_scores`` of all E experts at the levels active and scores.

        Returns
        -------
        int
            The call's forward_id.

        Raises
        ------
        UserError
            When the call breaks the format; ids, weights and scores are looked at in the background, so their faults, and those
            of the disk, are raised by a later call or by :meth:`close`.
        """
        self._check_open()
        rows, checked = self._rules.parts(self.next_forward, parts, tokens is not None, routing.layers)
        pairs = {(part["request_id"], part["block"]) for part in checked if part["block"] >= 0}
        ends = self._segment.num_bytes >= self._hard_bytes or (self._full() and not pairs & self._pairs)
        # Waiting can be interrupted; nothing has changed yet.
        self._committer.make_room(self._segment.num_bytes + self._last_bytes, ends)
        with undisturbed():
            if ends:
                self._committer.submit(self._segment)
                self._begin_segment()
            before = self._segment.num_bytes
            self._segment.put(self.next_forward, checked, rows, tokens, routing)
            self._rules.accept(checked, routing.layers)
            self._last_bytes = self._segment.num_bytes - before
            self._pairs |= pairs
            self.next_forward += 1
            return self.next_forward - 1

    def _full(self) -> bool:
        segment, age = self._segment, time.monotonic() - self._opened
        grown = segment.num_calls >= self._segment_forwards or segment.num_bytes >= self._soft_bytes
        return segment.num_calls > 0 and (grown or age > self._segment_seconds)

    def add_request(self, request: Mapping[str, Any]) -> None:
        """Add the row of a request that has ended: the columns of ``requests``, dataset and prompt optional.

        Raises
        ------
        UserError
            When a column is missing, unknown or out of range, or the request is already in the trace.
        """
        self._check_open()
        with undisturbed():
            self._segment.requests.append(self._rules.request(request))

    def close(self, complete: bool = True) -> None:
        """Commit everything, stop the thread and write the final ``meta.json``. Closing twice does nothing.

        What was to replace another trace takes its place now, if ``complete``; else it is left beside it, in ``folder``.

        Raises
        ------
        UserError
            When the background thread failed; the trace holds what was committed before.
        """
        with undisturbed():
            if not self._open:
                return
            self._open = False
            try:
                if self._segment.num_calls or self._segment.requests:
                    self._committer.submit(self._segment)
                self._committer.finish()
                document = {**self._place.document, "complete": complete}
                if complete:
                    document["segments"] = self._committer.next_part
                write_meta(self.folder, document)
                if complete:
                    self._place.finish()
            except OSError as error:
                raise self._unwritable(error) from None
            finally:
                self._place.release(keep=bool(self.next_forward) and not self._whole)
                self.folder = self._place.folder

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close(complete=False)
        except UserError as second:
            error.add_note(str(second))

    def __del__(self) -> None:
        # an interrupt may come between two lines of a with-statement, before the writer's own could hold it back
        if getattr(self, "_open", False):
            with suppress(Exception):
                self.close(complete=False)

    def _begin_segment(self) -> None:
        self._segment = OpenSegment(self.meta)
        self._pairs: set[tuple[int, int]] = set()
        self._opened = time.monotonic()

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"{self.path} cannot be written: {error.strerror or error}.")

    def _check_open(self) -> None:
        if not self._open:
            raise UserError(f"{self.path} is closed: open a TraceWriter with append=True to go on.")
        self._committer.raise_error()
