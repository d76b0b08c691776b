"""lru, lfu and belady against lists and loops, and Belady's against every other way to fill a cache."""

from __future__ import annotations

from collections import OrderedDict
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.policy import ExpertStream
from simulator.registry import load_policy
from simulator.residency.belady import BOUND
from tests.made_up.tables import geometry, naive_cell, plain_forwards, stream_of
from tracer.errors import UserError

E = 6


def naive_cache(cells, layers, sizes, capacity, rank, forget=False):
    """What fits the budget is kept at a cell's end, the least ``rank(key, cell, touches)`` first; sizes by layer.

    ``touches``: of every cell its keys in order of last touch. Returns per cell (hits, promotions, demotions, held at most,
    their bytes). ``forget``: the rank of a key does not know the touches before it was fetched.
    """
    touches = [[(layer, e) for e in naive_cell(rows)[2]] for layer, rows in zip(layers, cells, strict=True)]
    held, fetched, answers = [], {}, []
    for c, (layer, rows) in enumerate(zip(layers, cells, strict=True)):
        first, _, _ = naive_cell(rows)
        hits = [(layer, e) in held for e in first]
        missed = [key for key in touches[c] if key not in held]
        fetched |= dict.fromkeys(missed, c if forget else 0)

        def place(key, c=c, fetched=fetched):
            seen = [[k for k in keys if k != key or at >= fetched[key]] for at, keys in enumerate(touches)]
            return rank(key, c, seen)

        after = []
        for key in sorted([*held, *missed], key=place):
            if sum(sizes[one[0]] for one in [*after, key]) > capacity:
                break
            after.append(key)
        number = max(len(held), len(after))
        size = max(sum(sizes[at] for at, _ in keys) for keys in (held, after))
        answers.append((hits, len(missed), len(missed) + len(held) - len(after), number, size))
        held = after
    return answers


def latest(key, cell, touches):
    """Latest cell first, then latest last touch in it."""
    at = max(c for c in range(cell + 1) if key in touches[c])
    return -at, -touches[at].index(key)


def naive_lru(cells, layers, sizes, capacity):
    return naive_cache(cells, layers, sizes, capacity, latest)


def most_cells(key, cell, touches):
    """Most cells first, ties as LRU."""
    return -sum(key in keys for keys in touches[: cell + 1]), *latest(key, cell, touches)


def naive_lfu(cells, layers, sizes, capacity):
    return naive_cache(cells, layers, sizes, capacity, most_cells)


def naive_forgetful_lfu(cells, layers, sizes, capacity):
    """LFU whose uses start anew when a key is fetched again."""
    return naive_cache(cells, layers, sizes, capacity, most_cells, forget=True)


def naive_belady(cells, layers, sizes, capacity):
    """Soonest next cell first, ties to the lowest layer, then to the lowest id."""

    def rank(key, cell, touches):
        return min((c for c in range(cell + 1, len(touches)) if key in touches[c]), default=len(touches)), key

    return naive_cache(cells, layers, sizes, capacity, rank)


def naive_batch_lru(cells, layers, sizes, capacity):
    """hold=batch: keys in an OrderedDict, oldest first; sizes by layer. Answers as those of :func:`naive_cache`."""
    cache, answers = OrderedDict(), []
    for layer, rows in zip(layers, cells, strict=True):
        first, _, last = naive_cell(rows)
        hits = [(layer, e) in cache for e in first]
        for e in last:
            cache[layer, e] = sizes[layer]
            cache.move_to_end((layer, e))
        answer = [hits, len(first) - sum(hits), 0, len(cache), sum(cache.values())]
        for key in list(cache):
            if sum(cache.values()) > capacity and key not in {(layer, e) for e in first}:
                del cache[key]
                answer[2] += 1
        answers.append(tuple(answer))
    return answers


