"""A whole replay written with sets and loops: forwards, cells, placements and the figures of the summary."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from tests.simulator.test_residency_caches import naive_lru
from tests.simulator.test_residency_tide import naive_refresh, naive_tide
from tracer.schema import COMMIT, DENOISE, KINDS

E, LAYERS, BLOCK = 7, (1, 2), 4


def naive_forwards(trace, acceptance):
    """Calls as dicts: parts, kind, rows by part, per layer the recorded [(expert, weight)] of each row, reused rows."""
    calls = []
    for piece in trace.pieces:
        trajectory = acceptance.unroll(piece, None) if acceptance else None
        table = trajectory.forwards if trajectory else piece.forwards
        source = trajectory.source if trajectory else np.arange(table.num_rows)
        reused = trajectory.reused if trajectory else np.zeros(table.num_rows, bool)
        start, stop = table.part_rows
        layers = {number: piece.layer(number) for number in piece.layers}
        recorded_call = np.repeat(np.arange(piece.forwards.num_forwards), np.diff(piece.forwards.row_offsets))
        for f in range(table.num_forwards):
            parts = []
            for n in range(table.part_offsets[f], table.part_offsets[f + 1]):
                block = int(table.block[n])
                parts.append(
                    {
                        "request": int(table.request_id[n]),
                        "accepted": int(table.num_accepted[n]),
                        "step": int(table.step[n]),
                        "block": block,
                        "rows": list(range(start[n], stop[n])),
                        "in_block": [
                            t
                            for t in range(start[n], stop[n])
                            if block < 0 or int(piece.tokens.position[source[t]]) // BLOCK == block
                        ],
                    }
                )
            rows = range(table.row_offsets[f], table.row_offsets[f + 1])
            call = {
                "id": len(calls),
                "kind": int(table.forward_kind[f]),
                "parts": parts,
                "rows": list(rows),
                "reused": {t for t in rows if reused[t]},
                "present": {n: bool(layers[n].present[recorded_call[source[rows[0]]]]) for n in LAYERS},
                "experts": {},
                "bounds": [{t for t in rows if mask[t]} for mask in trajectory.bound_rows] if trajectory else None,
            }
            for number, layer in layers.items():
                weights = layer.gate_weights
                call["experts"][number] = {
                    t: [
                        (int(layer.expert_ids[source[t], k]), None if weights is None else float(weights[source[t], k]))
                        for k in range(layer.count[source[t]])
                    ]
                    for t in rows
                }
            calls.append(call)
    return calls


def naive_choice(call, number, keep):
    """Row -> the experts it uses, in the order they are touched."""
    chosen = {}
    for t, recorded in call["experts"][number].items():
        kept = [] if t in call["reused"] else recorded[:keep]
        chosen[t] = [e for e, _ in sorted(kept, key=lambda pair: (-(pair[1] or 0.0), pair[0]))]
    return chosen


def naive_cells(calls, keep, first_block, residency, weighted):
    """Cells by (call, layer number), with what residency did."""
    cells = {}
    touched = {(c["id"], n): naive_choice(c, n, keep) for c in calls for n in LAYERS}
    placed = naive_placement(calls, touched, first_block, residency)
    for call in calls:
        for number in LAYERS:
            if not call["present"][number]:
                continue
            rows = touched[call["id"], number]
            load = {}
            for used in rows.values():
                for e in used:
                    load[e] = load.get(e, 0) + 1
            recorded = call["experts"][number]
            pairs = [(t, e, w) for t, found in recorded.items() for e, w in found]
            hits, promotions, demotions, on_gpu = placed[call["id"], number]
            kept = [w for t, e, w in pairs if t in call["reused"] or e in rows[t]]
            whole = [w for _, _, w in pairs]
            cells[call["id"], number] = {
                "assignments": sum(load.values()),
                "unique_experts": len(load),
                "unique_experts_block": len({e for p in call["parts"] for t in p["in_block"] for e in rows[t]}),
                "gpu_tokens": sum(n for e, n in load.items() if e in on_gpu),
                "cpu_tokens": sum(n for e, n in load.items() if e not in on_gpu),
                "gpu_experts": len(on_gpu & set(load)),
                "cpu_experts": len(set(load) - on_gpu),
                "hit_tokens": sum(load[e] for e in hits),
                "hit_experts": len(hits),
                "promotions": promotions,
                "demotions": demotions,
                "kept": sum(kept) if weighted else None,
                "vanilla": sum(whole) if weighted else None,
            }
    return cells


def naive_placement(calls, touched, first_block, residency):
    """(call, layer) -> experts that hit, promotions, demotions, experts on the GPU."""
    name, sizes = residency[0], dict(zip(LAYERS, (1100, 1200), strict=True))
    order = [(c["id"], n) for c in calls for n in LAYERS if c["present"][n]]
    placed = {}
    if name == "lru_global":
        rows = [list(touched[key].values()) for key in order]
        answers = naive_lru(rows, [n for _, n in order], sizes, residency[1])
        for key, (hits, promotions, demotions, *_), used in zip(order, answers, rows, strict=True):
            first = list(dict.fromkeys(e for row in used for e in row))
            placed[key] = ({e for e, hit in zip(first, hits, strict=True) if hit}, promotions, demotions, set(range(E)))
        return placed
    for number in LAYERS:
        keys = [(c["id"], number) for c in calls if c["present"][number]]
        rows = [list(touched[key].values()) for key in keys]
        if name == "all_resident":
            for key, used in zip(keys, rows, strict=True):
                placed[key] = ({e for row in used for e in row}, 0, 0, set(range(E)))
        if name == "lru":
            answers = naive_lru(rows, [number] * len(keys), {number: 1}, residency[1])
            for key, (hits, promotions, demotions, *_), used in zip(keys, answers, rows, strict=True):
                first = list(dict.fromkeys(e for row in used for e in row))
                found = {e for e, hit in zip(first, hits, strict=True) if hit}
                placed[key] = (found, promotions, demotions, set(range(E)))
        if name == "tide":
            parts = [[(p["request"], c["kind"], p["block"], p["step"]) for p in c["parts"]] for c in calls]
            every = [list(touched[c["id"], number].values()) for c in calls]
            answers = naive_tide(parts, every, first_block, residency[1], residency[2])
            for call, (hits, promotions, demotions, _) in zip(calls, answers, strict=True):
                placed[call["id"], number] = (hits, promotions, demotions, hits)
    return placed


def naive_refreshes(calls, first_block, interval):
    """Whether each call refreshes under TIDE."""
    decoded, asked = {}, []
    for call in calls:
        parts = [(p["request"], call["kind"], p["block"], p["step"]) for p in call["parts"]]
        asked.append(any([naive_refresh(part, first_block, interval, decoded) for part in parts]))
    return asked


def naive_lags(calls, cells, first_block, residency):
    """Keys about refreshes: how many, the share with fewer active experts than the budget, hit rate by lag."""
    if residency[0] != "tide":
        return {"refreshes": None, "surplus_refreshes": None, "hit_rate_by_lag": None}
    budget, found, by_lag = residency[1], [], {}
    asked = naive_refreshes(calls, first_block, residency[2])
    for number in LAYERS:
        lag = None
        for call, wanted in zip(calls, asked, strict=True):
            if (call["id"], number) not in cells:
                continue
            cell = cells[call["id"], number]
            if wanted and cell["unique_experts"]:
                lag = 0
                found.append(cell["unique_experts"] < budget)
            elif lag is not None:
                lag += 1
            if lag is not None:
                hit, tokens = by_lag.get(lag, (0, 0))
                by_lag[lag] = hit + cell["hit_tokens"], tokens + cell["assignments"]
    rates = {lag: hit / tokens for lag, (hit, tokens) in by_lag.items() if tokens}
    return {
        "refreshes": len(found) or None,
        "surplus_refreshes": sum(found) / len(found) if found else None,
        "hit_rate_by_lag": [rates.get(lag) for lag in range(max(rates) + 1)] if rates else None,
    }


def naive_windows(touched_by_layer):
    """Distinct experts over every w consecutive calls a layer ran in, mean over windows and layers."""
    means = {}
    for w in (1, 2, 4, 8, 16):
        sizes = [
            len(set().union(*used[first : first + w]))
            for used in touched_by_layer
            for first in range(len(used) - w + 1)
        ]
        means[str(w)] = mean(sizes)
    return means


def naive_retained(calls, keep):
    """Mean over routed rows of the share of their recorded experts that they still use; reused rows keep all."""
    shares = []
    for call in calls:
        for number in LAYERS:
            rows = naive_choice(call, number, keep)
            for t, recorded in call["experts"][number].items():
                if recorded:
                    still = recorded if t in call["reused"] else [e for e, _ in recorded if e in rows[t]]
                    shares.append(Fraction(len(still), len(recorded)))
    return float(sum(shares) / len(shares)) if shares else None


def naive_skew(calls, keep):
    """Largest over mean load of all experts, mean over denoise calls and layers with tokens."""
    sums, number_of = [], 0
    for number in LAYERS:
        total = 0.0
        for call in calls:
            used = [e for row in naive_choice(call, number, keep).values() for e in row]
            if call["kind"] == DENOISE and used:
                total += max(used.count(e) for e in used) * E / len(used)
                number_of += 1
        sums.append(total)
    return math.fsum(sums) / number_of if number_of else None


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else None


def naive_summary(calls, cells, sizes, keep, first_block, residency):
    """The keys that sets and loops can say without the residency's own state."""
    kinds = {call["id"]: call["kind"] for call in calls}
    denoise = [cell for (f, _), cell in cells.items() if kinds[f] == DENOISE]
    accepted = sum(p["accepted"] for c in calls if c["kind"] == DENOISE for p in c["parts"])
    commits = sum(c["kind"] == COMMIT for c in calls)
    steps = sum(c["kind"] == DENOISE for c in calls)
    of_request, calls_of_request = {}, {}
    for c in calls:
        for p in c["parts"] if c["kind"] == DENOISE else ():
            for number in LAYERS:
                if c["present"][number]:
                    rows = naive_choice(c, number, keep)
                    of_request.setdefault(p["request"], []).append(len({e for t in p["in_block"] for e in rows[t]}))
                    unique = cells[c["id"], number]["unique_experts"]
                    # Requests of one call share it.
                    share = Fraction(1, len(c["parts"]))
                    calls_of_request.setdefault(p["request"], []).append((share, share * unique))
    totals = {k: sum(c[k] for c in cells.values()) for k in next(iter(cells.values())) if k not in ("kept", "vanilla")}
    by_kind = {}
    for kind, name in enumerate(KINDS):
        found = [cell for (f, _), cell in cells.items() if kinds[f] == kind]
        lookups = sum(c["unique_experts"] for c in found)
        if lookups:
            by_kind[name] = sum(c["hit_experts"] for c in found) / lookups
    weighted = [c for c in cells.values() if c["vanilla"] is not None]
    whole = sum(c["vanilla"] for c in weighted)
    interval = None
    if len(calls_of_request) > 1:
        sums = [tuple(map(sum, zip(*v, strict=True))) for v in calls_of_request.values()]
        ratio = sum(u for _, u in sums) / sum(n for n, _ in sums)
        variance = sum((u - ratio * n) ** 2 for n, u in sums) / (len(sums) - 1)
        half = 1.959963984540054 * math.sqrt(variance / len(sums)) / (sum(n for n, _ in sums) / len(sums))
        interval = [float(ratio) - half, float(ratio) + half]
    return {
        "forwards": len(calls),
        "denoise_forwards": steps,
        "unique_experts": mean(c["unique_experts"] for c in denoise),
        "unique_experts_block": mean(c["unique_experts_block"] for c in denoise),
        "unique_experts_all_forwards": mean(c["unique_experts"] for c in cells.values()),
        "unique_experts_block_all_forwards": mean(c["unique_experts_block"] for c in cells.values()),
        "unique_experts_per_request": mean(math.fsum(v) / len(v) for v in of_request.values()),
        "unique_experts_ci95": interval,
        "tokens_per_forward": accepted / steps if steps else None,
        "tokens_per_forward_with_commit": accepted / (steps + commits) if steps + commits else None,
        "assignments": totals["assignments"],
        "gpu_tokens": totals["gpu_tokens"],
        "cpu_tokens": totals["cpu_tokens"],
        "promotions": totals["promotions"],
        "demotions": totals["demotions"],
        "hit_rate": totals["hit_tokens"] / totals["assignments"] if totals["assignments"] else None,
        "expert_hit_rate": totals["hit_experts"] / totals["unique_experts"] if totals["unique_experts"] else None,
        "expert_hit_rate_by_kind": by_kind,
        "bytes_to_gpu": sum(cell["promotions"] * sizes[n] for (_, n), cell in cells.items()),
        "working_set_bytes": sum(cell["unique_experts"] * sizes[n] for (_, n), cell in cells.items()) / len(calls),
        "gate_retained": (sum(c["kept"] for c in weighted) / whole if whole else 1.0) if weighted else None,
        "experts_retained": naive_retained(calls, keep),
        "load_skew": naive_skew(calls, keep),
        "working_set_experts": naive_windows(
            [
                [{e for row in naive_choice(c, n, keep).values() for e in row} for c in calls if c["present"][n]]
                for n in LAYERS
            ],
        ),
        "gpu_tokens_per_promotion": totals["gpu_tokens"] / totals["promotions"] if totals["promotions"] else None,
        **naive_lags(calls, cells, first_block, residency),
    }
