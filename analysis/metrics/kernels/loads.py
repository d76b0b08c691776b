"""Numba kernels over expert counts: loads of a forward, ranks, cosine and drift between forwards, survival, working
sets.

P = parts (denoise forwards of a request), E = experts, G = bootstrap units. Nothing here checks its input.
"""

from __future__ import annotations

import math

import numpy as np

from tracer.jit import njit

UNWANTED = 1 << 40
"""Rank of an expert without load: beyond every budget."""


@njit
def part_loads(ids, count, first, last, num_experts):
    """Rows that use each expert, int64 [P, E], over rows first[p]..last[p]."""
    loads = np.zeros((len(first), num_experts), np.int64)
    for p in range(len(first)):
        for row in range(first[p], last[p]):
            for k in range(count[row]):
                loads[p, ids[row, k]] += 1
    return loads


@njit
def block_loads(ids, count, grid, num_experts):
    """Rows that use each expert, int64 [P, E], over the block rows in ``grid``."""
    loads = np.zeros((len(grid), num_experts), np.int64)
    for p in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            row = grid[p, j]
            if row >= 0:
                for k in range(count[row]):
                    loads[p, ids[row, k]] += 1
    return loads


@njit
def load_ranks(loads):
    """Place of each expert by falling load, ties to the lowest id, int64 [P, E]; UNWANTED without load."""
    parts, experts = loads.shape
    ranks = np.full((parts, experts), UNWANTED, np.int64)
    for p in range(parts):
        most = 0
        for e in range(experts):
            most = max(most, loads[p, e])
        place = np.zeros(most + 2, np.int64)
        for e in range(experts):
            place[loads[p, e]] += 1
        above = 0
        for c in range(most, 0, -1):
            here = place[c]
            place[c] = above
            above += here
        for e in range(experts):
            c = loads[p, e]
            if c > 0:
                ranks[p, e] = place[c]
                place[c] += 1
    return ranks


@njit
def load_pair_sums(loads, ranks, earlier, later, cell, budgets, pairs, cosine, drift, missed):
    """Compare forwards ``earlier[i]`` and ``later[i]``, summed into ``cell[i]``; forwards without load are left out.

    ``pairs`` int64 and ``cosine`` float64 [cells]; ``drift`` and ``missed`` float64 [cells, budgets]: share of the
    later top-B set that is not in the earlier one, and share of the later load outside the earlier top-B set.
    """
    experts = loads.shape[1]
    for i in range(len(earlier)):
        a, b, c = earlier[i], later[i], cell[i]
        dot, left, right, total, active = 0, 0, 0, 0, 0
        for e in range(experts):
            x, y = loads[a, e], loads[b, e]
            dot += x * y
            left += x * x
            right += y * y
            total += y
            active += y > 0
        if left == 0 or right == 0:
            continue
        pairs[c] += 1
        cosine[c] += dot / math.sqrt(np.float64(left) * np.float64(right))
        for n in range(len(budgets)):
            budget = budgets[n]
            changed, outside = 0, 0
            for e in range(experts):
                out = ranks[a, e] >= budget
                changed += out and ranks[b, e] < budget
                outside += loads[b, e] * out
            drift[c, n] += changed / min(budget, active)
            missed[c, n] += outside / total


@njit
def survival_sums(ranks, budget, run_offsets, run_unit, risk, alive):
    """Experts of rank below ``budget`` at a step (``risk``) and those of them that are at each of the next t steps too
    (``alive``), int64 [G, T]."""
    experts, longest = ranks.shape[1], risk.shape[1]
    age, size = np.zeros(experts, np.int64), np.zeros(len(ranks), np.int64)
    held = np.zeros(longest + 2, np.int64)
    for r in range(len(run_offsets) - 1):
        g, start = run_unit[r], run_offsets[r]
        age[:] = 0
        for p in range(start, run_offsets[r + 1]):
            held[:] = 0
            for e in range(experts):
                if ranks[p, e] < budget:
                    age[e] += 1
                    size[p] += 1
                    held[min(age[e], longest + 1)] += 1
                else:
                    age[e] = 0
            lasting = 0
            for t in range(longest, 0, -1):
                lasting += held[t + 1]
                if t <= p - start:
                    risk[g, t - 1] += size[p - t]
                    alive[g, t - 1] += lasting


@njit
def member_sums(ranks, budget, unit, member):
    """Steps at which each expert has a rank below ``budget``, added to int64 [G, E]."""
    for p in range(len(ranks)):
        g = unit[p]
        for e in range(ranks.shape[1]):
            member[g, e] += ranks[p, e] < budget


@njit
def window_sums(loads, unit, slot, last, clock, windows, counted, distinct):
    """Distinct experts of windows of consecutive denoise forwards of a request, summed into int64 [G, windows].

    ``slot`` int64 [P] is the request's row in ``last`` int64 [Q, E] (when each expert was last used) and ``clock``
    int64 [Q] (its denoise forwards so far); both go on from segment to segment.
    """
    for p in range(len(loads)):
        q, g = slot[p], unit[p]
        now = clock[q]
        for e in range(loads.shape[1]):
            if loads[p, e] > 0:
                last[q, e] = now
        clock[q] = now + 1
        for n in range(len(windows)):
            if now + 1 >= windows[n]:
                counted[g, n] += 1
                for e in range(loads.shape[1]):
                    distinct[g, n] += last[q, e] > now - windows[n]