def naive_ranked(cells, layers, sizes, capacity, rank):
    """A dict of keys; ``rank(key, cell, history)`` says who goes first, history = [(cell, key in order of last touch)]."""
    cache, history, answers = {}, [], []
    for c, (layer, rows) in enumerate(zip(layers, cells, strict=True)):
        first, _, last = naive_cell(rows)
        hits = [(layer, e) in cache for e in first]
        for e in last:
            cache[layer, e] = sizes[layer]
            history.append((c, (layer, e)))
        answer = [hits, len(first) - sum(hits), 0, len(cache), sum(cache.values())]
        idle = [key for key in cache if key not in {(layer, e) for e in first}]
        for key in sorted(idle, key=lambda key: rank(key, c, history)):
            if sum(cache.values()) > capacity:
                del cache[key]
                answer[2] += 1
        answers.append(tuple(answer))
    return answers


def naive_batch_lfu(cells, layers, sizes, capacity):
    def rank(key, cell, history):
        uses = [i for i, (_, other) in enumerate(history) if other == key]
        return len(uses), uses[-1]

    return naive_ranked(cells, layers, sizes, capacity, rank)


def naive_batch_belady(cells, layers, sizes, capacity):
    needs = [{(layer, e) for row in rows for e in row} for layer, rows in zip(layers, cells, strict=True)]

    def rank(key, cell, history):
        later = [c for c in range(cell + 1, len(cells)) if key in needs[c]]
        return -(later[0] if later else len(cells) + 1), key

    return naive_ranked(cells, layers, sizes, capacity, rank)


def naive_batch_forgetful_lfu(cells, layers, sizes, capacity):
    """LFU whose uses start anew when a key is loaded again."""
    uses, answers, touches = {}, [], []
    for layer, rows in zip(layers, cells, strict=True):
        first, _, last = naive_cell(rows)
        hits = [(layer, e) in uses for e in first]
        for e in last:
            uses[layer, e] = uses.get((layer, e), 0) + 1
            touches.append((layer, e))
        held = sum(sizes[at] for at, _ in uses)
        answer = [hits, len(first) - sum(hits), 0, len(uses), held]
        idle = [key for key in uses if key not in {(layer, e) for e in first}]
        for key in sorted(idle, key=lambda key: (uses[key], len(touches) - touches[::-1].index(key))):
            if held > capacity:
                held -= sizes[key[0]]
                del uses[key]
                answer[2] += 1
        answers.append(tuple(answer))
    return answers


CACHES = {
    "lru": naive_lru,
    "lfu": naive_lfu,
    "lfu:forget=true": naive_forgetful_lfu,
    "belady": naive_belady,
    "lru:hold=batch": naive_batch_lru,
    "lfu:hold=batch": naive_batch_lfu,
    "lfu:hold=batch,forget=true": naive_batch_forgetful_lfu,
    "belady:hold=batch": naive_batch_belady,
}


def cache(name, parameters):
    """The policy of a name, which may have parameters of its own."""
    return load_policy("residency", f"{name}{',' if ':' in name else ':'}{parameters}")


def of_run(naive):
    """A definition as the rule asks for it (tests/simulator/definitions.py)."""

    def definition(run, policy):
        answers = naive(run.cells, [0] * len(run.cells), [1], policy.budget)
        cells = []
        for rows, (hits, promotions, demotions, held, _) in zip(run.cells, answers, strict=True):
            first, _, _ = naive_cell(rows)
            cells.append(({e for e, hit in zip(first, hits) if hit}, set(first), promotions, demotions, held))
        return cells

    return definition


NAIVE = {
    f"{name}{',' if ':' in name else ':'}budget={budget}": of_run(naive)
    for name, naive in CACHES.items()
    for budget in (0, 2, 5)
}

rows = st.lists(st.permutations(range(E)).flatmap(lambda p: st.integers(0, 3).map(lambda k: p[:k])), max_size=3)
traces = st.lists(rows, min_size=1, max_size=12)


