"""Run a planned capture: decode every prompt under the recorder, with progress, safe against Ctrl-C."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tracer.adapters.named import named_adapter
from tracer.capture_plan import CapturePlan, own_options
from tracer.decode import decode_llada2, decode_own, decode_sdar, decode_team
from tracer.files.folder import last_state
from tracer.files.writer import TraceWriter
from tracer.levels import as_size
from tracer.meta import read_meta
from tracer.recording.context import record
from tracer.recording.recorder import Recorder

SMALL_MODEL = 50_000_000


@dataclass(frozen=True, slots=True)
class CaptureResult:
    """What a capture wrote."""

    trace: Path
    model: str
    requests: int
    forwards: int
    generated_tokens: int
    bytes_written: int
    seconds: float
    interrupted: bool

    @property
    def sentence(self) -> str:
        stopped = "Stopped early; what was finished is kept, --resume goes on with it. " if self.interrupted else ""
        return (
            f"{stopped}{self.trace}: {self.requests} requests, {self.generated_tokens} tokens in {self.forwards} forwards, "
            f"{as_size(self.bytes_written)}, {self.seconds:.1f} s"
        )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "trace": str(self.trace)}


def run_capture(plan: CapturePlan, on_step: Callable[[int, float, int], None] | None = None) -> CaptureResult:
    """Decode every prompt under the recorder.

    Parameters
    ----------
    plan : CapturePlan
    on_step : callable, optional
        Called after every forward with tokens generated so far, tokens per second and bytes written.

    Returns
    -------
    CaptureResult
        ``interrupted`` is True after Ctrl-C; what was finished is on disk and the trace opens.
    """
    options, loaded = plan.options, plan.loaded
    started = time.monotonic()
    if plan.finished == len(plan.prompts):
        return _completed(plan, started)
    tokens, interrupted, recorder = 0, False, None
    try:
        with (
            _few_threads(loaded.model),
            record(
                loaded.model,
                plan.out,
                level=options.level,
                decoding={
                    "loop": options.loop,
                    "block_length": options.block_length,
                    "steps": options.steps,
                    "threshold": options.threshold,
                    "remasking": "low_confidence" if options.loop != "own" else None,
                    "temperature": options.temperature,
                    "mask_id": loaded.mask_id,
                    "eos_id": loaded.eos_id,
                    "seed": options.seed,
                    "kv_cache": options.kv_cache,
                },
                model_id=loaded.id,
                revision=loaded.revision,
                adapter=named_adapter(options.adapter) if options.adapter else None,
                force=options.force,
                append=options.resume,
                compact=options.compact,
                quiet=True,
                meta={"writer": plan.hashes},
            ) as recorder,
        ):
            for number in range(plan.finished, len(plan.prompts)):

                def tell(generated: int, before: int = tokens, recorder: Recorder = recorder) -> None:
                    if on_step is not None:
                        done = before + generated
                        on_step(done, done / (time.monotonic() - started), recorder.bytes_written)

                tokens += _decode_one(plan, number, recorder, tell)
    except KeyboardInterrupt:
        interrupted = True
    # What was to replace another trace and did not get that far lies beside it.
    written = Path(getattr(recorder.sink.writer, "folder", plan.out)) if recorder else plan.out
    return CaptureResult(
        trace=written,
        model=loaded.id,
        requests=recorder.num_requests if recorder else 0,
        forwards=recorder.num_forwards if recorder else 0,
        generated_tokens=tokens,
        bytes_written=_bytes(written),
        seconds=time.monotonic() - started,
        interrupted=interrupted,
    )


def _bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


@contextmanager
def _few_threads(model: Any) -> Iterator[None]:
    """One thread for models of a few million parameters on a CPU, where a second one mostly waits."""
    before = torch.get_num_threads()
    small = sum(p.numel() for p in model.parameters()) < SMALL_MODEL and next(model.parameters()).device.type == "cpu"
    torch.set_num_threads(1 if small else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _decode_one(plan: CapturePlan, number: int, recorder: Recorder, tell: Callable[[int], None]) -> int:
    """Decode one prompt as one request; returns the tokens generated."""
    options, loaded, prompt = plan.options, plan.loaded, plan.prompts[number]
    ids = list(plan.token_ids[number])
    # A seed of its own for every prompt, so that a resumed capture draws what the uninterrupted one would have drawn.
    seed = options.seed + number
    text = prompt.text if options.keep_text else None
    with recorder.request(dataset=prompt.dataset, prompt_tokens=len(ids), prompt=text):
        if options.loop == "own":
            own = own_options(loaded, options)
            result = decode_own(
                loaded.model,
                ids,
                gen_length=options.gen_length,
                seed=seed,
                recorder=recorder,
                given=own["given"],
                known=own["known"],
            )
            recorder.finish(result.ids)
        else:
            common: dict[str, Any] = {
                "gen_length": options.gen_length,
                "mask_id": loaded.mask_id,
                "eos_id": loaded.eos_id,
                "block_length": options.block_length,
                "steps": options.steps,
                "threshold": options.threshold,
                "on_step": lambda step: tell(step.generated),
                "recorder": recorder,
            }
            if options.loop == "team":
                result = decode_team(loaded.model, ids, **common)
            elif options.loop == "sdar":
                result = decode_sdar(loaded.model, ids, temperature=options.temperature or 0.0, seed=seed, **common)
            else:
                cached = bool(options.kv_cache)
                result = decode_llada2(
                    loaded.model, ids, temperature=options.temperature or 0.0, seed=seed, kv_cache=cached, **common
                )
    tell(result.generated)
    return result.generated


def _completed(plan: CapturePlan, started: float) -> CaptureResult:
    """A trace that has every prompt and lacks at most its last meta.json."""
    meta = read_meta(plan.out)
    if not meta.complete:
        TraceWriter(plan.out, meta.raw, append=True).close()
    state = last_state(plan.out, read_meta(plan.out))
    return CaptureResult(
        trace=plan.out,
        model=plan.loaded.id,
        requests=plan.finished,
        forwards=state.calls,
        generated_tokens=0,
        bytes_written=_bytes(plan.out),
        seconds=time.monotonic() - started,
        interrupted=False,
    )
