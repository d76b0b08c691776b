"""What a trace's meta.json says about a model: its geometry, its routers' rule, the software it ran on.

Everything is read from the model's own configuration and from the shapes of its parameters; nothing is guessed. No host names
and no paths of the machine get in.
"""

from __future__ import annotations

import importlib.metadata
import os
from datetime import UTC, datetime
from typing import Any

import torch
from torch import nn

from tracer.adapters.find import find_gates
from tracer.adapters.gate import Gate, GateSet, setting, text_config
from tracer.trace import RouterSpec

LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
SHARED = ("num_shared_experts", "n_shared_experts", "moe_num_shared_experts", "num_shared_expert")
HIDDEN = ("hidden_size", "d_model", "n_embd")
INTERMEDIATE = ("moe_intermediate_size", "expert_ffn_hidden_size", "expert_intermediate_size", "intermediate_size")


def describe_model(
    model: nn.Module, gates: GateSet | None = None, *, model_id: str | None = None, revision: str | None = None
) -> dict[str, Any]:
    """The sections ``model`` and ``router`` of meta.json.

    Parameters
    ----------
    model : nn.Module
    gates : GateSet, optional
        From :func:`tracer.adapters.find.find_gates`. The router section is exact once the gates have seen a call; before that
        it holds what the configuration says.
    model_id, revision : str, optional
        Name and revision; by default the name in the configuration, unless that is a path.

    Returns
    -------
    dict
        ``{"model": {...}, "router": {...}}``
    """
    gates = gates or find_gates(model)
    config = text_config(model)
    first = gates.gates[0]
    expert_bytes = {gate.layer: _bytes(gate.experts) // gate.num_experts for gate in gates.gates}
    experts = {id(p): p for gate in gates.gates for p in gate.experts.parameters()}
    everything = {id(p): p for p in model.parameters()}
    dense = sum(p.numel() * p.element_size() for key, p in everything.items() if key not in experts)
    sizes = set(expert_bytes.values())
    layers = setting(LAYERS, config)
    shared = setting(SHARED, config)
    if shared is None:
        shared = int(any("shared_expert" in name for name, _ in first.block.named_children()))
    return {
        "model": {
            "id": model_id or _name(config) or type(model).__name__,
            "revision": revision or getattr(config, "_commit_hash", None),
            "class": type(model).__name__,
            "num_layers": max(int(layers or 0), max(gates.layers) + 1),
            "moe_layers": list(gates.layers),
            "num_experts": gates.num_experts,
            "top_k": gates.top_k,
            "hidden_size": setting(HIDDEN, config),
            "moe_intermediate_size": setting(INTERMEDIATE, config),
            "num_shared_experts": int(shared),
            **_heads(config),
            "expert_bytes": sizes.pop() if len(sizes) == 1 else {str(k): v for k, v in sorted(expert_bytes.items())},
            "dense_bytes": dense,
            "dtype": str(next(first.experts.parameters()).dtype).removeprefix("torch."),
        },
        "router": _router_section(gates, config),
    }


def _heads(config: Any) -> dict[str, int | None]:
    """Attention heads, those of keys and values, and values a head; a config leaves out what follows from the others.

    None where they differ from layer to layer: one number cannot stand for all.
    """
    try:
        heads = setting(("num_attention_heads", "n_head"), config)
        kv_heads = setting(("num_key_value_heads",), config)
        head_dim = setting(("head_dim",), config)
    except RuntimeError:
        # How transformers 5 answers for a value that layers do not share.
        return dict.fromkeys(("num_heads", "num_kv_heads", "head_dim"))
    hidden = setting(HIDDEN, config)
    if head_dim is None and heads and hidden:
        head_dim = hidden // heads
    return {"num_heads": heads, "num_kv_heads": heads if kv_heads is None else kv_heads, "head_dim": head_dim}


def _router_section(gates: GateSet, config: Any) -> dict[str, Any]:
    settled = [gate for gate in gates.gates if gate.router is not None]
    rule = settled[0].router if settled else None
    if rule is None:
        normed = setting(("norm_topk_prob",), config)
        rule = RouterSpec(gates.num_experts, gates.top_k, norm_topk_prob=True if normed is None else bool(normed))
    return {
        "score_function": rule.score_function,
        "norm_topk_prob": rule.norm_topk_prob,
        "n_group": rule.n_group,
        "topk_group": rule.topk_group,
        "routed_scaling_factor": rule.routed_scaling_factor,
        "expert_bias": _vectors(settled, "expert_bias"),
        "bias_in_weights": rule.bias_in_weights,
        "group_score": rule.group_score,
        "expert_scale": _vectors(settled, "expert_scale"),
        # Whether the rule was held against the first call of every layer; where not, ids and weights are all there is to trust.
        "verified": bool(settled) and all(gate.verified for gate in gates.gates),
        "adapter": gates.gates[0].adapter or None,
    }


def _vectors(gates: list[Gate], name: str) -> dict[str, list[float]] | None:
    found = {str(g.layer): getattr(g.router, name) for g in sorted(gates, key=lambda g: g.layer)}
    vectors = {layer: [float(v) for v in vector] for layer, vector in found.items() if vector is not None}
    return vectors or None


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _name(config: Any) -> str | None:
    name = getattr(config, "_name_or_path", None) or None
    if name is not None and (os.path.isabs(name) or name.startswith((".", "~")) or os.path.exists(name)):
        return os.path.basename(os.path.normpath(name)) or None
    return name


def describe_run(model: nn.Module) -> dict[str, Any]:
    """The section ``provenance`` of meta.json: versions, device and time."""
    try:
        package = importlib.metadata.version("moetrace")
    except importlib.metadata.PackageNotFoundError:
        package = "unknown"
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    return {
        "source": "captured",
        "package": package,
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