def answers_of(placement, stream, shared):
    """A placement in the form of the naive answers."""
    cells = []
    for c in range(len(stream.cell_forward)):
        inside = slice(stream.offsets[c], stream.offsets[c + 1])
        held = placement.resident_bytes[c] if shared else placement.resident[c]
        moved = (int(a[c]) for a in (placement.promotions, placement.demotions, placement.resident))
        cells.append((placement.hit[inside].tolist(), *moved, int(held)))
    assert placement.on_gpu.all() and not placement.copied_back.any()
    return cells


def served(policy, streams, forwards, about, layer):
    state = policy.fit(streams, about, layer) if policy.passes == 2 else policy.start(about, layer)
    found = []
    for stream, table in zip(streams, forwards, strict=True):
        placement, state = policy.place(stream, table, about, state)
        found += answers_of(placement, stream, layer is None)
    return found


@pytest.mark.parametrize("name", CACHES)
@given(cells=traces, budget=st.integers(0, E), cut=st.integers(0, 12))
@settings(max_examples=120, deadline=None)
def test_a_layers_cache_equals_the_naive_one_however_the_trace_is_cut(name, cells, budget, cut):
    policy, about = cache(name, f"budget={budget}"), geometry(E)
    expected = CACHES[name](cells, [0] * len(cells), [1], budget)
    pieces = [piece for piece in (cells[:cut], cells[cut:]) if piece]
    found = served(policy, [stream_of(p) for p in pieces], [plain_forwards(p) for p in pieces], about, 0)
    assert found == expected


@pytest.mark.parametrize("name", CACHES)
@given(cells=traces, room=st.integers(0, 120), cut=st.integers(0, 12))
@settings(max_examples=120, deadline=None)
def test_a_cache_over_layers_of_unequal_bytes_equals_the_naive_one(name, cells, room, cut):
    cells = cells + cells[: len(cells) % 2]
    layers = [i % 2 for i in range(len(cells))]
    about = geometry(E, layers=(3, 5), expert_bytes={3: 10, 5: 7})
    expected = CACHES[name](cells, layers, [10, 7], room)
    policy = cache(name, f"scope=global,budget_bytes={room}")
    cut = cut // 2 * 2
    pieces = [(cells[a:b], layers[a:b]) for a, b in ((0, cut), (cut, len(cells))) if cells[a:b]]
    streams = [stream_of(*piece) for piece in pieces]
    found = served(policy, streams, [plain_forwards(piece[0]) for piece in pieces], about, None)
    assert found == expected


