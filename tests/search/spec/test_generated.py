"""Specs made by chance over the schema itself: each that makes no sense is refused in words, and none with a trace."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from search.base import SpecError
from search.spec import SearchSpec, parse

GOOD: dict[str, Any] = {
    "name": "digits",
    "model": {"source": "zoo", "name": "resnet8"},
    "data": {"source": "digits"},
    "task": {"name": "classification"},
    "metric": {"function": "./scores.py:loss"},
    "devices": {"edge": {}},
    "budgets": [{"name": "half", "macs": "50%"}],
    "search": {},
    "recovery": {"labels": False, "data": {"source": "digits"}},
    "cluster": {},
    "tracking": {},
}
"""A spec that makes sense, with every section that the schema has."""

POISONS: list[Any] = [
    -1, math.nan, math.inf, -math.inf, 10**90, -(10**90), 1e300, "", " ", " a", "\x1b[31mred", "a\0b", "\u202eb",
    "a\nb", "x" * 5000, [], [[]], [None], [-1, {}], {"odd": -1}, {"": ""}, b"\xff", date(2026, 1, 2), "\ud800",
]  # fmt: skip
"""Values that no key takes."""

Place = tuple[str | int, ...]


def sections(model: type[BaseModel], where: Place = ()) -> Iterator[tuple[Place, type[BaseModel]]]:
    """Every section of the schema, with its place in `GOOD`."""
    yield where, model
    for key, field in model.model_fields.items():
        if (inner := model_in(field.annotation)) is not None:
            first: dict[Any, Place] = {dict: ("edge",), tuple: (0,)}
            yield from sections(inner, (*where, key, *first.get(get_origin(field.annotation), ())))


def model_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a key's type speaks of, if any."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for one in get_args(annotation) if (found := model_in(one)) is not None), None)


def beyond(field: FieldInfo) -> list[float]:
    """The numbers next to the bounds of a key, on the wrong side."""
    steps = {Ge: ("ge", -1), Gt: ("gt", 0), Le: ("le", 1), Lt: ("lt", 0)}
    return [getattr(one, steps[type(one)][0]) + steps[type(one)][1] for one in field.metadata if type(one) in steps]


SECTIONS = dict(sections(SearchSpec))
FIELDS = {
    (*where, key): field
    for where, model in SECTIONS.items()
    for key, field in model.model_fields.items()
    if key not in ("text", "folder")
}


def changed(document: dict[str, Any], place: Place, value: object) -> dict[str, Any]:
    """The document with another value at a place, on the way to which a list or a mapping may be gone already."""
    found: Any = document
    for step in place[:-1]:
        try:
            found = found[step]
        except (KeyError, TypeError, IndexError):
            return document
    if isinstance(found, dict):
        found[place[-1]] = value
    return document


@st.composite
def bad_specs(draw: st.DrawFn) -> dict[str, Any]:
    """A spec with one to four values that no key takes, keys that there are not, or keys that are missing."""
    document = copy.deepcopy(GOOD)
    for place in draw(st.lists(st.sampled_from(list(FIELDS)), min_size=1, max_size=4)):
        changed(document, place, draw(st.sampled_from(POISONS + beyond(FIELDS[place]))))
    for where in draw(st.lists(st.sampled_from(list(SECTIONS)), max_size=2)):
        changed(document, (*where, draw(st.text(min_size=1, max_size=20).map("odd ".__add__))), None)
    for place in draw(
        st.lists(st.sampled_from([place for place in FIELDS if FIELDS[place].is_required()]), max_size=1)
    ):
        if place[0] in document and len(place) == 1:
            del document[place[0]]
    return document


def told(text: str) -> str:
    """The refusal of a document."""
    with pytest.raises(SpecError) as caught:
        parse(text, folder=Path())
    message = str(caught.value)
    assert message.startswith(("the spec is ", "1 mistake in the spec:")) or " mistakes in the spec:" in message
    assert all(sign.isprintable() or sign == "\n" for sign in message)
    assert len(message) < 20_000
    return message


def test_the_spec_they_are_made_of_makes_sense() -> None:
    assert parse(yaml.safe_dump(GOOD), folder=Path()).name == "digits"


@settings(max_examples=200, deadline=None)
@given(bad_specs())
def test_what_makes_no_sense_is_refused_in_words(document: dict[str, Any]) -> None:
    told(yaml.safe_dump(document))


@pytest.mark.parametrize("place", FIELDS, ids=lambda place: ".".join(map(str, place)))
def test_every_key_refuses_what_no_key_takes_and_is_named(place: Place) -> None:
    for value in [-1, math.nan, 10**90, "\x1b[31mred", {"odd": -1}, *beyond(FIELDS[place])]:
        message = told(yaml.safe_dump(changed(copy.deepcopy(GOOD), place, value)))
        assert str(place[-1]) in message or "cannot be seen" in message


@settings(max_examples=100, deadline=None)
@given(st.text() | st.text("{}[]:,-&*!|>'\"%@ \n\tax1").map(lambda text: f"{yaml.safe_dump(GOOD)}{text}\nodd: 1"))
def test_no_text_ends_in_a_trace(text: str) -> None:
    told(text)
