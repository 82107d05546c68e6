"""Who may import whom, read from the source; and Ray's own word on the cluster file."""

from __future__ import annotations

import ast
import copy
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {"methods": {"methods"}, "cluster": {"cluster"}, "search": {"search", "methods", "cluster"}}
HOME = {
    "ray": {"cluster"},
    "optuna": {"search/driver/study.py"},
    "mlflow": {"search/record"},
}


def imports(path: Path) -> Iterator[str]:
    """The top-level names a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_follow_the_arrows(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        ours = {name for name in imports(path) if name in ALLOWED}
        assert ours <= ALLOWED[package], f"{path.name} imports {ours - ALLOWED[package]}"


@pytest.mark.parametrize("library", HOME)
def test_foreign_libraries_have_one_home(library: str) -> None:
    files = [path.relative_to(ROOT) for package in ALLOWED for path in (ROOT / package).rglob("*.py")]
    users = {path for path in files if library in imports(ROOT / path)}
    assert users
    assert all({str(path), *map(str, path.parents)} & HOME[library] for path in users), users


def test_who_only_looks_at_a_search_waits_for_no_torch() -> None:
    looks = "import sys, cluster, search.cli, search.cli.console, search.record.progress; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", looks], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert not {"torch", "onnx", "optuna", "cvxpy"} & set(loaded.split())


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
