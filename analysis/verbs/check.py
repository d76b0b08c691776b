"""``moetrace check``: whether a trace keeps to its format."""

import typer

from analysis.verbs import Json, Quiet, TracePath, counted, print_json

GROUP = "Look"


def check(trace: TracePath, as_json: Json = False, quiet: Quiet = False) -> None:
    """Hold a trace against every requirement of the format; exit code 1 and the first faults if it breaks any.

    Example: moetrace check first.trace
    """
    from tracer.checking import check as find_faults
    from tracer.parquet import open_trace

    if not (trace / "meta.json").is_file():
        # No trace at all is the caller's mistake, not a fault of a trace; opening says which.
        open_trace(trace)
    faults = find_faults(trace)
    if as_json:
        print_json({"trace": str(trace), "faults": faults})
    else:
        for fault in faults if not quiet else ():
            typer.echo(fault)
        if faults and quiet:
            typer.echo(f"{trace}: {counted(len(faults), 'fault')}.")
        elif not faults:
            typer.echo(f"{trace}: every requirement of the format holds.")
    if faults:
        raise typer.Exit(1)
