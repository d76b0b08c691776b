"""Model calls as a recorder hands them to a writer, kept as plain lists so that what is read back can be held against them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tests.made_up.routers import route_row, router, scores
from tracer.checking import check
from tracer.parquet import open_trace
from tracer.schema import tables_of
from tracer.trace import CallRouting


@dataclass
class Recorded:
    """Calls as ``TraceWriter.add_call`` takes them, in order, with the requests that end after each."""

    meta: dict
    calls: list = field(default_factory=list)
    ended: dict = field(default_factory=dict)  # call number -> requests rows

    def write(self, writer, first=0, last=None):
        """Hand calls ``first`` to ``last - 1`` and their requests to a writer."""
        last = len(self.calls) if last is None else last
        for number in range(first, last):
            writer.add_call(*self.calls[number])
            for row in self.ended.get(number, ()):
                writer.add_request(row)


def meta_of(spec, layers, level, tokens=True):
    return {
        "capture_level": level,
        "model": {
            "id": "made up",
            "num_layers": max(layers) + 1,
            "moe_layers": list(layers),
            "num_experts": spec.num_experts,
            "top_k": spec.top_k,
            "expert_bytes": 12,
        },
        "router": {
            "score_function": spec.score_function,
            "expert_bias": None
            if spec.expert_bias is None
            else {str(layer): [float(x) for x in spec.expert_bias] for layer in layers},
        },
        "tables": tables_of(level, tokens),
        "decoding": {"block_length": 3, "kv_cache": True},
    }


def record(rng, *, num_experts=9, top_k=2, layers=(1, 2), level="ids", batches=2, batch=2, weights=True, tokens=True,
           count=False, nan_scores=False, unweighted=(), branches=1, id_dtype=np.int64):  # fmt: skip
    """Decode ``batches`` times ``batch`` requests side by side, blocks of 3, with a prefill, denoise and commit calls.

    With ``count`` some rows have fewer than K experts, or none, and what stands behind the real ones is nonsense; with
    ``nan_scores`` some rows have no scores; layers ``unweighted`` have no weights.
    """
    spec = router(rng, num_experts, top_k, bias=True)
    recorded = Recorded(meta_of(spec, layers, level, tokens))

    def routing(rows):
        shape = (len(layers), rows)
        score = np.stack([scores(rng, rows, spec) for _ in layers]).reshape(*shape, num_experts)
        chosen = [[route_row(row, spec) for row in own] for own in score]
        ids = np.array([[ids for ids, _ in own] for own in chosen], id_dtype).reshape(*shape, top_k)
        weight = np.array([[w for _, w in own] for own in chosen], np.float32).reshape(*shape, top_k)
        weight[[layer in unweighted for layer in layers]] = np.nan
        real = None
        if count:
            # rows without an expert and whole ones are as common as all others together
            real = rng.choice([0, top_k, *range(top_k + 1)], shape)
            beyond = np.arange(top_k) >= real[..., None]
            ids[beyond], weight[beyond] = np.iinfo(id_dtype).max, np.nan
        if nan_scores:
            score[rng.random(shape) < 0.3] = np.nan
        return CallRouting(tuple(layers), ids, weight if weights else None, None if level == "ids" else score, real)

    def add(kind, block, step, requests, positions, masked):
        parts, start = [], 0
        copies = branches if kind == "denoise" else 1
        for request in requests:
            rows = len(positions) * copies
            accepted = masked[: 1 + step] if kind == "denoise" else []
            parts.append(
                {
                    "request_id": request,
                    "kind": kind,
                    "block": block,
                    "step": step,
                    "row_start": start,
                    "num_tokens": rows,
                    "kv_tokens": positions[0],
                    "num_masked": len(masked) * copies,
                    "num_accepted": len(accepted),
                    "branches": copies,
                    "chosen_branch": 0 if copies > 1 else None,
                    "duration_ns": int(rng.integers(1, 10**9)),
                }
            )
            start += rows
        one = np.tile(positions, copies)
        position = np.tile(one, len(requests))
        current = np.full(len(position), block >= 0)
        columns = {
            "position": position,
            "token_id": rng.integers(2, 99, len(position)),
            "state": np.where(np.isin(position, masked), 2, 1),
            "predicted_id": np.where(current, rng.integers(2, 99, len(position)), -1),
            "confidence": np.where(current, rng.random(len(position)), np.nan).astype(np.float32),
            "accepted": np.isin(position, masked[: 1 + step] if kind == "denoise" else []),
        }
        recorded.calls.append((parts, columns if tokens else None, routing(len(position))))

    for number in range(batches):
        requests = [number * batch + i for i in range(batch)]
        add("prefill", -1, -1, requests, [0, 1, 2], [])
        for block in (1, 2):
            own = [3 * block, 3 * block + 1, 3 * block + 2]
            add("denoise", block, 0, requests, own, own)
            add("denoise", block, 1, requests, own, own[1:])
            add("commit", block, -1, requests, own, [])
        recorded.ended[len(recorded.calls) - 1] = [
            {
                "request_id": request,
                "prompt_tokens": 3,
                "generated_tokens": 6,
                "first_block": 1,
                "stop_reason": "length",
            }
            for request in requests
        ]
    return recorded


def naive_active(ids, scores, bias, top_k):
    """Experts that level "active" keeps of a layer of a call, ascending.

    The union, over rows that have ids and scores, of the ids and of the K experts of largest score plus bias, ties to the
    lowest id. ``ids`` holds the real ids of each row.
    """
    kept = set()
    for row, score in zip(ids, scores):
        if len(row) and not np.isnan(score).all():
            selection = score + bias
            kept |= set(row) | set(sorted(range(len(score)), key=lambda e: (-selection[e], e))[:top_k])
    return sorted(kept)


def assert_unfinished(path, calls=None):
    """Nothing is wrong with a trace but that it was not finished; it holds so many calls."""
    trace = open_trace(path)
    ended = sum(reason != "interrupted" for reason in trace.requests["stop_reason"])
    words = f"this trace was not finished: {ended} requests of {len(trace.requests)} ended."
    assert check(path) == [f"{path}: {words}"]
    assert not trace.meta.complete and "segments" not in trace.meta.raw
    assert calls is None or trace.num_forwards == calls
