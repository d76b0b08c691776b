"""The trace format, version 1: tables, columns, types, units and codes. The one home of the format.

A trace is a folder of ``meta.json`` and four Parquet tables, each a folder of parts. Readers and the writer take their
column types from here, and the README's schema table is printed from :data:`TABLES`. Nothing here imports pyarrow until
:func:`arrow_schema` is called.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 1

KINDS = ("prefill", "denoise", "commit", "decode")
PREFILL, DENOISE, COMMIT, DECODE = range(4)

STATES = ("prompt", "decoded", "masked", "padding")
PROMPT, DECODED, MASKED, PADDING = range(4)

LEVELS = ("ids", "active", "scores")
STOP_REASONS = ("eos", "length", "error")
SCORE_FUNCTIONS = ("softmax", "sigmoid")
GROUP_SCORES = ("top2_sum", "max")
# Encodings of the binary columns of ``routing``, by column in meta.json's "encodings"; a column not named there is plain.
# "byte_planes": all first bytes of a cell's numbers, then all second bytes, and so on.
# "changes", for expert_ids and gate_weights alone: what differs from a linked row. A row is linked with the row of the same
# request, branch (the first one where the earlier call had fewer) and kv_tokens + index in the branch, in the last call of the
# request before, if that call is in the same row group of the part and has the layer; row groups hold whole forwards. Rows
# that were not routed repeat the linked row, or are 0.
# expert_ids "changes": the ids, row by row, of the slots whose bit is set in ``changed``; all others are the linked row's. Of a
# row without a link either no bit is set and all its ids are 0, or all are and each id but the first is stored as the
# difference, modulo its type, to the one before.
# gate_weights "changes": with d the difference, modulo 2^16, of a weight's bits to those of the same slot of the linked row (to
# 0 without one), 2d or, where d as an int16 is negative, -2d - 1; its low byte here, its high byte in ``gate_weights_high``.
ENCODINGS = ("plain", "byte_planes", "changes")
# What a writer does unless told otherwise: cells that any Parquet reader can take apart. The compact ones are a sixth to a
# quarter smaller.
DEFAULT_ENCODINGS = {"gate_weights": "byte_planes"}
COMPACT_ENCODINGS = {"expert_ids": "changes", "gate_weights": "changes"}
# columns that encoding "changes" adds
COMPANIONS = {"expert_ids": "changed", "gate_weights": "gate_weights_high"}


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table.

    ``type`` is an Arrow type name. ``optional``: the column may be missing from a part. ``nullable``: its values may be null.
    """

    name: str
    type: str
    meaning: str
    optional: bool = False
    nullable: bool = False


