"""What a replay answers: a table of cells, a list of runs, and the files they are kept in."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simulator.policy import Trajectory
from simulator.replay_files import REPLAY_FILES, files_in
from simulator.streams.spool import Spool
from simulator.tallies.cells import PlacedCells, RoutedCells
from tracer.errors import UserError
from tracer.schema import KINDS

if TYPE_CHECKING:
    import polars as pl

CELL_TYPES = {
    "run": np.uint16,
    "forward_id": np.uint32,
    "layer": np.uint16,
    "assignments": np.uint32,
    "unique_experts": np.uint16,
    "unique_experts_block": np.uint16,
    "gpu_tokens": np.uint32,
    "cpu_tokens": np.uint32,
    "gpu_experts": np.uint16,
    "cpu_experts": np.uint16,
    "hit_tokens": np.uint32,
    "hit_experts": np.uint16,
    "promotions": np.uint16,
    "demotions": np.uint16,
    "gate_retained": np.float32,
}
"""Columns of ``replay.parquet`` in order; only ``gate_retained`` may be null, where the trace holds no gate weights."""

FORWARD_TYPES = {
    "run": np.uint16,
    "forward_id": np.uint32,
    "kind": np.uint8,
    "request_id": np.uint32,
    "block": np.int32,
    "step": np.int32,
    "num_tokens": np.uint32,
    "num_masked": np.int64,
    "num_accepted": np.int64,
    "branches": np.uint8,
    "chosen_branch": np.int16,
}
"""Columns of ``forwards.parquet`` in order, -1 unknown; there and in frames ``kind`` is its name, not its code."""

# Rows of a row group at least, where there are as many.
ROWS_AT_ONCE = 1 << 18


@dataclass(frozen=True, slots=True)
class Run:
    """One experiment: policies as ``{"name", "parameters"}``, the machine and its kernel, its figures, and how to read them.

    ``estimate`` is false only for the recorded experts on the recorded forwards; ``over_budget``: the residency policy held
    more than its budget, so that its figures are those of a larger one; ``bounds`` are scenario bounds of an estimate.
    """

    run: int
    acceptance: dict[str, Any]
    routing: dict[str, Any]
    residency: dict[str, Any]
    hardware: str | None
    kernel: str | None
    summary: dict[str, Any]
    estimate: bool
    over_budget: bool
    bounds: dict[str, Any] | None
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """The run as plain values."""
        return {name: getattr(self, name) for name in self.__slots__}


def cell_columns(
    forward_ids: np.ndarray, layers: tuple[int, ...], routed: RoutedCells, placed: PlacedCells
) -> dict[str, np.ndarray]:
    """Columns of a segment's cells in their final types, forwards outermost, layers that did not run left out.

    Parameters
    ----------
    forward_ids : np.ndarray
        uint32 [F].
    layers : tuple of int
        The model's numbers of the L layers.
    routed, placed
        The segment's figures, [F, L] each.
    """
    shape = routed.present.shape
    # A call without gate weight has none to lose.
    share = np.divide(routed.kept, routed.vanilla, out=np.ones(shape), where=routed.vanilla != 0)
    values = {
        "forward_id": np.broadcast_to(forward_ids[:, None], shape),
        "layer": np.broadcast_to(np.array(layers)[None, :], shape),
        "assignments": routed.assignments,
        "unique_experts": routed.unique,
        "unique_experts_block": routed.in_block,
        "gpu_tokens": placed.gpu_tokens,
        "cpu_tokens": routed.assignments - placed.gpu_tokens,
        "gpu_experts": placed.gpu_experts,
        "cpu_experts": routed.unique - placed.gpu_experts,
        "hit_tokens": placed.hit_tokens,
        "hit_experts": placed.hit_experts,
        "promotions": placed.promotions,
        "demotions": placed.demotions,
        "gate_retained": share,
    }
    return {name: column[routed.present].astype(CELL_TYPES[name]) for name, column in values.items()}


def forward_columns(forward_ids: np.ndarray, trajectory: Trajectory) -> dict[str, np.ndarray]:
    """The forwards of a segment as the run ran them, one row a (forward, request) part."""
    forwards = trajectory.forwards
    columns = {name: getattr(forwards, name) for name in FORWARD_TYPES if name not in ("run", "forward_id")}
    columns = {"forward_id": forward_ids[forwards.part_forward], **columns}
    return {name: np.asarray(column).astype(FORWARD_TYPES[name]) for name, column in columns.items()}


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """All runs of a replay, in the order of the product: routing outermost, then residency, then hardware.

    ``trace`` says what was replayed. Cells and forwards are kept in a spool, on disk where they are many, until asked for.
    """

    trace: dict[str, Any]
    runs: list[Run]
    _spool: Spool = field(repr=False)
    _cell_keys: list[Hashable] | None = field(repr=False)  # of each run; None where they were not kept
    _forward_keys: list[Hashable] = field(repr=False)

    @property
    def cells(self) -> pl.DataFrame:
        """One row per (run, forward, layer), the columns and types of ``replay.parquet``.

        Raises
        ------
        UserError
            The replay was told not to keep them.
        """
        return _frame(self._cell_tables(), CELL_TYPES).with_columns(_null_where_nan())

    @property
    def forwards(self) -> pl.DataFrame:
        """One row per (run, forward, request): the forwards the run ran, the trace's own where it kept to them."""
        return _named_kinds(_frame(self._tables(self._forward_keys), FORWARD_TYPES))

    def _cell_tables(self) -> Iterator[dict[str, np.ndarray]]:
        if self._cell_keys is None:
            raise UserError("This replay kept no cells; replay the trace again with keep_cells=True.")
        return self._tables(self._cell_keys)

    def _tables(self, keys: list[Hashable]) -> Iterator[dict[str, np.ndarray]]:
        """Tables of all runs in order, with the run's number beside them."""
        for run, key in enumerate(keys):
            for table in self._spool.tables(key):
                rows = len(next(iter(table.values())))
                yield {"run": np.full(rows, run, np.uint16), **table}

    def to_json(self) -> dict[str, Any]:
        """The document of ``replay --json``, plain values only."""
        return {"trace": self.trace, "runs": [run.to_json() for run in self.runs]}

    def write(self, folder: str | Path, force: bool = False) -> list[Path]:
        """Write ``replay.parquet``, ``replay.json`` and ``forwards.parquet``; returns their paths.

        Parameters
        ----------
        folder : str or Path
            Made where it does not exist.
        force : bool
            Whether files that are there already are replaced.

        Raises
        ------
        UserError
            A file is there already, the folder cannot be written to, or the replay was told not to keep cells.
        """
        folder = Path(folder)
        if (folder / "meta.json").exists():
            raise UserError(f"{folder} is a trace; name another folder for the replay.")
        paths = [folder / name for name in REPLAY_FILES]
        taken = files_in(folder)
        if taken and not force:
            raise UserError(f"{folder} holds {taken[0]} already; name another folder, or replace it with force=True.")
        cells = self._cell_tables()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            fresh = [path.with_name(f".{path.name}.{os.getpid()}") for path in paths]
            _write_tables(fresh[0], cells, CELL_TYPES, lambda frame: frame.with_columns(_null_where_nan()))
            fresh[1].write_text(json.dumps(self.to_json(), indent=1, allow_nan=False), encoding="utf-8")
            _write_tables(fresh[2], self._tables(self._forward_keys), FORWARD_TYPES, _named_kinds)
            for path, written in zip(paths, fresh, strict=True):
                written.replace(path)
        except OSError as error:
            raise UserError(f"{folder} cannot be written to: {error.strerror}; name another folder.") from None
        return paths


