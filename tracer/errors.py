"""Errors a user can cause and mend; the command line prints them as one sentence and exits with 2."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend: a wrong name, path, parameter or file. The message is one whole sentence."""


class TraceError(UserError):
    """A trace, or a part of one, that breaks the format; the message names table, part and row."""


def unknown(kind: str, name: str, known: Iterable[str], more: str = "") -> UserError:
    """The error for a name that is none of those known; it tells the nearest of them, and all of them.

    ``kind`` is what the name is of, as in "routing policy"; ``more`` ends the sentence with what else is taken.
    """
    from difflib import get_close_matches

    names = list(known)
    nearest = get_close_matches(name, names, n=1)
    meant = f" (did you mean {nearest[0]}?)" if nearest else ""
    return UserError(f"There is no {kind} {name!r}{meant}; there are {', '.join(names) or 'none'}{more}.")
