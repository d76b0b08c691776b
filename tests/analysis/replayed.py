"""A made-up trace and replay, seeded, with the shapes and the noise of real ones; figures a test looks for are set by hand."""

from __future__ import annotations

import functools

import numpy as np
import polars as pl

from analysis.metrics import across_seeds
from analysis.metrics import consistency as measure
from analysis.summary import ReplaySummary, TraceSummary
from simulator.interval import IntervalResult
from tests.made_up.runs import block_run, decoded_trace
from tracer.parquet import TraceWriter, open_trace
from tracer.schema import KINDS
from tracer.trace import CallRouting

EXPERTS, TOP_K, LAYERS, BLOCK = 32, 4, (1, 2, 3), 16
EXPERT_BYTES = 3 * 128 * 64 * 4
ROUTINGS = (
    ("vanilla", {}, 22.9, 1.0, 1.21),
    ("team", {"threshold": 0.95, "speculate": True}, 15.3, 0.94, 1.83),
    ("dmoe", {"top_p": 0.6, "min_experts": 12}, 11.25, 0.871, 1.21),
)
RESIDENCIES = (
    ("all_resident", {}, 1.0, 0.0),
    ("lru", {"budget": 24, "scope": "layer"}, 0.815, 2.4e6),
    ("tide", {"budget": 24, "refresh_interval": 4}, 0.862, 1.1e6),
)
BAND = {"value": 1.0, "low": 0.9, "high": 1.2}
NOTE = "Open loop: restricting experts would change hidden states and later routing; this replay cannot see that."


def meta(model="demo:llada2", **more):
    """A meta.json."""
    return {
        "schema_version": 2,
        "created": "2026-01-05T10:00:00Z",
        "complete": True,
        "capture_level": "scores",
        "model": {
            "id": model,
            "num_layers": 4,
            "moe_layers": list(LAYERS),
            "num_experts": EXPERTS,
            "top_k": TOP_K,
            "hidden_size": 128,
            "expert_bytes": EXPERT_BYTES,
            "dtype": "float32",
        },
        "decoding": {"loop": "llada2", "block_length": BLOCK, "steps": 16, "threshold": 0.9, "kv_cache": True},
        "provenance": {"moetrace": "0.1.0", "torch": "2.13.0", "device": "cpu", "command": "moetrace capture"},
        **more,
    }


def forwards(rng, requests=3, blocks=4):
    """A forwards table: a prefill, then blocks of denoise steps that end when nothing is masked, and a commit each."""
    rows = []
    for request in range(requests):
        rows.append((request, "prefill", -1, -1, 0, 0))
        for block in range(2, 2 + blocks):
            masked, step = BLOCK, 0
            while masked:
                accepted = int(min(masked, rng.integers(1, 4)))
                rows.append((request, "denoise", block, step, masked, accepted))
                masked -= accepted
                step += 1
            rows.append((request, "commit", block, -1, 0, 0))
    names = ("request_id", "kind", "block", "step", "num_masked", "num_accepted")
    return pl.DataFrame(rows, schema=names, orient="row").with_row_index("forward_id")


def load(rng):
    """Expert load with a heavy head, and one expert that nothing uses."""
    rows = []
    for layer in LAYERS:
        tokens = np.floor(4000 * rng.dirichlet(np.full(EXPERTS, 0.7))).astype(int)
        tokens[5] = 0
        rows += [(layer, expert, int(count)) for expert, count in enumerate(tokens)]
    return pl.DataFrame(rows, schema=("layer", "expert_id", "tokens"), orient="row")


@functools.cache
def consistency(seed=0, **shape):
    """The analysis of a random trace: real frames, figures of no meaning."""
    wanted = {
        "requests": 4,
        "blocks": 3,
        "block_length": BLOCK,
        "experts": EXPERTS,
        "top_k": TOP_K,
        "layers": len(LAYERS),
    }
    return measure(decoded_trace(seed, **(wanted | shape)))


@functools.cache
def seeds():
    """Popularity across three of these."""
    return across_seeds({name: consistency(seed) for seed, name in enumerate("abc")}, replicates=20)


