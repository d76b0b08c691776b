"""Where a verb writes: looked at before its work, so that none is done that cannot be kept, and made the same way for all."""

from __future__ import annotations

import os
from pathlib import Path

from simulator.replay_files import files_in
from tracer.errors import UserError


def destination(path: Path, kind: str, force: bool = False, resume: bool | None = None) -> None:
    """Refuse a place that a result cannot be written to; nothing is made or changed.

    Parameters
    ----------
    path : Path
        What the user named with ``--out``.
    kind : str
        "file", "replay" (a folder), "results" (a sweep's file, which goes on with what is there) or "trace".
    force : bool
        Whether what is there is to be replaced.
    resume : bool, optional
        For a trace: whether the verb is to go on with the one there; None where it cannot.

    Raises
    ------
    UserError
        Something is there that may not be replaced, or the place cannot be written to.
    """
    try:
        if kind in ("file", "results"):
            _file(path, kind, force)
        else:
            _folder(path, kind, force, resume)
        folder = path if path.is_dir() else next(parent for parent in path.absolute().parents if parent.exists())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {os.strerror(error.errno or 0)}; name another place.") from None
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise UserError(f"{path} cannot be made because {folder} is not a folder that can be written to.")


def make_parents(path: Path) -> None:
    """Make the folders above a file that are not there yet.

    Raises
    ------
    UserError
        One cannot be made.
    """
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent} cannot be made: {os.strerror(error.errno or 0)}; name another place.") from None


def new_folder(path: Path | None, name: str) -> Path:
    """Make ``path``, or where it is None the first of ``name``, ``name-2``, ... that is free, and return it.

    Raises
    ------
    UserError
        It is there already or cannot be made.
    """
    if path is None:
        numbered = (Path(f"{name}{f'-{n}' if n > 1 else ''}") for n in range(1, 10**6))
        path = next(one for one in numbered if not one.exists())
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"{path} is already there; name another folder with --out.") from None
    except OSError as error:
        raise UserError(
            f"{path} cannot be made: {os.strerror(error.errno or 0)}; name another folder with --out."
        ) from None
    return path


def _file(path: Path, kind: str, force: bool) -> None:
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file to write to.")
    if not path.exists() or force:
        return
    if kind != "results":
        raise UserError(f"{path} is already there; name another file or pass --force to replace it.")
    from simulator.sweep_table import is_result

    if not is_result(path):
        raise UserError(f"{path} is no sweep's result; name another file or pass --force to replace it.")


def _folder(path: Path, kind: str, force: bool, resume: bool | None) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"{path} is a file; name a folder to write to.")
    trace = (path / "meta.json").exists()
    if kind == "replay":
        if trace:
            raise UserError(f"{path} is a trace; name another folder for the replay.")
        taken = files_in(path)
        if taken and not force:
            raise UserError(f"{path} holds {taken[0]} already; name another folder or pass --force to replace it.")
        return
    if trace and not (force or resume):
        other = "" if resume is None else ", --resume goes on with it"
        raise UserError(f"{path} is already there; name another folder, or --force replaces the trace{other}.")
    from tracer.files.folder import refuse_unless_trace

    refuse_unless_trace(path)