TABLES: dict[str, tuple[Column, ...]] = {
    "requests": (
        Column("request_id", "uint32", "number of the prompt"),
        Column("dataset", "string", "where the prompt comes from", optional=True, nullable=True),
        Column("prompt", "string", "its text, kept only when asked for", optional=True, nullable=True),
        Column("prompt_tokens", "uint32", "tokens of the prompt"),
        Column("generated_tokens", "uint32", "tokens generated after it"),
        Column("first_block", "int32", "prompt_tokens // block_length, -1 without blocks"),
        Column("stop_reason", "string", "eos, length or error; interrupted where the request never ended"),
    ),
    "forwards": (
        Column("forward_id", "uint32", "model call, increasing in execution order"),
        Column("request_id", "uint32", "request whose rows these are"),
        Column("kind", "string", "prefill, denoise, commit or decode"),
        Column("block", "int32", "block being worked on, absolute: position // block_length; -1 none"),
        Column("step", "int32", "index of the denoise forward inside its block, from 0; -1 else"),
        Column("row_start", "uint32", "first row of this request in the call"),
        Column("num_tokens", "uint32", "rows of this request in the call"),
        Column("kv_tokens", "uint32", "tokens served from the prefix cache"),
        Column("num_masked", "uint32", "rows whose token is masked"),
        Column("num_accepted", "uint32", "tokens accepted by this call"),
        Column("branches", "uint8", "copies of the block in the call, 1 unless speculative"),
        Column("chosen_branch", "uint8", "the copy that was kept", optional=True, nullable=True),
        Column("duration_ns", "int64", "wall time of the call, nanoseconds", optional=True, nullable=True),
    ),
    "tokens": (
        Column("forward_id", "uint32", "model call"),
        Column("row", "uint32", "row of the call"),
        Column("position", "int32", "absolute position in the sequence, -1 padding"),
        Column("token_id", "int32", "input token, -1 unknown"),
        Column("state", "uint8", "0 prompt, 1 decoded, 2 masked, 3 padding, as the call saw it"),
        Column("predicted_id", "int32", "token the loop would write here, -1 outside the current block"),
        Column("confidence", "float32", "probability of predicted_id, NaN outside the current block"),
        Column(
            "argmax_id", "int32", "most probable token, null where it is predicted_id", optional=True, nullable=True
        ),
        Column("argmax_confidence", "float32", "its probability, null where the same", optional=True, nullable=True),
        Column("accepted", "bool", "masked before and kept after this call"),
    ),
    "routing": (
        Column("forward_id", "uint32", "model call"),
        Column("layer", "uint16", "index of the MoE layer in the model, dense layers counted"),
        Column("num_tokens", "uint32", "all rows of the call"),
        Column(
            "changed",
            "binary",
            'bitmap [num_tokens, K], little bit order: ids that expert_ids holds under encoding "changes"',
            optional=True,
        ),
        Column("expert_ids", "binary", "uint8 (E <= 256) or uint16 [num_tokens, K]"),
        Column(
            "gate_weights", "binary", "float16 [num_tokens, K], what expert outputs are multiplied by", nullable=True
        ),
        Column(
            "gate_weights_high",
            "binary",
            'high bytes of gate_weights under encoding "changes"',
            optional=True,
            nullable=True,
        ),
        Column(
            "router_scores",
            "binary",
            "float32 or float16 [num_tokens, C], after the score function, before bias",
            optional=True,
            nullable=True,
        ),
        Column(
            "score_experts",
            "binary",
            "ids of the C score columns, ascending; null = all E",
            optional=True,
            nullable=True,
        ),
        Column(
            "routed",
            "binary",
            "bitmap [num_tokens], little bit order; null = every row routed",
            optional=True,
            nullable=True,
        ),
    ),
}


def arrow_schema(table: str) -> pa.Schema:
    """Arrow schema of a table as the writer writes it.

    Parameters
    ----------
    table : str
        One of :data:`TABLES`.
    """
    import pyarrow as pa

    types = {
        "uint8": pa.uint8(),
        "uint16": pa.uint16(),
        "uint32": pa.uint32(),
        "int32": pa.int32(),
        "int64": pa.int64(),
        "float32": pa.float32(),
        "bool": pa.bool_(),
        "string": pa.string(),
        "binary": pa.binary(),
    }
    return pa.schema([pa.field(c.name, types[c.type], nullable=c.nullable) for c in TABLES[table]])


def schema_markdown() -> str:
    """The format's tables as Markdown, one table each; the README's schema section is this text.

    A type ending in ``?`` may be null; a column in *italics* may be missing.
    """
    rows_are = {
        "requests": "prompt",
        "forwards": "(model call, request in it)",
        "tokens": "(model call, row)",
        "routing": "(model call, MoE layer)",
    }
    lines: list[str] = []
    for table, columns in TABLES.items():
        lines += [f"**`{table}`**: one row per {rows_are[table]}", "", "| column | type | meaning |", "|---|---|---|"]
        for column in columns:
            name = f"*`{column.name}`*" if column.optional else f"`{column.name}`"
            meaning = column.meaning.replace("|", "\\|")
            lines.append(f"| {name} | {column.type}{'?' if column.nullable else ''} | {meaning} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"
