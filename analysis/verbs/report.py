"""``moetrace report``: one page about traces and replays."""

from pathlib import Path
from typing import Annotated

import typer

from analysis.progress import bar
from analysis.verbs import Force, Json, Quiet, print_json

GROUP = "Look"


def report(
    sources: Annotated[list[Path], typer.Argument(help="Traces and folders written by replay --out.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write one self-contained page about traces and replays.

    Example: moetrace report first.trace result --out report.html
    """
    from analysis.destinations import destination, make_parents
    from analysis.reporting import report as write_report
    from analysis.summary import read_replay
    from tracer.parquet import open_trace

    destination(out, "file", force)
    results = [path for path in sources if (path / "replay.json").is_file()]
    traces = [open_trace(path) for path in sources if path not in results]
    with bar("report", not (as_json or quiet)):
        make_parents(out)
        page = write_report(out, traces=traces, results=[read_replay(path) for path in results], force=force)
    if as_json:
        print_json({"report": str(page), "traces": len(traces), "replays": len(results)})
        return
    typer.echo(str(page) if quiet else f"The report is {page.resolve()}")
