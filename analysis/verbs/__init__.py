"""The verbs of the command line, one file each, and what they share: common options, and the way they answer.

The files of verbs leave ``from __future__ import annotations`` out: typer would evaluate each text four times, half the time
that ``--help`` takes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from analysis.tables import Sheet

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar, no table; one line, or the names of a list.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is already there.")]
TracePath = Annotated[Path, typer.Argument(help="A trace folder.", metavar="TRACE")]
PageOut = Annotated[Path | None, typer.Option("--out", help="Write a page of charts here.")]
HARDWARE = (
    "NAME, FILE.toml or NAME:key=value,... with other parts (gpu, cpu, dram, nvme, kernel), as kernel=grouped_mm, or "
    "overlap=true or host_gib=GIB; moetrace hardware lists them."
)


def print_json(document: Any) -> None:
    """Print one JSON document."""
    import json

    typer.echo(json.dumps(document, indent=1))


def print_table(sheet: Sheet, notes: Iterable[str] = (), elsewhere: str = "--json") -> None:
    """Print a table, then each note once; ``elsewhere`` is what has the columns that the terminal has no room for."""
    from analysis.tables import show

    show(sheet, elsewhere)
    for note in dict.fromkeys(notes):
        typer.echo(note)


def counted(number: int, noun: str) -> str:
    """A number and its noun."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
