"""TEAM's decoding loop: vanilla when switched off, branches that do not see each other, and a trace that replays exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from simulator.replaying import replay
from tests.made_up.calls import assert_unfinished
from tests.made_up.routers import naive_choose, route_row
from tests.simulator.test_acceptance_team import naive_accept
from tests.tiny_models import BLOCK, EOS, MASK, VOCAB, block_causal, hooks_left, prompt, tiny_model
from tracer.checking import check
from tracer.decode import decode_sdar
from tracer.decoding.team_layers import TeamLayers, check_limited, choose_inside
from tracer.decoding.team_loop import decode_team
from tracer.decoding.team_rules import BRANCHES, chosen_branch
from tracer.errors import UserError
from tracer.parquet import open_trace
from tracer.recording.context import record
from tracer.schema import COMMIT, DENOISE, MASKED
from tracer.trace import RouterSpec

OPTIONS = {"mask_id": MASK, "block_length": BLOCK, "steps": BLOCK, "threshold": 0.35}
HOT = {"hot_distance": 1, "hot_probability": 0.9}
OFF = {"reuse": False, "limit": False, "speculate": False}
SWITCHES = [
    {"reuse": a, "limit": b, "speculate": c} for a in (False, True) for b in (False, True) for c in (False, True)
]


def naive_chosen(surest, guess, token, taken):
    """The specification's A1, A2, A12, A21, spelled out."""
    a, b = surest[0], surest[1] if len(surest) > 1 else None
    a1 = bool(taken[0][a]) and token[0][a] == guess[a]
    a2 = b is not None and bool(taken[0][b]) and token[0][b] == guess[b]
    a12 = b is not None and bool(taken[1][b]) and token[1][b] == guess[b]
    a21 = a2 and bool(taken[2][a]) and token[2][a] == guess[a]
    if (a1 and a2) or (a1 and a12) or (a2 and a21):
        return 3
    return 1 if a1 else 2 if a2 else 0


