"""Foreign routing dumps turned into traces, one file a format: ``import_file(source, out, *, force)``."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from tracer.errors import unknown
from tracer.packages import modules_in

FORMATS = modules_in(Path(__file__).parent)


def import_trace(format: str, source: Path, out: Path, *, force: bool = False) -> int:
    """Turn another tool's dump into a trace.

    Parameters
    ----------
    format : str
        A file of this package by its name.
    source : Path
        The dump.
    out : Path
        Trace folder to write.
    force : bool
        Replace a trace that is already there.

    Returns
    -------
    int
        Routing decisions (row, layer, expert) imported.

    Raises
    ------
    UserError
        There is no such format, or the dump is not of it.
    """
    if format not in FORMATS:
        raise unknown("importer", format, FORMATS)
    return import_module(f"tracer.importers.{format}").import_file(source, out, force=force)
