"""A user's own code: the modules it may import, those it never shadows, and those that workers are sent."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ray import cloudpickle
from torch import nn

import methods
from search.base import SpecError, WorkloadError
from search.spec import reading
from search.workload import loading, usercode
from search.workload.usercode import user_modules
from tests.support.tiny_workloads import THINGS, StageReport, factory, load, refused, spec


def test_a_users_file_may_import_its_neighbours(folder: Path) -> None:
    (folder / "entry.py").write_text("from things import network")
    assert isinstance(load(folder, factory("./entry.py:network")).teacher, nn.Sequential)


def test_a_users_own_search_never_shadows_ours(folder: Path) -> None:
    (folder / "search.py").write_text(THINGS)
    (folder / "methods.py").write_text("raise RuntimeError('imported')")
    for name in ("./search.py:network", "search:network"):
        assert isinstance(load(folder, factory(name)).teacher, nn.Sequential)
        assert Path(sys.modules["search"].__file__ or "").name == "__init__.py"
    assert reading.parse.__module__ == "search.spec.reading"
    assert importlib.import_module("search.spec.reading") is reading
    assert "importing methods raised RuntimeError: imported" in refused(folder, factory("methods:network"))
    assert sys.modules["methods"] is methods


def test_a_users_modules_with_names_of_ours_work_beside_them_and_are_sent_to_workers(folder: Path) -> None:
    (folder / "methods").mkdir()
    (folder / "methods" / "__init__.py").write_text("from .net import SIDE\n\ndef twice(x):\n    return 2 * x\n")
    (folder / "methods" / "net.py").write_text("from torch import nn\n\nSIDE = 8\n\nclass Part(nn.ReLU):\n    pass\n")
    (folder / "cluster.py").write_text("import methods\n\ndef once(x):\n    return methods.twice(x) / 2\n")
    (folder / "entry.py").write_text(
        "import cluster\nimport things\nfrom methods.net import Part\nfrom torch import nn\n\n"
        "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.inner, self.part = things.network(), Part()\n\n"
        "    def forward(self, x):\n        return self.inner(self.part(cluster.once(x)))\n"
    )
    teacher = load(folder, factory("./entry.py:Net")).teacher
    assert load(folder, factory("./entry.py:Net")).fingerprint
    assert sys.modules["methods"] is methods
    aliases = {"paredown_user_methods", "paredown_user_methods.net", "paredown_user_cluster"}
    assert users(folder) == aliases | {"paredown_user_entry", "paredown_user_things", "things"}
    for module in user_modules():
        cloudpickle.register_pickle_by_value(module)
    sent = cloudpickle.dumps(teacher)
    reading_it = "import pickle, sys, torch\nprint(pickle.load(sys.stdin.buffer)(torch.ones(2, 1, 8, 8)).shape)"
    command = [sys.executable, "-c", reading_it]
    root = Path(methods.__file__).parent.parent
    found = subprocess.run(command, input=sent, capture_output=True, check=True, cwd=root)
    assert found.stdout.decode().strip() == "torch.Size([2, 3])"


@pytest.mark.parametrize("line", ["import methods.net", "from methods import net", "import methods; methods.twice(1)"])
def test_a_call_that_imports_a_name_of_ours_is_told_where_to(folder: Path, line: str) -> None:
    (folder / "methods").mkdir()
    (folder / "methods" / "__init__.py").write_text("def twice(x):\n    return 2 * x\n")
    (folder / "methods" / "net.py").write_text("")
    (folder / "late.py").write_text(f"def metric(logits, labels):\n    {line}\n    return 0.5\n")
    told = "Error: .*; expected a file to import its own 'methods' at its top, because in a function, .*; move the imp"
    metric = usercode.UserMetric("late.py:metric", usercode.load_function("late.py:metric", str(folder)))
    with pytest.raises(WorkloadError, match=told):
        metric(torch.zeros(1, 2), torch.zeros(1))


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("end", ["return 1", "raise ValueError('own')"])
def test_code_that_closes_a_standard_stream_is_told(folder: Path, stream: str, end: str) -> None:
    (folder / "closing.py").write_text(f"import sys\ndef network():\n    sys.{stream}.close()\n    {end}\n")
    run = (
        "import sys\nfrom search.base import WorkloadError\nfrom search.workload.usercode import call_factory\n"
        f"try:\n    call_factory('./closing.py:network', {{}}, {str(folder)!r})\n"
        f"except WorkloadError as error:\n    print(error, file=sys.{stream}, flush=True)\n"
    )
    root = Path(methods.__file__).parent.parent
    ended = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True, cwd=root)
    name = {"stdout": "output", "stderr": "error"}[stream]
    told = f"closed the standard {name}; expected" if "return" in end else "raised ValueError: own; expected it to"
    assert f"the factory ./closing.py:network {told}" in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_factory_that_goes_to_another_folder_takes_nobody_along(folder: Path) -> None:
    here = Path.cwd()
    (folder / "going.py").write_text("import os\nos.chdir('/')\ndef network():\n    os.chdir('/')\n    return 1\n")
    assert usercode.call_factory("./going.py:network", {}, str(folder)) == 1
    assert Path.cwd() == here


def test_an_error_in_a_users_code_is_told_with_its_place(folder: Path) -> None:
    (folder / "entry.py").write_text("from things import network\n\ndef late():\n    raise RuntimeError('late')\n")
    late = usercode.load_function("./entry.py:late", str(folder))
    with pytest.raises(RuntimeError) as caught:
        late()
    assert usercode.place_of(caught.value) == f"{folder}/entry.py, line 4"
    with pytest.raises(SpecError) as ours:
        reading.parse("name: [", folder=folder)
    assert usercode.place_of(ours.value) is None


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
