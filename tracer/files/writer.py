"""``TraceWriter``: model calls in, segments out."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tracer.errors import UserError
from tracer.files.buffer import OpenSegment
from tracer.files.commit import Committer
from tracer.files.folder import take_folder
from tracer.files.incoming import CallRules
from tracer.meta import as_document, parse_meta, write_meta
from tracer.schema import DEFAULT_ENCODINGS, SCHEMA_VERSION, TABLES
from tracer.trace import TraceMeta

# about a sixth fewer bytes than plain ids and byte planes of weights


class TraceWriter:
    """Writes a trace, segment by segment, in the background; a context manager.

    A segment ends where the (request, block) of the calls changes, once it holds ``segment_forwards`` calls or an eighth of
    ``max_buffer_bytes``. A block that goes on past half of ``max_buffer_bytes`` is cut at the next call all the same; readers
    put its pieces together again. Encoding takes about as much memory again as the segment it works on. A process killed at
    any moment loses the open segment at most. Left by an exception, the context commits what it has and leaves ``complete``
    false.

    Parameters
    ----------
    path : str or Path
        Folder to write; made with its parents.
    meta : dict
        ``meta.json`` without schema_version, created and complete. ``tables`` defaults to all four, ``encodings`` to
        :data:`tracer.schema.DEFAULT_ENCODINGS`; ``COMPACT_ENCODINGS`` there make smaller files.
    force : bool
        Replace a trace that is there. Only a trace: another folder or file is never touched.
    append : bool
        Go on with a trace that is there, after removing what an interrupted writer left; a new one where there is none.
    segment_forwards : int
        Calls after which a segment ends at the next block end.
    max_buffer_bytes : int
        Bound on the bytes of calls held in memory; :meth:`add_call` waits for the disk beyond it. One call always fits.

    Attributes
    ----------
    meta : TraceMeta
    next_forward : int
        forward_id of the next call.
    next_request : int
        A request_id above all that were in the trace when it was opened. A request that was interrupted cannot go on.
    ended : frozenset of int
        Requests that were complete in the trace when it was opened.

    Raises
    ------
    UserError
        When the path is taken or cannot be written, or ``meta`` is not valid or not the one of the trace appended to.
    """

    def __init__(
        self,
        path: str | Path,
        meta: Mapping[str, Any],
        *,
        force: bool = False,
        append: bool = False,
        segment_forwards: int = 1024,
        max_buffer_bytes: int = 128 << 20,
    ) -> None:
        if force and append:
            raise UserError("force replaces a trace and append goes on with it: choose one of the two.")
        if segment_forwards < 1 or max_buffer_bytes < 1:
            raise UserError("segment_forwards and max_buffer_bytes must be at least 1.")
        self.path = Path(path)
        document = as_document(
            {
                "tables": list(TABLES),
                "encodings": DEFAULT_ENCODINGS,
                **meta,
                "schema_version": SCHEMA_VERSION,
                "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "complete": False,
            }
        )
        self.meta: TraceMeta = parse_meta(document)
        try:
            start = take_folder(self.path, document, force, append)
            for table in self.meta.tables:
                (self.path / table).mkdir(exist_ok=True)
            write_meta(self.path, start.document)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror or error}.") from None
        self._document = start.document
        self.next_forward = start.forward
        self.ended = start.ended
        self.next_request = max((*start.held, *start.ended), default=-1) + 1
        self._rules = CallRules(self.meta, start.held | start.ended)
        self._segment_forwards = segment_forwards
        self._soft_bytes, self._hard_bytes = max_buffer_bytes // 8, max_buffer_bytes // 2
        self._segment = OpenSegment(self.meta)
        self._pairs: set[tuple[int, int]] = set()
        self._last_bytes = 0
        self._committer = Committer(self.path, start.part, max_buffer_bytes)
        self._open = True

    @property
    def bytes_written(self) -> int:
        """Bytes of the parts this writer has committed so far."""
        return self._committer.bytes_written

    def add_call(
        self,
        parts: Sequence[Mapping[str, Any]],
        tokens: Mapping[str, Any] | None,
        routing: Mapping[int, Mapping[str, Any]],
    ) -> int:
        """Add one model call. Everything is copied.

        Parameters
        ----------
        parts : list of dict
            One a request of the call, in row order: the columns of ``forwards`` without forward_id; branches (1), chosen_branch
            and duration_ns (None) may be left out.
        tokens : dict of arrays [rows] or None
            The columns of ``tokens`` without forward_id and row; the argmax columns may be left out. None exactly when
            ``meta.tables`` does not list the table.
        routing : dict of dict
            Per layer: ``expert_ids`` int [rows, K]; ``gate_weights`` float [rows, K] or None; ``router_scores`` float32
            [rows, C] and ``score_experts`` [C] as the capture level has it; ``routed`` bool [rows] or None for all.

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
        rows, checked = self._rules.parts(self.next_forward, parts, tokens is not None, routing)
        pairs = {(part["request_id"], part["block"]) for part in checked if part["block"] >= 0}
        full = self._segment.num_calls >= self._segment_forwards or self._segment.num_bytes >= self._soft_bytes
        if self._segment.num_bytes >= self._hard_bytes or (full and not pairs & self._pairs):
            self._end_segment()
        self._committer.make_room(self._segment.num_bytes + self._last_bytes)
        before = self._segment.num_bytes
        self._segment.put(self.next_forward, checked, rows, tokens, routing)
        self._rules.accept(checked)
        self._last_bytes = self._segment.num_bytes - before
        self._pairs |= pairs
        self.next_forward += 1
        return self.next_forward - 1

    def add_request(self, request: Mapping[str, Any]) -> None:
        """Add the row of a request that has ended: the columns of ``requests``, dataset and prompt optional.

        Raises
        ------
        UserError
            When a column is missing, unknown or out of range, or the request is already in the trace.
        """
        self._check_open()
        self._segment.requests.append(self._rules.request(request))

    def close(self, complete: bool = True) -> None:
        """Commit everything, stop the thread and write the final ``meta.json``. Closing twice does nothing.

        Raises
        ------
        UserError
            When the background thread failed; the trace holds what was committed before.
        """
        if not self._open:
            return
        self._open = False
        if self._segment.num_calls or self._segment.requests:
            self._end_segment()
        self._committer.finish()
        try:
            write_meta(self.path, {**self._document, "complete": complete})
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror or error}.") from None

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

    def _end_segment(self) -> None:
        self._committer.submit(self._segment)
        self._segment, self._pairs = OpenSegment(self.meta, self._segment), set()

    def _check_open(self) -> None:
        if not self._open:
            raise UserError(f"{self.path} is closed: open a TraceWriter with append=True to go on.")
        self._committer.raise_error()
