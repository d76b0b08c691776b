"""One binary column of ``routing`` over the cells of a segment: found, kept in memory or streamed, gathered by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import Lock

import numpy as np

from tracer.errors import TraceError
from tracer.files.cells import copy_cells, join_planes
from tracer.files.parts import CellChunk, PartFile, cell_chunks, open_part

# a column of a segment that is larger than this is streamed anew for every layer instead of being kept
CACHE_BYTES = 512 << 20
STREAM_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows ``low`` to ``high - 1`` of one routing part: the cells from ``first`` on of the segment."""

    part: PartFile
    low: int
    high: int
    first: int


@dataclass(slots=True)
class CellColumn:
    """A binary column over the cells of a segment. Safe to use from several threads."""

    name: str
    pieces: tuple[Piece, ...]
    encoding: str
    _large: bool = field(init=False)
    _kept: list[CellChunk] | None = None
    _lengths: np.ndarray | None = None  # int64, of every cell of the segment
    _lock: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        self._large = sum(piece.part.cell_bytes(self.name)[1] for piece in self.pieces) > CACHE_BYTES

    def chunks(self) -> Iterator[CellChunk]:
        """The cells in order; ``first`` counts cells of the segment."""
        if self._large:
            for piece in self.pieces:
                yield from self._stream(piece)
            return
        yield from self._read_once()

    def _read_once(self) -> list[CellChunk]:
        with self._lock:
            if self._kept is None:
                self._kept = [chunk for piece in self.pieces for chunk in self._read(piece)]
        return self._kept

    @property
    def busy(self) -> bool:
        """Whether another thread is reading it just now."""
        return self._lock.locked()

    def read_ahead(self) -> None:
        """Read it now, if it is one that is kept."""
        if not self._large:
            self._read_once()

    def _read(self, piece: Piece) -> Iterator[CellChunk]:
        if self.name not in piece.part.present:
            return
        part = _own_reader(piece.part)
        for group, begin in part.row_groups(piece.low, piece.high):
            values = part.read([self.name], group).column(0)
            low = max(0, piece.low - begin)
            taken = values.slice(low, piece.high - begin - low)
            yield from cell_chunks(taken, piece.first + begin + low - piece.low)

    def _stream(self, piece: Piece) -> Iterator[CellChunk]:
        if self.name not in piece.part.present:
            return
        part = _own_reader(piece.part)
        rows = max(1, STREAM_BYTES * part.num_rows // max(1, part.cell_bytes(self.name)[1]))
        groups = part.row_groups(piece.low, piece.high)
        begin = groups[0][1] if groups else 0
        for batch in part.batches(self.name, rows, [group for group, _ in groups]):
            low = max(0, piece.low - begin)
            taken = batch.column(0).slice(low, max(0, piece.high - begin - low))
            yield from cell_chunks(taken, piece.first + begin + low - piece.low)
            begin += batch.num_rows

    def cell_fault(self, cell: int, message: str) -> TraceError:
        """A fault of a cell of the segment, naming table, part and row."""
        piece = next(p for p in reversed(self.pieces) if p.first <= cell)
        return piece.part.fault(cell - piece.first + piece.low, message)

    def lengths(self, cells: np.ndarray) -> np.ndarray:
        """int64 [M]: bytes of the given cells (ascending); -1 where null or where the column is missing."""
        if self._lengths is None:
            last = self.pieces[-1]
            found = np.full(last.first + last.high - last.low, -1, np.int64)
            for chunk in self.chunks():
                sizes = np.diff(chunk.offsets)
                own = slice(chunk.first, chunk.first + len(chunk))
                found[own] = sizes if chunk.valid is None else np.where(chunk.valid, sizes, -1)
            self._lengths = found
        return self._lengths[cells]

    def gather(self, cells: np.ndarray, starts: np.ndarray, sizes: np.ndarray, out: np.ndarray) -> None:
        """Copy cells (ascending) to byte offsets ``starts`` of ``out``, undoing the column's encoding.

        Parameters
        ----------
        cells, starts, sizes : int64 [M]
            ``sizes`` are the bytes each cell must have.
        out : any contiguous array

        Raises
        ------
        TraceError
            Where a cell is null or of another length; nothing of it is copied.
        """
        target = out.reshape(-1).view(np.uint8)
        copied = 0
        for chunk, wanted, local in self._matches(cells):
            found = chunk.offsets[local + 1] - chunk.offsets[local]
            wrong = found != sizes[wanted]
            if chunk.valid is not None:
                wrong |= ~chunk.valid[local]
            if wrong.any():
                at = int(np.argmax(wrong))
                null = chunk.valid is not None and not chunk.valid[local[at]]
                have = "is null" if null else f"has {found[at]} bytes"
                message = f"{self.name} {have} and must have {sizes[wanted][at]}"
                raise self.cell_fault(int(cells[wanted][at]), message + ".")
            if self.encoding == "byte_planes" and out.itemsize > 1:
                words = target.view(np.uint16) if out.itemsize == 2 else target
                join_planes(chunk.data, chunk.offsets, local, starts[wanted], words, out.itemsize)
            else:
                copy_cells(chunk.data, chunk.offsets, local, starts[wanted], target)
            copied += len(local)
        if copied < len(cells):
            lacking = next(piece.part for piece in self.pieces if self.name not in piece.part.present)
            raise lacking.fault(None, f"column {self.name} is missing.")

    def _matches(self, cells: np.ndarray) -> Iterator[tuple[CellChunk, slice, np.ndarray]]:
        """Chunks that hold some of the cells, which of them (a slice), and their indices in the chunk."""
        for chunk in self.chunks():
            if len(cells) and chunk.first <= cells[0] and cells[-1] < chunk.first + len(chunk):
                yield chunk, slice(None), cells - chunk.first
                return
            low, high = np.searchsorted(cells, (chunk.first, chunk.first + len(chunk)))
            if low < high:
                yield chunk, slice(low, high), cells[low:high] - chunk.first


def _own_reader(part: PartFile) -> PartFile:
    """The part opened once more: Parquet readers must not be shared between threads."""
    return open_part(part.path, part.table, part.number)
