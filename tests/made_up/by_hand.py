"""A trace written by hand with pyarrow, from the words of trace-format.md alone: nothing of tracer's writer is used.

Two requests, E = 9, K = 2, MoE layers 1 and 3, blocks of 4, prompts of 5 tokens, KV cache. Two parts a table, one a request.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

EXPERTS, TOP_K, LAYERS, BLOCK, PROMPT = 9, 2, (1, 3), 4, 5
# tokens of each expert by step and layer, of the trace that holds nothing else
COUNTS = np.arange(4 * len(LAYERS) * EXPERTS, dtype="<u4").reshape(4, len(LAYERS), EXPERTS)

TYPES = {
    "requests": {
        "request_id": pa.uint32(),
        "dataset": pa.string(),
        "prompt_tokens": pa.uint32(),
        "generated_tokens": pa.uint32(),
        "first_block": pa.int32(),
        "stop_reason": pa.string(),
    },
    "forwards": {
        "forward_id": pa.uint32(),
        "request_id": pa.uint32(),
        "kind": pa.string(),
        "block": pa.int32(),
        "step": pa.int32(),
        "row_start": pa.uint32(),
        "num_tokens": pa.uint32(),
        "kv_tokens": pa.uint32(),
        "num_masked": pa.uint32(),
        "num_accepted": pa.uint32(),
        "num_edited": pa.uint32(),
        "branches": pa.uint8(),
        "chosen_branch": pa.uint8(),
        "duration_ns": pa.int64(),
    },
    "tokens": {
        "forward_id": pa.uint32(),
        "row": pa.uint32(),
        "position": pa.int32(),
        "token_id": pa.int32(),
        "state": pa.uint8(),
        "predicted_id": pa.int32(),
        "confidence": pa.float32(),
        "argmax_id": pa.int32(),
        "argmax_confidence": pa.float32(),
        "accepted": pa.bool_(),
        "edited": pa.bool_(),
    },
    "routing": {
        "forward_id": pa.uint32(),
        "layer": pa.uint16(),
        "row": pa.uint32(),
        "expert_ids": pa.binary(TOP_K),
        "gate_weights": pa.binary(2 * TOP_K),
        "router_scores": pa.binary(4 * EXPERTS),
    },
}
# what a test may add
MORE = {
    "routing": {"count": pa.uint8()},
    "scores": {
        "forward_id": pa.uint32(),
        "layer": pa.uint16(),
        "experts": pa.binary(),
        "values": pa.binary(),
    },
}
BINARY = ("expert_ids", "gate_weights", "router_scores", "experts", "values")

META = {
    "schema_version": 2,
    "created": "2026-01-01T00:00:00+00:00",
    "complete": True,
    "capture_level": "scores",
    "model": {
        "id": "hand",
        "num_layers": 4,
        "moe_layers": [1, 3],
        "num_experts": 9,
        "top_k": 2,
        "hidden_size": 8,
        "moe_intermediate_size": 4,
        "num_shared_experts": 0,
        "expert_bytes": {"1": 384, "3": 400},
        "dense_bytes": 1000,
        "dtype": "float32",
    },
    "router": {
        "score_function": "softmax",
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "expert_bias": {"3": [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]},
        "bias_in_weights": False,
        "group_score": "max",
        "expert_scale": None,
    },
    "tables": ["requests", "forwards", "tokens", "routing"],
    "decoding": {"loop": "sdar", "block_length": 4, "kv_cache": True, "mask_id": 1},
    "provenance": {"package": "0"},
    "a key of the future": [1, 2],
}


class Handmade:
    """The trace as plain lists, to be changed at will before it is written.

    ``segments[n][table][column]`` is a list, one entry a row; ``routing`` goes by (forward_id, layer, row) and holds arrays,
    which ``write`` turns into bytes. ``names[table]`` names a table's parts, by number; ``cuts[table]`` are rows at which a
    new part begins, in place of one part a segment. With ``nullable`` False every column without nulls says so.
    """

    def __init__(self, seed=0, experts=EXPERTS):
        rng = np.random.default_rng(seed)
        self.meta = json.loads(json.dumps(META))
        self.types = {table: {**TYPES.get(table, {}), **MORE.get(table, {})} for table in (*TYPES, *MORE)}
        self.segments = []
        self.write_options = {}
        self.names = {table: "part-{:05d}.parquet" for table in self.types}
        self.cuts = {}
        self.nullable = True
        dtype = "u1" if experts <= 256 else "<u2"
        if experts != EXPERTS:
            self.meta["model"]["num_experts"], self.meta["router"]["expert_bias"] = experts, None
            width = TOP_K * np.dtype(dtype).itemsize
            self.types["routing"].update(expert_ids=pa.binary(width), router_scores=pa.binary(4 * experts))
        forward = 0
        for request in (0, 1):
            tables = {table: {column: [] for column in columns} for table, columns in TYPES.items()}
            calls = [
                ("prefill", -1, -1, range(0, 4), [], []),
                ("denoise", 1, 0, range(4, 8), [5, 6, 7], [6]),
                ("denoise", 1, 1, range(4, 8), [5, 7], [5, 7]),
                ("commit", 1, -1, range(4, 8), [], []),
            ]
            for kind, block, step, positions, masked, accepted in calls:
                part = [
                    forward, request, kind, block, step, 0, 4, positions[0],
                    len(masked), len(accepted), 0, 1, None, None,
                ]  # fmt: skip
                append(tables["forwards"], part)
                for row, position in enumerate(positions):
                    state = 2 if position in masked else 0 if position < PROMPT else 1
                    predicted = 10 + position if block >= 0 else -1
                    confidence = 0.5 if block >= 0 else float("nan")
                    token = [
                        forward, row, position, 1 if state == 2 else 10 + position, state, predicted, confidence,
                        None, None, position in accepted, False,
                    ]  # fmt: skip
                    append(tables["tokens"], token)
                for layer in LAYERS:
                    for row in range(4):
                        scores = rng.random(experts).astype("<f4")
                        ids = rng.permutation(experts)[:TOP_K].astype(dtype)
                        weights = rng.random(TOP_K).astype("<f2")
                        append(tables["routing"], [forward, layer, row, ids, weights, scores])
                forward += 1
            append(tables["requests"], [request, "hand", PROMPT, 3, 1, "eos"])
            self.segments.append(tables)

    def arrow(self, table, columns):
        """One part as an Arrow table."""
        arrays, fields = [], []
        for column, values in columns.items():
            kind = self.types[table][column]
            if column in BINARY:
                values = [v if v is None or isinstance(v, bytes) else np.ascontiguousarray(v).tobytes() for v in values]
            if pa.types.is_dictionary(kind):
                arrays.append(pa.array(values, kind.value_type).dictionary_encode().cast(kind))
            else:
                arrays.append(pa.array(values, kind))
            fields.append(pa.field(column, kind, nullable=self.nullable or None in values))
        return pa.Table.from_arrays(arrays, schema=pa.schema(fields))

    def parts(self, table):
        """Columns of a table's parts."""
        segments = [tables[table] for tables in self.segments if table in tables]
        if table not in self.cuts or not segments:
            return segments
        whole = {column: self.column(table, column) for column in segments[0]}
        bounds = [0, *self.cuts[table], None]
        return [
            {column: values[low:high] for column, values in whole.items()} for low, high in itertools.pairwise(bounds)
        ]

    def write(self, path):
        """Write everything under ``path``; returns it."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        (path / "meta.json").write_text(json.dumps(self.meta))
        for table in self.types:
            for number, columns in enumerate(self.parts(table)):
                (path / table).mkdir(exist_ok=True)
                part = path / table / self.names[table].format(number)
                pq.write_table(self.arrow(table, columns), part, **self.write_options)
        return path

    def column(self, table, name):
        """A column over all segments."""
        return [value for tables in self.segments for value in tables[table][name]]

    def rows(self, layer, column):
        """A column of the routing rows of a layer, by (forward_id, row), over all segments."""
        keys = ("forward_id", "row", "layer", column)
        rows = zip(*(self.column("routing", key) for key in keys), strict=True)
        return [value for _, _, own, value in sorted(rows, key=lambda row: row[:2]) if own == layer]

    def add(self, table, column, value):
        """A column of one value throughout."""
        for tables in self.segments:
            tables[table][column] = [value] * len(next(iter(tables[table].values())))

    def layer_first(self):
        """Sort each segment's routing by (layer, forward_id, row)."""
        for tables in self.segments:
            routing = tables["routing"]
            keys = list(zip(routing["layer"], routing["forward_id"], routing["row"], strict=True))
            order = sorted(range(len(keys)), key=keys.__getitem__)
            for column, values in routing.items():
                routing[column] = [values[i] for i in order]

    def make_active(self):
        """Turn to level "active": each call keeps the scores of the ids it recorded and of expert 8."""
        self.meta["capture_level"] = "active"
        self.meta["tables"].append("scores")
        for tables in self.segments:
            routing = tables["routing"]
            cells = {}
            for forward, layer, ids, scores in zip(
                *(routing[name] for name in ("forward_id", "layer", "expert_ids", "router_scores")), strict=True
            ):
                own = cells.setdefault((forward, layer), ([8], []))
                own[0].extend(ids)
                own[1].append(scores)
            tables["scores"] = {column: [] for column in MORE["scores"]}
            for (forward, layer), (ids, scores) in cells.items():
                kept = np.unique(np.array(ids, routing["expert_ids"][0].dtype))
                append(tables["scores"], [forward, layer, kept, np.stack(scores)[:, kept]])
            del routing["router_scores"]


