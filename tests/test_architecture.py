"""Who may import whom, read from the source; and Ray's own word on the cluster file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {"methods": {"methods"}, "cluster": {"cluster"}, "search": {"search", "methods", "cluster"}}
HOME = {
    "ray": {"cluster"},
    "optuna": {"search/study.py"},
    "mlflow": {"search/store.py", "search/records.py", "search/tracking.py", "search/registry.py"},
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
    assert all(path.parts[0] in HOME[library] or str(path) in HOME[library] for path in users), users


@pytest.mark.filterwarnings("ignore")
def test_ray_accepts_the_cluster_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "ray_config.yaml").read_text())
    validate_config(prepare_config(config))
    assert config["available_node_types"][config["head_node_type"]]["resources"]["CPU"] == 0
    assert "~/.ray/auth_token" in config["file_mounts"]
