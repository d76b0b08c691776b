"""``meta.json`` and its sections, as pydantic models. Rules: trace-format.md, "meta.json".

A field's description is what a message says it must be (:func:`tracer.faults.sentences`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from tracer.faults import said, wrong
from tracer.schema import GROUP_SCORES, KINDS, LEVELS, SCORE_FUNCTIONS

Count = Annotated[int, Field(ge=0, description="a whole number of at least 0")]
Positive = Annotated[int, Field(ge=1, description="a whole number of at least 1")]
Indices = Annotated[int, Field(ge=1, le=65536, description="a whole number from 1 to 65536")]
Flag = Annotated[bool, Field(description="true or false")]
Text = Annotated[str, Field(description="a text or null")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
LayerNumbers = Annotated[
    dict[int, list[Finite]] | dict[str, dict[int, list[Finite]]],
    Field(
        description="null or an object of MoE layer -> list of num_experts finite numbers, or one of these a kind of call"
    ),
]


def _choice(*allowed: str) -> Any:
    return Field(description=f"one of {', '.join(allowed)}")


class Section(BaseModel):
    """Unknown keys are kept and ignored; texts are no numbers and numbers no flags."""

    model_config = ConfigDict(extra="allow", strict=True)


class Model(Section):
    """Geometry of the traced model; byte counts are of weights as loaded. None = unknown."""

    id: Text | None = None
    revision: Text | None = None
    class_: Text | None = Field(None, alias="class")
    num_layers: Indices
    moe_layers: list[int] = Field(description="an ascending list of layer indices below num_layers")
    num_experts: Indices
    top_k: Annotated[int, Field(ge=1, le=255, description="a whole number from 1 to num_experts, at most 255")]
    hidden_size: Count | None = None
    moe_intermediate_size: Count | None = None
    num_shared_experts: Count | None = 0
    expert_bytes: Count | dict[str, Count] = Field(
        description="the bytes of one expert, or an object of MoE layer -> bytes that holds every MoE layer"
    )
    dense_bytes: Count | None = None
    dtype: Text | None = None
    num_heads: Count | None = None
    num_kv_heads: Count | None = None
    head_dim: Count | None = None

    @field_validator("moe_layers")
    @classmethod
    def _ascending(cls, layers: list[int], known: ValidationInfo) -> list[int]:
        most = known.data.get("num_layers", 65536)
        if not layers or layers[0] < 0 or layers[-1] >= most or any(a >= b for a, b in itertools.pairwise(layers)):
            raise wrong()
        return layers

    @field_validator("top_k")
    @classmethod
    def _at_most_all(cls, top_k: int, known: ValidationInfo) -> int:
        if top_k > known.data.get("num_experts", top_k):
            raise wrong()
        return top_k

    @field_validator("expert_bytes")
    @classmethod
    def _every_layer(cls, value: int | dict[str, int], known: ValidationInfo) -> int | dict[str, int]:
        layers = known.data.get("moe_layers")
        if isinstance(value, dict) and layers is not None and set(value) != set(map(str, layers)):
            raise wrong()
        return value


class Router(Section):
    """How scores become experts and weights (:class:`tracer.trace.RouterSpec`)."""

    score_function: Literal["softmax", "sigmoid"] = _choice(*SCORE_FUNCTIONS)
    norm_topk_prob: Flag | None = True
    n_group: Positive | None = 1
    topk_group: Positive | None = 1
    routed_scaling_factor: Annotated[float | None, Field(gt=0, allow_inf_nan=False, description="a number above 0")] = (
        1.0
    )
    expert_bias: LayerNumbers | None = None
    bias_in_weights: Flag | None = False
    group_score: Literal["top2_sum", "max"] | None = Field("top2_sum", description=f"one of {', '.join(GROUP_SCORES)}")
    expert_scale: LayerNumbers | None = None
    verified: Flag | None = None

    @field_validator("expert_bias", "expert_scale", mode="before")
    @classmethod
    def _layer_keys(cls, value: Any) -> Any:
        """JSON's keys are texts."""
        if isinstance(value, Mapping) and value and set(value) <= set(KINDS):
            return {kind: cls._layer_keys(own) for kind, own in value.items()}
        if isinstance(value, Mapping):
            return {int(k) if isinstance(k, str) and k.isdecimal() else -1: v for k, v in value.items()}
        return value


class Decoding(Section):
    """What the loop really used; its other keys are kept as they are."""

    block_length: Count | None = None


def by_kind(numbers: dict[Any, Any] | None) -> dict[str, dict[int, list[float]]]:
    """``expert_bias`` or ``expert_scale`` by kind of call; "" where all kinds share them."""
    if numbers and set(numbers) <= set(KINDS):
        return numbers
    return {"": numbers or {}}


class Document(Section):
    """The whole of ``meta.json``."""

    schema_version: Positive
    complete: Flag
    capture_level: Literal["ids", "active", "scores"] = _choice(*LEVELS)
    model: Model = Field(description="a JSON object")
    router: Router = Field(description="a JSON object")
    tables: list[str] = Field(
        description="a list of requests, forwards, routing and, where there are such tables, tokens and (level active) "
        "scores; or loads alone"
    )
    decoding: Decoding | None = Field(None, description="a JSON object")
    provenance: dict[str, Any] | None = Field(None, description="a JSON object")
    segments: Count | None = None
    writer: dict[str, Any] | None = Field(None, description="a JSON object")
    checksum: Text | None = None

    @field_validator("tables")
    @classmethod
    def _known_tables(cls, tables: list[str], known: ValidationInfo) -> list[str]:
        wanted = {"requests", "forwards", "routing"}
        if known.data.get("capture_level") == "active":
            wanted.add("scores")
        if set(tables) != {"loads"} and not wanted <= set(tables) <= wanted | {"tokens"}:
            raise wrong()
        return tables

    @model_validator(mode="after")
    def _router_fits(self) -> Document:
        model, router = self.model, self.router
        groups, kept = router.n_group or 1, router.topk_group or 1
        if model.num_experts % groups:
            raise said(f"router.n_group must be a divisor of num_experts ({model.num_experts}), not {groups}")
        if kept > groups or model.top_k > kept * (model.num_experts // groups):
            raise said(
                f"router.topk_group must be at most n_group ({groups}) and large enough to reach top_k ({model.top_k}) "
                f"experts, not {kept}"
            )
        for name in ("expert_bias", "expert_scale"):
            for layer, numbers in (pair for own in by_kind(getattr(router, name)).values() for pair in own.items()):
                if layer not in model.moe_layers or len(numbers) != model.num_experts:
                    raise said(
                        f"router.{name} must be null or an object of MoE layer -> list of {model.num_experts} finite "
                        f"numbers, which layer {layer} is not"
                    )
        return self
