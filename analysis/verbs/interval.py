"""``moetrace interval``: TIDE's refresh interval."""

from typing import Annotated

import typer

from analysis.progress import bar
from analysis.verbs import HARDWARE, Force, Json, PageOut, Quiet, TracePath, print_json, print_table

GROUP = "Ask"


def interval(
    trace: TracePath,
    budget: Annotated[int, typer.Option(help="Experts a layer keeps on the GPU.")],
    hardware: Annotated[str, typer.Option(help=HARDWARE)] = "h100-pcie5",
    copy_back: Annotated[
        bool, typer.Option("--copy-back/--no-copy-back", help="Demoted experts cross the bus.")
    ] = True,
    out: PageOut = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose TIDE's refresh interval: its program with measured drift, the replayed optimum, the regret.

    Example: moetrace interval first.trace --budget 24 --hardware h100-pcie5 --out interval.html
    """
    from analysis.destinations import destination, make_parents
    from analysis.reporting import report
    from analysis.terminal import INTERVAL_ORDER, frame_table
    from simulator.interval import find_interval
    from tracer.parquet import open_trace

    if out is not None:
        destination(out, "file", force)
    with bar("interval", not (as_json or quiet)) as on_segment:
        opened = open_trace(trace)
        result = find_interval(opened, budget, hardware, copy_back, progress=on_segment)
    if out is not None:
        make_parents(out)
        report(out, traces=[opened], consistency=[None], intervals=[result], force=force)
    if as_json:
        print_json(result.to_json())
        return
    if not quiet:
        frame = result.frame
        sheet = frame_table(frame.columns, frame.iter_rows(), INTERVAL_ORDER[:1], INTERVAL_ORDER)
        print_table(sheet, result.notes)
    typer.echo(
        f"The program chooses {result.program} (drift {result.drift:.3f} a step), replaying finds {result.best} fastest; "
        f"regret {100 * result.regret:.1f}%" + (f"; charts in {out}" if out else "")
    )
