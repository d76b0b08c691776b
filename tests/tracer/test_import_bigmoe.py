"""BigMoeOnEdge route traces: what a CSV says arrives in the trace, and its replay is that of the sets and loops below."""

from __future__ import annotations

import os
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from simulator.replaying import replay
from tracer.checking import check
from tracer.errors import UserError
from tracer.importers.bigmoe import import_file
from tracer.parquet import open_trace

EXPERTS, TOP_K, LAYERS = 6, 2, (0, 1, 3)
BYTES = {0: 100, 1: 100, 3: 250}


def rows(seed=0, turns=2, prompt=3, decoded=12):
    """(turn, phase, step, layer, slot, expert, weight); a prefill's last layer runs for its last token only."""
    rng = np.random.default_rng(seed)
    found = []
    for turn in range(turns):
        for step in range(prompt + decoded):
            phase = int(step >= prompt)
            for layer in LAYERS:
                if phase == 0 and layer == LAYERS[-1] and step < prompt - 1:
                    continue
                experts = rng.choice(EXPERTS, TOP_K, replace=False, p=[0.3, 0.25, 0.2, 0.1, 0.1, 0.05])
                weights = np.sort(rng.dirichlet(np.ones(TOP_K)))[::-1]
                for slot in range(TOP_K):
                    found.append((turn, phase, step, layer, slot, int(experts[slot]), round(float(weights[slot]), 6)))
    return found


def write(path, found, preamble=True):
    head = [
        "# route_trace v1",
        f"# model=tiny.gguf arch=tiny n_layer=4 n_expert={EXPERTS} n_expert_used={TOP_K}",
        *(f"# layer={layer} expert_bytes={size} dense_bytes=7" for layer, size in BYTES.items()),
    ]
    body = ["turn,phase,step,layer,slot,expert,weight,residency,expert_bytes"]
    body += [",".join(map(str, (*row, 0, BYTES[row[3]]))) for row in found]
    path.write_text("\n".join([*(head if preamble else []), *body]) + "\n")
    return path


def naive_lru_hit_rate(found, budget_bytes):
    """Decode hit rate of one byte-budgeted LRU over all layers, by the rules the dump's own README states."""
    batches = {}
    for turn, phase, step, layer, _, expert, weight in found:
        key = (turn, phase, step if phase else -1, layer)
        batches.setdefault(key, []).append((step, -weight, expert))
    cache, hits, lookups = OrderedDict(), Counter(), Counter()
    for (_turn, phase, _step, layer), batch in sorted(batches.items(), key=lambda item: item[0]):
        touched = list(OrderedDict.fromkeys((layer, expert) for _, _, expert in sorted(batch)))
        for key in touched:
            lookups[phase] += 1
            hits[phase] += key in cache
        for _, _, expert in sorted(batch):
            cache[layer, expert] = BYTES[layer]
            cache.move_to_end((layer, expert))
        for key in list(cache):
            if sum(cache.values()) <= budget_bytes:
                break
            if key not in touched:
                del cache[key]
    return hits[1] / lookups[1]


def test_every_decision_arrives(tmp_path):
    found = rows()
    assert import_file(write(tmp_path / "a.route.csv", found), tmp_path / "a.trace") == len(found)
    assert check(tmp_path / "a.trace") == []
    trace = open_trace(tmp_path / "a.trace")
    assert trace.requests["prompt_tokens"].to_list() == [3, 3]
    assert trace.requests["generated_tokens"].to_list() == [12, 12]
    tidy = trace.scan("routing").collect()
    wanted = Counter((layer, expert) for _, _, _, layer, _, expert, _ in found)
    assert Counter(zip(tidy["layer"].to_list(), tidy["expert_id"].to_list(), strict=True)) == wanted
    assert tidy.filter(pl.col("forward_id") == 0)["row"].max() == 2


@pytest.mark.parametrize("budget", [0, 300, 500, 900, 5000])
def test_lru_over_all_layers(tmp_path, budget):
    found = rows(seed=budget)
    import_file(write(tmp_path / "a.route.csv", found), tmp_path / "a.trace")
    result = replay(
        open_trace(tmp_path / "a.trace"), ["vanilla"], [f"lru:scope=global,hold=batch,budget_bytes={budget}"]
    )
    assert result.runs[0].summary["expert_hit_rate_by_kind"]["decode"] == naive_lru_hit_rate(found, budget)


def broken(found, change):
    changed = list(found)
    change(changed)
    return changed


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: f.__setitem__(5, (*f[5][:5], EXPERTS, 0.5)), "expert 6 of 6"),
        (lambda f: f.pop(3), "1 rows"),
        (lambda f: f.__setitem__(4, (*f[4][:6], float("nan"))), "weight nan"),
        (lambda f: f.__setitem__(4, (*f[4][:6], -0.5)), "weight -0.5"),
        (lambda f: f.clear(), "no routed expert"),
        (lambda f: f.__setitem__(0, (0, 0, 0, 0, "x", 1, 0.5)), "cannot be read"),
    ],
)
def test_a_broken_dump_is_refused_in_a_sentence(tmp_path, change, says):
    source = write(tmp_path / "a.route.csv", broken(rows(), change))
    with pytest.raises(UserError, match=says):
        import_file(source, tmp_path / "a.trace")
    assert list(tmp_path.iterdir()) == [source]


def test_a_broken_dump_replaces_nothing(tmp_path):
    import_file(write(tmp_path / "a.route.csv", rows()), tmp_path / "a.trace")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    # the second turn lacks a row, which shows when the first one is written
    source = write(tmp_path / "b.route.csv", rows()[:-1])
    with pytest.raises(UserError, match="has 1 rows"):
        import_file(source, tmp_path / "a.trace", force=True)
    source.unlink()
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.route.csv", "a.trace"]


