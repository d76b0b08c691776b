"""The denoise forwards of a segment in the order the figures ask for: by request, block and step.

P = (call, request) parts of kind denoise, R = runs (a block of a request inside the segment), S = block length.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from analysis.metrics.kernels.decoding import final_tokens
from analysis.metrics.shared.settings import UNITS
from tracer.schema import DENOISE, PADDING, undecided
from tracer.trace import Segment

ABSENT, STILL_MASKED, KNOWN = -1, 0, 1
"""Codes of :attr:`Timeline.state`."""


class Units:
    """Numbers requests in the order they are met and deals them to at most :data:`UNITS` bootstrap units."""

    def __init__(self) -> None:
        self.number: dict[int, int] = {}

    def of(self, requests: np.ndarray) -> np.ndarray:
        """int64: the unit of each request id."""
        numbers = [self.number.setdefault(int(r), len(self.number)) % UNITS for r in requests]
        return np.array(numbers, np.int64)

    @property
    def count(self) -> int:
        return min(len(self.number), UNITS)


@dataclass(frozen=True)
class Timeline:
    """Parts sorted by (request, block, step), and where each block position of each part lies in the segment's rows.

    ``first`` and ``last`` bound all rows of a part, every branch. ``grid`` and ``state`` know the rows of the current
    block only, and of the chosen branch; without a tokens table or without blocks they are [P, 0].
    """

    segment: Segment
    request: np.ndarray  # int64 [P]
    block: np.ndarray  # int64 [P]
    step: np.ndarray  # int64 [P]
    unit: np.ndarray  # int64 [P]
    first: np.ndarray  # int64 [P]
    last: np.ndarray  # int64 [P]
    rows: int  # of all parts, padding apart
    accepted: np.ndarray  # int64 [P], -1 unknown
    run_offsets: np.ndarray  # int64 [R + 1]
    grid: np.ndarray  # int64 [P, S], row in the segment, -1 absent
    state: np.ndarray  # int8 [P, S], ABSENT, STILL_MASKED or KNOWN

    @property
    def parts(self) -> int:
        return len(self.request)

    @property
    def runs(self) -> int:
        return len(self.run_offsets) - 1

    @cached_property
    def block_only(self) -> bool:
        """Whether the parts hold no rows but those in the grid, padding apart."""
        return self.grid.shape[1] > 0 and self.rows == int((self.grid >= 0).sum())

    @cached_property
    def run_unit(self) -> np.ndarray:
        """int64 [R]: the bootstrap unit of each run."""
        return self.unit[self.run_offsets[:-1]]

    @property
    def run_request(self) -> np.ndarray:
        """int64 [R]: the request of each run."""
        return self.request[self.run_offsets[:-1]]

    def by_run(self, counts: np.ndarray) -> np.ndarray:
        """Sums over the parts of each run, [R, ...] of counts [P, ...]."""
        return np.add.reduceat(counts, self.run_offsets[:-1], axis=0) if self.parts else counts

    def placed(self, column: str) -> np.ndarray:
        """A column of the tokens table, [P, S]; absent positions hold another row's, and their state says so."""
        return np.ascontiguousarray(getattr(self.segment.tokens, column)[self.grid])

    @cached_property
    def final(self) -> tuple[np.ndarray, np.ndarray] | None:
        """When each position of each run is accepted for good, counted in parts of the run, and as which token.

        int64 [R, S] twice, -1 where it is not; None without rows of blocks.
        """
        tokens = self.segment.tokens
        if tokens is None or not self.grid.size or not len(tokens.position):
            return None
        rows = (self.placed(name) for name in ("accepted", "predicted_id", "token_id"))
        return final_tokens(self.state, *rows, self.run_offsets)


def timeline(segment: Segment, block_length: int, units: Units) -> Timeline:
    """Sort the denoise parts of a segment and find their block rows.

    Padding and rows outside the part's block are absent from the grid. A call with several copies of the block counts
    with its chosen branch (branch 0 where the trace does not say).
    """
    forwards = segment.forwards
    parts = np.flatnonzero(forwards.kind == DENOISE)
    order = np.lexsort((forwards.step[parts], forwards.block[parts], forwards.request_id[parts]))
    parts = parts[order]
    request = forwards.request_id[parts].astype(np.int64)
    block = forwards.block[parts].astype(np.int64)
    starts, ends = forwards.part_rows
    change = np.flatnonzero((np.diff(request) != 0) | (np.diff(block) != 0)) + 1
    run_offsets = np.concatenate(([0], change, [len(parts)])) if len(parts) else np.zeros(1, np.int64)
    # Numbered in the order of the calls, so that a unit does not depend on where segments end.
    units.of(forwards.request_id[np.sort(parts)])
    grid, state = _block_rows(segment, parts, block, starts, block_length)
    rows, padding = int((ends[parts] - starts[parts]).sum()), segment.padding
    if padding is not None:
        before = np.concatenate(([0], np.cumsum(padding)))
        rows -= int((before[ends[parts]] - before[starts[parts]]).sum())
    return Timeline(
        segment=segment,
        request=request,
        block=block,
        step=forwards.step[parts].astype(np.int64),
        unit=units.of(request),
        first=starts[parts],
        last=ends[parts],
        rows=rows,
        accepted=forwards.num_accepted[parts].astype(np.int64),
        run_offsets=run_offsets.astype(np.int64),
        grid=grid,
        state=state,
    )


def _block_rows(
    segment: Segment, parts: np.ndarray, block: np.ndarray, starts: np.ndarray, block_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Row and state of every block position of every part."""
    tokens = segment.tokens
    width = block_length if tokens is not None else 0
    grid = np.full((len(parts), width), -1, np.int64)
    state = np.full((len(parts), width), ABSENT, np.int8)
    if tokens is None or width == 0 or not len(parts):
        return grid, state
    forwards = segment.forwards
    branches = np.maximum(forwards.branches[parts].astype(np.int64), 1)
    rows = forwards.num_tokens[parts] // branches
    first = starts[parts] + rows * np.maximum(forwards.chosen_branch[parts].astype(np.int64), 0)
    part = np.repeat(np.arange(len(parts)), rows)
    row = np.arange(len(part)) + np.repeat(first - (np.cumsum(rows) - rows), rows)
    position = tokens.position[row].astype(np.int64)
    offset = position - block[part] * width
    inside = (offset >= 0) & (offset < width) & (position >= 0) & (tokens.state[row] != PADDING)
    part, row, offset = part[inside], row[inside], offset[inside]
    grid[part, offset] = row
    state[part, offset] = np.where(undecided(tokens.state[row]), STILL_MASKED, KNOWN)
    return grid, state
