"""``meta.json``: read whole, all faults at once; written atomically. Rules: trace-format.md, "meta.json"."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from tracer.document import Document, Model, Router, by_kind
from tracer.errors import TraceError
from tracer.faults import sentences, shown
from tracer.schema import SCHEMA_VERSION, TABLES
from tracer.trace import ModelInfo, RouterSpec, TraceMeta

META_FILE = "meta.json"
TEMPORARY_META = ".meta.json.tmp"


class MetaError(TraceError):
    """``meta.json`` breaks the format; ``faults`` are all of them, a sentence each without the file's name."""

    def __init__(self, faults: list[str], name: str = META_FILE):
        self.faults, self.name = faults, name
        more = f" ({len(faults) - 1} more; moetrace check lists them)" if len(faults) > 1 else ""
        super().__init__(f"{name}: {faults[0]}{more}.")


def parse_meta(document: Any, name: str = META_FILE) -> TraceMeta:
    """Check a ``meta.json`` document.

    Parameters
    ----------
    document : dict
        As ``json.load`` gives it. Unknown keys are ignored and stay in ``raw``.
    name : str
        The file, as messages call it.

    Raises
    ------
    MetaError
        With every fault: what is wrong and what it must be.
    """
    if not isinstance(document, Mapping):
        raise MetaError([f"it must be a JSON object, not {shown(document)}"], name)
    version = document.get("schema_version")
    if type(version) is int and version > SCHEMA_VERSION:
        raise MetaError([f"schema_version is {version} and this package reads {SCHEMA_VERSION}: update moetrace"], name)
    if version == 1:
        raise MetaError(["schema_version is 1, which was never released: record the trace anew"], name)
    if document.get("checksum") is not None and document["checksum"] != checksum(document):
        raise MetaError(
            ["the document was changed after it was written, its checksum says: restore it, or take checksum out"], name
        )
    try:
        read = Document.model_validate(dict(document))
    except ValidationError as error:
        raise MetaError(sentences(error, Document), name) from None
    model = read.model
    layers = tuple(model.moe_layers)
    size = model.expert_bytes
    return TraceMeta(
        schema_version=read.schema_version,
        complete=read.complete,
        capture_level=read.capture_level,
        model=ModelInfo(
            id=model.id or "unknown",
            num_layers=model.num_layers,
            moe_layers=layers,
            num_experts=model.num_experts,
            top_k=model.top_k,
            hidden_size=model.hidden_size,
            moe_intermediate_size=model.moe_intermediate_size,
            num_shared_experts=model.num_shared_experts or 0,
            expert_bytes={layer: size[str(layer)] if isinstance(size, dict) else size for layer in layers},
            dense_bytes=model.dense_bytes,
            dtype=model.dtype,
            revision=model.revision,
            class_name=model.class_,
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
        ),
        routers=_routers(read.router, model, "denoise"),
        kind_routers={
            kind: _routers(read.router, model, kind)
            for kind in sorted({*by_kind(read.router.expert_bias), *by_kind(read.router.expert_scale)} - {""})
        },
        tables=tuple(table for table in TABLES if table in read.tables),
        decoding=dict(document.get("decoding") or {}),
        provenance=dict(read.provenance or {}),
        segments=read.segments,
        raw=dict(document),
    )


def _routers(router: Router, model: Model, kind: str) -> dict[int, RouterSpec]:
    """The routers that calls of a kind go through, by layer."""

    def numbers(values: dict[Any, Any] | None, layer: int) -> np.ndarray | None:
        own = by_kind(values)
        found = own.get(kind, own.get("", {})).get(layer)
        return None if found is None else np.array(found, np.float32)

    return {
        layer: RouterSpec(
            num_experts=model.num_experts,
            top_k=model.top_k,
            score_function=router.score_function,
            norm_topk_prob=router.norm_topk_prob is not False,
            n_group=router.n_group or 1,
            topk_group=router.topk_group or 1,
            routed_scaling_factor=1.0 if router.routed_scaling_factor is None else router.routed_scaling_factor,
            expert_bias=numbers(router.expert_bias, layer),
            bias_in_weights=bool(router.bias_in_weights),
            group_score=router.group_score or "top2_sum",
            expert_scale=numbers(router.expert_scale, layer),
        )
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
    return parse_meta(document, f"{path}: {META_FILE}")


def digest(value: Any) -> str:
    """blake2b (16 bytes, hex) of a value as JSON with sorted keys and no spaces."""
    return hashlib.blake2b(
        json.dumps(value, sort_keys=True, separators=(",", ":")).encode(), digest_size=16
    ).hexdigest()


def checksum(document: Mapping[str, Any]) -> str:
    """The digest of a document without its checksum."""
    return digest({key: value for key, value in document.items() if key != "checksum"})


def under_way(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document of a trace that is being written: what only a complete one says is left out."""
    rest = {key: value for key, value in document.items() if key not in ("segments", "checksum")}
    return {**rest, "complete": False}


def as_document(meta: Mapping[str, Any]) -> dict[str, Any]:
    """``meta`` as JSON would give it back: text keys, lists, plain numbers; a TraceError when it cannot be JSON."""
    try:
        return dict(json.loads(json.dumps(meta, default=_plain, allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise TraceError(f"{META_FILE} cannot hold what was given: {error}.") from None


def write_meta(path: Path, document: Mapping[str, Any]) -> None:
    """Write ``path/meta.json`` with its checksum, atomically: to a temporary name, synced, renamed."""
    temporary = path / TEMPORARY_META
    whole = {**document, "checksum": checksum(document)}
    with open(temporary, "w", encoding="utf-8") as file:
        # a key a line; indented further, thousands of biases would fill as many lines
        lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in whole.items())
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
