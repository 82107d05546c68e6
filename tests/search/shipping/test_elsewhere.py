"""Registered models whose folder was moved or copied: every reader finds them, MLflow's own commands too."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from mlflow.tracking._tracking_service.utils import _artifact_repos_cache

from search.record.store import connect
from search.shipping.ship import ship
from tests.search.driver.test_winners import Search
from tests.support.commands import Run

PLAIN = """
import json, mlflow, torch
mlflow.set_tracking_uri("sqlite:///paredown.db")
model = mlflow.pytorch.load_model("models:/tiny@half")
run = mlflow.search_runs(experiment_names=["tiny"], filter_string="tags.`paredown.state` = 'complete'").iloc[0]
plan = mlflow.artifacts.load_dict(run.artifact_uri + "/plan.json")
print(json.dumps({"macs": plan["macs"], "logits": list(model(torch.zeros(2, 1, 8, 8)).shape)}))
"""


def copied(old: Path, new: Path) -> None:
    for name in ("paredown.db", "paredown.artifacts"):
        (shutil.copytree if (old / name).is_dir() else shutil.copy)(old / name, new / name)


def moved(old: Path, new: Path) -> None:
    for name in ("paredown.db", "paredown.artifacts"):
        shutil.move(old / name, new / name)


@pytest.mark.parametrize("brought", [moved, copied])
def test_models_are_found_where_the_folder_is_now(
    won: Search,
    run: Run,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    brought: Callable[[Path, Path], None],
) -> None:
    before = won.record.read.result()
    place = tmp_path_factory.mktemp("a new place, 50 % #1", numbered=True)
    brought(tmp_path, place)
    monkeypatch.chdir(place)
    _artifact_repos_cache.clear()  # a process of its own would have none

    ended = run("frontier", "tiny", "--json")
    assert (ended.code, json.loads(ended.out)) == (3, before.to_json())  # a budget of this search has no winner
    assert f"was moved: its files are those in {(place / 'paredown.artifacts' / 'tiny').as_uri()}" in caplog.text
    assert not [text for text in texts(place / "paredown.db") if f"{tmp_path}/paredown.artifacts" in text]

    alone = subprocess.run([sys.executable, "-c", PLAIN], capture_output=True, text=True, timeout=120)
    assert alone.returncode == 0, alone.stderr
    best = before.budgets[0].winner
    assert best is not None
    assert json.loads(alone.stdout.splitlines()[-1]) == {"macs": best.macs, "logits": [2, 3]}
    assert ship("sqlite:///paredown.db", "tiny@half", Path("out"))["budget"] == "half"
    if brought is copied:
        assert str(tmp_path) in connect(f"sqlite:///{tmp_path}/paredown.db").get_run(best.run_id).info.artifact_uri


def texts(database: Path) -> list[str]:
    """Every text in a database."""
    with closing(sqlite3.connect(database)) as opened:
        tables = [name for (name,) in opened.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = [row for table in tables for row in opened.execute(f"SELECT * FROM {table}")]
    return [value for row in rows for value in row if isinstance(value, str)]
