"""Counting experts and dMoE's restriction: process CPU time beside the speed of reading memory and beside other tools."""

from __future__ import annotations

import time

import numpy as np
import polars as pl
import pytest
import torch

from simulator.kernels import router_arrays
from simulator.routing.dmoe import _restrict
from simulator.tallies.counting import unique_experts
from tests.made_up.routers import router, scores

pytestmark = [pytest.mark.bench, pytest.mark.benchmark(timer=time.process_time, warmup=True, min_rounds=5)]

BLOCK, TOP_K = 32, 8
DISTINCT = 256


def cpu_seconds(call, repeats=5):
    """Least process CPU time of a few calls."""
    least = float("inf")
    for _ in range(repeats):
        begin = time.process_time()
        call()
        least = min(least, time.process_time() - begin)
    return least


def block_ids(num_experts, forwards):
    """Ids [T, K] of ``forwards`` blocks whose rows lean to the same experts, a few hundred different blocks repeated."""
    rng = np.random.default_rng(0)
    shared = rng.standard_normal((DISTINCT, 1, num_experts)) * 1.2
    noise = rng.gumbel(size=(DISTINCT, BLOCK, num_experts))
    ids = np.argpartition(-(shared + noise), TOP_K, axis=2)[:, :, :TOP_K].astype(np.uint8)
    return np.tile(ids, (forwards // DISTINCT, 1, 1)).reshape(-1, TOP_K)


@pytest.mark.parametrize("num_experts", [256, 128])
def test_unique_experts_against_reading_the_same_bytes(benchmark, num_experts):
    ids = block_ids(num_experts, 1 << 20)
    offsets = np.arange(0, len(ids) + 1, BLOCK)
    count = np.full(len(ids), TOP_K, np.uint8)
    words = ids.reshape(-1).view(np.int64)
    benchmark(unique_experts, ids, count, offsets, num_experts)
    ours, reading = benchmark.stats.stats.min, cpu_seconds(words.sum)
    benchmark.extra_info |= {
        "ns a decision": round(ours / ids.size * 1e9, 3),
        "share of stream-read": round(reading / ours, 3),
        "mean unique": float(unique_experts(ids, count, offsets, num_experts).mean()),
    }
    print(f"\nunique experts, E={num_experts}: {benchmark.extra_info}")


def scatter_add(ids, num_experts):
    """How engines count: tokens of each expert, then those that are not zero."""
    flat = torch.from_numpy(ids).view(-1, BLOCK * TOP_K).long()
    loads = torch.zeros(len(flat), num_experts, dtype=torch.int32)
    loads.scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.int32))
    return (loads > 0).sum(1).numpy()


def polars_lists(ids, num_experts):
    """Distinct ids of a column of lists."""
    return pl.Series(ids.reshape(-1, BLOCK * TOP_K)).arr.to_list().list.n_unique().to_numpy()


def numpy_unique(ids, num_experts):
    """``np.unique`` a forward."""
    return np.array([len(np.unique(block)) for block in ids.reshape(-1, BLOCK * TOP_K)])


@pytest.mark.parametrize("peer", [scatter_add, polars_lists, numpy_unique], ids=lambda p: p.__name__)
def test_unique_experts_against_other_tools(benchmark, peer):
    torch.set_num_threads(1)
    ids = block_ids(256, 1 << 12)
    offsets = np.arange(0, len(ids) + 1, BLOCK)
    count = np.full(len(ids), TOP_K, np.uint8)
    found = benchmark(unique_experts, ids, count, offsets, 256)
    assert np.array_equal(found, peer(ids, 256))
    theirs = cpu_seconds(lambda: peer(ids, 256), repeats=3)
    benchmark.extra_info["times faster"] = round(theirs / benchmark.stats.stats.min, 1)
    print(f"\nunique experts against {peer.__name__}: {benchmark.extra_info}")


@pytest.mark.parametrize("num_experts", [256, 128])
def test_dmoe_restriction(benchmark, num_experts):
    rng = np.random.default_rng(1)
    blocks = 256
    grouped = num_experts == 256
    spec = router(
        rng, num_experts, TOP_K, "sigmoid" if grouped else "softmax", *((8, 4) if grouped else (1, 1)), bias=grouped
    )
    score = scores(rng, blocks * BLOCK, spec)
    rows = np.arange(len(score))
    offsets = np.arange(0, len(score) + 1, BLOCK)
    ids = np.zeros((len(score), TOP_K), np.uint8)
    count, weights = np.zeros(len(score), np.uint8), np.zeros((len(score), TOP_K), np.float32)
    missing = benchmark(_restrict, score, rows, offsets, router_arrays(spec), np.float32(0.6), 12, ids, count, weights)
    assert missing == -1
    benchmark.extra_info["us a block and layer"] = round(benchmark.stats.stats.min / blocks * 1e6, 2)
    print(f"\ndMoE restriction, E={num_experts}: {benchmark.extra_info}")
