"""Tables that fit where they are shown: heads and texts fold over several lines, numbers are never cut.

A table that is too wide all the same loses columns, first those that say the same in every row (a line below says what), then
those least in its order of importance (a line below names them). Where nothing may go any more it is wider than the terminal.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

GAP = 2
TEXT = 19
"""Cells a column of texts is folded to at least, unless its texts are shorter: ``refresh_interval=4,``."""
_LISTED = re.compile(r"[^,]*,+|[^,]+")
_PIECE = re.compile(r"[^,_/:=]*[,_/:=]+|[^,_/:=]+")


@dataclass(frozen=True, slots=True)
class Column:
    """A column: ``right`` for numbers; ``folds`` is how many cells its texts may be folded to, 0 where they are not."""

    name: str
    right: bool = False
    folds: int = 0


@dataclass(slots=True)
class Sheet:
    """A table before it is laid out.

    ``rows`` are texts, one a column; ``styles`` has a rich style or None for each row, or nothing. ``keys`` are the columns
    that tell rows apart: they go only where they are the same in every row. ``order`` names columns by importance, most
    important first; columns it does not name come after them. ``head`` is whether names are shown.
    """

    columns: Sequence[Column]
    rows: list[Sequence[str]]
    keys: Sequence[str] = ()
    order: Sequence[str] = ()
    styles: Sequence[str | None] = field(default_factory=list)
    head: bool = True


def show(sheet: Sheet, elsewhere: str = "--json") -> None:
    """Print a table on stdout, as wide as :func:`available` says; ``elsewhere`` is what has the columns left out."""
    width = available()
    table, wide, below = laid_out(sheet, width, elsewhere)
    Console(width=max(wide, width or 1), highlight=False).print(table)
    for line in below:
        print(line)


def available() -> int | None:
    """Cells of a line: of the terminal, else of COLUMNS where that is set, else None for no limit."""
    if sys.stdout.isatty():
        return Console().width
    told = os.environ.get("COLUMNS", "")
    return int(told) if told.isdecimal() and int(told) > 0 else None


def laid_out(sheet: Sheet, width: int | None, elsewhere: str = "--json") -> tuple[Table, int, list[str]]:
    """The table of the columns that fit, its width in cells, and the lines to print below it.

    Parameters
    ----------
    sheet : Sheet
        The table.
    width : int or None
        Cells of a line, None for no limit.
    elsewhere : str
        What has the columns that are left out.
    """
    shown = list(range(len(sheet.columns)))
    doomed = _doomed(sheet)
    widths = _widths(sheet, shown, width)
    said: list[str] = []
    gone: list[str] = []
    while widths is None and doomed:
        index = doomed.pop(0)
        shown.remove(index)
        name, same = sheet.columns[index].name, _same(sheet, index)
        if same is None:
            gone.append(name)
        else:
            said.append(f"{name} {same}")
        widths = _widths(sheet, shown, width)
    if widths is None:
        widths = _needed(sheet, shown)[0]
    below = [f"In every row: {', '.join(reversed(said))}."] if said else []
    if gone:
        has = "has them" if len(gone) > 1 else "has it"
        below.append(f"Left out of {width} columns: {', '.join(reversed(gone))}; {elsewhere} {has}.")
    return _table(sheet, shown, widths), sum(widths) + GAP * (len(widths) - 1), below


def fold(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` cells that together are the whole text.

    They break at spaces, in long words after commas, in what is long between commas after ``_/:=``, in the rest anywhere.
    """
    indent = " " * min(len(text) - len(text.lstrip()), max(width - 2, 0))
    room = max(width - len(indent), 1)
    lines, line = [], ""
    for word in text.split():
        gap = " " if line else ""
        for part in [word] if cell_len(word) <= room else _LISTED.findall(word):
            for piece in [part] if cell_len(part) <= room else _pieces(part, room):
                if line and cell_len(line + gap + piece) > room:
                    lines.append(indent + line)
                    line, gap = "", ""
                line += gap + piece
                gap = ""
    return [*lines, indent + line]


def _pieces(word: str, width: int) -> Iterable[str]:
    for piece in _PIECE.findall(word):
        while cell_len(piece) > width:
            cut = next(n for n in range(len(piece), 0, -1) if n == 1 or cell_len(piece[:n]) <= width)
            yield piece[:cut]
            piece = piece[cut:]
        if piece:
            yield piece


def _same(sheet: Sheet, index: int) -> str | None:
    """What a column says in every row, None where rows differ."""
    found = {row[index] for row in sheet.rows}
    return found.pop() if len(found) == 1 else None


def _doomed(sheet: Sheet) -> list[int]:
    """Columns that may go, the first to go first; the most important one never goes."""
    names = [column.name for column in sheet.columns]
    ranked = [names.index(name) for name in sheet.order if name in names]
    ranked += [index for index in range(len(names)) if index not in ranked and sheet.order]
    falling = ranked[:0:-1]
    same = [index for index in falling if _same(sheet, index) is not None]
    return same + [index for index in falling if index not in same and names[index] not in sheet.keys]


def _needed(sheet: Sheet, shown: Sequence[int]) -> tuple[list[int], list[int]]:
    """Cells that each column takes at least, and on one line."""
    least, whole = [], []
    for index in shown:
        column = sheet.columns[index]
        head = column.name if sheet.head else ""
        pieces = (piece for word in head.split() for piece in _PIECE.findall(word))
        cells = max((cell_len(row[index]) for row in sheet.rows), default=0)
        least.append(max(min(cells, column.folds) if column.folds else cells, *map(cell_len, pieces), 1))
        whole.append(max(cells, cell_len(head), 1))
    return least, whole


def _widths(sheet: Sheet, shown: Sequence[int], limit: int | None) -> list[int] | None:
    """Cells for each column shown, None where they do not fit."""
    least, whole = _needed(sheet, shown)
    gaps = GAP * (len(shown) - 1)
    if limit is None or sum(whole) + gaps <= limit:
        return whole
    spare = limit - gaps - sum(least)
    if spare < 0:
        return None
    # Texts first, the one that lacks most; then the heads of numbers, which gain nothing from half of what they lack.
    texts = [at for at, index in enumerate(shown) if sheet.columns[index].folds]
    while spare and any(least[at] < whole[at] for at in texts):
        at = max(texts, key=lambda at: whole[at] - least[at])
        least[at] += 1
        spare -= 1
    for at in range(len(shown)):
        if whole[at] - least[at] <= spare:
            spare -= whole[at] - least[at]
            least[at] = whole[at]
    return least


def _table(sheet: Sheet, shown: Sequence[int], widths: Sequence[int]) -> Table:
    heads = [fold(sheet.columns[index].name, width) for index, width in zip(shown, widths, strict=True)]
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), show_header=sheet.head)
    for index, width, head in zip(shown, widths, heads, strict=True):
        # Heads of fewer lines stand at the bottom.
        lines = [""] * (max(map(len, heads)) - len(head)) + head
        justify = "right" if sheet.columns[index].right else "left"
        table.add_column(Text("\n".join(lines)), justify=justify, no_wrap=True, width=width)  # type: ignore[arg-type]
    for at, row in enumerate(sheet.rows):
        style = sheet.styles[at] if sheet.styles else None
        cells = [(index, width) for index, width in zip(shown, widths, strict=True)]
        table.add_row(*(_cell(sheet, row, index, width) for index, width in cells), style=style)
    return table


def _cell(sheet: Sheet, row: Sequence[str], index: int, width: int) -> Text:
    return Text("\n".join(fold(row[index], width)) if sheet.columns[index].folds else row[index])
