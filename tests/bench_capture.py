"""What recording costs a model's forward, in percent of its CPU time, on both demo models.

Goals on a CPU: at most 5% at level ids, 7% at active and scores.

"told": the loops of this package with their KV caches, which tell the recorder what they predicted; "followed": bare forwards,
for which the recorder takes argmax and probability of the block's rows from the logits itself.

Three copies of the model, two bare ones and a recorded one, take turns in rounds, each round in another order; a figure is the
median over rounds of the ratio of process CPU times, beside it the middle half. The second bare copy says how far off a ratio
may be. The recorder hands its calls to a writer that keeps nothing: ``bench_format`` measures writing.
"""

from __future__ import annotations

import copy
import itertools
import time

import numpy as np
import pytest
import torch

from tests.tiny_models import block_causal
from tracer.decode import decode_llada2, decode_sdar
from tracer.models import load_model
from tracer.recording.context import record

# CPU seconds a figure may take; eight figures, about a minute in all
SECONDS = 8.0
FOLLOWED_FORWARDS = 8


class Discard:
    """A writer that keeps nothing, so that only the recording itself is measured."""

    calls = 0

    def add_call(self, parts, tokens, routing):
        self.calls += 1
        return self.calls - 1

    def add_request(self, row):
        pass

    def close(self, complete=True):
        pass


def told(family, mask_id, tokens):
    """A decoding of 32 tokens after a prompt in some eight steps, with a KV cache; returns its forwards."""
    decode = decode_llada2 if family == "llada2" else decode_sdar
    cached = {"kv_cache": True} if family == "llada2" else {}

    def run(model, recorder):
        options = {"gen_length": 32, "steps": 8, "mask_id": mask_id, "threshold": 1.0, "recorder": recorder, **cached}
        return decode(model, tokens[:, :64], **options).forwards

    return run


def followed(tokens, mask):
    def run(model, recorder):
        with torch.no_grad():
            for _ in range(FOLLOWED_FORWARDS):
                model(input_ids=tokens, attention_mask=mask, use_cache=False)
        return FOLLOWED_FORWARDS

    return run


def cpu_seconds(run, model, recorder):
    """Process CPU seconds a forward."""
    started = time.process_time()
    forwards = run(model, recorder)
    return (time.process_time() - started) / forwards


def rounds(run, candidates):
    """float64 [rounds, 3]: CPU seconds a forward of every (model, recorder), in every order by turns."""
    found = []
    started = time.process_time()
    for order in itertools.cycle(itertools.permutations(range(len(candidates)))):
        times = np.empty(len(candidates))
        for n in order:
            times[n] = cpu_seconds(run, *candidates[n])
        found.append(times)
        if time.process_time() - started > SECONDS:
            return np.array(found)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.bench
@pytest.mark.parametrize("level", ["ids", "active", "scores"])
@pytest.mark.parametrize("loop", ["told", "followed"])
@pytest.mark.parametrize("family", ["llada2", "sdar"])
def test_capture_overhead(benchmark, family, loop, level, one_thread, capsys):
    torch.manual_seed(0)
    loaded = load_model(f"demo:{family}")
    plain, block = loaded.model, loaded.block_length
    other, recorded = copy.deepcopy(plain), copy.deepcopy(plain)
    tokens = torch.randint(3, loaded.vocab_size, (1, 96))
    if loop == "told":
        run = told(family, loaded.mask_id, tokens)
    else:
        tokens[:, -block // 2 :] = loaded.mask_id
        run = followed(tokens, block_causal(96, block))
    with record(recorded, Discard(), level=level, mask_id=loaded.mask_id, block_length=block) as recorder:
        candidates = [(plain, None), (other, None), (recorded, recorder)]
        for candidate in candidates:
            run(*candidate)
        times = rounds(run, candidates)
        benchmark.pedantic(run, (recorded, recorder), rounds=3)
    percent = 100 * (times[:, 1:] / times[:, :1] - 1)
    low, median, high = np.percentile(percent, [25, 50, 75], axis=0)
    layers = sum(hasattr(layer.mlp, "gate") for layer in plain.model.layers)
    forward = float(np.median(times[:, 0]))
    added = float(np.median(times[:, 2] - times[:, 0]))
    benchmark.extra_info.update(
        overhead_percent=median[1], middle_half=[low[1], high[1]], bare_percent=median[0], rounds=len(times)
    )
    with capsys.disabled():
        print(
            f"\ncapture overhead, {family}, {loop}, level {level}: {median[1]:.1f}% (goal <= "
            f"{5 if level == 'ids' else 7}%; middle half {low[1]:.1f} to {high[1]:.1f}; bare against bare {median[0]:.1f}, "
            f"{low[0]:.1f} to {high[0]:.1f}; {len(times)} rounds), "
            f"forward {1e3 * forward:.2f} ms, {1e6 * added / layers:.0f} us a layer"
        )
    assert recorder.num_forwards > 0
