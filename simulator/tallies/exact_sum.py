"""Sums of floats that are the same however the numbers are cut into pieces: exact inside, rounded once when asked for.

Source: J. R. Shewchuk, "Adaptive precision floating-point arithmetic and fast robust geometric predicates" (1997), as Python's
``math.fsum``, but with the partial sums kept from call to call.
"""

from __future__ import annotations

import math

import numpy as np

from tracer.jit import njit

# Partial sums there is room for at first; numbers of like size need two or three.
ROOM = 6


class ExactSums:
    """Running sums of N columns of finite float64."""

    def __init__(self, columns: int) -> None:
        self._partials = [np.zeros(ROOM) for _ in range(columns)]
        self._used = [0] * columns

    def add(self, values: np.ndarray) -> None:
        """Add the rows of float64 [R, N]; may not be called from several threads at once."""
        for j, column in enumerate(np.ascontiguousarray(values.T, np.float64)):
            row = 0
            while row < len(column):
                row, self._used[j] = _add(column, row, self._partials[j], self._used[j])
                if self._used[j] == len(self._partials[j]):
                    self._partials[j] = np.concatenate((self._partials[j], np.zeros(self._used[j])))

    def partials(self) -> list[list[float]]:
        """Numbers of each column whose exact sum is that of the column so far."""
        return [row[:used].tolist() for row, used in zip(self._partials, self._used, strict=True)]

    def totals(self) -> list[float]:
        """The sums so far, each correctly rounded."""
        return [math.fsum(of_column) for of_column in self.partials()]


@njit
def _add(values, row, partials, used):
    """Add values from ``row`` on for as long as one more partial sum fits; the row and the partial sums it came to."""
    while row < len(values) and used < len(partials):
        x = values[row]
        kept = 0
        for i in range(used):
            y = partials[i]
            high = x + y
            # What rounding lost, whichever of the two is larger.
            whole = high - x
            low = (x - (high - whole)) + (y - whole)
            if low != 0.0:
                partials[kept] = low
                kept += 1
            x = high
        partials[kept] = x
        used = kept + 1
        row += 1
    return row, used
