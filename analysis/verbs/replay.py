"""``moetrace replay``: a trace under other policies and on other machines."""

from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from analysis.progress import bar
from analysis.verbs import HARDWARE, Force, Json, Quiet, TracePath, counted, print_json, print_table

GROUP = "Ask"


def replay(
    trace: TracePath,
    routing: Annotated[list[str], typer.Option(help="A routing policy, name:key=value,...; repeatable.")] = ["vanilla"],  # noqa: B006
    residency: Annotated[list[str], typer.Option(help="A residency policy, likewise.")] = ["all_resident"],  # noqa: B006
    acceptance: Annotated[
        list[str] | None,
        typer.Option(help="An acceptance policy; by default what routing brings along, else recorded."),
    ] = None,
    hardware: Annotated[list[str] | None, typer.Option(help=f"{HARDWARE} Repeatable.")] = None,
    fit: Annotated[Path | None, typer.Option(help="The trace that static counts popularity on; else TRACE.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for replay.parquet and replay.json.")] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Replay a trace under routing policies x residency policies x hardware, routing outermost.

    Example: moetrace replay first.trace --routing vanilla --routing dmoe:top_p=0.6 --residency tide:budget=16
    """
    from analysis.destinations import destination
    from analysis.terminal import run_table, stood_in
    from simulator import replay as run_replay
    from simulator.residency.static import fitted
    from tracer.parquet import open_trace

    if out is not None:
        destination(out, "replay", force)
    opened = open_trace(trace)
    residency = fitted(residency, fit) if fit is not None else residency
    names = [specs[1:3] for specs in product(acceptance or [""], routing, residency, hardware or [""])]
    with bar("replay", not (as_json or quiet)) as on_segment:
        result = run_replay(opened, routing, residency, hardware or None, on_segment, acceptance=acceptance or None)
    if out is not None:
        result.write(out, force=force)
    if as_json:
        print_json(result.to_json())
        return
    if not quiet:
        kinds = "over forwards of every kind, as none of this trace denoises."
        notes = [f"{heading}: {kinds}" for run in result.runs for heading in stood_in(run.summary)]
        notes += [note for run in result.runs for note in run.notes]
        print_table(run_table([(opened.meta.model.id, names, result)]), notes)
    typer.echo(counted(len(result.runs), "run") + (f", written to {out}" if out is not None else ""))
