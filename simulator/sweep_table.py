"""The table a sweep keeps: one row a run, in a Parquet file that is replaced whole and never half written."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simulator.cost import PARTS
from simulator.experiment import Machine
from simulator.registry import describe
from simulator.result import Run
from simulator.sources import package_sources, policy_sources
from simulator.tallies.working_set import WINDOWS
from tracer.errors import UserError
from tracer.files.parts import part_names
from tracer.parquet import open_trace
from tracer.schema import KINDS

if TYPE_CHECKING:
    import polars as pl

    from tracer.files.reader import Trace

Row = dict[str, Any]

NAMES = ("trace", "key", "model", "acceptance", "routing", "residency", "hardware")
"""First columns: which trace (:func:`trace_identity`), fingerprint of all that decides the row, model, and specs."""
TEXTS = (*NAMES, "kernel")
"""Columns that are texts even where no row has any."""

POLICY_AXES = ("acceptance", "routing", "residency")

PARTS_OF = {
    "expert_hit_rate_by_kind": KINDS,
    "working_set_experts": tuple(map(str, WINDOWS)),
    "latency": PARTS,
}
"""Figures of the summary that have parts, a column each."""

# Of a Parquet file its footer: sizes and extremes of every column chunk.
FOOTER = 1 << 16


def trace_identity(trace: Trace) -> str:
    """A hash of a stored trace that changes with its content but not with its place: ``meta.json`` and each part's footer."""
    digest = hashlib.sha256(json.dumps(trace.meta.raw, sort_keys=True).encode())
    for table in trace.meta.tables:
        for name in part_names(trace.path, table):
            with (trace.path / table / name).open("rb") as part:
                size = part.seek(0, os.SEEK_END)
                part.seek(max(0, size - FOOTER))
                digest.update(f"{table} {name} {size}".encode())
                digest.update(part.read())
    return digest.hexdigest()[:16]


def fingerprint(identity: str, policies: Sequence[Any], machine: Machine) -> str:
    """A hash of everything a run's figures follow from: trace, policies, machine, and this package's sources.

    Of the user's own policies the files count too, and of a trace to fit on its content, so that edited ones are run again.
    """
    told: list[Any] = [package_sources(), identity]
    for policy in policies:
        module = sys.modules[type(policy).__module__]
        told.append([module.__name__.startswith("simulator."), describe(policy)])
        if getattr(module, "__file__", None) is not None and not module.__name__.startswith("simulator."):
            told.append(policy_sources(module))
        if getattr(policy, "fit_on", None) is not None:
            told.append(trace_identity(open_trace(policy.fit_on)))
    if machine.spec is not None:
        told.append(_plain((machine.cost, machine.note)))
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def run_row(names: Row, run: Run) -> Row:
    """One run as a flat row: parameters as ``routing.top_p``, parts of a figure as ``latency.dense``, intervals by end.

    Of a speed-up its value, and the ends of its band as ``speedup.low`` and ``speedup.high``.
    """
    row = {**names, "kernel": run.kernel}
    for axis in POLICY_AXES:
        row |= {f"{axis}.{key}": value for key, value in getattr(run, axis)["parameters"].items()}
    # The same columns in the same order for every run, whatever it has no figure for.
    for key, value in run.summary.items():
        if key in PARTS_OF:
            row |= {f"{key}.{part}": (value or {}).get(part) for part in PARTS_OF[key]}
        elif key == "unique_experts_ci95":
            row |= _ends(key, value)
        elif key == "speedup":
            row |= {key: value and value["value"]} | _ends(key, value and (value["low"], value["high"]))
        else:
            row[key] = value
    row["estimate"], row["over_budget"] = run.estimate, run.over_budget
    for key in ("tokens_per_forward", "unique_experts"):
        row |= _ends(f"bounds.{key}", (run.bounds or {}).get(key))
    row["notes"] = list(run.notes)
    return row


def _ends(key: str, interval: Sequence[float] | None) -> Row:
    low, high = interval or (None, None)
    return {f"{key}.low": low, f"{key}.high": high}


def is_result(path: Path) -> bool:
    """Whether a file is a Parquet file with a sweep's columns."""
    import polars as pl

    try:
        return set(NAMES) <= set(pl.read_parquet_schema(path))
    except (OSError, pl.exceptions.PolarsError):
        return False


def read_rows(path: Path) -> list[Row]:
    """The rows of a sweep's file.

    Raises
    ------
    UserError
        The file is not a sweep's result.
    """
    import polars as pl

    try:
        if is_result(path):
            return list(pl.read_parquet(path).iter_rows(named=True))
    except (OSError, pl.exceptions.PolarsError):
        # Its end is there, what comes before it is damaged.
        pass
    raise UserError(f"{path} is there and is not a sweep's result; name another file, or replace it with force=True.")


def frame_of(rows: Iterable[Row]) -> pl.DataFrame:
    """Rows as a frame: names, parameters, figures; a column that holds values of several kinds is text."""
    import polars as pl

    rows = list(rows)
    found = dict.fromkeys(key for row in rows for key in row)
    parameters = [key for key in found if key.startswith(tuple(f"{axis}." for axis in POLICY_AXES))]
    columns = dict.fromkeys([*TEXTS, *sorted(parameters), *found])
    series = [_series(name, [row.get(name) for row in rows]) for name in columns]
    return pl.DataFrame(series)


def _series(name: str, values: list[Any]) -> pl.Series:
    import polars as pl

    kinds = {type(value) for value in values if value is not None}
    if name == "notes":
        return pl.Series(name, values, pl.List(pl.String))
    if kinds == {list}:
        return pl.Series(name, values, pl.List(pl.Float64))
    if kinds <= {int} and kinds:
        return pl.Series(name, values, pl.Int64)
    if kinds <= {int, float} and (kinds or name not in TEXTS):
        return pl.Series(name, values, pl.Float64)
    if kinds == {bool}:
        return pl.Series(name, values, pl.Boolean)
    texts = [str(value).lower() if isinstance(value, bool) else str(value) for value in values]
    known = [None if value is None else text for value, text in zip(values, texts, strict=True)]
    return pl.Series(name, known, pl.String)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replace the file by one of these rows; whatever stops the writing, the old file or the new one is there.

    Raises
    ------
    UserError
        The file cannot be written.
    """
    fresh = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with fresh.open("wb") as file:
            frame_of(rows).write_parquet(file)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; name another file.") from None
