"""The trace format, version 2: tables, columns, types, units and codes. The one home of the format.

A trace is a folder of ``meta.json`` and Parquet tables, each a folder of parts. Readers and the writer take their column types
from here, and the README's schema table is printed from :data:`TABLES`.

Why rows: Parquet's own fixed-width binary columns store and read one row per token as well as hand-made cells, and every
Parquet reader can take them apart. No column has an encoding of our own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SCHEMA_VERSION = 2

KINDS = ("prefill", "denoise", "commit", "decode")
PREFILL, DENOISE, COMMIT, DECODE = range(4)

STATES = ("prompt", "decoded", "masked", "padding", "noise")
PROMPT, DECODED, MASKED, PADDING, NOISE = range(5)

LEVELS = ("ids", "active", "scores")
STOP_REASONS = ("eos", "length", "error", "interrupted")
SCORE_FUNCTIONS = ("softmax", "sigmoid")
GROUP_SCORES = ("top2_sum", "max")


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table.

    ``type`` is an Arrow type name; "ids", "weights", "scores" and "counts" are fixed-width binaries whose width follows from
    the model (:func:`widths`). ``optional``: the column may be missing from a part, and its values may be null.
    """

    name: str
    type: str
    meaning: str
    optional: bool = False


TABLES: dict[str, tuple[Column, ...]] = {
    "requests": (
        Column("request_id", "uint32", "number of the prompt"),
        Column("dataset", "string", "where the prompt comes from", True),
        Column("prompt", "string", "its text, kept only when asked for", True),
        Column("prompt_tokens", "uint32", "tokens of the prompt; null = unknown", True),
        Column("generated_tokens", "uint32", "tokens up to and with the end token, no padding; null = unknown", True),
        Column("first_block", "int32", "prompt_tokens // block_length, -1 without blocks"),
        Column("stop_reason", "string", "eos, length, error or interrupted; a request that never ended has no row"),
    ),
    "forwards": (
        Column("forward_id", "uint32", "model call, increasing in execution order"),
        Column("request_id", "uint32", "request whose rows these are"),
        Column("kind", "string", "prefill, denoise, commit or decode"),
        Column("block", "int32", "block being worked on, absolute: position // block_length; -1 none"),
        Column("step", "int32", "index of the denoise forward inside its block, from 0; -1 else"),
        Column("row_start", "uint32", "first row of this request in the call"),
        Column("num_tokens", "uint32", "rows of this request in the call"),
        Column("kv_tokens", "uint32", "tokens served from the prefix cache; null = unknown", True),
        Column("num_masked", "uint32", "rows whose token is undecided, masked or noise; null = unknown", True),
        Column("num_accepted", "uint32", "tokens this call gained; null = unknown", True),
        Column("num_edited", "uint32", "decided tokens that this call changed or took back"),
        Column("branches", "uint8", "copies of the block in the call, 1 unless speculative"),
        Column("chosen_branch", "uint8", "the copy that was kept", True),
        Column("duration_ns", "int64", "wall time of the call, nanoseconds", True),
    ),
    "tokens": (
        Column("forward_id", "uint32", "model call"),
        Column("row", "uint32", "row of the call"),
        Column("position", "int32", "absolute position in the sequence, -1 padding"),
        Column("token_id", "int32", "input token, -1 unknown"),
        Column(
            "state", "uint8", "0 prompt, 1 decoded, 2 masked, 3 padding, 4 noise (undecided, a random token), as seen"
        ),
        Column("predicted_id", "int32", "token the loop would write here, -1 outside the current block"),
        Column("confidence", "float32", "probability of predicted_id, NaN outside the current block"),
        Column("argmax_id", "int32", "most probable token, null where it is predicted_id", True),
        Column("argmax_confidence", "float32", "its probability, null where the same", True),
        Column("accepted", "bool", "undecided before and kept after this call"),
        Column("edited", "bool", "decided before, another token or undecided again after this call"),
    ),
    "routing": (
        Column("forward_id", "uint32", "model call"),
        Column("layer", "uint16", "index of the MoE layer in the model, dense layers counted"),
        Column("row", "uint32", "row of the call"),
        Column("expert_ids", "ids", "uint8 (E <= 256) or uint16 [K], distinct, in any order, real ones first"),
        Column(
            "gate_weights", "weights", "float16 [K], what expert outputs are multiplied by, in the same order", True
        ),
        Column(
            "router_scores", "scores", "float32 [E], after the score function, before bias; NaN = not recorded", True
        ),
        Column("count", "uint8", "how many of the K are real, 0 = row not routed; without the column all K", True),
    ),
    "scores": (
        Column("forward_id", "uint32", "model call"),
        Column("layer", "uint16", "index of the MoE layer in the model"),
        Column("experts", "binary", "ids of the C experts whose scores were kept, ascending, typed as expert_ids"),
        Column("values", "binary", "float32 [rows of the call, C]"),
    ),
    "loads": (
        Column("step", "uint32", "step of the engine that counted"),
        Column("layer", "uint16", "index of the MoE layer in the model"),
        Column("counts", "counts", "uint32 [E], tokens of each expert"),
    ),
}
ROWS_ARE = {
    "requests": "prompt",
    "forwards": "(model call, request in it)",
    "tokens": "(model call, row)",
    "routing": "(model call, MoE layer, row)",
    "scores": "(model call, MoE layer), capture level active only",
    "loads": "(step, MoE layer), dumps that hold counts only; no other table then",
}


def tables_of(level: str, tokens: bool = True) -> list[str]:
    """Tables of a trace of a capture level, with or without ``tokens``."""
    return [
        "requests",
        "forwards",
        *(["tokens"] if tokens else []),
        "routing",
        *(["scores"] if level == "active" else []),
    ]


def undecided(state: np.ndarray) -> np.ndarray:
    """bool, like ``state``: rows whose token is not decided yet, masked or noise."""
    return (state == MASKED) | (state == NOISE)


def id_type(num_experts: int) -> type[np.unsignedinteger]:
    """dtype of stored expert ids: uint8 up to 256 experts, else uint16."""
    return np.uint8 if num_experts <= 256 else np.uint16


def widths(num_experts: int, top_k: int) -> dict[str, int]:
    """Bytes of the fixed-width binary types of a model with E experts, K a row."""
    ids = top_k * np.dtype(id_type(num_experts)).itemsize
    return {"ids": ids, "weights": 2 * top_k, "scores": 4 * num_experts, "counts": 4 * num_experts}


def schema_markdown() -> str:
    """The format's tables as Markdown, one table each; the README's schema section is this text.

    A type ending in ``?`` may be null, and the column may be missing.
    """
    binaries = {"ids": "binary[K or 2K]", "weights": "binary[2K]", "scores": "binary[4E]", "counts": "binary[4E]"}
    lines: list[str] = []
    for table, columns in TABLES.items():
        lines += [f"**`{table}`**: one row per {ROWS_ARE[table]}", "", "| column | type | meaning |", "|---|---|---|"]
        for column in columns:
            kind = binaries.get(column.type, column.type)
            meaning = column.meaning.replace("|", "\\|")
            lines.append(f"| `{column.name}` | {kind}{'?' if column.optional else ''} | {meaning} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"
