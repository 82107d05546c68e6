"""The pages: what they name exists, their specs are valid, and the method they build obeys the laws."""

from __future__ import annotations

import importlib.util
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from methods import METHODS
from methods.names import NAMES
from methods.network import profile
from search.base import SpecError
from search.spec import load, parse, schema
from tests.methods import test_contract as contract
from tests.support.networks import NETWORKS
from tests.test_architecture import ORDER, ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted(ROOT.glob("examples/*/README.md")),
    *sorted(ROOT.glob("docs/*.md")),
]
YOURS = {"methods/narrowest.py", "tests/methods/test_narrowest.py"}
"""Files that a page tells its reader to write."""

FOLDERS = r"(?:methods|search|cluster|tests|docs|benchmarks|examples|\.ci)"
BASE = {
    "name": "tiny",
    "model": {"source": "zoo", "name": "resnet8"},
    "data": {"source": "digits"},
    "methods": ["itpruner", "alds"],
    "budgets": [{"name": "half", "macs": "50%"}],
}
"""The spec that pieces of one are tried in."""

SECTIONS: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "top level": (schema.SearchSpec, {key: value for key, value in BASE.items() if key != "methods"}),
    "`model`": (schema.ModelSpec, BASE["model"]),
    "`data`": (schema.DataSpec, BASE["data"]),
    "`task`": (schema.TaskSpec, {}),
    "`metric`": (schema.MetricSpec, {"function": "./scores.py:loss"}),
    "`devices`": (schema.DeviceSpec, {}),
    "`budgets`": (schema.BudgetSpec, {"name": "half"}),
    "`search`": (schema.SearchSettings, {}),
    "`recovery`": (schema.RecoverySpec, {}),
    "`cluster`": (schema.ClusterSpec, {}),
    "`tracking`": (schema.TrackingSpec, {}),
}
"""The headings of the reference by how they end, each with its model and what that must be given."""

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of some languages, `""` being those that name none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def spans(page: Path) -> list[str]:
    """The code within the lines of a page."""
    return re.findall(r"`([^`]+)`", prose(page))


def anchors(page: Path) -> set[str]:
    """The names that the headings of a page have in links."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def rows(text: str) -> Iterator[list[str]]:
    """The cells of the rows of every table that begin with code."""
    for line in text.splitlines():
        if line.startswith("| `"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def section(name: str) -> str:
    """The part of the reference of specs under the heading that ends so."""
    parts = re.split(r"^## (.+)$", (ROOT / "docs/spec.md").read_text(), flags=re.MULTILINE)
    return next(text for heading, text in zip(parts[1::2], parts[2::2], strict=True) if heading.endswith(name))


# What pages name


@pages
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    named = set(re.findall(rf"(?<![\w./-]){FOLDERS}/[\w./-]*[\w/]", page.read_text())) - YOURS
    missing = [name for name in named if not (ROOT / name).exists()]
    missing += [name for name in spans(page) if re.fullmatch(r"\w+\.(py|yaml)", name) and not _is_near(name, page)]
    assert not missing


def _is_near(name: str, page: Path) -> bool:
    """Whether a file named without its folder is at the top, beside its page, or in some room."""
    return (ROOT / name).exists() or (page.parent / name).exists() or any(ROOT.glob(f"*/**/{name}"))


@pages
def test_every_dotted_name_is_a_key_of_specs_or_a_name_of_ours(page: Path) -> None:
    keys = {f"{name.strip('`')}.{key}" for name, (model, _) in SECTIONS.items() for key in model.model_fields}
    named = {name for span in spans(page) for name in re.findall(r"^(?:methods|search|cluster)(?:\.\w+)+", span)}
    assert not [name for name in named - keys if not _is_ours(name)]


def _is_ours(name: str) -> bool:
    """Whether a dotted name leads to a module, and what it names there occurs in that module's file."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:length])
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.is_file():
                return all(part in file.read_text() for part in parts[length:])
    return False


@pages
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text()
    assert not [page.name for page in ROOT.glob("docs/*.md") if page.name != "README.md" and page.name not in index]


def test_the_picture_of_the_rooms_is_the_rule() -> None:
    (picture,) = blocks(ROOT / "docs/architecture.md", "mermaid")
    drawn = [set(label.split(", ")) for label in re.findall(r'\["(.+?)"\]', picture)]
    columns = [column for package in ("search", "methods", "cluster") for column in ORDER[package].split("|")]
    assert drawn == [set(re.findall(r"\w+", column)) for column in columns]


