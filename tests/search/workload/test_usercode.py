"""A user's own code: the modules it may import, those it never shadows, and those that workers are sent."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from search.spec import reading
from search.workload import loading
from search.workload.usercode import user_modules
from tests.support.tiny_workloads import THINGS, StageReport, factory, load, refused, spec, users_code


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A spec's folder with the user's own code in it."""
    with users_code(tmp_path):
        yield tmp_path


def test_a_users_file_may_import_its_neighbours(folder: Path) -> None:
    (folder / "entry.py").write_text("from things import network")
    assert isinstance(load(folder, factory("./entry.py:network")).teacher, nn.Sequential)


def test_a_users_own_search_never_shadows_ours(folder: Path) -> None:
    (folder / "search.py").write_text("import search.spec\n" + THINGS)
    (folder / "methods.py").write_text("raise RuntimeError('imported')")
    found = load(folder, factory("./search.py:network"))
    assert isinstance(found.teacher, nn.Sequential)
    assert Path(sys.modules["search"].__file__ or "").name == "__init__.py"
    assert reading.parse.__module__ == "search.spec.reading"
    assert "has no function 'network'" in refused(folder, factory("search:network"))


def test_user_modules_are_those_of_the_folder(folder: Path) -> None:
    (folder / "entry.py").write_text("from things import network")
    load(folder, factory("./entry.py:network"))
    assert users(folder) == {"paredown_user_entry", "paredown_user_things", "things"}


def users(folder: Path) -> set[str]:
    """The names of the modules of a folder that workers are sent."""
    return {module.__name__ for module in user_modules() if Path(module.__file__ or "").is_relative_to(folder)}


def test_user_modules_may_lie_anywhere_but_are_never_pythons(folder: Path) -> None:
    (folder / "models").mkdir()
    (folder / "models" / "net.py").write_text("import neighbour\n" + THINGS)
    (folder / "neighbour.py").write_text("import colorsys\n")
    sys.modules.pop("colorsys", None)
    load(folder, factory("./models/net.py:network"))
    assert "colorsys" in sys.modules
    assert users(folder) == {"paredown_user_net", "paredown_user_things", "neighbour"}
    (folder / "specs").mkdir()
    (folder / "specs" / "late.py").write_text(THINGS)
    away = {"data": {"source": "factory", "name": "../things.py:images"}}
    load(folder / "specs", factory(str(folder / "things.py") + ":lazily"), **away)
    assert "late" in users(folder)
    root = spec(
        Path("/"),
        factory(f"{folder}/things.py:network"),
        data={"source": "factory", "name": f"{folder}/things.py:images"},
    )
    loading.load(root, StageReport())
    assert not {module.__name__.partition(".")[0] for module in user_modules()} & sys.stdlib_module_names
