"""The recorded acceptance policy is the identity, and finds the branches of speculative calls."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings

from simulator.acceptance.recorded import Recorded
from tests.made_up.strategies import runs, seeds
from tracer.schema import MASKED


def naive_branches(forwards):
    """Branch of each row: which copy of the block it is in, rows branch-major inside a part."""
    branch = [0] * forwards.num_rows
    start, stop = forwards.part_rows
    for n in range(len(start)):
        own = (stop[n] - start[n]) // int(forwards.branches[n])
        for t in range(start[n], stop[n]):
            branch[t] = (t - start[n]) // own
    return branch


def naive_recorded(segment, geometry, policy):
    """The recorded forwards: every row is computed."""
    forwards, state, branch = segment.forwards, segment.tokens.state, naive_branches(segment.forwards)
    found = []
    for f in range(forwards.num_forwards):
        rows = range(forwards.row_offsets[f], forwards.row_offsets[f + 1])
        numbers = forwards.step[f], forwards.num_accepted[f], forwards.branches[f], forwards.chosen_branch[f]
        found.append((*numbers, [(t, state[t] == MASKED, branch[t], False, False) for t in rows]))
    return found


NAIVE = {"recorded": naive_recorded}


@settings(max_examples=40, deadline=None)
@given(runs(), seeds)
def test_it_is_the_identity(run, seed):
    segment, geometry = run
    found = Recorded().unroll(segment, geometry)
    assert found.recorded and found.forwards is segment.forwards
    assert found.position is segment.tokens.position and found.state is segment.tokens.state
    assert found.branch is None and found.reused is None and found.cold is None
    lengths = segment.forwards.num_tokens
    copies = np.random.default_rng(seed).integers(1, 5, len(lengths))
    branches = np.where(lengths % copies == 0, copies, 1).astype(np.uint8)
    speculative = replace(segment.forwards, branches=branches)
    branch = Recorded().unroll(replace(segment, forwards=speculative), geometry).branch
    assert ([0] * len(found.position) if branch is None else branch.tolist()) == naive_branches(speculative)
    assert (branch is None) == bool((branches == 1).all())


@settings(max_examples=10, deadline=None)
@given(runs())
def test_a_tokens_table_is_not_needed(run):
    segment, geometry = run
    found = Recorded().unroll(replace(segment, tokens=None), geometry)
    assert found.position is None and found.state is None and found.forwards is segment.forwards
