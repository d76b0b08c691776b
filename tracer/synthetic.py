"""Seeded synthetic traces with a given popularity, temporal and spatial consistency, for benchmarks and tests.

Each (layer, position) holds a set of K experts. From one step to the next an expert stays with chance ``temporal``; one that
leaves, and every expert of a first set, is taken from the set of the position to the left with chance ``spatial``, else drawn
from a Zipf-like popularity. Scores are made around the sets, so that the router's rule gives exactly these sets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tracer.errors import UserError
from tracer.files.writer import TraceWriter
from tracer.schema import DECODED, LEVELS, MASKED, PROMPT, SCORE_FUNCTIONS, tables_of
from tracer.synthetic_sets import Recipe

MASK_ID, EOS_ID, FIRST_TOKEN, VOCABULARY = 1, 2, 3, 1000
THRESHOLD = 0.95


def synthesize(
    path: str | Path,
    *,
    num_experts: int = 256,
    top_k: int = 8,
    layers: int | Sequence[int] = 19,
    requests: int = 2,
    blocks: int = 4,
    block_length: int = 32,
    prompt_tokens: int = 40,
    kv_cache: bool = True,
    score_function: str = "sigmoid",
    n_group: int = 8,
    topk_group: int = 4,
    routed_scaling_factor: float = 2.5,
    expert_bias: bool = True,
    level: str = "ids",
    temporal: float = 0.9,
    spatial: float = 0.3,
    skew: float = 0.6,
    accepted_per_step: float = 2.5,
    tokens: bool = True,
    seed: int = 0,
    compact: bool = False,
    force: bool = False,
    segment_forwards: int = 1024,
    expert_bytes: int = 3 * 2048 * 512 * 2,
) -> Path:
    """Write a synthetic trace of block-diffusion decoding; the same arguments give the same trace.

    The defaults have the geometry of LLaDA2.0-mini (256 experts, 8 a token, 19 MoE layers, groups 8/4, sigmoid with bias,
    weights times 2.5, blocks of 32; source: its config.json). Decoding: with ``kv_cache`` a prefill of the whole prompt
    blocks, then per block denoise forwards of its rows and a commit forward; without, denoise forwards over everything so
    far, as the model's own loop does.

    Parameters
    ----------
    path : str or Path
        Folder to write.
    num_experts, top_k, n_group, topk_group : int
    layers : int or sequence of int
        How many MoE layers, after one dense one, or their indices.
    requests, blocks, block_length, prompt_tokens : int
        ``blocks`` are decoded per request, the first holding the prompt's tail.
    level : str
        "ids", "active" or "scores".
    temporal : float
        Chance that an expert of a position's set stays in the next step.
    spatial : float
        Chance that a new expert is copied from the position to the left.
    skew : float
        Exponent of the popularity 1 / rank ** skew.
    accepted_per_step : float
        Mean tokens accepted by a denoise forward, at least 1.
    tokens : bool
        Whether to write the ``tokens`` table.
    compact : bool
        Smaller weights and scores, which pyarrow alone reads (:class:`tracer.files.writer.TraceWriter`).
    expert_bytes : int
        Bytes of one expert; by default three bfloat16 matrices of 2048 x 512.

    Returns
    -------
    Path
        ``path``.

    Raises
    ------
    UserError
        When a parameter is out of range or the path is taken.
    """
    numbers = tuple(range(1, layers + 1)) if isinstance(layers, int) else tuple(layers)
    _check(locals())
    rng = np.random.default_rng(seed)
    ranks = np.argsort(rng.random((len(numbers), num_experts)), axis=1) + 1.0
    bias = np.zeros((len(numbers), num_experts), np.float32)
    if expert_bias and score_function == "sigmoid":
        bias = rng.uniform(-0.02, 0.0, bias.shape).astype(np.float32)
    recipe = Recipe(
        layers=numbers,
        popularity=ranks**-skew,
        bias=bias,
        temporal=temporal,
        spatial=spatial,
        groups=n_group,
        limit=topk_group,
        top_k=top_k,
        softmax=score_function == "softmax",
        factor=routed_scaling_factor,
        level=level,
        state=rng.integers(0, 2**63, 1).astype(np.uint64),
    )
    meta = {
        "capture_level": level,
        "model": {
            "id": "synthetic",
            "num_layers": numbers[-1] + 1,
            "moe_layers": list(numbers),
            "num_experts": num_experts,
            "top_k": top_k,
            "expert_bytes": expert_bytes,
            "dtype": "bfloat16",
        },
        "router": {
            "score_function": score_function,
            "norm_topk_prob": True,
            "n_group": n_group,
            "topk_group": topk_group,
            "routed_scaling_factor": routed_scaling_factor,
            "expert_bias": {str(n): row.tolist() for n, row in zip(numbers, bias, strict=True)} if bias.any() else None,
        },
        "tables": tables_of(level, tokens),
        "decoding": {
            "loop": "synthetic",
            "block_length": block_length,
            "threshold": THRESHOLD,
            "mask_id": MASK_ID,
            "eos_id": EOS_ID,
            "seed": seed,
            "kv_cache": kv_cache,
        },
        "provenance": {"source": "synthetic", "temporal": temporal, "spatial": spatial, "skew": skew},
    }
    first = prompt_tokens // block_length
    with TraceWriter(path, meta, force=force, compact=compact, segment_forwards=segment_forwards) as writer:
        for request in range(requests):
            length = (first + blocks) * block_length
            shape = (len(numbers), length, top_k)
            sets = np.full(shape, -1, np.int64), np.zeros(shape, np.float32), np.zeros(length, np.bool_)
            calls = _decode(rng, request, prompt_tokens, blocks, block_length, kv_cache, accepted_per_step)
            for part, columns in calls:
                writer.add_call([part], columns if tokens else None, recipe.routing(sets, columns["position"]))
            writer.add_request(
                {
                    "request_id": request,
                    "dataset": "synthetic",
                    "prompt_tokens": prompt_tokens,
                    "generated_tokens": length - prompt_tokens,
                    "first_block": first,
                    "stop_reason": "length",
                }
            )
    return Path(path)


def _decode(
    rng: np.random.Generator,
    request: int,
    prompt: int,
    blocks: int,
    size: int,
    kv_cache: bool,
    accepted_per_step: float,
) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """The calls of one request: its ``forwards`` row and its ``tokens`` columns."""
    first = prompt // size
    end = (first + blocks) * size
    final = rng.integers(FIRST_TOKEN, VOCABULARY, end)
    known = np.arange(end) < prompt

    def call(kind: str, block: int, step: int, low: int, high: int, accepted: np.ndarray) -> tuple:
        position = np.arange(low, high)
        masked = ~known[low:high]
        current = position // size == block
        right = ~masked | accepted[low:high] | (rng.random(high - low) < 0.6)
        guess = np.where(right, final[low:high], rng.integers(FIRST_TOKEN, VOCABULARY, high - low))
        sure = np.where(
            accepted[low:high], rng.uniform(THRESHOLD + 0.001, 1, high - low), rng.uniform(0.05, 0.94, high - low)
        )
        sure = np.where(masked, sure, rng.uniform(0.9, 1, high - low))
        part = {
            "request_id": request,
            "kind": kind,
            "block": block,
            "step": step,
            "row_start": 0,
            "num_tokens": high - low,
            "kv_tokens": low,
            "num_masked": int(masked.sum()),
            "num_accepted": int(accepted[low:high].sum()),
        }
        return part, {
            "position": position,
            "token_id": np.where(masked, MASK_ID, final[low:high]),
            "state": np.where(position < prompt, PROMPT, np.where(masked, MASKED, DECODED)),
            "predicted_id": np.where(current, guess, -1),
            "confidence": np.where(current, sure, np.nan),
            "accepted": accepted[low:high],
        }

    nothing = np.zeros(end, bool)
    if kv_cache and first:
        yield call("prefill", -1, -1, 0, first * size, nothing)
    for block in range(first, first + blocks):
        low, high = block * size, (block + 1) * size
        step = 0
        while not known[low:high].all():
            masked = low + np.flatnonzero(~known[low:high])
            accepted = nothing.copy()
            accepted[rng.permutation(masked)[: 1 + rng.poisson(accepted_per_step - 1)]] = True
            yield call("denoise", block, step, low if kv_cache else 0, high, accepted)
            known |= accepted
            step += 1
        if kv_cache:
            yield call("commit", block, -1, low, high, nothing)


def _check(given: dict[str, Any]) -> None:
    experts, groups, kept, top_k = (given[n] for n in ("num_experts", "n_group", "topk_group", "top_k"))
    for name in ("num_experts", "top_k", "requests", "blocks", "block_length", "n_group", "topk_group"):
        if given[name] < 1:
            raise UserError(f"{name} must be at least 1, not {given[name]}.")
    for name in ("temporal", "spatial"):
        if not 0 <= given[name] <= 1:
            raise UserError(f"{name} is a chance and must lie in 0..1, not {given[name]}.")
    if not given["numbers"]:
        raise UserError("layers must name at least one MoE layer.")
    if given["prompt_tokens"] < 0 or given["skew"] < 0 or given["accepted_per_step"] < 1:
        raise UserError("prompt_tokens and skew must be at least 0, accepted_per_step at least 1.")
    if experts % groups or kept > groups or top_k > kept * (experts // groups):
        raise UserError(f"{kept} of {groups} groups of {experts} experts cannot give {top_k} experts a token.")
    if given["level"] not in LEVELS or given["score_function"] not in SCORE_FUNCTIONS:
        raise UserError(
            f"level must be one of {', '.join(LEVELS)}, score_function one of {', '.join(SCORE_FUNCTIONS)}."
        )
