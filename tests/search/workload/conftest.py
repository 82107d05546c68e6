"""What the tests of workloads share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.tiny_workloads import users_code


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A spec's folder with the user's own code in it."""
    with users_code(tmp_path):
        yield tmp_path