def interval(budget=24, program=6, best=3):
    """A refresh interval found, on curves of a plausible shape."""
    taus = np.arange(1, 16)
    latency = 0.4 + 0.002 * (taus - best) ** 2
    slowdown = latency / latency[best - 1] - 1
    columns = {
        "refresh_interval": taus,
        "objective": 1e-3 * (1 + 0.01 * (taus - program) ** 2),
        "objective_memoryless": 1e-3 * (1 + 0.1 * taus),
        "extra_misses": 0.01 * taus,
        "extra_misses_memoryless": 0.02 * taus,
        "latency_s": latency,
        "slowdown": slowdown,
        "hit_rate": 0.95 - 0.005 * taus,
        "expert_hit_rate": 0.9 - 0.005 * taus,
        "promotions": 100 // taus,
        "bytes_to_gpu": 10**6 // taus,
        "bytes_to_host": 10**6 // taus,
    }
    regrets = float(slowdown[program - 1]), float(slowdown[0])
    chosen = budget, "h100-pcie5", True, 16, 0.086, 1e-5, 2e-5, 0.1, program, 1, best
    return IntervalResult(*chosen, *regrets, ("A note on the interval.",), columns)


def trace(name="llada2", seed=0, **more):
    """A TraceSummary."""
    rng = np.random.default_rng(seed)
    return TraceSummary(
        name=name,
        meta=meta(more.pop("model", "demo:llada2")),
        requests=3,
        forwards=forwards(rng),
        load=load(rng),
        bytes_on_disk={"routing": 81_234, "forwards": 2_100},
        cell_bytes={"expert_ids": 8_123, "gate_weights": 20_000},
        **more,
    )


def run(number, routing, residency, hardware="h100-pcie5", estimate=None):
    """One run of a replay document, from a row of ROUTINGS and one of RESIDENCIES."""
    name, parameters, experts, kept, tokens = routing
    place, knobs, hits, moved = residency
    changed = name != "vanilla" if estimate is None else estimate
    denoise = 100
    parts = {
        "dense": 0.004,
        "gpu_experts": 0.0004 * experts,
        "cpu_experts": 0.02 * (1 - hits),
        "to_gpu": moved * 4e-9,
    }
    seconds = sum(parts.values())
    return {
        "run": number,
        "acceptance": {"name": "team" if name == "team" else "recorded", "parameters": {}},
        "routing": {"name": name, "parameters": parameters},
        "residency": {"name": place, "parameters": knobs},
        "hardware": hardware,
        "kernel": "vllm_fused" if hardware else None,
        "summary": {
            "forwards": 115,
            "denoise_forwards": denoise,
            "unique_experts": experts,
            "unique_experts_block": experts,
            "tokens_per_forward": tokens,
            "assignments": 115 * len(LAYERS) * BLOCK * TOP_K,
            "hit_rate": hits,
            "expert_hit_rate": hits * 0.97,
            "expert_hit_rate_by_kind": {"denoise": hits * 0.97},
            "bytes_to_gpu": moved * 115 * experts / 22.9,
            "bytes_to_host": 0,
            "resident_bytes": knobs.get("budget", EXPERTS) * len(LAYERS) * EXPERT_BYTES,
            "working_set_bytes": experts * len(LAYERS) * EXPERT_BYTES,
            "gate_retained": kept,
            "latency_s": seconds if hardware else None,
            "latency": parts if hardware else None,
            "tokens_per_s": denoise * tokens / seconds if hardware else None,
            "speedup": {end: f * 0.0131 / seconds for end, f in BAND.items()} if hardware else None,
            "speedup_residency": 1.07 if hardware and "budget" in knobs else None,
        },
        "estimate": changed,
        "bounds": {"tokens_per_forward": [1.21, 2.4], "unique_experts": [12.0, 19.5]} if name == "team" else None,
        "notes": [NOTE] if changed else [],
    }


def document(routings=ROUTINGS, residencies=RESIDENCIES, hardware="h100-pcie5", model="demo:llada2"):
    """A replay document: the product, routing outermost."""
    pairs = [(routing, residency) for routing in routings for residency in residencies]
    runs = [run(i, routing, residency, hardware) for i, (routing, residency) in enumerate(pairs)]
    return {"trace": {"model": model, "num_experts": EXPERTS, "top_k": TOP_K, "moe_layers": len(LAYERS)}, "runs": runs}


