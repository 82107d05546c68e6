"""Every test runs in a folder of its own, with its own cache, and starts nothing that reports home."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # or workers starve beside what the other tests compute
    "RAY_AUTH_MODE": "disabled",
    "RAY_TMPDIR": tempfile.mkdtemp(prefix="pd"),
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "OMP_NUM_THREADS": "1",
}

import pytest
import torch
from hypothesis import HealthCheck, settings

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it runs in the background ignore Ctrl-C
torch.set_num_threads(1)
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("shared"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "shared")


LONGEST = ("test_resume.py", "test_loop.py", "test_contract.py", "test_jobs.py", "test_nodes.py", "test_search.py")
"""Files that take minutes, which are begun first: a worker that began one last would end alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a resnet8 that has seen digits for 150 steps: good enough for accuracy to mean something."""
    from methods.training import Recipe, evaluate, top1
    from search.workload import zoo
    from search.workload.data import sources
    from search.workload.data.splits import split
    from search.workload.teacher import fit_teacher, save_weights

    pool, test = sources.digits()
    splits = split(pool, test, validation=0.2, calibration=128, seed=0)
    model = zoo.build("resnet8", 1, 10, 0)
    fit_teacher(model, splits, Recipe(150, report_every=150, warmup=0.2), lambda *_: None)
    assert evaluate(model, splits.test, top1) > 0.9
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_weights(model, path)
    return path


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PAREDOWN_CACHE", str(tmp_path / "cache"))