def append(columns, row):
    """Add a row, a value a column, to a table's lists."""
    for column, value in zip(columns, row, strict=True):
        columns[column].append(value)


def write_counts(path, steps=(3, 4, 9, 10), layers=LAYERS, counts=None, sizes=(4,), meta=None, **options):
    """A trace that holds counts only: :data:`COUNTS`, a row a step and layer, ``sizes`` steps a part; returns ``path``."""
    (path / "loads").mkdir(parents=True)
    document = {**META, "capture_level": "ids", "tables": ["loads"], **(meta or {})}
    (path / "meta.json").write_text(json.dumps(document))
    counts = counts or [own.tobytes() for own in COUNTS.reshape(-1, EXPERTS)]
    kind = pa.binary(4 * EXPERTS) if {len(own or b"") for own in counts} == {4 * EXPERTS} else pa.binary()
    columns = {
        "step": pa.array(np.repeat(steps, len(layers)), pa.uint32()),
        "layer": pa.array(np.tile(layers, len(steps)), pa.uint16()),
        "counts": pa.array(counts, kind),
    }
    whole, first = pa.table(columns), 0
    for number, size in enumerate(sizes):
        part = whole.slice(first * len(layers), size * len(layers))
        pq.write_table(part, path / "loads" / f"{number}.parquet", **options)
        first += size
    return path
