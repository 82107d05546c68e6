"""A finished small search, made once by hand as the tests of its end make it; every test gets a copy of its folder."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.tracking._tracking_service.utils import _artifact_repos_cache

from search.record.searches import find_search
from tests.search.cli.conftest import run
from tests.search.driver.test_winners import Search, begun

__all__ = ["run"]


@pytest.fixture(scope="package")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Search]:
    """The folder of a search that registered the same student for two of its budgets, and the search."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PAREDOWN_CACHE", str(folder / "cache"))
        search = begun(folder)
        search.train("half", 0.5, top1=0.8)
        search.register()
    return folder, search


@pytest.fixture
def won(finished: tuple[Path, Search], tmp_path: Path) -> Search:
    folder, search = finished
    shutil.copytree(folder / "paredown.artifacts", tmp_path / "paredown.artifacts")
    shutil.copy(folder / "paredown.db", tmp_path)
    _artifact_repos_cache.clear()  # a process of its own would have none
    return replace(search, record=find_search("sqlite:///paredown.db", "tiny"))
