"""Amounts as people write them in specs: bytes with a unit, and shares in percent."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Annotated

Size = Annotated[int, "bytes"]
"""The type of a parameter that is a number of bytes, read by :func:`parse_size`."""

UNITS = {"": 1, "b": 1}
UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)}
UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)}
_SIZE = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*([a-z]*)")


@dataclass(frozen=True, slots=True)
class Percent:
    """A share of something, ``value`` of a hundred."""

    value: Decimal

    def __str__(self) -> str:
        return f"{self.value}%"

    def of(self, count: int) -> int:
        """That share of a count, rounded down."""
        return math.floor(self.value * count / 100)


def parse_size(text: str) -> int:
    """Bytes of ``24GB`` (10^9 each), ``24GiB`` (2^30 each) or a whole number, ``1.5e9``; part of a byte is left out.

    Raises
    ------
    ValueError
        The text is none of these.
    """
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None or match[2] not in UNITS:
        raise ValueError(text)
    size = Fraction(match[1]) * UNITS[match[2]]
    if not match[2] and size.denominator != 1:
        raise ValueError(text)
    return math.floor(size)


def parse_percent(text: str) -> Percent:
    """The share that ``25%`` stands for.

    Raises
    ------
    ValueError
        The text is no number followed by %.
    """
    number, sign, rest = text.strip().partition("%")
    if not sign or rest or not math.isfinite(float(number)):
        raise ValueError(text)
    return Percent(Decimal(number.strip()))
