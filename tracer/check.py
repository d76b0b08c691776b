"""``check``: hold a trace against every requirement of trace-format.md and collect the first faults.

Readers stop at the first fault they meet; this goes on as far as the faults leave sense in what follows, and also looks at
what readers take on trust: counts that repeat other columns, and the score columns of capture level "active".
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from tracer.errors import TraceError
from tracer.files.forwards import StoredForwards, read_forwards, rule_faults, structure_faults
from tracer.files.layers import read_layer
from tracer.files.parts import PartFile
from tracer.files.routing import KindLayers, key_faults, read_cells
from tracer.files.segments import segment_cells
from tracer.files.tidy import INTERRUPTED, requests_frame
from tracer.files.tokens import read_tokens, token_faults
from tracer.meta import read_meta
from tracer.schema import MASKED
from tracer.trace import LayerTrace, TraceMeta

MOST_FAULTS = 20


def check(path: str | Path, most: int = MOST_FAULTS) -> list[str]:
    """Faults of a trace, one sentence each, in the order they are met; empty when every requirement holds.

    Parameters
    ----------
    path : str or Path
        The trace's folder.
    most : int
        How many faults to collect at most.
    """
    faults: list[str] = []
    for fault in _all_faults(Path(path)):
        faults.append(fault)
        if len(faults) >= most:
            break
    return faults


def _all_faults(path: Path) -> Iterator[str]:
    try:
        meta = read_meta(path)
        stored = read_forwards(path)
    except TraceError as error:
        yield str(error)
        return
    broken = False
    for fault in structure_faults(stored):
        broken = True
        yield fault
    if broken:
        return
    yield from rule_faults(stored)
    yield from _request_faults(stored, meta)
    kinds = KindLayers()
    for number in range(stored.num_parts):
        if "tokens" in meta.tables:
            yield from _token_faults(stored, number)
        yield from _routing_faults(stored, number, meta, kinds)


def _request_faults(stored: StoredForwards, meta: TraceMeta) -> Iterator[str]:
    try:
        requests = requests_frame(stored.path, stored)
    except TraceError as error:
        yield str(error)
        return
    length = meta.block_length
    ended = requests.filter(pl.col("stop_reason") != INTERRUPTED)
    expected = pl.col("prompt_tokens").cast(pl.Int32) // length if length else pl.lit(-1, pl.Int32)
    for request, found, wanted in (
        ended.select("request_id", "first_block", expected.alias("wanted"))
        .filter(pl.col("first_block") != pl.col("wanted"))
        .head(1)
        .iter_rows()
    ):
        yield f"{stored.path}: requests: first_block of request {request} is {found} and must be {wanted}."


def _token_faults(stored: StoredForwards, number: int) -> Iterator[str]:
    first, last = (int(call) for call in stored.part_calls[number : number + 2])
    try:
        part, low, columns = read_tokens(stored, number, first, last)
    except TraceError as error:
        yield str(error)
        return
    broken = False
    for fault in token_faults(stored, first, last, part, low, columns):
        broken = True
        yield fault
    if not broken:
        yield from _value_faults(part, columns)
        yield from _count_faults(stored, first, last, part, columns)


def _value_faults(part: PartFile, columns: dict[str, np.ndarray]) -> Iterator[str]:
    state, accepted = columns["state"], columns["accepted"]
    predicted, confidence = columns["predicted_id"], columns["confidence"]
    rules = (
        (accepted & (state != MASKED), "accepted is set where the token was not masked"),
        (columns["token_id"] < -1, "token_id must be -1 or more"),
        (predicted < -1, "predicted_id must be -1 or more"),
        ((predicted < 0) != np.isnan(confidence), "confidence must be NaN exactly where predicted_id is -1"),
        ((confidence < 0) | (confidence > 1.001), "confidence must lie in 0..1"),
    )
    for wrong, message in rules:
        if wrong.any():
            yield str(part.fault(int(np.argmax(wrong)), f"{message}."))


def _count_faults(
    stored: StoredForwards, first: int, last: int, part: PartFile, columns: dict[str, np.ndarray]
) -> Iterator[str]:
    """num_masked = rows in state masked; num_accepted = accepted rows.

    Of a speculative call, those of the chosen branch count, and the positions it knows that the first branch has masked.
    """
    masked = np.concatenate(([0], np.cumsum(columns["state"] == MASKED)))
    accepted = np.concatenate(([0], np.cumsum(columns["accepted"])))
    rows = np.arange(stored.call_parts[first], stored.call_parts[last])
    table = {name: values[rows].astype(np.int64) for name, values in stored.columns.items()}
    begins = np.cumsum(table["num_tokens"]) - table["num_tokens"]
    ends = begins + table["num_tokens"]
    found = masked[ends] - masked[begins]
    for i in np.flatnonzero(found != table["num_masked"])[:1]:
        yield f"{stored.name(int(rows[i]))}: num_masked is {table['num_masked'][i]} where tokens has {found[i]} masked rows."
    speculative = table["branches"] > 1
    unchosen = speculative & (table["chosen_branch"] < 0)
    for i in np.flatnonzero(unchosen)[:1]:
        yield f"{stored.name(int(rows[i]))}: chosen_branch is null in a call with {table['branches'][i]} branches."
    own = table["num_tokens"] // np.maximum(table["branches"], 1)
    chosen_begin = begins + np.maximum(table["chosen_branch"], 0) * own
    gained = accepted[chosen_begin + own] - accepted[chosen_begin]
    gained += (masked[begins + own] - masked[begins]) - (masked[chosen_begin + own] - masked[chosen_begin])
    for i in np.flatnonzero((gained != table["num_accepted"]) & ~unchosen)[:1]:
        yield f"{stored.name(int(rows[i]))}: num_accepted is {table['num_accepted'][i]} where tokens gains {gained[i]}."


def _routing_faults(stored: StoredForwards, number: int, meta: TraceMeta, kinds: KindLayers) -> Iterator[str]:
    first, last = (int(call) for call in stored.part_calls[number : number + 2])
    try:
        cells, forward, num_tokens = read_cells(stored, number)
    except TraceError as error:
        yield str(error)
        return
    broken = False
    for fault in key_faults(stored, number, meta, kinds, cells, forward, num_tokens):
        broken = True
        yield fault
    if broken or first == last:
        return
    part = cells.part
    if meta.capture_level == "ids" and part.null_count("router_scores") < part.num_rows:
        yield str(part.fault(None, "it holds router_scores although capture_level is ids."))
    segment = segment_cells(stored, meta, kinds, first, last)
    for layer in meta.model.moe_layers:
        try:
            found = read_layer(segment, layer, True, True)
        except TraceError as error:
            yield str(error)
            continue
        missing = first_without_scores(found)
        if missing >= 0:
            call = int(np.searchsorted(segment.row_offsets, missing, "right")) - 1
            cell = int(np.flatnonzero((segment.call == call) & (segment.layer == layer))[0])
            ids = f"ids {found.expert_ids[missing].tolist()} of token row {missing - segment.row_offsets[call]}"
            message = f"score_experts of layer {layer} lacks some of the {ids}."
            yield str(segment.columns["score_experts"].cell_fault(cell, message))


def first_without_scores(layer: LayerTrace) -> int:
    """First routed row that lacks the score of an expert it recorded, -1 if none or if there are no scores."""
    if layer.router_scores is None:
        return -1
    own = np.take_along_axis(layer.router_scores, layer.expert_ids.astype(np.int64), axis=1)
    lacking = np.isnan(own).any(axis=1) & (layer.count > 0)
    return int(np.argmax(lacking)) if lacking.any() else -1
