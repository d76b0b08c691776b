"""Policies by name, by path and by dotted module, and the sentences that refuse them."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulator.registry import AXES, describe, list_policies, load_policy, policy_names, spec_of
from tests.made_up.tables import geometry
from tracer.errors import UserError

OWN = '''
from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True)
class Mine:
    """A policy of my own.

    More about it.
    """

    width: int
    share: float = 0.5
    loud: bool = False
    mode: Literal["fast", "slow"] = "fast"
    label: str = "x"
    most: int | None = None
    requires: ClassVar[frozenset[str]] = frozenset()

    def select(self, layer, trajectory, geometry):
        return None
'''


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN, encoding="utf-8")
    return path


def test_file_names_are_the_policies():
    for axis in AXES:
        files = {p.stem for p in (Path("simulator") / axis).resolve().glob("[!_]*.py")}
        assert set(policy_names(axis)) == files
    assert {"all_resident", "none_resident", "static", "lru", "lfu", "belady", "tide"} <= set(policy_names("residency"))


def test_lists_give_line_and_parameters():
    tide = next(p for p in list_policies("residency") if p.name == "tide")
    assert tide.line.startswith("Refresh the resident set")
    assert tide.source == "arXiv 2605.20179 and its released code (github ims-kdks/TIDE)"
    assert tide.parameters == {
        "budget": None,
        "budget_bytes": None,
        "vram": None,
        "vram_gib": None,
        "split": None,
        "refresh_interval": 2,
        "copy_back": True,
    }
    for axis in AXES:
        assert [p.name for p in list_policies(axis)] == policy_names(axis)
        assert all(p.line for p in list_policies(axis))


def test_values_take_the_types_of_the_fields(own):
    spec = f"{own}:width=3,share=1e-2,loud=TRUE,mode=slow,label=a b,most=none"
    policy = load_policy("routing", spec)
    assert (policy.width, policy.share, policy.loud, policy.mode, policy.label, policy.most) == (
        3,
        0.01,
        True,
        "slow",
        "a b",
        None,
    )
    assert load_policy("routing", f"{own}:width=3,most=4").most == 4
    assert describe(policy) == {
        "name": "mine",
        "parameters": {"width": 3, "share": 0.01, "loud": True, "mode": "slow", "label": "a b"},
    }


def test_a_dotted_name_loads_a_module(own, monkeypatch):
    monkeypatch.syspath_prepend(str(own.parent.parent))
    assert load_policy("routing", f"{own.parent.name}.mine:width=1").width == 1


@pytest.mark.parametrize(
    ("axis", "spec", "reason"),
    [
        ("residency", "nope", r"no residency policy 'nope'; there are all_resident, belady"),
        (
            "residency",
            "lru:colour=red",
            r"no parameter 'colour=red'; its parameters are budget, budget_bytes, hold, scope",
        ),
        ("residency", "lru:budget", "each given as key=value"),
        ("residency", "lru:budget", r"^residency policy lru needs a value for budget; write budget=VALUE, as"),
        ("routing", "dmoe:top_p", r"^routing policy dmoe needs a value for top_p; write top_p=VALUE, as"),
        ("routing", "vanilla:x=1", r"^routing policy vanilla has no parameter 'x=1'; it takes none\.$"),
        ("routing", "vanilla:x", r"^routing policy vanilla has no parameter 'x'; it takes none\.$"),
        ("routing", "dmoe:", r"dmoe is followed by a colon and nothing; write dmoe or dmoe:key=value,key=value\.$"),
        ("routing", "dmoe: ", "followed by a colon and nothing"),
        ("routing", "dmoe:top_p=0.5,", r"dmoe is given an empty parameter; write dmoe or dmoe:key=value"),
        ("residency", "lru:,budget=3", "is given an empty parameter"),
        ("residency", "lru:budget=many", r"lru:budget=many is not a whole number"),
        ("residency", "lru:budget=1,budget=2", "budget twice"),
        ("residency", "lru:budget=1,scope=both", "is not layer or global"),
        ("residency", "tide:budget=1,copy_back=perhaps", "is not true or false"),
        ("residency", "lru:budget=25%%", r"lru:budget=25%% is not a whole number or a share such as 25%"),
        ("residency", "lru:budget=nan%", "a whole number or a share"),
        ("residency", "lru:budget=-25%", "is no amount of memory"),
        ("residency", "lru:budget_bytes=24GX", "is not a size such as 512MB or 24GiB"),
        ("residency", "lru:budget_bytes=1.5", "is not a size"),
        ("residency", "tide:vram=lots", "is not a size"),
        ("residency", "tide:vram_gib=lots", "is not a number"),
        ("routing", "/no/such/file.py", "no policy file"),
        ("routing", "no_such_package.policy", "cannot be imported"),
        ("routing", "simulator.policy", "defines 0 dataclasses with a method select"),
    ],
)
def test_refusals_are_one_sentence(axis, spec, reason):
    with pytest.raises(UserError, match=reason) as caught:
        load_policy(axis, spec)
    assert "\n" not in str(caught.value)


def test_a_file_that_fails_or_lacks_a_value_is_refused(tmp_path, own):
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0", encoding="utf-8")
    with pytest.raises(UserError, match=r"broken.py fails to load: ZeroDivisionError"):
        load_policy("routing", str(broken))
    with pytest.raises(UserError, match="needs a value for width"):
        load_policy("routing", str(own))


def test_two_files_of_one_name_do_not_meet(tmp_path, own):
    other = tmp_path / "elsewhere" / "mine.py"
    other.parent.mkdir()
    other.write_text(OWN.replace("share: float = 0.5", "share: float = 0.75"), encoding="utf-8")
    assert load_policy("routing", f"{own}:width=1").share == 0.5
    assert load_policy("routing", f"{other}:width=1").share == 0.75


def test_whole_numbers_may_be_written_with_an_exponent():
    assert load_policy("residency", "lru:budget_bytes=1.5e6").budget_bytes == 1_500_000
    with pytest.raises(UserError, match=r"budget=2\.5 is not a whole number"):
        load_policy("residency", "lru:budget=2.5")
    with pytest.raises(UserError, match="budget=inf is not a whole number"):
        load_policy("residency", "lru:budget=inf")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("24GiB", 24 * 2**30),
        ("512MB", 512 * 10**6),
        ("1.5 kb", 1500),
        ("0.3KiB", 307),
        ("1e3B", 1000),
        ("12345678901234567", 12345678901234567),
    ],
)
def test_sizes_take_units(text, size):
    policy = load_policy("residency", f"tide:vram={text},budget_bytes={text}")
    assert policy.vram == policy.budget_bytes == size
    assert load_policy("residency", spec_of(policy)) == policy


def test_a_budget_may_be_a_share_of_a_layers_experts():
    for text, experts, held in (("25%", 256, 64), ("29%", 100, 29), ("12.5%", 60, 7), ("0%", 8, 0), ("100%", 8, 8)):
        policy = load_policy("residency", f"lru:budget={text}")
        assert policy.experts_per_layer(geometry(experts), 0) == held
        assert policy.settled(geometry(experts)).budget == held
        assert load_policy("residency", spec_of(policy)) == policy
    assert load_policy("residency", "lru:budget=25%") != load_policy("residency", "lru:budget=25")
