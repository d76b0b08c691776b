"""Running sums against the exact sum of fractions, however the numbers come."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.tallies.exact_sum import ExactSums


def naive_sum(values):
    """The exact sum, rounded once."""
    return float(sum(map(Fraction, values), Fraction(0)))


numbers = st.floats(-1e300, 1e300) | st.floats(-1, 1)


@given(rows=st.lists(st.tuples(numbers, numbers), max_size=40), cut=st.integers(0, 40))
@settings(max_examples=150, deadline=None)
def test_sums_are_exact_and_do_not_depend_on_the_cut(rows, cut):
    sums = ExactSums(2)
    for piece in (rows[:cut], rows[cut:]):
        sums.add(np.array(piece).reshape(-1, 2))
    assert sums.totals() == [naive_sum(row[j] for row in rows) for j in (0, 1)]


def test_partial_sums_of_every_exponent_fit():
    """Numbers so far apart that none absorbs another, over the whole range of exponents."""
    values = [2.0**e for e in range(-1074, 1022, 50)]
    sums = ExactSums(1)
    sums.add(np.array(values)[:, None])
    sums.add(-np.array(values[1:])[:, None])
    assert sums.totals() == [values[0]]
