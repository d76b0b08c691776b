"""``moetrace diff``: two traces or two replays side by side."""

from pathlib import Path
from typing import Annotated

import typer

from analysis.verbs import Json, Quiet, print_json, print_table

GROUP = "Look"


def diff(
    a: Annotated[Path, typer.Argument(help="A trace, or a folder written by replay --out.", metavar="A")],
    b: Annotated[Path, typer.Argument(help="Another of the same kind.", metavar="B")],
    limit: Annotated[int, typer.Option(min=1, help="Rows to print.")] = 30,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare two traces or two replays, the differences that matter first.

    Example: moetrace diff first.trace second.trace
    """
    from analysis.comparing import diff as compare
    from analysis.terminal import frame_table

    result = compare(a, b)
    if as_json:
        print_json(result.to_json())
        return
    if not quiet:
        columns = ("part", "figure", "a", "b", "difference")
        rows = ([row[column] for column in columns] for row in result.differing[:limit])
        sheet = frame_table(columns, rows, columns[:4], ("figure", "a", "b", "difference", "part"), 14)
        print_table(sheet, result.notes)
    typer.echo(result.sentence())
