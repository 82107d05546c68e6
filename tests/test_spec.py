"""The spec: what it accepts, and that all its mistakes are told at once."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from methods.profile import Profile
from search.base import SpecError
from search.spec import Amount, SearchSpec, load, parse

GOOD = """
name: digits
model: {source: zoo, name: resnet8}
data: {source: digits}
methods: [itpruner, alds]
devices: {edge: {channels: 4}, server: {channels: 16}}
budgets:
  - {name: half, macs: 50%}
  - {name: tiny, macs: 25%, params: 20k, device: server}
search: {trials: 4, timeout: 2m}
"""


def spec(text: str = GOOD) -> SearchSpec:
    return parse(text, folder=Path())


def mistakes(text: str) -> str:
    with pytest.raises(SpecError) as caught:
        parse(text, folder=Path())
    return str(caught.value)


def test_a_good_spec_in_absolute_units() -> None:
    profile = Profile((), (), macs=1001, params=50_000, input_shape=(1, 8, 8))
    half, tiny = spec().limits(profile)
    assert (half.macs, half.params, half.channels) == (500, None, 4)
    assert (tiny.macs, tiny.params, tiny.channels) == (250, 20_000, 16)
    assert spec().search.timeout == 120
    assert spec().candidates == ("itpruner", "alds", "uniform")


@given(st.integers(1, 10**12), st.integers(1, 1000))
def test_a_share_never_exceeds_the_teachers_part(teacher: int, permille: int) -> None:
    limit = Amount("", share=Fraction(permille, 1000)).of(teacher)
    assert limit == teacher * permille // 1000


def test_all_mistakes_at_once_with_the_nearest_key() -> None:
    told = mistakes("""
name: digits
model: {source: zoo, name: resnet8, wights: x}
data: {source: digits, validation: 2}
method: [alds]
budgets:
  - {name: half, macs: 50 ms}
  - {name: more, macs: 150%}
  - {name: latest, params: 10%, devic: cpu}
  - {name: none}
  - {name: zero, macs: 0, device: phone}
""")
    assert told.startswith("11 mistakes in the spec")
    for part in (
        "model.wights: unknown key; did you mean 'weights'?",
        "data.validation: Input should be less than 1, but it is 2",
        "method: unknown key; did you mean 'methods'?",
        "methods: missing",
        "budgets.0.macs: '50 ms' is not an amount",
        "budgets.1.macs: '150%' is more than the teacher itself",
        "budgets.2.name: 'latest' is reserved",
        "budgets.2.devic: unknown key; did you mean 'device'?",
        "budgets.3: limits nothing",
        "budgets.4.macs: '0' is not positive",
        "budgets.4.device: no device 'phone'",
    ):
        assert part in told


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("methods: [uniform]", "baseline of every search"),
        ("methods: [itprune]", "is not a method; known: itpruner"),
        ("methods: [alds, alds]", "method alds given twice"),
        ("methods: alds", "expected a list"),
        ("search: {trials: 2}", "too few for 2 methods and the baseline"),
        ("search: {timeout: soon}", "is not a duration"),
        ("data: {source: imagefolder}", "data.root: missing"),
        ("devices: {}", "devices: empty"),
        ("budgets: [{name: a, macs: 1M}, {name: a, macs: 2M}]", "budget a given twice"),
    ],
)
def test_single_mistakes(change: str, told: str) -> None:
    document = yaml.safe_load(GOOD) | yaml.safe_load(change)
    assert told in mistakes(yaml.safe_dump(document))


def test_what_is_not_a_spec() -> None:
    assert "not valid YAML" in mistakes("name: [")
    assert "expected keys such as" in mistakes("- a list")
    with pytest.raises(SpecError, match="check the path"):
        load(Path("nowhere.yaml"))


def test_the_digest_ignores_where_and_keeps_what() -> None:
    elsewhere = spec(GOOD + "cluster: {address: 'ray://head:10001'}\ntracking: {uri: 'sqlite:///other.db'}\n")
    assert elsewhere.digest() == spec().digest()
    assert spec(GOOD.replace("50%", "51%")).digest() != spec().digest()
