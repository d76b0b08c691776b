"""Sweeps: a trace replayed under every configuration of grids, results kept in one file, run by run.

Many configurations share one pass over the trace, and a pass holds so many that memory stays bounded whatever the grid. The
file is brought up to date after every pass, so a sweep that is stopped loses only the runs under way and goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simulator.experiment import Branch, Experiment, check_hashable, make_experiments
from simulator.policy import Geometry
from simulator.registry import load_policy, spec_of
from simulator.replaying import one_pass, run_experiments
from simulator.spec import expand, split
from simulator.sweep_table import Row, fingerprint, frame_of, read_rows, run_row, trace_identity, write_rows
from tracer.errors import UserError

if TYPE_CHECKING:
    import polars as pl

    from tracer.files.reader import Trace

# A pass over a segment of the largest size takes some 20 MB a branch and 2 MB a run.
BRANCHES_A_PASS, RUNS_A_PASS = 8, 64

AXES = ("trace", "acceptance", "routing", "residency", "hardware")


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
        """One row a run: specs, parameters, figures, ``estimate`` and ``notes``."""
        return frame_of(self.rows)


@dataclass(frozen=True, slots=True)
class _Point:
    """An experiment, and the names its row begins with, the fingerprint of what it follows from among them."""

    experiment: Experiment
    names: Row

    @property
    def specs(self) -> tuple[Any, ...]:
        return tuple(self.names[axis] for axis in AXES)

    @property
    def branch(self) -> Branch:
        return self.experiment.acceptance, self.experiment.routing


def sweep(
    trace: Trace,
    routing: Sequence[str] = ("vanilla",),
    residency: Sequence[str] = ("all_resident",),
    hardware: str | Sequence[str] | None = None,
    *,
    out: str | Path,
    acceptance: Sequence[str] | None = None,
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
        Specs, with grids inside: see :func:`simulator.spec.expand`.
    hardware : str or sequence of str, optional
        Hardware specs, likewise.
    out : str or Path
        The Parquet file. Where it holds rows of this trace, version and configuration these are not computed again; rows of
        other traces and configurations stay.
    acceptance : sequence of str, optional
        As ``routing``; by default the one a routing policy brings along, else the recorded forwards.
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
    geometry, points = _points(trace, routing, residency, hardware, acceptance)
    asked = {point.specs: point for point in points}
    kept = read_rows(path) if path.exists() and not force else []
    by_specs = {tuple(row.get(axis) for axis in AXES): row for row in kept}
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
        write_rows(path, [*rows, *others])
        return rows

    for members in _passes(missing):

        def count(seen: int, total: int | None, runs: int = len(members), done: int = done) -> None:
            # A pass may go over the trace twice.
            if progress is not None and total:
                progress(done + seen * runs * calls // total, len(missing) * calls)

        experiments = [point.experiment for point in members]
        result = run_experiments(trace, geometry, experiments, count, keep_cells=False, threads=workers)
        done += len(members) * calls
        for point, run in zip(members, result.runs, strict=True):
            found[point.specs] = run_row(point.names, run)
        rows = save()
    return SweepResult(path, len(missing), reused, rows if missing else save())


def _points(
    trace: Trace,
    routing: Sequence[str],
    residency: Sequence[str],
    hardware: str | Sequence[str] | None,
    acceptance: Sequence[str] | None,
) -> tuple[Geometry, list[_Point]]:
    """Every configuration once, in the order of a replay; needs are held against the trace before anything is replayed."""
    given = [hardware] if isinstance(hardware, str) else list(hardware or ())
    machines = list(dict.fromkeys(one for spec in given for one in expand(spec))) or None
    policies = {
        axis: _policies(axis, specs)
        for axis, specs in (("acceptance", acceptance or ()), ("routing", routing), ("residency", residency))
    }
    asked = {axis: list(specs) for axis, specs in policies.items()}
    geometry, experiments = make_experiments(trace, asked["routing"], asked["residency"], machines, asked["acceptance"])
    identity = trace_identity(trace)
    # in the order of experiments: a residency policy may be another one on each machine
    named: list[str | None] = [*machines] if machines else [None]
    told = product(asked["acceptance"] or [None], asked["routing"], asked["residency"], named)
    points = []
    for one, (_, routing_policy, residency_policy, machine) in zip(experiments, told, strict=True):
        names = {
            "trace": identity,
            "key": fingerprint(identity, (one.acceptance, routing_policy, residency_policy), one.machine),
            "model": trace.meta.model.id,
            "acceptance": spec_of(one.acceptance),
            "routing": policies["routing"][routing_policy],
            "residency": policies["residency"][residency_policy],
            "hardware": machine,
        }
        points.append(_Point(one, names))
    return geometry, points


def _policies(axis: str, specs: Sequence[str]) -> dict[Any, str]:
    """Policy object to canonical spec; one that several grids name is there once."""
    policies: dict[str, Any] = {}
    for spec in specs:
        for one in expand(spec):
            policy = load_policy(axis, one)
            check_hashable(axis, policy)
            policies.setdefault(spec_of(policy, split(one)[0]), policy)
    return {policy: spec for spec, policy in policies.items()}


def _passes(points: Sequence[_Point]) -> Iterator[list[_Point]]:
    """Points of one walk each: few branches and runs at once, so that memory stays bounded."""
    groups = {branch: place // BRANCHES_A_PASS for place, branch in enumerate(dict.fromkeys(p.branch for p in points))}
    # Policies that look at the whole run first come last, so that few passes pay for it.
    ordered = sorted(points, key=lambda point: (groups[point.branch], point.experiment.residency.passes))
    for _, together in groupby(ordered, lambda point: groups[point.branch]):
        members: list[_Point] = []
        runs = 0
        for point in together:
            if runs == RUNS_A_PASS:
                yield members
                members, runs = [], 0
            members.append(point)
            # those that one watcher serves together take no more room than one
            runs += one_pass(point.experiment.residency, [point.experiment.machine]) is None
        yield members