@pytest.mark.parametrize("name", CACHES)
@given(seed=st.integers(0, 10**6), budget=st.integers(1, E - 1), most=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_long_runs_equal_the_naive_ones(name, seed, budget, most):
    # Long enough for queues and heaps to be packed many times.
    rng = np.random.default_rng(seed)
    popular = rng.dirichlet(np.ones(E))
    cells = [[rng.choice(E, rng.integers(1, most + 1), replace=False, p=popular).tolist()] for _ in range(150)]
    found = served(cache(name, f"budget={budget}"), [stream_of(cells)], [plain_forwards(cells)], geometry(E), 0)
    assert found == CACHES[name](cells, [0] * len(cells), [1], budget)


@pytest.mark.parametrize("name", ["belady", "belady:hold=batch"])
@given(cells=traces, room=st.integers(0, 90), cuts=st.lists(st.integers(0, 12), max_size=11), shared=st.booleans())
@settings(max_examples=150, deadline=None)
def test_belady_cut_into_many_segments_equals_the_naive_one_over_the_whole_run(name, cells, room, cuts, shared):
    layers, sizes, about = [0] * len(cells), [1], geometry(E)
    if shared:
        cells = cells + cells[: len(cells) % 2]
        layers, sizes = [i % 2 for i in range(len(cells))], [10, 7]
        about = geometry(E, layers=(3, 5), expert_bytes={3: 10, 5: 7})
        cuts = [cut // 2 * 2 for cut in cuts]
    budget = f"scope=global,budget_bytes={room}" if shared else f"budget={room // 15}"
    bounds = [0, *sorted(min(cut, len(cells)) for cut in cuts), len(cells)]
    pieces = [slice(*pair) for pair in pairwise(bounds)]
    streams = [stream_of(cells[piece], layers[piece]) for piece in pieces]
    forwards = [plain_forwards(cells[piece]) for piece in pieces]
    found = served(cache(name, budget), streams, forwards, about, None if shared else 0)
    assert found == CACHES[name](cells, layers, sizes, room if shared else room // 15)


def held_bytes(state):
    """Bytes of all arrays in a state."""
    if isinstance(state, np.ndarray):
        return state.nbytes
    return sum(held_bytes(part) for part in state) if isinstance(state, tuple) else 0


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_what_belady_keeps_does_not_grow_with_lookups(scope):
    rng = np.random.default_rng(0)
    policy, about = load_policy("residency", f"belady:budget=2,scope={scope}"), geometry(E)
    kept = []
    for cells in (5, 500):
        segments = [[[rng.permutation(E)[:3].tolist()] for _ in range(cells)] for _ in range(4)]
        state = policy.fit([stream_of(s) for s in segments], about, None if scope == "global" else 0)
        kept.append(held_bytes(state))
        for segment in segments:
            _, state = policy.place(stream_of(segment), plain_forwards(segment), about, state)
            assert held_bytes(state) <= kept[-1]
    assert kept[0] == kept[1]


def naive_belady_of_single_lookups(layers, experts, capacity):
    """Loads of one cache that counts keys, one lookup a batch: a dict of each held key's next need."""
    following, later = [], {}
    for n in range(len(experts) - 1, -1, -1):
        following.append(later.get((layers[n], experts[n]), len(experts)))
        later[layers[n], experts[n]] = n
    held, loads = {}, []
    for n, key in enumerate(zip(layers, experts, strict=True)):
        loads.append(key not in held)
        held[key] = following[-1 - n]
        if len(held) > capacity:
            del held[min((one for one in held if one != key), key=lambda one: (-held[one], one))]
    return loads


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_belady_equals_the_naive_one_where_needs_are_hundreds_of_thousands_of_lookups_apart(scope):
    # 2 ** 18 lookups of a cache fill one word of the third level.
    rng, number, rare = np.random.default_rng(4), 560_000, [(4, 3), (5, 40_000), (5, 270_000)]
    experts = rng.choice(4, number)
    for expert, apart in rare:
        experts[rng.integers(0, apart) :: apart] = expert
    layers = rng.choice(2, number, p=[0.05, 0.95])
    about = geometry(E, layers=(3, 5), expert_bytes={3: 10, 5: 10})
    stream = ExpertStream(
        cell_forward=np.arange(number),
        cell_layer=layers.astype(np.int32),
        offsets=np.arange(number + 1),
        experts=experts.astype(np.uint16),
        tokens=np.ones(number, np.uint32),
        last_touch=np.zeros(number, np.uint16),
    )
    policy = load_policy("residency", f"belady:budget=3,scope={scope},hold=batch")
    found, _ = policy.place(stream, plain_forwards([]), about, policy.fit([stream], about, None))
    loads = np.empty(number, bool)
    for own in [[0], [1]] if scope == "layer" else [[0, 1]]:
        mine = np.isin(layers, own)
        capacity = 3 * len(own)
        loads[mine] = naive_belady_of_single_lookups(layers[mine].tolist(), experts[mine].tolist(), capacity)
    assert found.hit.tolist() == (~loads).tolist()
    assert found.promotions.tolist() == loads.tolist()


def test_belady_refuses_a_stream_it_has_not_looked_ahead_in():
    policy, about, stream = load_policy("residency", "belady:budget=2"), geometry(E), stream_of([[[0, 1]]])
    with pytest.raises(ValueError, match="next use of 0 lookups, the stream has 2"):
        policy.place(stream, plain_forwards([[[0, 1]]]), about, policy.start(about, 0))


@pytest.mark.parametrize("name", CACHES)
def test_placing_twice_from_one_state_gives_the_same_answer(name):
    cells = [[[0, 1], [2, 1]], [[3]], [[0, 4]], [[1, 2]]]
    policy, about, stream = cache(name, "budget=2"), geometry(E), stream_of(cells)
    state = policy.fit([stream], about, 0) if policy.passes == 2 else policy.start(about, 0)
    first, second = (policy.place(stream, plain_forwards(cells), about, state)[0] for _ in range(2))
    assert answers_of(first, stream, False) == answers_of(second, stream, False)


@given(cells=traces, budget=st.integers(1, E))
@settings(max_examples=60, deadline=None)
def test_no_demand_cache_loads_less_than_belady_when_batches_are_single_lookups(cells, budget):
    lookups = [[[e]] for rows in cells for row in rows for e in row]
    if not lookups:
        return
    loads = {name: sum(a[1] for a in naive(lookups, [0] * len(lookups), [1], budget)) for name, naive in CACHES.items()}
    policy = load_policy("residency", f"belady:budget={budget}")
    found = served(policy, [stream_of(lookups)], [plain_forwards(lookups)], geometry(E), 0)
    assert sum(a[1] for a in found) <= min(loads.values())


def fewest_fetches(needs, capacity):
    """Of all ways to fill a cache, whatever it keeps after every cell of what it held or fetched; ``needs`` sets of keys."""
    fetches = {frozenset(): 0}
    for cell in needs:
        after = {}
        for held, number in fetches.items():
            everything = sorted(held | cell)
            for size in range(min(capacity, len(everything)) + 1):
                for kept in map(frozenset, combinations(everything, size)):
                    after[kept] = min(after.get(kept, number + len(cell - held)), number + len(cell - held))
        fetches = after
    return min(fetches.values())


small = st.lists(st.sets(st.integers(0, 4), max_size=4).map(sorted), min_size=1, max_size=7)


@given(cells=small, capacity=st.integers(0, 5), shared=st.booleans())
@settings(max_examples=300, deadline=None)
def test_no_way_to_fill_a_budget_fetches_less_than_belady_where_experts_are_of_one_size(cells, capacity, shared):
    layers = [i % 2 if shared else 0 for i in range(len(cells))]
    needs = [{(layer, e) for e in cell} for layer, cell in zip(layers, cells, strict=True)]
    about = geometry(5, layers=(3, 5), expert_bytes={3: 10, 5: 10}) if shared else geometry(5)
    policy = load_policy("residency", f"belady:scope=global,budget_bytes={10 * capacity + 9}")
    calls = [[cell] for cell in cells]
    found = served(policy, [stream_of(calls, layers)], [plain_forwards(calls)], about, None)
    assert sum(promotions for _, promotions, *_ in found) == fewest_fetches(needs, capacity)


@pytest.mark.parametrize("name", [name for name in CACHES if "batch" not in name])
@given(cells=traces, room=st.integers(0, 102), shared=st.booleans())
@settings(max_examples=60, deadline=None)
def test_what_is_held_fits_the_budget_and_a_budget_of_nothing_hits_nothing(name, cells, room, shared):
    about, layers = geometry(E), [0] * len(cells)
    if shared:
        about, layers = geometry(E, layers=(3, 5), expert_bytes={3: 10, 5: 7}), [i % 2 for i in range(len(cells))]
    budget = room if shared else room // 17
    policy = cache(name, f"scope=global,budget_bytes={room}" if shared else f"budget={budget}")
    found = served(policy, [stream_of(cells, layers)], [plain_forwards(cells)], about, None if shared else 0)
    assert all(held <= budget for *_, held in found)
    assert budget or not any(any(hits) for hits, *_ in found)
    assert all(promotions == hits.count(False) for hits, promotions, *_ in found)


def test_belady_says_where_it_is_a_bound_and_where_it_is_not():
    even, uneven = (geometry(E, layers=(3, 5), expert_bytes={3: 10, 5: size}) for size in (10, 7))
    layered, shared = (load_policy("residency", f"belady:budget=2,scope={scope}") for scope in ("layer", "global"))
    assert layered.notes_on(even) == layered.notes_on(uneven) == shared.notes_on(even) == (BOUND,)
    (note,) = shared.notes_on(uneven)
    assert "clairvoyant" in note and "unequal bytes" in note and "no bound" in note
    (note,) = load_policy("residency", "belady:budget=2,hold=batch").notes_on(even)
    assert "clairvoyant" in note and "stay whole" in note and "no bound" in note


def test_a_batch_larger_than_the_budget_stays_until_the_next_one():
    cells = [[[0, 1, 2]], [[0, 1, 2]], [[5]], [[0]]]
    policy = load_policy("residency", "lru:budget=1,hold=batch")
    found = served(policy, [stream_of(cells)], [plain_forwards(cells)], geometry(E), 0)
    assert found == [
        ([False] * 3, 3, 0, 3, 3),
        ([True] * 3, 0, 0, 3, 3),
        ([False], 1, 3, 4, 4),
        ([False], 1, 1, 2, 2),
    ]


def test_of_a_batch_larger_than_the_budget_the_latest_stay():
    cells = [[[0, 1, 2]], [[0, 1, 2]], [[5]], [[0, 5]]]
    policy = load_policy("residency", "lru:budget=1")
    found = served(policy, [stream_of(cells)], [plain_forwards(cells)], geometry(E), 0)
    assert found == [
        ([False] * 3, 3, 2, 1, 1),
        ([False, False, True], 2, 2, 1, 1),
        ([False], 1, 1, 1, 1),
        ([False, True], 1, 1, 1, 1),
    ]


def test_a_repeat_inside_a_batch_makes_an_expert_more_recent():
    cells = [[[0, 1], [0]], [[2]], [[0]], [[1]]]
    policy = load_policy("residency", "lru:budget=2")
    found = served(policy, [stream_of(cells)], [plain_forwards(cells)], geometry(E), 0)
    assert [hits for hits, *_ in found] == [[False, False], [False], [True], [False]]


@pytest.mark.parametrize("name", ["lru", "lfu", "belady"])
def test_caches_need_a_budget_and_a_known_scope(name):
    with pytest.raises(UserError, match=f"{name} needs a budget"):
        load_policy("residency", name).start(geometry(E), 0)
    with pytest.raises(UserError, match="layer or global"):
        load_policy("residency", f"{name}:budget=1,scope=all")
    with pytest.raises(UserError, match="budget or batch"):
        load_policy("residency", f"{name}:budget=1,hold=all")


def test_layers_of_unequal_bytes_get_equal_shares_of_the_budget():
    about = geometry(E, layers=(3, 5), expert_bytes={3: 10, 5: 7})
    policy = load_policy("residency", "lru:budget_bytes=45")
    # 45 // 2 = 22 bytes a layer.
    assert [policy.experts_per_layer(about, at) for at in (0, 1)] == [2, 3]
    assert load_policy("residency", f"lru:budget={E}").experts_per_layer(about, 0) == E
    assert load_policy("residency", "lru:budget=2,budget_bytes=45").experts_per_layer(about, 1) == 2
    assert load_policy("residency", "lru:budget=2").total_bytes(about) == 2 * 17
    assert load_policy("residency", "lru:budget_bytes=45").total_bytes(about) == 45


def test_streams_without_entries_are_served():
    empty = ExpertStream(
        np.arange(2), np.zeros(2, np.int32), np.zeros(3, np.int64), *(np.zeros(0, np.uint16) for _ in range(3))
    )
    for name in CACHES:
        policy, about = cache(name, "budget=2"), geometry(E)
        state = policy.fit([empty], about, 0) if policy.passes == 2 else policy.start(about, 0)
        placement, _ = policy.place(empty, plain_forwards([[], []]), about, state)
        assert placement.promotions.tolist() == placement.resident.tolist() == [0, 0]
