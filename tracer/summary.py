"""What there is to say about a stored trace without reading its cells: geometry, counts, sizes, provenance."""

from __future__ import annotations

from typing import Any

from tracer.files.reader import Trace
from tracer.schema import KINDS


def describe(trace: Trace) -> dict[str, Any]:
    """Facts of a trace, for ``moetrace info``.

    Parameters
    ----------
    trace : Trace
        From :func:`tracer.files.reader.open_trace`.

    Returns
    -------
    dict
        Plain values by section: ``trace``, ``model``, ``router``, ``decoding``, ``counts``, ``bytes`` (compressed, per table),
        ``bytes_per_decision`` (from the Parquet columns' compressed sizes, keys included; a decision is one id of one row in
        one layer), ``provenance``, and ``notes``, the sentences that every figure of the trace needs.

    Raises
    ------
    TraceError
        When a part is missing or not readable.
    """
    meta, model = trace.meta, trace.meta.model
    expert_bytes = sorted(set(model.expert_bytes.values()))
    router = meta.routers[model.moe_layers[0]]
    return {
        "trace": {
            "path": str(trace.path),
            "schema_version": meta.schema_version,
            "complete": meta.complete,
            "capture_level": meta.capture_level,
            "created": meta.raw.get("created"),
            "tables": list(meta.tables),
        },
        "model": {
            "id": model.id,
            "revision": model.revision,
            "class": model.class_name,
            "dtype": model.dtype,
            "num_layers": model.num_layers,
            "moe_layers": len(model.moe_layers),
            "num_experts": model.num_experts,
            "top_k": model.top_k,
            "num_shared_experts": model.num_shared_experts,
            "hidden_size": model.hidden_size,
            "moe_intermediate_size": model.moe_intermediate_size,
            "expert_bytes": expert_bytes[0] if len(expert_bytes) == 1 else expert_bytes,
            "all_expert_bytes": sum(model.expert_bytes.values()) * model.num_experts,
            "dense_bytes": model.dense_bytes,
        },
        "router": {
            "score_function": router.score_function,
            "norm_topk_prob": router.norm_topk_prob,
            "n_group": router.n_group,
            "topk_group": router.topk_group,
            "routed_scaling_factor": router.routed_scaling_factor,
            "expert_bias": any(spec.expert_bias is not None for spec in meta.routers.values()),
        },
        "decoding": dict(meta.decoding),
        **(_counted(trace) if "loads" in meta.tables else _recorded(trace)),
        "provenance": dict(meta.provenance),
        "notes": [] if "loads" in meta.tables else list(trace.notes),
    }


def _counted(trace: Trace) -> dict[str, Any]:
    """``counts`` and ``bytes`` of a trace that holds counts only."""
    steps, loads = trace.loads
    sizes = trace.bytes_on_disk()
    counts = {"steps": len(steps), "assignments": int(loads.sum(dtype="int64"))}
    return {"counts": counts, "bytes": {**sizes, "total": sum(sizes.values())}}


def _recorded(trace: Trace) -> dict[str, Any]:
    """``counts``, ``bytes`` and ``bytes_per_decision`` of a trace of calls."""
    sizes = trace.bytes_on_disk()
    decisions = trace.num_decisions
    keys = ("forward_id", "layer", "row")
    columns = {"expert_ids": 0, "gate_weights": 0, **dict.fromkeys(keys, 0)}
    for part in trace.parts("routing"):
        for name in columns:
            columns[name] += part.compressed_bytes(name)
    ids = columns["expert_ids"] + sum(columns[name] for name in keys)

    def per_decision(size: int) -> float | None:
        return size / decisions if decisions else None

    reasons = trace.requests["stop_reason"].value_counts(sort=True)
    return {
        "counts": {
            "requests": len(trace.requests),
            "stop_reasons": dict(reasons.iter_rows()),
            "forwards": trace.num_forwards,
            "forwards_by_kind": {
                kind: int((trace.forwards.call_kinds == code).sum()) for code, kind in enumerate(KINDS)
            },
            "rows": trace.num_rows,
            "decisions": decisions,
            "padding_rows": trace.padding_rows,
            "parts": trace.forwards.num_parts,
            "segments": trace.num_segments,
        },
        "bytes": {**sizes, "total": sum(sizes.values())},
        "bytes_per_decision": {
            "ids": per_decision(ids),
            "ids_and_weights": per_decision(ids + columns["gate_weights"]),
            "all": per_decision(sum(sizes.values())),
        },
    }
