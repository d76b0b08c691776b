"""Model calls made up for writer tests, kept as plain lists so that what is read back can be held against them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tests.builders import route_row, router, scores
from tracer.files.cells import active_columns


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


def meta_of(spec, layers, level, tables=("requests", "forwards", "tokens", "routing"), score_dtype="float32"):
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
        "score_dtype": score_dtype,
        "tables": list(tables),
        "decoding": {"block_length": 3, "kv_cache": True},
    }


def record(rng, *, num_experts=9, top_k=2, layers=(1, 2), level="ids", batches=2, batch=2, weights=True, tokens=True,
           some_unrouted=False, branches=1, id_dtype=np.int64):  # fmt: skip
    """Decode ``batches`` times ``batch`` requests side by side, blocks of 3, with a prefill, denoise and commit calls."""
    spec = router(rng, num_experts, top_k, bias=True)
    tables = ("requests", "forwards", "tokens", "routing") if tokens else ("requests", "forwards", "routing")
    recorded = Recorded(meta_of(spec, layers, level, tables))

    def routing(rows):
        cells = {}
        for layer in layers:
            score = scores(rng, rows, spec)
            chosen = [route_row(row, spec) for row in score]
            cell = {
                "expert_ids": np.array([ids for ids, _ in chosen], id_dtype).reshape(rows, top_k),
                "gate_weights": np.array([w for _, w in chosen], np.float32).reshape(rows, top_k) if weights else None,
                "router_scores": None,
                "score_experts": None,
                "routed": rng.random(rows) < 0.7 if some_unrouted else None,
            }
            if level == "scores":
                cell["router_scores"] = score
            if level == "active":
                columns = active_columns(cell["expert_ids"], score, spec.expert_bias, cell["routed"])
                cell["router_scores"], cell["score_experts"] = score[:, columns], columns
            cells[layer] = cell
        return cells

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
