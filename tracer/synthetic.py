"""Seeded synthetic traces of block-diffusion decoding, with the popularity and the consistency that is asked for.

Each (layer, position) holds a set of K experts. From one step to the next an expert stays with chance ``temporal``; one that
leaves, and every expert of a first set, is taken from the set of the position to the left with chance ``spatial``, else drawn
from a Zipf-like popularity. Scores are made around the sets, so that the router's rule gives exactly these sets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tracer.errors import UserError
from tracer.files.writer import TraceWriter
from tracer.schema import DECODED, LEVELS, MASKED, PROMPT, SCORE_FUNCTIONS, tables_of
from tracer.synthetic_sets import SyntheticRouters

MASK_ID, EOS_ID, FIRST_TOKEN, VOCABULARY = 1, 2, 3, 1000
THRESHOLD = 0.95


@dataclass(frozen=True, slots=True)
class SyntheticOptions:
    """What a synthetic trace is like.

    The defaults have the geometry of LLaDA2.0-mini (256 experts, 8 a token, 19 MoE layers, groups 8/4, sigmoid with bias,
    weights times 2.5, blocks of 32; source: its config.json).

    Parameters
    ----------
    layers : int
        MoE layers; they come after one dense layer.
    experts, top_k : int
        Experts of a layer, and how many of them a token takes.
    groups, topk_group : int
        Groups of experts, and how many of them a token may use.
    score_function : str
        "softmax" or "sigmoid".
    expert_bias : bool
        Whether sigmoid routers add a bias to the scores when they select.
    routed_scaling_factor : float
        What the weights of a token add up to.
    expert_bytes : int
        Bytes of one expert; by default three bfloat16 matrices of 2048 x 512.
    requests, prompt_tokens : int
        Prompts, and the tokens of each.
    blocks, block_length : int
        Blocks decoded per request, the first holding the prompt's tail, and their tokens.
    accepted_per_step : float
        Mean tokens that a denoise forward accepts, at least 1.
    kv_cache : bool
        With it a prefill of the whole prompt blocks, then per block denoise forwards of its rows and a commit forward; without,
        denoise forwards over everything so far.
    temporal : float
        Chance that an expert of a position's set stays in the next step.
    spatial : float
        Chance that a new expert is copied from the position to the left.
    skew : float
        Exponent of the popularity 1 / rank ** skew.
    level : str
        "ids", "active" or "scores".
    tokens : bool
        Whether to write the ``tokens`` table.
    seed : int
        The same options give the same trace.

    Raises
    ------
    UserError
        When a parameter is out of range.
    """

    layers: int = 19
    experts: int = 256
    top_k: int = 8
    groups: int = 8
    topk_group: int = 4
    score_function: str = "sigmoid"
    expert_bias: bool = True
    routed_scaling_factor: float = 2.5
    expert_bytes: int = 3 * 2048 * 512 * 2
    requests: int = 2
    prompt_tokens: int = 40
    blocks: int = 4
    block_length: int = 32
    accepted_per_step: float = 2.5
    kv_cache: bool = True
    temporal: float = 0.9
    spatial: float = 0.3
    skew: float = 0.6
    level: str = "ids"
    tokens: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        ones = ("layers", "experts", "top_k", "groups", "topk_group", "requests", "blocks", "block_length")
        for name in (*ones, "expert_bytes", "accepted_per_step"):
            if not getattr(self, name) >= 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("prompt_tokens", "skew", "seed"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} must be at least 0, not {getattr(self, name)}.")
        for name in ("temporal", "spatial"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is a chance and must lie in 0..1, not {getattr(self, name)}.")
        if not self.routed_scaling_factor > 0:
            raise UserError(f"routed_scaling_factor must be above 0, not {self.routed_scaling_factor}.")
        for name, names in (("level", LEVELS), ("score_function", SCORE_FUNCTIONS)):
            if getattr(self, name) not in names:
                raise UserError(f"{name} must be one of {', '.join(names)}, not {getattr(self, name)!r}.")
        whole_groups = self.experts % self.groups == 0 and self.topk_group <= self.groups
        if not whole_groups or self.top_k > self.topk_group * (self.experts // self.groups):
            raise UserError(
                f"{self.topk_group} of {self.groups} groups of {self.experts} experts cannot give {self.top_k} experts a "
                "token; groups must divide the experts, and groups of 1 do without."
            )


def write_synthetic(
    path: str | Path,
    options: SyntheticOptions | None = None,
    *,
    force: bool = False,
    compact: bool = False,
    segment_forwards: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a synthetic trace; the same options give the same trace. Memory does not grow with its length.

    Parameters
    ----------
    path : str or Path
        Folder to write.
    options : SyntheticOptions, optional
    force : bool
        Replace a trace that is there.
    compact : bool
        Smaller weights and scores, which pyarrow alone reads (:class:`tracer.files.writer.TraceWriter`).
    segment_forwards : int
        Calls after which a segment ends at the next block end.
    progress : callable, optional
        Called with (tokens decoded, tokens to decode) after every call.

    Returns
    -------
    Path
        ``path``.

    Raises
    ------
    UserError
        When the path is taken or cannot be written.
    """
    options = options or SyntheticOptions()
    rng = np.random.default_rng((options.seed, 0))
    routers = SyntheticRouters(options)
    first = options.prompt_tokens // options.block_length
    length = (first + options.blocks) * options.block_length
    done, total = 0, options.requests * (length - options.prompt_tokens)
    with TraceWriter(
        path, _meta(options, routers), force=force, compact=compact, segment_forwards=segment_forwards
    ) as writer:
        for request in range(options.requests):
            routers.begin(length)
            for part, columns in _calls(options, rng, request):
                low = part["kv_tokens"]
                routing = routers.routing(low, low + part["num_tokens"])
                writer.add_call([part], columns if options.tokens else None, routing)
                done += part["num_accepted"]
                if progress is not None:
                    progress(done, total)
            writer.add_request(
                {
                    "request_id": request,
                    "dataset": "synthetic",
                    "prompt_tokens": options.prompt_tokens,
                    "generated_tokens": length - options.prompt_tokens,
                    "first_block": first,
                    "stop_reason": "length",
                }
            )
    return Path(path)


