"""A good spec, and what is told of one that is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from search.base import SpecError
from search.spec import SearchSpec, parse

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