def test_a_foreign_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="preamble lacks"):
        import_file(write(tmp_path / "a.route.csv", rows(), preamble=False), tmp_path / "a.trace")
    with pytest.raises(UserError, match="no file"):
        import_file(tmp_path / "none.csv", tmp_path / "a.trace")


def test_slots_that_float16_cannot_tell_apart_keep_their_order(tmp_path):
    found = []
    for step in range(4):
        for layer in LAYERS:
            # The second step's weights are equal in the dump already; the slots order its experts all the same.
            second = 0.5 if step == 1 else 0.499999
            found += [(0, 1, step, layer, 0, 4, 0.5), (0, 1, step, layer, 1, 1 + step % 2, second)]
    import_file(write(tmp_path / "a.route.csv", found), tmp_path / "a.trace")
    for segment in open_trace(tmp_path / "a.trace").segments():
        for number in LAYERS:
            layer = segment.layer(number)
            assert (
                np.take_along_axis(layer.expert_ids, np.argsort(-layer.gate_weights, axis=1), 1)[:, 0].tolist()
                == [4] * 4
            )
            assert np.abs(np.sort(layer.gate_weights.view(np.int16)) - np.float16(0.5).view(np.int16)).max() == 1


# Percent of decode lookups that hit, as printed by the replay of the recorded traces (github Helldez/BigMoeOnEdge @2d4f2b1,
# docs/bench-data/2026-07-20-cache-replay, *-curve.csv), at these budgets over all layers; its "layer" and "layerlfu" divide
# them equally.
MEBIBYTES = (250, 500, 750, 1000, 1500, 2000, 2500, 3000, 4000, 6000, 8000)
PUBLISHED = {
    "qwen": {
        "belady:scope=global": (27.496, 45.266, 55.371, 62.671, 72.705, 79.354, 84.150, 87.828, 92.716, 96.623, 97.095),
        "lru:scope=global": (0.000, 0.000, 0.000, 37.679, 47.040, 56.548, 65.107, 70.614, 80.287, 92.133, 95.966),
        "lfu:scope=global": (17.106, 26.636, 34.144, 40.188, 50.279, 58.621, 65.473, 71.265, 80.794, 92.022, 95.969),
        "lru": (38.344, 38.344, 38.344, 42.337, 50.507, 59.399, 65.449, 71.129, 79.715, 90.291, 95.049),
        "lfu": (38.344, 38.344, 38.344, 45.090, 55.244, 63.330, 68.880, 74.186, 81.746, 91.045, 95.201),
    },
    "gptoss": {
        "belady:scope=global": (17.860, 29.384, 37.218, 43.490, 53.168, 59.896, 64.475, 67.795, 73.003, 81.033, 85.026),
        "lru:scope=global": (0.000, 0.000, 0.000, 17.665, 17.990, 30.881, 41.688, 44.835, 51.714, 59.484, 65.885),
        "lfu:scope=global": (8.160, 14.236, 18.685, 23.264, 29.601, 34.983, 39.714, 43.576, 49.783, 59.679, 66.081),
        "lru": (19.054, 19.054, 19.054, 19.054, 25.933, 34.484, 41.189, 45.942, 52.148, 61.589, 67.687),
        "lfu": (19.054, 19.054, 19.054, 19.054, 27.387, 34.245, 40.213, 44.510, 50.846, 61.849, 67.708),
    },
    "gemma": {
        "belady:scope=global": (29.275, 48.220, 58.051, 65.699, 74.857, 80.569, 85.109, 88.633, 92.908, 96.424, 96.424),
        "lru:scope=global": (0.000, 0.000, 35.438, 36.076, 51.081, 62.157, 67.821, 73.099, 81.910, 93.273, 96.233),
        "lfu:scope=global": (18.433, 30.525, 38.993, 45.755, 56.411, 64.089, 70.295, 75.486, 83.433, 93.585, 96.233),
        "lru": (36.024, 36.024, 37.539, 42.951, 54.983, 63.950, 69.896, 74.800, 82.161, 92.309, 95.521),
        "lfu": (36.024, 36.024, 38.802, 47.726, 59.757, 67.617, 73.741, 78.064, 84.349, 92.895, 95.586),
    },
}


def caches(name):
    """One spec a published figure, policies outermost."""
    specs = []
    for cache in PUBLISHED[name]:
        specs += [f"{cache}{',' if ':' in cache else ':'}hold=batch,budget_bytes={size << 20}" for size in MEBIBYTES]
    return specs


def recorded(name, folder):
    """The recorded trace, imported; skips where there is none."""
    if "BIGMOE_TRACES" not in os.environ:
        pytest.skip("BIGMOE_TRACES names no folder with BigMoeOnEdge's recorded traces")
    source = Path(os.environ["BIGMOE_TRACES"]) / f"{name}.route.csv"
    if not source.exists():
        pytest.skip(f"the folder BIGMOE_TRACES names has no {source.name}")
    import_file(source, folder / f"{name}.trace")
    return open_trace(folder / f"{name}.trace")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_hit_rates(name, tmp_path):
    runs = replay(recorded(name, tmp_path), residency=caches(name), keep_cells=False).runs
    rates = [round(100 * run.summary["expert_hit_rate_by_kind"]["decode"], 3) for run in runs]
    assert rates == [rate for row in PUBLISHED[name].values() for rate in row]
