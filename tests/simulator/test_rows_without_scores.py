"""Rows whose scores were not recorded: policies that choose again leave them as recorded, and say so."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from simulator.replaying import replay
from simulator.streams.routed import BLIND
from tests.made_up.runs import block_run
from tests.made_up.tables import MemoryTrace, meta_of
from tracer.trace import without_rows


def held(piece, first_block):
    """One segment as a trace."""
    specs = {layer: piece.load(layer, False, False).router for layer in piece.layers}
    return MemoryTrace(meta_of(specs), first_block, [piece])


def blinded(piece, rows):
    """The segment with NaN in all scores of some rows."""

    def load(layer, scores, weights):
        found = piece.load(layer, scores, weights)
        if found.router_scores is None:
            return found
        return replace(found, router_scores=np.where(rows[:, None], np.float32(np.nan), found.router_scores))

    return replace(piece, load=load)


def unrouted(piece, rows):
    """The segment as if some rows had not been routed."""
    return replace(piece, load=lambda layer, scores, weights: without_rows(piece.load(layer, scores, weights), rows))


@pytest.mark.parametrize("routing", ["dmoe", "block_pool", "des_vote"])
def test_rows_without_scores_stay_as_recorded(routing):
    rng = np.random.default_rng(0)
    piece, first_block = block_run(rng, requests=2, blocks=2)
    rows = rng.random(piece.forwards.num_rows) < 0.3
    (found,) = replay(held(blinded(piece, rows), first_block), [routing]).runs
    cells = replay(held(blinded(piece, rows), first_block), [routing]).cells
    others = replay(held(unrouted(piece, rows), first_block), [routing]).cells
    alone = replay(held(unrouted(piece, ~rows), first_block), ["vanilla"]).cells
    # what the others choose among themselves, and what the rest had
    assert cells["assignments"].to_list() == (others["assignments"] + alone["assignments"]).to_list()
    both = zip(cells["unique_experts"], others["unique_experts"], alone["unique_experts"], strict=True)
    assert all(max(a, b) <= union <= a + b for union, a, b in both)
    assert BLIND in found.notes
    (plain,) = replay(held(piece, first_block), [routing]).runs
    assert BLIND not in plain.notes


def test_vanilla_needs_no_scores():
    piece, first_block = block_run(np.random.default_rng(1))
    rows = np.ones(piece.forwards.num_rows, bool)
    runs = [replay(held(one, first_block), ["vanilla"]).runs[0] for one in (piece, blinded(piece, rows))]
    assert runs[0].summary == runs[1].summary and BLIND not in runs[1].notes
