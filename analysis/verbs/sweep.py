"""``moetrace sweep``: grids of policies and their Pareto front."""

from pathlib import Path
from typing import Annotated

import typer

from analysis.progress import bar
from analysis.verbs import HARDWARE, Force, Json, Quiet, TracePath, counted, print_json, print_table

GROUP = "Ask"


def sweep(
    trace: TracePath,
    out: Annotated[Path, typer.Option(help="The Parquet file of results; runs it holds are not computed again.")],
    routing: Annotated[list[str], typer.Option(help="Grids inside: dmoe:top_p=0.4|0.6.")] = ["vanilla"],  # noqa: B006
    residency: Annotated[list[str], typer.Option(help="tide:budget=16|32.")] = ["all_resident"],  # noqa: B006
    acceptance: Annotated[
        list[str] | None,
        typer.Option(help="An acceptance policy; by default what routing brings along, else recorded."),
    ] = None,
    hardware: Annotated[list[str] | None, typer.Option(help=f"{HARDWARE} Repeatable.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; by default one a processor.")] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Replay a trace over grids of policies, keep every run in Parquet, print the Pareto front.

    Example: moetrace sweep first.trace --residency "tide:budget=16|32,refresh_interval=1..8" --out results.parquet
    """
    from analysis.destinations import destination
    from analysis.pareto import pareto
    from analysis.terminal import front_table
    from simulator import sweep as run_sweep
    from tracer.parquet import open_trace

    destination(out, "results", force)
    with bar("sweep", not (as_json or quiet)) as on_segment:
        opened = open_trace(trace)
        result = run_sweep(
            opened,
            routing,
            residency,
            hardware or None,
            out=out,
            acceptance=acceptance or None,
            workers=workers,
            progress=on_segment,
            force=force,
        )
    front = pareto(result.frame)
    if as_json:
        print_json({"results": str(result.path), "runs": len(result.rows), "pareto": front.to_dicts()})
        return
    if not quiet:
        print_table(front_table(front), opened.notes, str(result.path))
    over = sum(row["over_budget"] for row in result.rows)
    typer.echo(
        f"{result.path}: {len(result.rows)} runs, {result.computed} computed now; {front.height} of them on the Pareto front"
        + (f", which leaves out {counted(over, 'run')} that held more than the budget" if over else "")
    )