def test_the_chosen_branch_is_the_specification_s():
    rng, seen = np.random.default_rng(0), set()
    for _ in range(400):
        surest = rng.permutation(6)[: rng.integers(1, 3)].tolist()
        guess, token = rng.integers(0, 2, 6), rng.integers(0, 2, (4, 6))
        taken = rng.random((4, 6)) < 0.6
        places = np.array([*surest, -1][:2])
        found = chosen_branch(places, guess, token, taken.astype(np.uint8))
        assert found == naive_chosen(surest, guess, token, taken)
        seen.add((len(surest), found))
    assert seen == {(1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (2, 3)}


@pytest.mark.parametrize("places", [[4, 1, 2], [4, 1, -1], [3, -1, -1]])
def test_with_any_number_of_guesses_a_branch_holds_when_smaller_ones_that_hold_confirm_it(places):
    rng, seen = np.random.default_rng(1), set()
    for _ in range(300):
        guess, token = rng.integers(0, 2, 6), rng.integers(0, 2, (8, 6))
        taken = rng.random((8, 6)) < 0.7
        confirmed = [
            {i for i, j in enumerate(places) if j >= 0 and taken[r][j] and token[r][j] == guess[j]} for r in range(8)
        ]
        guesses = [{i for i in range(3) if r >> i & 1} for r in range(8)]
        holds = [0]
        for r in range(1, 8):
            if any(guesses[s] < guesses[r] and guesses[r] - guesses[s] <= confirmed[s] for s in holds):
                holds.append(r)
        found = chosen_branch(np.array(places), guess, token, taken.astype(np.uint8))
        assert found == max(holds, key=lambda r: (len(guesses[r]), -r))
        seen.add(found)
    assert len(seen) == 2 ** sum(j >= 0 for j in places)


def assert_same_calls(one, other):
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert [{**p, "duration_ns": 0} for p in a.parts] == [{**p, "duration_ns": 0} for p in b.parts]
        for name, column in a.tokens.items():
            assert np.array_equal(column, b.tokens[name], equal_nan=column.dtype.kind == "f"), name
        assert a.routing.layers == b.routing.layers
        for name in ("expert_ids", "gate_weights", "router_scores", "count"):
            values, found = getattr(a.routing, name), getattr(b.routing, name)
            assert (values is None and found is None) or np.array_equal(values, found), name


@pytest.mark.parametrize("length", [3, 8, 11])
@pytest.mark.parametrize("steps", [8, 3])
def test_switched_off_it_is_the_vanilla_loop(length, steps):
    model, tokens = tiny_model("sdar"), prompt(length)
    options = {**OPTIONS, "steps": steps, "gen_length": 20, "eos_id": EOS}
    with record(model, level="scores") as plain:
        expected = decode_sdar(model, tokens, recorder=plain, **options)
    with record(model, level="scores") as team:
        found = decode_team(model, tokens, recorder=team, **OFF, **options)
    assert found.ids.tolist() == expected.ids.tolist()
    assert (found.forwards, found.stop_reason) == (expected.forwards, expected.stop_reason)
    assert_same_calls(team.calls, plain.calls)
    assert team.requests == plain.requests


def watched(model, **options):
    """Every four-branch call of a run: its cached tokens, its input and its logits; and the result."""
    calls, forward = [], model.forward

    def watch(**arguments):
        cached = arguments["past_key_values"].get_seq_length()
        output = forward(**arguments)
        if arguments["input_ids"].shape[1] == BRANCHES * BLOCK:
            calls.append((cached, arguments["input_ids"][0].clone(), output.logits[0].clone()))
        return output

    model.forward = watch
    try:
        return decode_team(model, **options), calls
    finally:
        model.forward = forward


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_branches_do_not_see_each_other(attention):
    model, tokens = tiny_model("sdar"), prompt(11)
    model.set_attn_implementation(attention)
    result, calls = watched(
        model, input_ids=tokens, gen_length=20, reuse=False, limit=False, **{**OPTIONS, "threshold": 0.2}
    )
    whole = torch.cat((result.ids, torch.full((BLOCK,), MASK)))
    assert len(calls) > 3
    for cached, given, logits in calls:
        for branch in range(BRANCHES):
            own = given.view(BRANCHES, BLOCK)[branch]
            length = cached + BLOCK
            mask = block_causal(length)
            if attention == "eager":
                mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
            with torch.no_grad():
                alone = model(
                    input_ids=torch.cat((whole[:cached], own))[None],
                    attention_mask=mask,
                    position_ids=torch.arange(length)[None],
                    use_cache=False,
                ).logits[0, cached:]
            torch.testing.assert_close(logits.view(BRANCHES, BLOCK, -1)[branch], alone, rtol=1e-4, atol=1e-4)


def diverse_model():
    """A tiny model whose masked rows take their experts from what they see, not from the mask's embedding they share."""
    model = tiny_model("sdar")
    with torch.no_grad():
        model.model.embed_tokens.weight[MASK] *= 0.02
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(20)
    return model


def run(path, switches, lengths=(11, 6), level="scores", **options):
    model = diverse_model()
    with record(model, path, level=level) as recorder:
        for seed, length in enumerate(lengths):
            with recorder.request():
                decode_team(
                    model,
                    prompt(length, seed),
                    gen_length=20,
                    recorder=recorder,
                    **{**OPTIONS, **HOT, **switches, **options},
                )
    assert hooks_left(model) == 0
    return open_trace(path)


def spec_of(switches):
    values = {**HOT, **switches}
    return "team:" + ",".join(f"{name}={str(value).lower()}" for name, value in values.items())


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "+".join(k for k, v in s.items() if v) or "off")
def test_a_recorded_run_replays_exactly(tmp_path, switches):
    trace = run(tmp_path / "run.trace", switches)
    assert check(tmp_path / "run.trace") == []
    result = replay(trace, ["vanilla", spec_of(switches)])
    vanilla, team = result.runs
    assert (vanilla.estimate, team.estimate) == (False, False)
    same = {key: value for key, value in vanilla.summary.items() if key != "gate_retained"}
    assert {key: team.summary[key] for key in same} == same
    columns = ("forward_id", "layer", "assignments", "unique_experts")
    cells = [result.cells.filter(result.cells["run"] == n).select(columns).rows() for n in (0, 1)]
    assert cells[0] == cells[1]
    denoise = gained = 0
    unique = []
    for segment in trace.segments():
        forwards, tokens = segment.forwards, segment.tokens
        for f in np.flatnonzero(forwards.kind == DENOISE):
            rows = slice(forwards.row_offsets[f], forwards.row_offsets[f + 1])
            taken = tokens.accepted[rows].reshape(int(forwards.branches[f]), BLOCK).sum(axis=1)
            kept = max(int(forwards.chosen_branch[f]), 0)
            gained += (0, 1, 1, 2)[kept] + int(taken[kept])
            denoise += 1
            for layer in segment.layers:
                found = segment.layer(layer)
                own = [t for t in range(rows.start, rows.stop) if found.count[t]]
                unique.append(len({e for t in own for e in found.expert_ids[t].tolist()}))
    assert vanilla.summary["tokens_per_forward"] == gained / denoise
    assert vanilla.summary["unique_experts"] == sum(unique) / len(unique)