def _null_where_nan() -> pl.Expr:
    import polars as pl

    return pl.col("gate_retained").fill_nan(None)


def _named_kinds(frame: pl.DataFrame) -> pl.DataFrame:
    import polars as pl

    return frame.with_columns(pl.Series("kind", np.array(KINDS)[frame["kind"].to_numpy()], dtype=pl.String))


def _frame(tables: Iterable[dict[str, np.ndarray]], types: dict[str, Any]) -> pl.DataFrame:
    """Tables one below the other, columns in the order and the types of ``types``."""
    import polars as pl

    found = list(tables)
    columns = {
        name: np.concatenate([*(table[name] for table in found), np.zeros(0, kind)]).astype(kind)
        for name, kind in types.items()
    }
    return pl.DataFrame(columns)


def _write_tables(
    path: Path,
    tables: Iterable[dict[str, np.ndarray]],
    types: dict[str, Any],
    finish: Callable[[pl.DataFrame], pl.DataFrame],
) -> None:
    """Tables as the row groups of a Parquet file, several small ones in one, never all in memory at once."""
    import pyarrow.parquet as pq

    empty = finish(_frame([], types)).to_arrow(compat_level=_plain_arrow())
    waiting: list[dict[str, np.ndarray]] = []
    with pq.ParquetWriter(path, empty.schema, compression="zstd") as writer:

        def flush() -> None:
            writer.write_table(finish(_frame(waiting, types)).to_arrow(compat_level=_plain_arrow()))
            waiting.clear()

        for table in tables:
            waiting.append(table)
            if sum(len(one["run"]) for one in waiting) >= ROWS_AT_ONCE:
                flush()
        flush()


def _plain_arrow() -> Any:
    """Arrow types every Parquet reader knows, no string views."""
    import polars as pl

    return pl.CompatLevel.oldest()