def _meta(options: SyntheticOptions, routers: SyntheticRouters) -> dict[str, Any]:
    bias = {str(layer): row.tolist() for layer, row in zip(routers.layers, routers.bias[:, 0], strict=True)}
    return {
        "capture_level": options.level,
        "model": {
            "id": "synthetic",
            "num_layers": options.layers + 1,
            "moe_layers": list(routers.layers),
            "num_experts": options.experts,
            "top_k": options.top_k,
            "expert_bytes": options.expert_bytes,
            "dtype": "bfloat16",
        },
        "router": {
            "score_function": options.score_function,
            "norm_topk_prob": True,
            "n_group": options.groups,
            "topk_group": options.topk_group,
            "routed_scaling_factor": options.routed_scaling_factor,
            "expert_bias": bias if routers.bias.any() else None,
        },
        "tables": tables_of(options.level, options.tokens),
        "decoding": {
            "loop": "synthetic",
            "block_length": options.block_length,
            "threshold": THRESHOLD,
            "mask_id": MASK_ID,
            "eos_id": EOS_ID,
            "seed": options.seed,
            "kv_cache": options.kv_cache,
        },
        "provenance": {"source": "synthetic", "options": asdict(options)},
    }


def _calls(
    options: SyntheticOptions, rng: np.random.Generator, request: int
) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """The calls of one request: its ``forwards`` row and its ``tokens`` columns."""
    size, prompt = options.block_length, options.prompt_tokens
    first = prompt // size
    end = (first + options.blocks) * size
    final = rng.integers(FIRST_TOKEN, VOCABULARY, end)
    known = np.arange(end) < prompt

    def call(kind: str, block: int, step: int, low: int, high: int, accepted: np.ndarray) -> tuple:
        position, rows = np.arange(low, high), high - low
        masked, accepted = ~known[low:high], accepted[low:high]
        right = ~masked | accepted | (rng.random(rows) < 0.6)
        guess = np.where(right, final[low:high], rng.integers(FIRST_TOKEN, VOCABULARY, rows))
        sure = np.where(accepted, rng.uniform(THRESHOLD + 0.001, 1, rows), rng.uniform(0.05, 0.94, rows))
        sure = np.where(masked, sure, rng.uniform(0.9, 1, rows))
        part = {
            "request_id": request,
            "kind": kind,
            "block": block,
            "step": step,
            "row_start": 0,
            "num_tokens": rows,
            "kv_tokens": low,
            "num_masked": int(masked.sum()),
            "num_accepted": int(accepted.sum()),
        }
        current = position // size == block
        return part, {
            "position": position,
            "token_id": np.where(masked, MASK_ID, final[low:high]),
            "state": np.where(position < prompt, PROMPT, np.where(masked, MASKED, DECODED)),
            "predicted_id": np.where(current, guess, -1),
            "confidence": np.where(current, sure, np.nan),
            "accepted": accepted,
        }

    nothing = np.zeros(end, bool)
    if options.kv_cache and first:
        yield call("prefill", -1, -1, 0, first * size, nothing)
    for block in range(first, first + options.blocks):
        low, high = block * size, (block + 1) * size
        step = 0
        while not known[low:high].all():
            masked = low + np.flatnonzero(~known[low:high])
            accepted = nothing.copy()
            accepted[rng.permutation(masked)[: 1 + rng.poisson(options.accepted_per_step - 1)]] = True
            yield call("denoise", block, step, low if options.kv_cache else 0, high, accepted)
            known |= accepted
            step += 1
        if options.kv_cache:
            yield call("commit", block, -1, low, high, nothing)
