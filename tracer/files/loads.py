"""The ``loads`` table of traces that hold counts only: tokens of each expert, by step and layer. No calls, no rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tracer.errors import TraceError, UserError
from tracer.files.columns import arrow_schema, fixed_array
from tracer.files.commit import part_name, put_part, write_part
from tracer.files.folder import take_folder
from tracer.files.parts import PartFile, check_part_count, part_names
from tracer.meta import as_document, parse_meta, write_meta
from tracer.schema import SCHEMA_VERSION
from tracer.trace import TraceMeta


def read_loads(path: Path, meta: TraceMeta) -> tuple[np.ndarray, np.ndarray]:
    """Steps uint32 [S], ascending, and counts uint32 [S, L, E], layers as in ``meta``.

    Raises
    ------
    TraceError
        Naming part and row: rows that do not go by (step, layer) with every layer in every step, foreign layers, no table.
    """
    if "loads" not in meta.tables:
        raise TraceError(f"{path} has no loads table: it holds calls, whose loads follow from them.")
    check_part_count(path, meta)
    layers, experts = np.array(meta.model.moe_layers), meta.model.num_experts
    parts = [PartFile(path, "loads", name, meta) for name in part_names(path, "loads")]
    steps, counts = [np.empty(0, np.uint32)], [np.empty((0, experts), np.uint32)]
    last, rows = np.array([-1]), 0
    for part in parts:
        columns = part.arrays(["step", "layer", "counts"])
        # a row's place among the layers of its step
        place = (rows + np.arange(part.num_rows)) % len(layers)
        step: np.ndarray = columns["step"].astype(np.int64)
        values, nulls = columns["counts"]
        before = np.concatenate((last, step))[:-1]
        for wrong, words in (
            (columns["layer"] != layers[place], "layer is {layer} and must be {wanted}."),
            (nulls if nulls is not None else place < 0, "counts is null."),
            (
                np.where(place == 0, step <= before, step != before),
                "step is {step}: steps must ascend, one for all layers.",
            ),
        ):
            if wrong.any():
                at = int(np.argmax(wrong))
                words = words.format(layer=columns["layer"][at], wanted=layers[place[at]], step=step[at])
                raise part.fault(at, words)
        steps.append(columns["step"][place == 0])
        counts.append(values.view(np.uint32))
        rows, last = rows + part.num_rows, np.concatenate((last, step))[-1:]
    if rows % len(layers):
        raise TraceError(f"{path}: loads has {rows} rows, which is no whole number of steps of {len(layers)} layers.")
    return np.concatenate(steps), np.concatenate(counts).reshape(-1, len(layers), experts)


def write_loads(path: str | Path, meta: Mapping[str, Any], counts: np.ndarray, *, force: bool = False) -> None:
    """Write a trace that holds counts only, whole or not at all.

    Parameters
    ----------
    path : str or Path
    meta : dict
        ``meta.json`` without schema_version, created, complete and tables.
    counts : int [S, L, E]
        Tokens of each expert in every step and MoE layer.
    force : bool
        Replace a trace that is there.

    Raises
    ------
    UserError
        When counts are of another shape or no counts, or the path is taken.
    """
    document = as_document(
        {"capture_level": "ids", **meta, "tables": ["loads"], "schema_version": SCHEMA_VERSION, "complete": False}
    )
    model = parse_meta(document).model
    shape = (len(counts), len(model.moe_layers), model.num_experts)
    if counts.shape != shape or counts.dtype.kind not in "iu" or (counts.size and counts.min() < 0):
        raise UserError(
            f"counts must be whole numbers of at least 0 of shape {shape}, not {counts.dtype} {counts.shape}."
        )
    place = take_folder(Path(path), document, force, False, True)
    try:
        schema = arrow_schema("loads", model.num_experts, model.top_k)
        flat = np.ascontiguousarray(counts, np.uint32)
        columns = [
            pa.array(np.repeat(np.arange(shape[0], dtype=np.uint32), shape[1])),
            pa.array(np.tile(np.array(model.moe_layers, np.uint16), shape[0])),
            fixed_array(flat.reshape(-1, shape[2]), schema.field("counts").type),
        ]
        (place.folder / "loads").mkdir()
        write_part(place.folder, "loads", part_name(0), iter([pa.Table.from_arrays(columns, schema=schema)]))
        put_part(place.folder, "loads", part_name(0))
        write_meta(place.folder, {**document, "complete": True, "segments": 1})
        place.finish()
    finally:
        place.release(keep=False)