def cells(rng, forward_table, replay):
    """replay.parquet of a document on a trace's forwards."""
    frames = []
    base = forward_table.select("forward_id").join(pl.DataFrame({"layer": LAYERS}), how="cross")
    for one in replay["runs"]:
        mean = one["summary"]["unique_experts"]
        unique = np.clip(np.round(rng.normal(mean, 2, base.height) + base["layer"].to_numpy() - 2), 1, EXPERTS)
        frames.append(
            base.with_columns(
                pl.lit(one["run"]).cast(pl.UInt16).alias("run"),
                pl.Series("unique_experts", unique.astype(np.uint16)),
                pl.lit(BLOCK * TOP_K).cast(pl.UInt32).alias("assignments"),
            )
        )
    return pl.concat(frames)


def replay(forward_table, seed=1, **more):
    """A ReplaySummary."""
    made = document(**more)
    return ReplaySummary(document=made, cells=cells(np.random.default_rng(seed), forward_table, made))


def stored(
    path,
    seed=0,
    forwards_kept=None,
    tokens_kept=True,
    confident=True,
    routed=True,
    changed=None,
    finished=True,
    **shape,
):
    """A segment made by the builders, and the trace it was written to, opened.

    ``forwards_kept``: how many of its model calls are written; ``tokens_kept``, ``confident``, ``routed``: whether the trace
    has a tokens table, confidences and routed rows. ``changed(segment)`` is written in place of the segment; without
    ``finished`` the last request never ends. ``shape`` goes to the builder.
    """
    segment, first_block = block_run(np.random.default_rng(seed), **{"requests": 2, **shape})
    segment = segment if changed is None else changed(segment)
    forwards, tokens = segment.forwards, segment.tokens
    layers = {layer: segment.layer(layer, True, with_padding=True) for layer in segment.layers}
    described = {**meta("made"), "capture_level": "scores"}
    described["model"] |= {"num_layers": 3, "moe_layers": list(layers), "num_experts": 9, "top_k": 2}
    described["model"] |= {"moe_intermediate_size": 64, "num_shared_experts": 0, "dense_bytes": 1 << 20}
    described["router"] = {"score_function": "softmax", "norm_topk_prob": True}
    described["decoding"]["block_length"] = shape.get("block_length", 4)
    if not tokens_kept:
        described["tables"] = ["requests", "forwards", "routing"]
    for key in ("schema_version", "created", "complete"):
        del described[key]
    with TraceWriter(path, described) as writer:
        for f in range(forwards.num_forwards if forwards_kept is None else forwards_kept):
            rows = slice(*forwards.row_offsets[f : f + 2])
            names = (
                "request_id",
                "block",
                "step",
                "row_start",
                "num_tokens",
                "kv_tokens",
                "num_masked",
                "num_accepted",
            )
            part = {name: int(getattr(forwards, name)[f]) for name in names} | {"kind": KINDS[forwards.kind[f]]}
            part |= {name: None for name in ("kv_tokens", "num_masked", "num_accepted") if part[name] < 0}
            columns = ("position", "token_id", "state", "predicted_id", "confidence", "accepted")
            told = {name: getattr(tokens, name)[rows] for name in columns}
            if not confident:
                told |= {"confidence": np.full_like(told["confidence"], np.nan)}
                told |= {"predicted_id": np.full_like(told["predicted_id"], -1)}
            routing = CallRouting(
                tuple(layers),
                *(
                    np.stack([getattr(table, name)[rows] for table in layers.values()])
                    for name in ("expert_ids", "gate_weights", "router_scores")
                ),
                count=None if routed else np.zeros((len(layers), rows.stop - rows.start), np.uint8),
            )
            writer.add_call([part], told if tokens_kept else None, routing)
        ended = list(first_block.items()) if forwards_kept is None else []
        for request, block in ended if finished else ended[:-1]:
            writer.add_request(
                {
                    "request_id": request,
                    "prompt_tokens": 5,
                    "generated_tokens": 7,
                    "first_block": block,
                    "stop_reason": "length",
                }
            )
        writer.close(complete=finished)
    return segment, open_trace(path)
