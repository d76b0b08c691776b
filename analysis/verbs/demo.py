"""``moetrace demo``: the whole job in one go."""

from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from analysis.progress import bar, with_bar
from analysis.verbs import Json, Quiet, print_json, print_table

GROUP = "Record"
ROUTING = ["vanilla", "team", "dmoe"]
RESIDENCY = ["all_resident", "lru:budget=24", "tide:budget=24,refresh_interval=4"]
FOLDER = "moetrace-demo"


def demo(
    out: Annotated[
        Path | None, typer.Option(help="Folder to make; by default moetrace-demo, moetrace-demo-2, ...")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The whole job in one go, offline: capture both bundled models, replay vanilla, TEAM, dMoE and TIDE, write report.html.

    Example: moetrace demo
    """
    from analysis.destinations import new_folder
    from analysis.reporting import report as write_report
    from analysis.terminal import run_table
    from simulator import replay as run_replay
    from simulator.speedups import RESIDENCY_NOTE, ROUTING_NOTE
    from tracer.capture import run_capture
    from tracer.capture_plan import DEMO_OPTIONS, demo_prompts, plan_capture
    from tracer.parquet import open_trace

    shown = not (as_json or quiet)
    folder = new_folder(out, FOLDER)
    traces, results = [], []
    for name in ("llada2", "sdar"):
        path = folder / f"{name}.trace"
        plan = plan_capture(f"demo:{name}", path, demo_prompts(), DEMO_OPTIONS)
        captured = with_bar(run_capture, plan, shown)
        if shown:
            typer.echo(captured.sentence)
        opened = open_trace(path)
        with bar("replay", shown) as on_segment:
            result = run_replay(opened, ROUTING, RESIDENCY, hardware="h100-pcie5", progress=on_segment)
        result.write(folder / f"{name}.replay")
        traces.append(opened)
        results.append(result)
    with bar("report", shown):
        report = write_report(folder / "report.html", traces=traces, results=results)
    if as_json:
        runs = {t.meta.model.id: r.to_json() for t, r in zip(traces, results, strict=True)}
        print_json({"report": str(report), "replays": runs})
        return
    if not quiet:
        names = list(product(ROUTING, RESIDENCY))
        rows = [(trace.meta.model.id, names, result) for trace, result in zip(traces, results, strict=True)]
        print_table(run_table(rows), elsewhere="the report")
        typer.echo("Rows in italics are estimates: other experts or other forwards than the recorded ones.")
        typer.echo(ROUTING_NOTE)
        typer.echo(RESIDENCY_NOTE)
    typer.echo(f"The report is {report.resolve()}" if shown else str(report))
