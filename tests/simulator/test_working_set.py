"""Working sets against sets of a sliding window, however the run is cut."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.tallies.working_set import WINDOWS, WorkingSets

E = 9


def naive_working_sets(layers):
    """Mean distinct experts over every window of w consecutive forwards of each layer's list of expert sets."""
    found = {}
    for w in WINDOWS:
        sizes = [len(set().union(*sets[i : i + w])) for sets in layers for i in range(len(sets) - w + 1)]
        found[str(w)] = sum(sizes) / len(sizes) if sizes else None
    return found


layers = st.lists(st.lists(st.sets(st.integers(0, E - 1)), max_size=50), min_size=1, max_size=2)


@given(layers=layers, cut=st.integers(0, 50))
@settings(max_examples=150, deadline=None)
def test_every_window_is_counted_once(layers, cut):
    working_sets = WorkingSets(len(layers), E)
    for at, sets in enumerate(layers):
        for piece in (sets[:cut], sets[cut:]):
            offsets = np.cumsum([0, *map(len, piece)]).astype(np.int64)
            working_sets.add(at, offsets, np.array([e for used in piece for e in sorted(used)], np.uint16))
    assert working_sets.means() == naive_working_sets(layers)
