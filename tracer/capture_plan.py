"""What a capture will do: options checked, model loaded, prompts tokenised, before anything is written."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tracer.adapters.find import find_gates
from tracer.adapters.named import named_adapter
from tracer.decoding.own_generate import NAMES, generate_arguments
from tracer.decoding.team_layers import check_limited
from tracer.decoding.team_rules import BRANCHES
from tracer.errors import UserError
from tracer.files.folder import last_state
from tracer.levels import as_size, level_sentence, row_bytes
from tracer.meta import META_FILE, digest, read_meta
from tracer.models import LoadedModel, load_model
from tracer.prompts import Prompt, RandomPrompts, read_prompts
from tracer.schema import LEVELS

DEFAULT_BLOCK, DEFAULT_THRESHOLD = 32, 0.95
LOOPS = ("auto", "llada2", "sdar", "team", "own")


@dataclass(frozen=True, slots=True)
class CaptureOptions:
    """What to record and how to decode; None is LLaDA2.0's and SDAR's default (block 32, 32 steps, threshold 0.95, temperature
    0), or with loop "own" the model's.

    ``kv_cache`` None means what the loop's released code does: none for LLaDA2, a prefix cache for SDAR and TEAM. ``mask_id``
    and ``eos_id`` None mean what :mod:`tracer.families` knows. ``adapter`` names a reader of routers, as ``module:function``.
    """

    level: str = "scores"
    loop: str = "auto"
    kv_cache: bool | None = None
    block_length: int | None = None
    steps: int | None = None
    threshold: float | None = None
    gen_length: int = 128
    temperature: float | None = None
    seed: int = 0
    keep_text: bool = False
    compact: bool = False
    force: bool = False
    resume: bool = False
    device: str = "auto"
    dtype: str | None = None
    device_map: str | None = None
    trust_remote_code: bool = False
    mask_id: int | None = None
    eos_id: int | None = None
    adapter: str | None = None

    def __post_init__(self):
        if self.level not in LEVELS:
            raise UserError(f"Unknown capture level '{self.level}'; choose one of {', '.join(LEVELS)}.")
        if self.loop not in LOOPS:
            raise UserError(f"Unknown decoding loop '{self.loop}'; choose one of {', '.join(LOOPS)}.")
        if self.force and self.resume:
            raise UserError("--force replaces a trace and --resume goes on with it; give one of them.")
        for name, low in (("block_length", 1), ("steps", 1), ("gen_length", 1), ("mask_id", 0), ("eos_id", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"--{name.replace('_', '-')} must be at least {low}, not {value}.")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise UserError(f"--threshold is a probability between 0 and 1, not {self.threshold}.")
        if self.temperature is not None and not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise UserError(f"--temperature must be 0 or more, not {self.temperature}.")


# Short enough to finish in seconds on two cores; a lower threshold than 0.95 lets small models accept several tokens a step.
DEMO_OPTIONS = CaptureOptions(level="scores", gen_length=64, threshold=0.8, kv_cache=True)


@dataclass(frozen=True, slots=True)
class CapturePlan:
    """A capture that can start: model loaded, prompts tokenised and checked."""

    loaded: LoadedModel
    out: Path
    prompts: tuple[Prompt, ...]
    token_ids: tuple[tuple[int, ...], ...]
    options: CaptureOptions
    expected_bytes: int
    largest_forward: int  # rows
    finished: int = 0  # prompts that the trace to go on with has already

    @property
    def hashes(self) -> dict[str, str]:
        """What a resumed capture must have in common with the one it goes on with, for meta.json."""
        given = {
            name: value for name, value in asdict(self.options).items() if name not in ("force", "resume", "compact")
        }
        prompts = [
            [list(ids), prompt.dataset, prompt.text if self.options.keep_text else None]
            for ids, prompt in zip(self.token_ids, self.prompts, strict=True)
        ]
        return {"options_hash": digest([self.loaded.id, given]), "prompts_hash": digest(prompts)}

    @property
    def total_tokens(self) -> int:
        return len(self.prompts) * self.options.gen_length

    @property
    def sentence(self) -> str:
        gates, rows = find_gates(self.loaded.model), self.largest_forward
        level = self.options.level
        bytes_a_forward = rows * row_bytes(level, len(gates.layers), gates.num_experts, gates.top_k)
        return (
            f"Capturing {len(self.prompts)} prompts x {self.options.gen_length} tokens from {self.loaded.id}: at most about "
            f"{as_size(self.expected_bytes)} on disk. {level_sentence(level, bytes_a_forward, rows)}"
        )


def demo_prompts() -> list[Prompt]:
    """The prompts beside the demo models: character tables (low entropy) and ordinary code."""
    return read_prompts(Path(__file__).parent / "demo" / "prompts.jsonl")


def plan_capture(model: str, out: Path, prompts: list[Prompt] | RandomPrompts, options: CaptureOptions) -> CapturePlan:
    """Load the model, tokenise the prompts and check that the capture can run.

    Raises
    ------
    UserError
        Anything wrong with the request, in one sentence; nothing has been written then.
    """
    _check_destination(Path(out), options)
    if options.adapter is not None:
        named_adapter(options.adapter)
    loaded = load_model(
        model,
        device=options.device,
        dtype=options.dtype,
        device_map=options.device_map,
        trust_remote_code=options.trust_remote_code,
        seed=options.seed,
        mask_id=options.mask_id,
        eos_id=options.eos_id,
    )
    loop = loaded.loop if options.loop == "auto" else options.loop
    if loop != "own" and loaded.mask_id is None:
        raise UserError(
            f"No mask token is known of {loaded.id}, so the {loop} loop cannot run; give --mask-id, or use --loop own."
        )
    options = replace(options, loop=loop)
    if loop == "own":
        if options.kv_cache is not None:
            raise UserError("Whether a model's generate keeps a KV cache is its own affair; leave --kv-cache out.")
        # Refuses what the model's generate does not take.
        generate_arguments(loaded.model, options.gen_length, **own_options(loaded, options))
    else:
        options = _with_defaults(options, loaded)
    if loop in ("sdar", "team") and not options.kv_cache:
        raise UserError("The SDAR and TEAM loops always keep a prefix KV cache; leave --no-kv-cache out.")
    if loop == "team":
        _check_team(loaded, options)
    if isinstance(prompts, RandomPrompts):
        special = {token for token in (loaded.mask_id, loaded.eos_id, loaded.pad_id) if token is not None}
        prompts = prompts.draw(loaded.vocab_size, special, options.seed)
    token_ids = tuple(_tokenise(loaded, number, prompt, options) for number, prompt in enumerate(prompts))
    plan = CapturePlan(loaded, Path(out), tuple(prompts), token_ids, options, *_expected(loaded, token_ids, options))
    return replace(plan, finished=_finished(plan)) if options.resume else plan


def own_options(loaded: LoadedModel, options: CaptureOptions) -> dict[str, Any]:
    """What :func:`tracer.decode.decode_own` is to hand to generate: ``given`` by the user, and ``known`` of the model."""
    given = {name: getattr(options, name) for name in NAMES}
    known = {"block_length": loaded.block_length, "mask_id": loaded.mask_id, "eos_id": loaded.eos_id}
    return {"given": given, "known": known}


def _with_defaults(options: CaptureOptions, loaded: LoadedModel) -> CaptureOptions:
    block_length = options.block_length or loaded.block_length or DEFAULT_BLOCK
    return replace(
        options,
        block_length=block_length,
        steps=options.steps or block_length,
        threshold=DEFAULT_THRESHOLD if options.threshold is None else options.threshold,
        temperature=options.temperature or 0.0,
        kv_cache=options.loop in ("sdar", "team") if options.kv_cache is None else options.kv_cache,
    )


def _check_team(loaded: LoadedModel, options: CaptureOptions) -> None:
    if loaded.loop != "sdar":
        raise UserError(f"TEAM's loop decodes models of SDAR's kind, which {loaded.id} is not; use --loop auto.")
    if options.temperature:
        raise UserError("TEAM's loop writes the most probable tokens; leave --temperature out.")
    # Ids of all kinds, so that rows differ and show the routers' rule.
    check_limited(loaded.model, range(min(32, loaded.vocab_size)))


def _finished(plan: CapturePlan) -> int:
    """Prompts a trace has finished: they run in order.

    Raises
    ------
    UserError
        When it was recorded with other options or prompts.
    """
    if not (plan.out / META_FILE).exists():
        return 0
    meta = read_meta(plan.out)
    stored = meta.raw.get("writer") or {}
    for key, what in (("options_hash", "options"), ("prompts_hash", "prompts")):
        if stored.get(key) != plan.hashes[key]:
            raise UserError(
                f"{plan.out} was recorded with other {what}, so --resume cannot go on with it; repeat the command it was "
                "begun with, or give another --out."
            )
    return len(last_state(plan.out, meta).ended)


def _check_destination(out: Path, options: CaptureOptions) -> None:
    if out.exists():
        if not (options.force or options.resume):
            raise UserError(f"{out} is already there; --force replaces the trace, --resume goes on with it.")
        return
    ancestor = next(p for p in out.absolute().parents if p.exists())
    if not (ancestor.is_dir() and os.access(ancestor, os.W_OK | os.X_OK)):
        raise UserError(f"{out} cannot be made because {ancestor} is not a folder that can be written to.")


def _tokenise(loaded: LoadedModel, number: int, prompt: Prompt, options: CaptureOptions) -> tuple[int, ...]:
    if prompt.token_ids is not None:
        ids = prompt.token_ids
    elif loaded.tokenizer is None:
        raise UserError(f"{loaded.id} comes without a tokenizer; give random prompts with --prompt-tokens N.")
    else:
        ids = tuple(loaded.tokenizer.encode(prompt.text or ""))
    if not ids:
        raise UserError(f"Prompt {number} has no tokens.")
    # Blocks are filled to their end, so the last one may reach past prompt + gen_length.
    block = (options.block_length or loaded.block_length or 1) if loaded.mask_id is not None else 1
    needed = math.ceil((len(ids) + options.gen_length) / block) * block
    if loaded.context is not None and needed > loaded.context:
        raise UserError(
            f"Prompt {number} has {len(ids)} tokens and with {options.gen_length} generated ones needs {needed}, but "
            f"{loaded.id} takes {loaded.context}; shorten the prompt or lower --gen-length."
        )
    return ids


def _expected(loaded: LoadedModel, token_ids: tuple[tuple[int, ...], ...], options: CaptureOptions) -> tuple[int, int]:
    """Bytes of the trace at most, if a forward accepts one token; and the rows of its largest denoise forward."""
    gates = find_gates(loaded.model)
    block = options.block_length or loaded.block_length or 1
    rows = most = 0
    for ids in token_ids:
        end = math.ceil((len(ids) + options.gen_length) / block) * block
        per_forward = block * (BRANCHES if options.loop == "team" else 1) if options.kv_cache else end
        rows += (end - len(ids)) * per_forward + 2 * end
        most = max(most, per_forward)
    # Schemas and footers of one segment take some 20 kB.
    return int(rows * row_bytes(options.level, len(gates.layers), gates.num_experts, gates.top_k)) + 20_000, most
