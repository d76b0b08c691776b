"""Sweeps: a trace replayed under every configuration of grids, results kept in one file, run by run.

Many configurations share one pass over the trace, and a pass holds so many that memory stays bounded whatever the grid. The
file is brought up to date after every pass, so a sweep that is stopped loses only the runs under way and goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simulator.grid import expand, split_name
from simulator.plan import make_plan
from simulator.registry import load_policy
from simulator.replay import replay
from simulator.runs import speedup
from simulator.sweep_table import Row, fingerprint, frame_of, read_rows, run_row, spec_of, trace_identity, write_rows
from tracer.errors import UserError

if TYPE_CHECKING:
    import polars as pl

    from tracer.files.reader import Trace

# A pass over a segment of the largest size takes some 20 MB a routing policy and 2 MB a run.
ROUTINGS_A_PASS, RUNS_A_PASS = 8, 64


@dataclass(frozen=True, slots=True)
class SweepResult:
    """A finished sweep: where it is kept, how many runs were computed now and how many were there, and its rows.

    ``rows`` are those asked for, routing outermost, then residency, then hardware; the file may hold others.
    """

    path: Path
    computed: int
    reused: int
    rows: list[Row]

    @property
    def frame(self) -> pl.DataFrame:
        """One row a run: specs, parameters, figures, ``estimate`` and ``notes``; ``speedup`` against the first row."""
        return frame_of(self.rows)


@dataclass(frozen=True, slots=True)
class _Point:
    """A configuration, the names its row begins with, and the fingerprint of what it follows from."""

    routing: Any
    residency: Any
    hardware: str | None
    names: Row

    @property
    def specs(self) -> tuple[Any, ...]:
        return tuple(self.names[axis] for axis in ("trace", "routing", "residency", "hardware"))


def sweep(
    trace: Trace,
    routing: Sequence[str] = ("vanilla",),
    residency: Sequence[str] = ("all_resident",),
    hardware: str | Sequence[str] | None = None,
    *,
    out: str | Path,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    force: bool = False,
) -> SweepResult:
    """Replay a trace under every configuration that grids of specs stand for.

    Parameters
    ----------
    trace
        What ``tracer.parquet.open_trace`` returns.
    routing, residency : sequence of str
        Specs, with grids inside: see :func:`simulator.grid.expand`.
    hardware : str or sequence of str, optional
        Hardware specs, likewise.
    out : str or Path
        The Parquet file. Where it holds rows of this trace, version and configuration these are not computed again; rows of
        other traces and configurations stay.
    workers : int, optional
        Threads; by default as many as the machine has processors.
    progress : callable, optional
        ``progress(done, total)`` in model calls, counted once for every run still to be computed.
    force : bool
        Start anew and replace the file, whatever it holds.

    Raises
    ------
    UserError
        A grid or spec that is none, a policy that needs what the trace does not hold, or a file that is no sweep's result.
    """
    path = Path(out)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file for the sweep's results, such as {path / 'results.parquet'}.")
    points = _points(trace, routing, residency, hardware)
    asked = {point.specs: point for point in points}
    kept = read_rows(path) if path.exists() and not force else []
    by_specs = {tuple(row.get(axis) for axis in ("trace", "routing", "residency", "hardware")): row for row in kept}
    others = [row for specs, row in by_specs.items() if specs not in asked]
    found = {
        specs: by_specs[specs]
        for specs, point in asked.items()
        if specs in by_specs and by_specs[specs]["key"] == point.names["key"]
    }
    reused = len(found)
    missing = [point for point in points if point.specs not in found]
    calls, done = trace.num_forwards, 0

    def save() -> list[Row]:
        rows = [found[point.specs] for point in points if point.specs in found]
        same_trace = [row for row in others if row["trace"] == points[0].names["trace"]]
        for row in (*rows, *same_trace):
            row["speedup"] = speedup(rows[0], row)
        write_rows(path, [*rows, *others])
        return rows

    for routings, residencies, machines, members in _passes(missing):
        runs = len(members)

        def count(seen: int, total: int | None, runs: int = runs, done: int = done) -> None:
            # A pass may go over the trace twice.
            if progress is not None and total:
                progress(done + seen * runs * calls // total, len(missing) * calls)

        result = replay(trace, routings, residencies, machines, progress=count, keep_cells=False, threads=workers)
        done += runs * calls
        for point, run in zip(members, result.runs, strict=True):
            found[point.specs] = run_row(point.names, run)
        save()
    return SweepResult(path, len(missing), reused, save())


def _points(
    trace: Trace, routing: Sequence[str], residency: Sequence[str], hardware: str | Sequence[str] | None
) -> list[_Point]:
    """Every configuration once, routing outermost; needs are held against the trace before anything is replayed."""
    given = [hardware] if isinstance(hardware, str) else list(hardware or ())
    machines: list[str | None] = list(dict.fromkeys(one for spec in given for one in expand(spec))) or [None]
    routings, residencies = _policies("routing", routing), _policies("residency", residency)
    plan = make_plan(trace, list(routings.values()), list(residencies.values()), [m for m in machines if m] or None)
    identity = trace_identity(trace)
    points = []
    for r, (routing_spec, routing_policy) in enumerate(routings.items()):
        acceptance = plan.acceptances[plan.acceptance_of[r]]
        for residency_spec, residency_policy in residencies.items():
            for machine in machines:
                policies = (acceptance, routing_policy, residency_policy)
                names = {
                    "trace": identity,
                    "key": fingerprint(identity, policies, machine, trace),
                    "model": trace.meta.model.id,
                    "acceptance": spec_of(acceptance),
                    "routing": routing_spec,
                    "residency": residency_spec,
                    "hardware": machine,
                }
                points.append(_Point(routing_policy, residency_policy, machine, names))
    return points


def _policies(axis: str, specs: Sequence[str]) -> dict[str, Any]:
    """Canonical spec to policy object; one that several grids name is there once."""
    found: dict[str, Any] = {}
    for spec in specs:
        for one in expand(spec):
            policy = load_policy(axis, one)
            found.setdefault(spec_of(policy, split_name(one)[0].strip()), policy)
    return found


def _passes(points: Sequence[_Point]) -> Iterator[tuple[list[Any], list[Any], list[str] | None, list[_Point]]]:
    """Products of configurations for one replay each: routings, residencies, machines, and the points in a replay's order."""
    at = {point.specs[1:]: point for point in points}
    machines_of: dict[tuple[str, str], list[str | None]] = {}
    for routing, residency, machine in at:
        machines_of.setdefault((routing, residency), []).append(machine)
    routings_of: dict[tuple[str, tuple[str | None, ...]], list[str]] = {}
    for (routing, residency), machines in machines_of.items():
        routings_of.setdefault((residency, tuple(machines)), []).append(routing)
    residencies_of: dict[tuple[tuple[str, ...], tuple[str | None, ...]], list[str]] = {}
    for (residency, together), routings in routings_of.items():
        residencies_of.setdefault((tuple(routings), together), []).append(residency)
    for (alike, together), residencies in residencies_of.items():
        routings = list(alike)
        policies = {residency: at[routings[0], residency, together[0]].residency for residency in residencies}
        # Policies that look at the whole run first come last, so that few passes pay for it.
        ordered = sorted(residencies, key=lambda residency: policies[residency].passes)
        for r in range(0, len(routings), ROUTINGS_A_PASS):
            some = routings[r : r + ROUTINGS_A_PASS]
            step = max(1, RUNS_A_PASS // (len(some) * len(together)))
            for p in range(0, len(ordered), step):
                members = [at[one, other, m] for one in some for other in ordered[p : p + step] for m in together]
                yield (
                    [at[one, ordered[0], together[0]].routing for one in some],
                    [policies[residency] for residency in ordered[p : p + step]],
                    [machine for machine in together if machine is not None] or None,
                    members,
                )
