"""The ``loads`` table of traces that hold counts only: tokens of each expert, by step and layer. No calls, no rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tracer.errors import TraceError, UserError
from tracer.files.columns import arrow_schema, fixed
from tracer.files.commit import part_name, temporary_path, write_part
from tracer.files.folder import take_folder
from tracer.files.parts import open_part, part_names
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
    layers = np.array(meta.model.moe_layers)
    steps, found = [], []
    names = part_names(path, "loads")
    if meta.complete and meta.segments not in (None, len(names)):
        raise TraceError(f"{path}: loads has {len(names)} parts where meta.json counts {meta.segments} segments.")
    if meta.complete and meta.segments != 0 and not names:
        raise TraceError(f"{path}: loads has no parts.")
    row, begins = 0, []
    for name in names:
        part = open_part(path, "loads", name, meta)
        begins.append((row, part))
        for group in range(len(part.groups) - 1):
            table, first = part.read(["step", "layer", "counts"], group), int(part.groups[group])
            keys = part.arrays(["step", "layer"], group)
            wanted = layers[(row + np.arange(table.num_rows)) % len(layers)]
            if not np.array_equal(keys["layer"], wanted):
                at = int(np.argmax(keys["layer"] != wanted))
                raise part.fault(first + at, f"layer is {keys['layer'][at]} and must be {wanted[at]}.")
            counts, nulls = fixed(part, "counts", table, first)
            if nulls is not None:
                raise part.fault(first + int(np.argmax(nulls)), "counts is null.")
            steps.append(keys["step"])
            found.append(counts.view(np.uint32))
            row += table.num_rows
    shape = (-1, len(layers))
    if row % len(layers):
        raise TraceError(f"{path}: loads has {row} rows, which is no whole number of steps of {len(layers)} layers.")
    step = np.concatenate(steps).reshape(shape) if steps else np.zeros((0, len(layers)), np.uint32)
    wrong = step != step[:, :1]
    wrong[1:, 0] |= step[1:, 0] <= step[:-1, 0]
    if wrong.any():
        at = int(np.argmax(wrong))
        first, part = next(begin for begin in reversed(begins) if begin[0] <= at)
        raise part.fault(at - first, f"step is {step.flat[at]}: steps must ascend, one for all layers.")
    counted = np.concatenate(found) if found else np.zeros((0, meta.model.num_experts), np.uint32)
    return step[:, 0], counted.reshape(*shape, meta.model.num_experts)


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
        (place.folder / "loads").mkdir()
        schema = arrow_schema("loads", model.num_experts, model.top_k)
        flat = np.ascontiguousarray(counts, np.uint32)
        rows = len(counts) * len(model.moe_layers)
        columns = [
            pa.array(np.repeat(np.arange(len(counts), dtype=np.uint32), len(model.moe_layers))),
            pa.array(np.tile(np.array(model.moe_layers, np.uint16), len(counts))),
            pa.FixedSizeBinaryArray.from_buffers(schema.field("counts").type, rows, [None, pa.py_buffer(flat)]),
        ]
        write_part(place.folder, "loads", part_name(0), iter([pa.Table.from_arrays(columns, schema=schema)]))
        temporary_path(place.folder, "loads", part_name(0)).rename(place.folder / "loads" / part_name(0))
        write_meta(place.folder, {**document, "complete": True, "segments": 1})
        place.finish()
    finally:
        place.release(keep=False)
