"""TEAM's own decoding written out with sets, over predictions that are drawn: segments as a recorder would leave them."""

from __future__ import annotations

import numpy as np

from tests.made_up.routers import naive_choose, route_row, scores
from tests.made_up.tables import forward_table, in_memory, layer_of_rows, token_table
from tests.simulator.test_acceptance_team import naive_accept, naive_cold, naive_quota
from tracer.schema import COMMIT, DECODED, DENOISE, MASKED, PREFILL, PROMPT


class Drawn:
    """A model made up as it is asked: the true token often, a probability from few values so that ties happen."""

    def __init__(self, rng, sure):
        self.rng, self.sure, self.truth = rng, sure, {}

    def predict(self, positions):
        """Token and probability at every position."""
        x, p = {}, {}
        for j in positions:
            true = self.truth.setdefault(j, int(self.rng.integers(2, 9)))
            x[j] = true if self.rng.random() < self.sure else int(self.rng.integers(2, 9))
            p[j] = np.float32(self.rng.integers(0, 9) / 8 if self.rng.random() < 0.5 else self.rng.random())
        return x, p


def naive_block(positions, known, model, policy, threshold, steps):
    """One block under TEAM. Yields a dict a forward: branches of (known, x, p, accepted), chosen, gained, decoded, cold."""
    cur, before, step = set(known), None, 0
    while cur != set(positions):
        quota = naive_quota(len(positions), steps, step)
        joins, decoded, cold = [set()], set(), set()
        surest = []
        if before is not None:
            masked = set(positions) - cur
            surest = sorted(masked, key=lambda j, p=before["p"]: (-p[j], j))[:2]
            a, b = set(surest[:1]), set(surest[1:])
            if policy.speculate:
                joins = [set(), a, b, a | b]
            if policy.reuse:
                decoded = cur - before["accepted"]
            if policy.limit:
                cold = naive_cold(
                    positions, cur | joins[-1], before["p"], surest, policy.hot_probability, policy.hot_distance
                )
        branches = []
        for join in joins:
            x, p = model.predict(positions)
            taken = naive_accept(set(positions) - cur - join, p, threshold, quota) if threshold < 1 else set()
            if threshold >= 1:
                taken = set(sorted(set(positions) - cur - join, key=lambda j, p=p: (-p[j], j))[:quota])
            branches.append({"known": cur | join, "x": x, "p": p, "accepted": taken})
        chosen = 0
        if len(branches) > 1:
            chosen = naive_chosen(surest, before["x"], branches)
        kept = branches[chosen]
        yield {
            "branches": branches,
            "chosen": chosen if len(branches) > 1 else -1,
            "gained": (0, 1, 1, 2)[chosen] + len(kept["accepted"]),
            "decoded": decoded,
            "cold": cold,
            "step": step,
        }
        cur, before, step = kept["known"] | kept["accepted"], kept, step + 1


def naive_chosen(surest, guess, branches):
    """The branch whose guesses branches with fewer of them accept."""

    def right(r, j):
        return j in branches[r]["accepted"] and branches[r]["x"][j] == guess[j]

    a, b = surest[0], surest[1] if len(surest) > 1 else None
    a1 = right(0, a)
    a2 = b is not None and right(0, b)
    a12 = b is not None and right(1, b)
    a21 = a2 and right(2, a)
    return 3 if (a1 and a2) or (a1 and a12) or (a2 and a21) else 1 if a1 else 2 if a2 else 0


def naive_sets(score, spec, decoded, cold):
    """Experts and weights of each row of a forward, None where it is reused; ``decoded`` and ``cold`` by row."""
    rows = [None if decoded[t] else route_row(score[t], spec) for t in range(len(score))]
    if any(cold[t] and rows[t] for t in range(len(score))):
        inside = {e for t, row in enumerate(rows) if row and not cold[t] for e in row[0]}
        for t, row in enumerate(rows):
            if row and cold[t]:
                rows[t] = naive_choose(score[t], inside, spec)
    return rows


def team_run(
    rng, policy, *, threshold, steps, specs, block_length=4, blocks=2, prompt=5, requests=1, sure=0.8, kv_cache=True
):
    """A segment that holds TEAM's run and what happened: a list of dicts, one a forward, with its rows.

    A row is (position, known, x, p, accepted, reused, cold, branch). Without ``kv_cache`` every branch holds all rows before
    the block too; they are reused in every step of a block but its first.
    """
    happened = []
    for request in range(requests):
        model = Drawn(rng, sure)
        whole = prompt // block_length * block_length

        def plain(kind, block, positions, request=request):
            rows = [(j, True, -1, np.float32(np.nan), False, False, False, 0) for j in positions]
            happened.append(
                {"request": request, "kind": kind, "block": block, "step": -1, "rows": rows, "chosen": -1, "gained": 0}
            )

        if whole and kv_cache:
            plain(PREFILL, -1, range(whole))
        for block in range(prompt // block_length, prompt // block_length + blocks):
            own = range(block * block_length, (block + 1) * block_length)
            known = {j for j in own if j < prompt}
            outside = () if kv_cache else range(block * block_length)
            for forward in naive_block(own, known, model, policy, threshold, steps):
                rows = []
                for r, branch in enumerate(forward["branches"]):
                    again = policy.reuse and forward["step"] > 0
                    rows += [(j, True, -1, np.float32(np.nan), False, again, False, r) for j in outside]
                    for j in own:
                        found = branch["x"][j], branch["p"][j], j in branch["accepted"]
                        rows.append((j, j in branch["known"], *found, j in forward["decoded"], j in forward["cold"], r))
                forward |= {"request": request, "kind": DENOISE, "block": block, "rows": rows}
                happened.append(forward)
            plain(COMMIT, block, [*outside, *own])
    return _segment(rng, happened, specs, prompt), happened


def _segment(rng, happened, specs, prompt):
    rows = [row for forward in happened for row in forward["rows"]]
    position, known, predicted, confidence, accepted, _, _, _ = (np.array(column) for column in zip(*rows, strict=True))
    state = np.where(known, np.where(position < prompt, PROMPT, DECODED), MASKED)
    calls = []
    for f in happened:
        masked = sum(not row[1] for row in f["rows"])
        calls.append([(f["request"], f["kind"], f["block"], f["step"], len(f["rows"]), masked, f["gained"])])
    forwards = forward_table(
        calls,
        kv_tokens=[f["rows"][0][0] for f in happened],
        branches=[f["rows"][-1][7] + 1 for f in happened],
        chosen_branch=[f["chosen"] for f in happened],
    )
    tokens = token_table(position, state=state, predicted_id=predicted, confidence=confidence, accepted=accepted)
    layers = {layer: _layer(rng, layer, spec, happened, forwards.row_offsets) for layer, spec in specs.items()}
    return in_memory(forwards, tokens, layers)


def _layer(rng, layer, spec, happened, offsets):
    score, rows = scores(rng, int(offsets[-1]), spec), []
    for f, forward in enumerate(happened):
        decoded, cold = [row[5] for row in forward["rows"]], [row[6] for row in forward["rows"]]
        own = naive_sets(score[offsets[f] : offsets[f + 1]], spec, decoded, cold)
        forward.setdefault("experts", {})[layer] = own
        rows += own
    score[[row is None for row in rows]] = 0
    return layer_of_rows(rng, layer, spec, rows, len(happened), score)
