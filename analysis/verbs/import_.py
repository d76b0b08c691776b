"""``moetrace import``: other tools' dumps as traces."""

from pathlib import Path
from typing import Annotated

import typer

from analysis.verbs import Force, Json, Quiet, print_json
from tracer.importers import FORMATS

GROUP = "Bring in and out"


def import_(
    format: Annotated[str, typer.Argument(help=f"What wrote it: {', '.join(FORMATS)}.", metavar="FORMAT")],
    source: Annotated[Path, typer.Argument(help="The foreign file.", metavar="SRC")],
    out: Annotated[Path, typer.Option(help="Folder to write the trace to.")],
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn another tool's routing dump into a trace.

    Example: moetrace import bigmoe qwen.route.csv --out qwen.trace
    """
    from analysis.destinations import destination
    from tracer.importers import import_trace

    destination(out, "trace", force)
    decisions = import_trace(format, source, out, force=force)
    if as_json:
        print_json({"trace": str(out), "decisions": decisions})
        return
    typer.echo(str(out) if quiet else f"{out}: {decisions} decisions")
