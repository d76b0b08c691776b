"""Grids inside specs against loops over their values."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.spec import MAX_SPECS, expand, split
from tracer.errors import UserError


def naive_expand(name, parameters):
    """Specs of a list of (key, values), the last key changing fastest."""
    specs = [name + ":"]
    for n, (key, values) in enumerate(parameters):
        specs = [f"{spec}{',' if n else ''}{key}={value}" for spec in specs for value in values]
    return specs


whole = st.integers(-5, 9)
ranges = st.tuples(whole, st.integers(0, 6), st.integers(1, 3)).map(
    lambda r: (
        f"{r[0]}..{r[0] + r[1]}" + (f"..{r[2]}" if r[2] > 1 else ""),
        [str(n) for n in range(r[0], r[0] + r[1] + 1) if (n - r[0]) % r[2] == 0],
    )
)
plain = st.sampled_from(["0.6", "true", "layer", "-3", "1e-3", "../x.toml"]).map(lambda text: (text, [text]))
values = st.lists(ranges | plain, min_size=1, max_size=3).map(
    lambda parts: ("|".join(text for text, _ in parts), [value for _, found in parts for value in found])
)


@given(parameters=st.lists(st.tuples(st.sampled_from("abc"), values), min_size=1, max_size=3))
@settings(max_examples=100, deadline=None)
def test_a_grid_is_the_product_of_its_values(parameters):
    spec = "name:" + ",".join(f"{key}={text}" for key, (text, _) in parameters)
    assert expand(spec) == naive_expand("name", [(key, found) for key, (_, found) in parameters])


@pytest.mark.parametrize(
    "spec", ["vanilla", "tide:budget=4", "../my_policy.py", "a.b.c", "C:\\my\\policy.py", "tide:budget"]
)
def test_a_spec_without_a_grid_stands_for_itself(spec):
    assert expand(spec) == [spec]


def test_a_path_may_hold_colons():
    assert split("C:\\my\\policy.py:budget=1..2,x=3") == ("C:\\my\\policy.py", "budget=1..2,x=3")
    assert expand("C:\\p.py:budget=1..2") == ["C:\\p.py:budget=1", "C:\\p.py:budget=2"]


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("tide:budget=", "'budget=' in tide:budget= has an empty value"),
        ("tide:budget=32||64", "empty value"),
        ("tide:budget=9..3", "The range 9..3 in tide:budget=9..3 is empty"),
        ("tide:budget=1..9..0", "is empty"),
        ("dmoe:top_p=0.1..0.9", "0.1..0.9 in dmoe:top_p=0.1..0.9 is no range"),
        ("tide:budget=1..", "is no range"),
        ("tide:budget=1..1000000000000", f"holds {MAX_SPECS:,} at most"),
        ("tide:budget=1..1000,refresh_interval=1..101", f"holds {MAX_SPECS:,} at most"),
    ],
)
def test_a_grid_that_is_none_is_refused_in_a_sentence(spec, sentence):
    with pytest.raises(UserError) as error:
        expand(spec)
    assert sentence in str(error.value) and str(error.value).endswith(".") and "\n" not in str(error.value)
