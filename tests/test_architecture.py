"""The arrows between rooms, read from the source; and Ray's own word on the cluster file."""

from __future__ import annotations

import ast
import copy
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"methods": {"methods"}, "cluster": {"cluster"}, "search": {"search", "methods", "cluster"}}
"""The packages of ours that each package may import."""

ORDER = {
    "methods": "__init__, pipeline | known | chain | alds, channels, itpruner, manidp, practise, uniform | narrowing "
    "| protocol | refit, allocation | network | training | base, hooks, muted, names, state",
    "search": "cli | service | driver | devices, shipping | workload | report, record | spec, results | frontier "
    "| export, archive | trials | units, cache, limits, base, noise, __init__",
    "cluster": "__init__ | ray_cluster | pool, groups | workers, serve | head, inline, jobs "
    "| devices, token, reach, front | base",
}
"""The rooms of each package, folders and single files: one imports those to its right, and none of its own column."""

HOME = {"ray": "cluster", "optuna": "search/driver/study.py", "mlflow": "search/record"}
MOST_FILES = 14
MODULES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imports(path: Path) -> Iterator[str]:
    """The dotted names that a file imports, anywhere in it: of our own a module each, of others as they are written."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = (f"{node.module}.{name.name}" for name in node.names)
            yield from (name if name in MODULES else node.module for name in names)


def room(module: str) -> str:
    """The room that a module lies in, by its name inside its package."""
    return [*module.split("."), "__init__"][1]


def column(module: str) -> int:
    """The place of a module's room in the order of its package."""
    columns = ORDER[module.partition(".")[0]].split("|")
    return next(place for place, rooms in enumerate(columns) if room(module) in re.findall(r"\w+", rooms))


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_follow_the_arrows(package: str) -> None:
    files = [path for path in MODULES.values() if path.relative_to(ROOT).parts[0] == package]
    assert files
    for path in files:
        ours = {top for name in imports(path) if (top := name.partition(".")[0]) in PACKAGES}
        assert ours <= PACKAGES[package], f"{path} imports {ours - PACKAGES[package]}"


def test_rooms_follow_the_arrows() -> None:
    arrows = [(importer, name) for importer, path in MODULES.items() for name in imports(path) if name in MODULES]
    between = [
        (importer, name)
        for importer, name in arrows
        if importer.partition(".")[0] == name.partition(".")[0] and room(importer) != room(name)
    ]
    assert between
    assert not [arrow for arrow in between if column(arrow[0]) >= column(arrow[1])]


def test_files_import_each_other_in_no_circle() -> None:
    graph = {name: {found for found in imports(path) if found in MODULES} for name, path in MODULES.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)  # or it raises CycleError


def test_no_folder_is_crowded() -> None:
    folders = {path.parent for path in [*MODULES.values(), *(ROOT / "tests").rglob("*.py")]}
    assert max(len(list(folder.glob("*.py"))) for folder in folders) <= MOST_FILES


@pytest.mark.parametrize("library", HOME)
def test_foreign_libraries_have_one_home(library: str) -> None:
    users = {path for path in MODULES.values() if library in {name.partition(".")[0] for name in imports(path)}}
    assert users
    assert all(path.is_relative_to(ROOT / HOME[library]) for path in users), users


HEAVY = {"torch", "torchvision", "onnx", "optuna", "cvxpy"}


def loaded_by(names: str) -> set[str]:
    """The modules that a process has once it has imported these."""
    looks = f"import sys, {names}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", looks], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return set(loaded.split())


def test_who_only_looks_at_a_search_waits_for_no_torch() -> None:
    assert not HEAVY & loaded_by("cluster, search.cli, search.cli.console, search.record.progress")


def test_who_only_checks_a_spec_waits_for_nothing() -> None:
    assert not (HEAVY | {"ray", "mlflow", "scipy", "pandas"}) & loaded_by("search.cli.main, search.spec")


@pytest.mark.filterwarnings("ignore")
def test_ray_accepts_the_cluster_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "ray_config.yaml").read_text())
    validate_config(prepare_config(copy.deepcopy(config)))


def test_the_cluster_file_says_what_ray_does_not_check() -> None:
    config = yaml.safe_load((ROOT / "ray_config.yaml").read_text())
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert config["provider"]["region"]
    assert all({"InstanceType", "ImageId"} <= one["node_config"].keys() for one in (head, *types.values()))
    assert head["resources"] == {"CPU": 0}
    assert any(one["resources"].get("GPU") and one["max_workers"] > 0 for one in types.values())
    assert {one["min_workers"] for one in types.values()} == {0}
    assert "~/.ray/auth_token" in config["file_mounts"]
    assert any("RAY_AUTH_MODE=token" in command and "~/.bashrc" in command for command in config["setup_commands"])
    # Where these are left out, Ray installs another Ray, and opens the dashboard to the world.
    for kind in ("setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray"):
        assert f"{kind}_commands" in config
    (start,) = (command for command in config["head_start_ray_commands"] if "ray start --head" in command)
    assert "--dashboard-host=127.0.0.1" in start


def test_the_kubernetes_manifest_is_the_cluster_file_in_other_words() -> None:
    spec = yaml.safe_load((ROOT / "docs" / "kuberay.yaml").read_text())["spec"]
    version = re.escape(spec["rayVersion"])
    assert re.search(rf"^ray(\[.*\])?=={version}$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert re.search(rf"^FROM rayproject/ray:{version}-", (ROOT / "docs" / "cluster.md").read_text(), re.MULTILINE)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    assert [group["minReplicas"] for group in spec["workerGroupSpecs"]] == [0]
