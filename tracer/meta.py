"""``meta.json``: read, check key by key, write atomically. Rules: trace-format.md, "meta.json"."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tracer.errors import TraceError
from tracer.schema import COMPANIONS, ENCODINGS, GROUP_SCORES, LEVELS, SCHEMA_VERSION, SCORE_FUNCTIONS, TABLES
from tracer.trace import ModelInfo, RouterSpec, TraceMeta

META_FILE = "meta.json"
TEMPORARY_META = ".meta.json.tmp"
SCORE_DTYPES = ("float32", "float16")
CELL_COLUMNS = ("expert_ids", "gate_weights", "router_scores", "score_experts")


class _Section:
    """One JSON object with the name it is spoken of in messages."""

    def __init__(self, values: Any, name: str) -> None:
        self.name = name
        if not isinstance(values, Mapping):
            raise TraceError(f"{name} must be a JSON object, not {_shown(values)}.")
        self.values = values

    def fault(self, key: str, wanted: str) -> TraceError:
        separator = "." if self.name != META_FILE else ": "
        if key not in self.values:
            return TraceError(f"{self.name}{separator}{key} is missing: it must be {wanted}.")
        return TraceError(f"{self.name}{separator}{key} must be {wanted}, not {_shown(self.values[key])}.")

    def section(self, key: str) -> _Section:
        if not isinstance(self.values.get(key), Mapping):
            raise self.fault(key, "a JSON object")
        return _Section(self.values[key], f"{META_FILE}: {key}")

    def integer(self, key: str, low: int, default: int | None = None, high: int | None = None) -> int:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or value < low or (high is not None and value > high):
            bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
            raise self.fault(key, f"a whole number {bounds}")
        return value

    def optional_integer(self, key: str) -> int | None:
        return None if self.values.get(key) is None else self.integer(key, 0)

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.fault(key, "true or false")
        return value

    def choice(self, key: str, allowed: tuple[str, ...], default: str | None = None) -> str:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str) or value not in allowed:
            raise self.fault(key, f"one of {', '.join(allowed)}")
        return value

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise self.fault(key, "a text or null")
        return value

    def layer_numbers(self, key: str, layers: tuple[int, ...], experts: int) -> dict[int, np.ndarray]:
        """``{layer: [E floats]}`` or null."""
        values = self.values.get(key)
        if values is None:
            return {}
        wanted = f"null or an object of MoE layer -> list of {experts} finite numbers"
        if not isinstance(values, Mapping):
            raise self.fault(key, wanted)
        found = {}
        for name, numbers in values.items():
            layer = int(name) if isinstance(name, str) and name.isdecimal() else -1
            try:
                array = np.asarray(numbers, np.float64)
            except (TypeError, ValueError):
                array = np.empty(0)
            if layer not in layers or array.shape != (experts,) or not np.isfinite(array).all():
                raise TraceError(f"{self.name}.{key} must be {wanted}, which layer {_shown(name)} is not.")
            found[layer] = array.astype(np.float32)
        return found


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def parse_meta(document: Any) -> TraceMeta:
    """Check a ``meta.json`` document.

    Parameters
    ----------
    document : dict
        As ``json.load`` gives it. Unknown keys are ignored and stay in ``raw``.

    Raises
    ------
    TraceError
        Naming the first key that is wrong and what it must be.
    """
    top = _Section(document, META_FILE)
    version = top.integer("schema_version", 1)
    if version > SCHEMA_VERSION:
        raise TraceError(
            f"{META_FILE}: schema_version is {version} and this package reads up to {SCHEMA_VERSION}: update moetrace."
        )
    level = top.choice("capture_level", LEVELS)
    model = _parse_model(top.section("model"))
    tables = top.values.get("tables")
    if not isinstance(tables, list) or not set(tables) <= set(TABLES) or not set(TABLES) - {"tokens"} <= set(tables):
        raise top.fault("tables", f"a list of {', '.join(TABLES)} (tokens may be left out)")
    encodings = top.values.get("encodings") or {}
    if not isinstance(encodings, Mapping) or any(
        column in CELL_COLUMNS and encoding not in ENCODINGS for column, encoding in encodings.items()
    ):
        raise top.fault("encodings", f"an object of column -> {' or '.join(ENCODINGS)}")
    for column in set(CELL_COLUMNS) - set(COMPANIONS):
        if encodings.get(column) == "changes":
            raise TraceError(
                f"{META_FILE}: encodings.{column} must be plain or byte_planes, changes is for ids and weights."
            )
    decoding = top.section("decoding") if top.values.get("decoding") is not None else _Section({}, "decoding")
    decoding.optional_integer("block_length")
    provenance = top.section("provenance") if top.values.get("provenance") is not None else _Section({}, "provenance")
    return TraceMeta(
        schema_version=version,
        complete=top.flag("complete"),
        capture_level=level,
        model=model,
        routers=_parse_routers(top.section("router"), model),
        score_dtype=top.choice("score_dtype", SCORE_DTYPES, "float32") if level != "ids" else None,
        tables=tuple(name for name in TABLES if name in tables),
        decoding=dict(decoding.values),
        encodings={str(column): str(encoding) for column, encoding in encodings.items()},
        provenance=dict(provenance.values),
        raw=dict(top.values),
    )


def _parse_model(section: _Section) -> ModelInfo:
    num_layers = section.integer("num_layers", 1, high=65536)
    layers = section.values.get("moe_layers")
    if (
        not isinstance(layers, list)
        or not layers
        or any(type(n) is not int or not 0 <= n < num_layers for n in layers)
        or any(a >= b for a, b in itertools.pairwise(layers))
    ):
        raise section.fault("moe_layers", f"an ascending list of layer indices below num_layers ({num_layers})")
    num_experts = section.integer("num_experts", 1, high=65536)
    return ModelInfo(
        id=section.text("id") or "unknown",
        num_layers=num_layers,
        moe_layers=tuple(layers),
        num_experts=num_experts,
        top_k=section.integer("top_k", 1, high=min(num_experts, 255)),
        hidden_size=section.optional_integer("hidden_size"),
        moe_intermediate_size=section.optional_integer("moe_intermediate_size"),
        num_shared_experts=section.integer("num_shared_experts", 0, 0),
        expert_bytes=_parse_expert_bytes(section, tuple(layers)),
        dense_bytes=section.optional_integer("dense_bytes"),
        dtype=section.text("dtype"),
        revision=section.text("revision"),
        class_name=section.text("class"),
        num_heads=section.optional_integer("num_heads"),
        num_kv_heads=section.optional_integer("num_kv_heads"),
        head_dim=section.optional_integer("head_dim"),
    )


def _parse_expert_bytes(section: _Section, layers: tuple[int, ...]) -> dict[int, int]:
    value = section.values.get("expert_bytes")
    if type(value) is int and value >= 0:
        return dict.fromkeys(layers, value)
    wanted = "the bytes of one expert, or an object of MoE layer -> bytes that holds every MoE layer"
    if not isinstance(value, Mapping):
        raise section.fault("expert_bytes", wanted)
    found = {int(k): v for k, v in value.items() if str(k).isdecimal() and type(v) is int and v >= 0}
    if set(found) != set(layers) or len(found) != len(value):
        raise section.fault("expert_bytes", wanted)
    return {layer: found[layer] for layer in layers}


def _parse_routers(section: _Section, model: ModelInfo) -> dict[int, RouterSpec]:
    experts = model.num_experts
    groups = section.integer("n_group", 1, 1)
    kept = section.integer("topk_group", 1, groups, high=groups)
    if experts % groups:
        raise section.fault("n_group", f"a divisor of num_experts ({experts})")
    if model.top_k > kept * (experts // groups):
        raise section.fault("topk_group", f"large enough to reach top_k ({model.top_k}) experts")
    factor = section.values.get("routed_scaling_factor")
    factor = 1.0 if factor is None else factor
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not math.isfinite(factor) or factor <= 0:
        raise section.fault("routed_scaling_factor", "a number above 0")
    bias = section.layer_numbers("expert_bias", model.moe_layers, experts)
    scale = section.layer_numbers("expert_scale", model.moe_layers, experts)
    shared: dict[str, Any] = {
        "num_experts": experts,
        "top_k": model.top_k,
        "score_function": section.choice("score_function", SCORE_FUNCTIONS),
        "norm_topk_prob": section.flag("norm_topk_prob", True),
        "n_group": groups,
        "topk_group": kept,
        "routed_scaling_factor": float(factor),
        "bias_in_weights": section.flag("bias_in_weights", False),
        "group_score": section.choice("group_score", GROUP_SCORES, "top2_sum"),
    }
    return {
        layer: RouterSpec(**shared, expert_bias=bias.get(layer), expert_scale=scale.get(layer))
        for layer in model.moe_layers
    }


def read_meta(path: Path) -> TraceMeta:
    """Read and check ``path/meta.json``; a TraceError says what is wrong with it."""
    file = path / META_FILE
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TraceError(f"{path} is not a trace: it has no {META_FILE}.") from None
    except OSError as error:
        raise TraceError(f"{file} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise TraceError(f"{file} is not valid JSON: {error}.") from None
    try:
        return parse_meta(document)
    except TraceError as error:
        raise TraceError(f"{path}: {error}") from None


def as_document(meta: Mapping[str, Any]) -> dict[str, Any]:
    """``meta`` as JSON would give it back: text keys, lists, plain numbers; a TraceError when it cannot be JSON."""
    try:
        return dict(json.loads(json.dumps(meta, default=_plain, allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise TraceError(f"{META_FILE} cannot hold what was given: {error}.") from None


def write_meta(path: Path, document: Mapping[str, Any]) -> None:
    """Write ``path/meta.json`` atomically: to a temporary name, synced, renamed."""
    temporary = path / TEMPORARY_META
    with open(temporary, "w", encoding="utf-8") as file:
        # a key a line; indented further, thousands of biases would fill as many lines
        lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in document.items())
        file.write(f"{{\n{lines}\n}}\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path / META_FILE)
    sync_folder(path)


def sync_folder(path: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is no JSON value")
