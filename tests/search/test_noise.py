"""The noise of a top-1: against simulation, against the textbook, and through its text."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.noise import MOST_IMAGES, is_noise, packed, standard_error, unpacked


@given(st.lists(st.booleans(), max_size=70))
def test_hits_survive_their_text(hits: list[bool]) -> None:
    assert unpacked(packed(np.array(hits, dtype=bool))).tolist() == hits


def test_a_tag_holds_them_and_only_so_many_are_kept() -> None:
    hits = np.random.default_rng(0).random(3 * MOST_IMAGES) < 0.5
    assert len(packed(hits)) < 8000
    assert np.array_equal(unpacked(packed(hits)), hits[:MOST_IMAGES])


@pytest.mark.parametrize("text", ["", "3:", "3:!!", "3:AAAA"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        unpacked(text)


def test_the_error_is_the_spread_of_repeated_draws() -> None:
    draws = np.random.default_rng(0).random((2000, 500)) < 0.9
    assert standard_error(draws[0]) == pytest.approx(draws.mean(1).std(), rel=0.15)
    assert standard_error(np.array([True])) == 0


def test_a_difference_is_taken_image_by_image() -> None:
    """Two networks that are one point below a third: one loses ten images, the other sixty, and wins fifty back."""
    order = np.arange(1000)
    right, nested, crossed = order < 900, order < 890, (order < 840) | (order >= 950)
    assert nested.mean() == crossed.mean()
    assert not is_noise(packed(right), packed(nested))
    assert is_noise(packed(right), packed(crossed))
    assert is_noise(packed(right), packed(right))
    assert not is_noise(packed(right), packed(right[:500]))


@given(st.integers(2, 300))
def test_a_single_image_is_noise(count: int) -> None:
    right = np.ones(count, dtype=bool)
    wrong = right.copy()
    wrong[count // 2] = False
    assert is_noise(packed(right), packed(wrong))
    assert is_noise(packed(wrong), packed(right))
