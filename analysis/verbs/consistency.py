"""``moetrace consistency``: how stable routing is, beside its nulls."""

import typer

from analysis.progress import bar
from analysis.verbs import Force, Json, PageOut, Quiet, TracePath, print_json, print_table

GROUP = "Look"


def consistency(
    trace: TracePath,
    out: PageOut = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say how stable routing is in time and space, each figure beside the null that is hardest to beat.

    Example: moetrace consistency first.trace --out charts.html
    """
    from analysis.destinations import destination, make_parents
    from analysis.metrics import consistency as measure
    from analysis.reporting import report
    from analysis.terminal import headline_table
    from tracer.parquet import open_trace

    if out is not None:
        destination(out, "file", force)
    opened = open_trace(trace)
    with bar("consistency", not (as_json or quiet), opened.num_forwards) as on_segment:
        result = measure(opened, progress=on_segment)
    if out is not None:
        make_parents(out)
        report(out, traces=[opened], consistency=[result], force=force)
    if as_json:
        print_json(result.to_json())
        return
    if not quiet:
        reasons = (f"{name}: {reason}" for name, reason in result.reasons.items())
        print_table(headline_table(result.headline()), [*result.notes, *reasons])
    typer.echo(f"{trace}: {len(result.frames)} tables" + (f", charts in {out}" if out else ""))
