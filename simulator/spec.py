"""The grammar of specs, for policies and machines alike: ``name`` or ``name:key=value,key=value``, and grids of them.

A value of a grid is a list ``a|b|c``, a range of whole numbers ``lo..hi`` (both ends in it) or ``lo..hi..step``, or a list of
these: ``tide:refresh_interval=1..31,budget=32|64`` stands for 62 specs. The name may be a path, with colons of its own, as
``C:/mine.py:top=2``: it ends at the first colon that a key follows, or where the path has its ending.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any

from tracer.errors import UserError

MAX_SPECS = 100_000

_WHOLE = re.compile(r"(.*?):([^:=,]+=.*)", re.DOTALL)
_PATH = re.compile(r"(.*\.(?:py|toml)):?")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
_HOW = "write a list a|b|c or a range lo..hi or lo..hi..step of whole numbers"


def split(spec: str) -> tuple[str, str]:
    """Name and parameters of a spec, as texts; the latter are empty where there are none."""
    for form in (_WHOLE, _PATH):
        if match := form.fullmatch(spec):
            return match[1].strip(), (*match.groups(), "")[1]
    name, _, rest = spec.partition(":")
    return name.strip(), rest


def parse(spec: str, what: str, known: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Name and parameters of a spec, values as texts.

    Parameters
    ----------
    spec : str
        No grid.
    what : str
        What it names, for the messages: "residency policy", "Hardware".
    known : iterable of str
        Names of its parameters.

    Raises
    ------
    UserError
        A parameter that is unknown, empty, without a value or given twice.
    """
    name, rest = split(spec)
    known, given = sorted(known), dict[str, str]()
    if spec.rstrip().endswith(":") and not rest.strip() and not _PATH.fullmatch(spec):
        raise UserError(
            f"{what} {name} is followed by a colon and nothing; write {name} or {name}:key=value,key=value."
        )
    for item in rest.split(",") if rest else ():
        key, _, text = (part.strip() for part in item.partition("="))
        if not item.strip():
            raise UserError(f"{what} {name} is given an empty parameter; write {name} or {name}:key=value,key=value.")
        if key not in known:
            has = f"its parameters are {', '.join(known)}, each given as key=value" if known else "it takes none"
            raise UserError(f"{what} {name} has no parameter {item.strip()!r}; {has}.")
        if not text:
            raise UserError(
                f"{what} {name} needs a value for {key}; write {key}=VALUE, as parameters are each given as key=value."
            )
        if key in given:
            raise UserError(f"{what} {name} is given {key} twice; give it once.")
        given[key] = text
    return name, given


def write(name: str, parameters: Mapping[str, Any]) -> str:
    """The spec of a name and its parameters, those that are None left out: what :func:`parse` takes apart again."""
    told = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in parameters.items()]
    shown = [item for item, value in zip(told, parameters.values(), strict=True) if value is not None]
    return f"{name}:{','.join(shown)}" if shown else name


def expand(spec: str) -> list[str]:
    """The specs a grid stands for, the last parameter changing fastest; one without a grid stands for itself.

    Raises
    ------
    UserError
        An empty value, a range that is none or runs backwards, or more than 100,000 specs.
    """
    name, rest = split(spec)
    if "=" not in rest:
        return [spec]
    keys, choices, size = [], [], 1
    for item in rest.split(","):
        key, equals, text = item.partition("=")
        ranges = [_values(spec, item, one) for one in text.split("|")] if equals else [("",)]
        size *= sum(map(len, ranges))
        if size > MAX_SPECS:
            raise UserError(f"{spec} stands for {size:,} configurations or more; a grid holds {MAX_SPECS:,} at most.")
        keys.append(f"{key}{equals}")
        choices.append([str(value) for one in ranges for value in one])
    pairs = (zip(keys, values, strict=True) for values in product(*choices))
    return [f"{name}:{','.join(key + value for key, value in pair)}" for pair in pairs]


def _values(spec: str, item: str, text: str) -> tuple[str, ...] | range:
    text = text.strip()
    if not text:
        raise UserError(f"{item.strip()!r} in {spec} has an empty value; {_HOW}.")
    match = _RANGE.fullmatch(text)
    if match is None:
        # A relative path has two dots as well.
        if ".." in text and "/" not in text and "\\" not in text:
            raise UserError(f"{text} in {spec} is no range; {_HOW}.")
        return (text,)
    low, high, step = int(match[1]), int(match[2]), int(match[3] or 1)
    if step < 1 or high < low:
        raise UserError(f"The range {text} in {spec} is empty; {_HOW}, lo not above hi and step 1 or more.")
    return range(low, high + 1, step)