def test_pages_name_the_commands_there_are() -> None:
    from search.cli.main import app

    known = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    named = {name for page in PAGES for name in re.findall(r"\bparedown ([a-z]+)\b", _code(page))}
    assert named == known


def _code(page: Path) -> str:
    """All code of a page: its blocks of commands, and what stands within lines."""
    return "\n".join([*blocks(page, "", "sh"), *spans(page)])


# Specs


def test_the_reference_has_a_section_for_every_part_of_a_spec() -> None:
    models = [one for one in vars(schema).values() if isinstance(one, type) and issubclass(one, BaseModel)]
    assert {one for one in models if one.model_fields} == {model for model, _ in SECTIONS.values()}


@pytest.mark.parametrize("name", SECTIONS)
def test_the_reference_has_every_key_and_its_default(name: str) -> None:
    model, needed = SECTIONS[name]
    told = {cells[0].strip("`"): cells[2] for cells in rows(section(name)) if len(cells) == 4}
    fields = {key: field for key, field in model.model_fields.items() if key not in ("text", "folder")}
    assert told.keys() == fields.keys()
    required = {key for key, default in told.items() if default == "required"}
    assert required == {key for key, field in fields.items() if field.is_required()}
    stated = {key: _value(default) for key, default in told.items() if key not in required}
    assert model.model_validate(needed | stated) == model.model_validate(needed)


def _value(cell: str) -> object:
    return None if cell == "none" else yaml.safe_load(cell.strip("`"))


@pages
def test_every_spec_and_piece_of_one_is_valid(page: Path) -> None:
    for text in blocks(page, "yaml"):
        given = yaml.safe_load(text)
        is_whole = BASE.keys() <= given.keys()
        parse(text if is_whole else yaml.safe_dump(BASE | given), folder=Path())


@pytest.mark.parametrize("example", sorted(ROOT.glob("examples/**/*.yaml")), ids=lambda path: path.stem)
def test_every_example_is_a_valid_spec(example: Path) -> None:
    assert load(example).methods


def test_the_readme_has_a_whole_spec() -> None:
    assert any(BASE.keys() <= yaml.safe_load(text).keys() for text in blocks(ROOT / "README.md", "yaml"))


@pytest.mark.parametrize("cells", list(rows(section("refusal"))), ids=lambda cells: cells[0])
def test_a_refusal_is_told_as_the_reference_says(cells: list[str]) -> None:
    given, told = cells
    with pytest.raises(SpecError) as caught:
        parse(yaml.safe_dump(BASE | yaml.safe_load(given.strip("`"))), folder=Path())
    assert f"  - {told}" in str(caught.value).splitlines()


# The method that a page builds


@pytest.fixture(scope="module")
def narrowest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The file that the page has its reader write, as if it lay in `methods` and were listed there."""
    path = tmp_path_factory.mktemp("page") / "narrowest.py"
    path.write_text(blocks(ROOT / "docs/adding_a_method.md", "python")[0])
    found = importlib.util.spec_from_file_location("methods.narrowest", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "methods.narrowest", module)
        found.loader.exec_module(module)
        patch.setitem(METHODS, "narrowest", module.Narrowest())
        patch.setitem(NAMES, "narrowest", False)
        yield module


def test_what_the_page_tries_works(narrowest: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for text in blocks(ROOT / "docs/adding_a_method.md", "python")[1:]:
        exec(text, {})
    assert re.fullmatch(r"2 steps done, \d\d% of the MACs\n", capsys.readouterr().out)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_pages_method_obeys_the_laws(narrowest: ModuleType, network: str) -> None:
    contract.test_the_student_costs_what_its_plan_says("narrowest", network)
    contract.test_the_teachers_own_cost_leaves_it_as_it_is("narrowest", network)
    contract.test_a_larger_budget_is_never_worse("narrowest", network)
    contract.test_a_student_is_rebuilt_from_its_plan_and_its_state("narrowest", network)
    contract.test_the_same_plan_gives_the_same_student("narrowest", network)
    contract.test_scores_do_not_depend_on_the_order_of_their_parts("narrowest", network)


def test_the_pages_method_is_one_of_ours(narrowest: ModuleType) -> None:
    method = METHODS["narrowest"]
    shards = method.shards(profile(NETWORKS["plain"](), contract.images()), contract.images())
    assert pickle.loads(pickle.dumps((method, shards))) == (method, shards)
    spec = BASE | {"methods": ["narrowest", ["narrowest", "alds"]]}
    assert parse(yaml.safe_dump(spec), folder=Path()).candidates == ("narrowest", "narrowest+alds", "uniform")
