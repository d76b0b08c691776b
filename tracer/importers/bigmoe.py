"""BigMoeOnEdge route traces: a CSV of one row per routed expert, with a preamble of ``#`` lines.

Source: github Helldez/BigMoeOnEdge @2d4f2b1, docs/bench-data (format ``route_trace v1``). Its own replay, and its device
counters, read a prefill as one batch per layer, token-major, and every decoded token as one batch per layer; experts of a row
are looked up slot by slot, by falling weight.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import polars as pl

from tracer.errors import UserError
from tracer.parquet import TraceWriter
from tracer.trace import CallRouting

PREFILL_PHASE, DECODE_PHASE = 0, 1
COLUMNS = {
    "turn": pl.UInt32,
    "phase": pl.UInt8,
    "step": pl.UInt32,
    "layer": pl.UInt16,
    "slot": pl.UInt16,
    "expert": pl.UInt16,
    "weight": pl.Float32,
}


def import_file(source: Path, out: Path, *, force: bool = False) -> int:
    """Turn a BigMoeOnEdge CSV into a trace of level "ids".

    Parameters
    ----------
    source : Path
        ``NAME.route.csv``.
    out : Path
        Trace folder to write.
    force : bool
        Replace a trace that is already there.

    Returns
    -------
    int
        Routing decisions (row, layer, expert) imported.

    Raises
    ------
    UserError
        The file is missing, is no route trace, or breaks its own preamble; the sentence names line, layer or step.
    """
    source = Path(source)
    if not source.is_file():
        raise UserError(f"There is no file {source} to import.")
    preamble = _preamble(source)
    experts, top_k = preamble["n_expert"], preamble["n_expert_used"]
    table = _read(source, experts, top_k)
    layers = table["layer"].unique().sort().to_list()
    meta = {
        "capture_level": "ids",
        "model": {
            "id": preamble["model"],
            "revision": None,
            "class": preamble["arch"],
            "num_layers": preamble["n_layer"],
            "moe_layers": layers,
            "num_experts": experts,
            "top_k": top_k,
            "hidden_size": None,
            "moe_intermediate_size": None,
            "num_shared_experts": 0,
            "expert_bytes": {str(layer): preamble["expert_bytes"][layer] for layer in layers},
            "dense_bytes": sum(preamble["dense_bytes"].values()),
            "dtype": None,
        },
        "router": {"score_function": "softmax", "norm_topk_prob": True, "n_group": 1, "topk_group": 1},
        "tables": ["requests", "forwards", "routing"],
        "decoding": {"loop": "autoregressive", "block_length": None, "kv_cache": True},
        "provenance": {"source": "imported from BigMoeOnEdge route_trace v1", "file": source.name},
    }
    with TraceWriter(out, meta, force=force, whole=True) as writer:
        for turn in table["turn"].unique().sort().to_list():
            _write_turn(writer, table.filter(pl.col("turn") == turn), turn, layers, top_k)
    return table.height


def _preamble(source: Path) -> dict:
    facts: dict = {"expert_bytes": {}, "dense_bytes": {}}
    with source.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.startswith("#"):
                break
            fields = dict(re.findall(r"(\w+)=(\S+)", line))
            if "layer" in fields:
                layer = int(fields["layer"])
                facts["expert_bytes"][layer] = int(fields["expert_bytes"])
                facts["dense_bytes"][layer] = int(fields["dense_bytes"])
            facts |= {k: fields[k] for k in ("model", "arch") if k in fields}
            facts |= {k: int(fields[k]) for k in ("n_layer", "n_expert", "n_expert_used") if k in fields}
    missing = [k for k in ("model", "arch", "n_layer", "n_expert", "n_expert_used") if k not in facts]
    if missing:
        raise UserError(f"{source} is no BigMoeOnEdge route trace: its '#' preamble lacks {', '.join(missing)}.")
    return facts


def _read(source: Path, experts: int, top_k: int) -> pl.DataFrame:
    try:
        table = pl.read_csv(source, comment_prefix="#", columns=list(COLUMNS), schema_overrides=COLUMNS)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(
            f"{source} cannot be read as a route trace: {str(error).splitlines()[0].rstrip('.')}."
        ) from None
    if table.is_empty():
        raise UserError(f"{source} holds no routed expert.")
    wrong = table.filter(
        (pl.col("expert") >= experts)
        | (pl.col("phase") > DECODE_PHASE)
        | ~pl.col("weight").is_finite()
        | (pl.col("weight") < 0)
    )
    if wrong.height:
        turn, phase, step, layer, slot, expert, weight = wrong.row(0)
        raise UserError(
            f"{source}: turn {turn}, phase {phase}, step {step}, layer {layer}, slot {slot} has expert {expert} of {experts} "
            f"and weight {weight}."
        )
    return table


def _write_turn(writer: TraceWriter, turn_rows: pl.DataFrame, turn: int, layers: list[int], top_k: int) -> None:
    """One prefill call with all prompt tokens, then one call per decoded token."""
    cells = turn_rows.group_by("phase", "step", "layer").agg(pl.len(), pl.col("slot").n_unique().alias("slots"))
    uneven = cells.filter((pl.col("len") != top_k) | (pl.col("slots") != top_k)).sort("phase", "step", "layer")
    if uneven.height:
        phase, step, layer, count, _ = uneven.row(0)
        raise UserError(
            f"Turn {turn}, phase {phase}, step {step}, layer {layer} has {count} rows instead of one for each of {top_k} slots."
        )
    per_token = turn_rows.select("phase", "step").unique().sort("phase", "step").with_row_index("token")
    calls = turn_rows.join(per_token, on=["phase", "step"], how="left")
    tokens = per_token.height
    where = (
        np.searchsorted(np.array(layers), calls["layer"].to_numpy()),
        calls["token"].to_numpy(),
        calls["slot"].to_numpy(),
    )
    expert_ids = np.zeros((len(layers), tokens, top_k), np.uint16)
    weights = np.zeros((len(layers), tokens, top_k), np.float32)
    # llama.cpp computes the last layer of a prefill for the last token only, so some rows of a call are not routed.
    count = np.zeros((len(layers), tokens), np.uint8)
    expert_ids[where] = calls["expert"].to_numpy()
    weights[where] = calls["weight"].to_numpy()
    count[where[:2]] = top_k
    gate_weights = np.where(count[..., None] > 0, _half_in_order(weights), np.float16(0))
    prompt = int((per_token["phase"] == PREFILL_PHASE).sum())
    bounds = ([(0, prompt)] if prompt else []) + [(t, t + 1) for t in range(prompt, tokens)]
    for start, end in bounds:
        prefill = start < prompt
        part = {
            "request_id": turn,
            "kind": "prefill" if prefill else "decode",
            "block": -1,
            "step": -1,
            "row_start": 0,
            "num_tokens": end - start,
            "kv_tokens": start,
            "num_masked": 0,
            "num_accepted": 0 if prefill else 1,
        }
        own = slice(start, end)
        writer.add_call(
            [part], None, CallRouting(tuple(layers), expert_ids[:, own], gate_weights[:, own], count=count[:, own])
        )
    writer.add_request(
        {
            "request_id": turn,
            "prompt_tokens": prompt,
            "generated_tokens": tokens - prompt,
            "first_block": -1,
            "stop_reason": "length",
        }
    )


def _half_in_order(weights: np.ndarray) -> np.ndarray:
    """Weights as float16 [..., K], those that rounding makes equal told apart by one unit in the last place.

    Weights order a row's lookups, so the slots' falling order must survive; where it did not fall, nothing is changed.
    """
    half = weights.astype(np.float16)
    # Of numbers that are not negative the next larger one has the next larger bits.
    bits = half.view(np.int16)
    for slot in range(weights.shape[-1] - 2, -1, -1):
        falls = weights[..., slot] >= weights[..., slot + 1]
        above = np.where(falls, bits[..., slot + 1] + 1, bits[..., slot])
        bits[..., slot] = np.maximum(bits[..., slot], above)
    return half