def test_rows_run_what_the_rules_say(tmp_path):
    trace = run(tmp_path / "run.trace", {}, lengths=(11, 6, 8))
    (segment,) = trace.segments()
    forwards, tokens, cold_rows, chosen = segment.forwards, segment.tokens, 0, set()
    layers = [segment.layer(layer, True) for layer in segment.layers]
    before = None
    for f in range(forwards.num_forwards):
        rows = np.arange(forwards.row_offsets[f], forwards.row_offsets[f + 1])
        if forwards.kind[f] != DENOISE:
            assert all((layer.count[rows] == 2).all() for layer in layers)
            before = None
            continue
        states = (tokens.state[rows] != MASKED).reshape(-1, BLOCK)
        sure = tokens.confidence[rows].reshape(-1, BLOCK)
        taken = tokens.accepted[rows].reshape(-1, BLOCK)
        decoded, cold = set(), set()
        if before is not None:
            known, just, p = before
            masked = [j for j in range(BLOCK) if not states[0, j]]
            surest = sorted(masked, key=lambda j, p=p: (-p[j], j))[:2]
            decoded = {j for j in range(BLOCK) if known[j] and not just[j]}
            there = [j for j in range(BLOCK) if states[3, j]]
            for j in masked:
                far = min(abs(j - k) for k in there) >= HOT["hot_distance"]
                if far and j not in surest and p[j] < np.float32(HOT["hot_probability"]):
                    cold.add(j)
        for layer in layers:
            score = layer.router_scores[rows]
            own = [t for t in range(len(rows)) if t % BLOCK not in decoded]
            sets = {t: set(route_row(score[t], layer.router)[0]) for t in own}
            if cold:
                inside = set().union(*(sets[t] for t in own if t % BLOCK not in cold))
                again = [t for t in own if t % BLOCK in cold]
                cold_rows += sum(not sets[t] <= inside for t in again)
                for t in again:
                    ids, weights = naive_choose(score[t], inside, layer.router)
                    sets[t] = set(ids)
                    found = dict(zip(layer.expert_ids[rows[t]].tolist(), layer.gate_weights[rows[t]], strict=True))
                    assert np.allclose([found[e] for e in ids], weights, atol=1e-3)
            assert (layer.count[rows] > 0).nonzero()[0].tolist() == own
            assert all(set(layer.expert_ids[rows[t]].tolist()) == sets[t] for t in own)
        for r in range(len(states)):
            masked = {j for j in range(BLOCK) if not states[r, j]}
            assert set(np.flatnonzero(taken[r]).tolist()) == naive_accept(masked, sure[r], OPTIONS["threshold"], 1)
        kept = max(int(forwards.chosen_branch[f]), 0)
        chosen.add(int(forwards.chosen_branch[f]))
        before = states[kept], taken[kept], sure[kept]
    # The run is only worth anything if it went through every case.
    assert cold_rows > 0 and chosen >= {-1, 0, 3}
    assert (forwards.kind == COMMIT).any()


def test_decoded_rows_keep_the_output_of_the_branch_before():
    model, outputs, plans = tiny_model("sdar"), [], []
    block = model.model.layers[1].mlp
    step, keep = TeamLayers.step, TeamLayers.keep

    class Watched(TeamLayers):
        def step(self, branches, decoded, cold):
            plans.append([branches, None if decoded is None else torch.from_numpy(decoded), None])
            step(self, branches, decoded, cold)

        def keep(self, branch):
            plans[-1][2] = branch
            keep(self, branch)

    seen = []
    handle = block.register_forward_hook(lambda module, args, output: seen.append((len(plans), output[0].clone())))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tracer.decoding.team_loop.TeamLayers", Watched)
        decode_team(model, prompt(11), gen_length=20, limit=False, **OPTIONS)
    handle.remove()
    by_plan = {}
    for number, output in seen:
        by_plan.setdefault(number - 1, output)
    kept_rows = 0
    for number, (branches, decoded, _) in enumerate(plans):
        if decoded is None:
            continue
        outputs = by_plan[number].view(branches, BLOCK, -1)
        before = by_plan[number - 1].view(plans[number - 1][0], BLOCK, -1)[plans[number - 1][2]]
        for branch in range(branches):
            assert torch.equal(outputs[branch][decoded], before[decoded])
            kept_rows += int(decoded.sum())
            assert not torch.equal(outputs[branch][~decoded], before[~decoded])
    assert kept_rows > 0


