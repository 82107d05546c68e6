"""Documents that were made to harm: bombs, depths, numbers without end, and signs that nobody sees."""

from __future__ import annotations

import re

import pytest

from tests.search.spec.specs import GOOD, mistakes, spec


def bomb(levels: int) -> str:
    """Lists of nine of the list before, which come to 9 ** `levels` values."""
    steps = (f"l{n}: &l{n} [{', '.join(9 * [f'*l{n - 1}' if n else 'x'])}]" for n in range(levels))
    return "\n".join(steps)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"{bomb(12)}\nname: *l11", "it has more than 20,000 parts"),
        (f"{bomb(12)}\nmethods: *l11", "it has more than 20,000 parts"),
        ("name: &a [*a]", "line 1 has an alias of what it is in"),
        ("name: " + 5000 * "[", "is more than 32 levels deep"),
        ("name: " + 5000 * "[" + 5000 * "]", "is more than 32 levels deep"),
        ("name: " + 5000 * "{a: ", "is more than 32 levels deep"),
        (f"name: {'9' * 900}", "line 1 has a number of 900 digits, of 100 at most"),
        (f"name: 0x{'f' * 9000}", "line 1 has a number of 9,002 digits, of 100 at most"),
        ("name: \x1b[31mred", "unacceptable character #x001b"),
    ],
)
def test_a_document_that_is_no_spec_is_not_read_to_its_end(text: str, told: str) -> None:
    assert told in mistakes(text)


@pytest.mark.parametrize("sign", [r"\e", r"\0", r"\u202e", r"\u200b", r"\uFEFF", r"\uD800", r"\L"])
def test_no_sign_of_a_key_or_a_value_is_hidden_or_reaches_the_terminal(sign: str) -> None:
    for text in (f'"mo{sign}[31mdel": 1', f'metric: "a{sign}[31m:b"'):
        told = mistakes(f"{GOOD}{text}")
        assert re.search(r"line 11: U\+[0-9A-F]{4} \(.*\) cannot be seen", told)
        assert all(one.isprintable() or one == "\n" for one in told)


@pytest.mark.parametrize(
    "text",
    [
        "tracking: {uri: 'postgresql://ada:S3cret%s@db:port/x'}",
        "tracking: {uri: 'http://S3cret%s@mlflow:port'}",
        "cluster: {address: 'ray://ada:S3cret%s@h:1 x'}",
        "metric: 'http://ada:S3cret%s@h:1'",
        "tracking: ['http://ada:S3cret%s@h:1']",
        "tracking: {uri: 'http://ada:S3cret%s@h:1",
        "tracking: {uri: http://ada:S3cret%s@h:1: x}",
    ],
)
def test_a_value_is_not_cut_where_its_secret_then_shows(text: str) -> None:
    for length in (0, 20, 80, 200):
        told = mistakes(GOOD + text % (length * "a"))
        assert "S3c" not in told.replace("***", ""), told
        assert "line 11" in told or "***" in told


def test_a_comment_hides_nothing_either() -> None:
    assert "line 11: U+202E (RIGHT-TO-LEFT OVERRIDE) cannot be seen" in mistakes(f"{GOOD}# \u202e of a report")
    assert spec("\ufeff" + GOOD.replace("\n", "\r\n") + "# \u062a\u200c\u0628").decisive() == spec().decisive()


def test_of_very_many_mistakes_the_first_are_listed() -> None:
    told = mistakes(GOOD + "\n".join(f"key{number}: 1" for number in range(80)))
    assert told.startswith("80 mistakes")
    assert told.endswith("  - and 30 more")