def test_choosing_inside_a_set_is_the_plain_choice():
    rng = np.random.default_rng(2)
    for trial in range(40):
        spec = RouterSpec(
            9,
            3,
            norm_topk_prob=bool(trial % 2),
            expert_bias=rng.random(9).astype(np.float32) if trial % 3 else None,
            bias_in_weights=trial % 5 == 0,
            routed_scaling_factor=2.5,
            expert_scale=rng.random(9).astype(np.float32) if trial % 4 else None,
        )
        score = np.round(rng.random((4, 9)), 1).astype(np.float32)
        inside = rng.permutation(9)[: rng.integers(3, 10)]
        allowed = np.isin(np.arange(9), inside)
        ids, weights = choose_inside(spec, torch.from_numpy(score), torch.from_numpy(allowed))
        for t in range(4):
            expected, own = naive_choose(score[t], set(inside.tolist()), spec)
            order = ids[t].argsort()
            assert ids[t][order].tolist() == expected
            assert np.allclose(weights[t][order], own, rtol=1e-5)


@pytest.mark.parametrize("level", ["ids", "active"])
def test_lower_levels_replay_without_choosing_anew(tmp_path, level):
    trace = run(tmp_path / "run.trace", {}, level=level)
    assert check(tmp_path / "run.trace") == []
    result = replay(trace, ["vanilla", spec_of({"reselect": False})])
    assert result.runs[1].estimate is False
    assert result.runs[0].summary["unique_experts"] == result.runs[1].summary["unique_experts"]
    with pytest.raises(UserError, match="needs router scores of all experts"):
        replay(trace, [spec_of({})])


def test_the_trace_says_what_ran(tmp_path):
    trace = run(tmp_path / "run.trace", {"reuse": False})
    decoding = trace.meta.decoding
    expected = {"loop": "team", "threshold": 0.35, "steps": BLOCK, "reuse": False, "limit": True, "speculate": True}
    assert {key: decoding[key] for key in expected} == expected
    assert {key: decoding[key] for key in HOT} == HOT
    with pytest.raises(UserError, match="recorded under TEAM with reuse=false"):
        replay(trace, [spec_of({})])
    model = tiny_model("sdar")
    with record(model) as recorder:
        decode_team(model, prompt(6), gen_length=8, recorder=recorder, **OPTIONS)
        with pytest.raises(UserError, match="begun with reuse=True, not False"):
            decode_team(model, prompt(6), gen_length=8, recorder=recorder, reuse=False, **OPTIONS)
        decode_team(model, prompt(7), gen_length=8, recorder=recorder, **OPTIONS)
    assert [row["stop_reason"] for row in recorder.requests] == ["length", "length"]


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "+".join(k for k, v in s.items() if v) or "off")
def test_recording_changes_nothing(switches):
    model, tokens = tiny_model("sdar"), prompt(9)
    options = {**OPTIONS, **HOT, **switches, "gen_length": 20}
    alone = decode_team(model, tokens, **options)
    with record(model) as recorder:
        found = decode_team(model, tokens, recorder=recorder, **options)
    assert found.ids.tolist() == alone.ids.tolist() and found.forwards == alone.forwards
    assert MASK not in found.ids.tolist()


@pytest.mark.parametrize("fails_at", [1, 3, 4])
def test_a_run_that_breaks_leaves_a_sound_trace(tmp_path, fails_at):
    model, forward, calls = tiny_model("sdar"), None, 0
    forward = model.model.layers[2].mlp.experts.forward

    def breaks(*args):
        nonlocal calls
        calls += 1
        if calls > fails_at:
            raise RuntimeError("gone")
        return forward(*args)

    model.model.layers[2].mlp.experts.forward = breaks
    with pytest.raises(RuntimeError, match="gone"), record(model, tmp_path / "run.trace", level="scores") as recorder:
        decode_team(model, prompt(9), gen_length=16, recorder=recorder, **OPTIONS)
    assert hooks_left(model) == 0
    assert_unfinished(tmp_path / "run.trace", fails_at)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hot_probability": 1.5}, "hot_probability"),
        ({"hot_distance": 0}, "hot_distance"),
        ({"hot_distance": 1.5}, "hot_distance"),
        ({"steps": 0}, "steps"),
        ({"threshold": -1.0}, "threshold"),
    ],
)
def test_bad_options_are_told_in_one_sentence(changes, words):
    with pytest.raises(UserError, match=words):
        decode_team(tiny_model("sdar"), prompt(9), gen_length=8, **{**OPTIONS, **changes})


def test_routers_that_cannot_be_limited_are_refused():
    model = tiny_model("llada2")
    with pytest.raises(UserError, match=r"so its rows cannot be held to a set of experts; pass limit=False"):
        decode_team(model, prompt(9), gen_length=8, **OPTIONS)
    assert hooks_left(model) == 0
    with pytest.raises(UserError, match=r"cannot be held to a set of experts; .* capture with --loop sdar"):
        check_limited(model, range(VOCAB))
    assert hooks_left(model) == 0
    check_limited(tiny_model("sdar"), range(VOCAB))
    result = decode_team(model, prompt(9), gen_length=8, limit=False, **OPTIONS)
    assert result.generated == 8 and MASK not in result.ids.tolist()
