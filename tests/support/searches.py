"""Small real searches that several test files run: resnet8 on digits, latency from a roofline."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from cluster import Cluster, InlineCluster
from search.record.store import check_store
from search.spec import reading, schema
from search.workload import Workload

SPEC = """
name: digits
model: {source: zoo, name: resnet8, weights: teacher.safetensors}
data: {source: digits, validation: 0.2, calibration: 128}
methods: [itpruner, alds]
devices: {rock: {runtime: profile, file: rock.yaml}}
budgets:
  - {name: half, macs: 50%}
search: {trials: 3, explore: 1}
recovery: {steps: 5, batch_size: 64}
"""
ROCK = "{macs_per_s: 2.0e+9, bytes_per_s: 1.0e+9, overhead_us: 5}"


@cache
def empty_store() -> bytes:
    """The database of an MLflow store without a search, which takes MLflow two seconds of CPU to make."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "paredown.db")
        check_store(f"sqlite:///{path}")
        return path.read_bytes()


def place(folder: Path, teacher: Path, text: str = SPEC, *, has_store: bool = True) -> Path:
    """A folder with a spec, its teacher and its device, where a search can run; a first one where it has no store."""
    folder.mkdir(exist_ok=True)
    if has_store:
        (folder / "paredown.db").write_bytes(empty_store())
    (folder / "teacher.safetensors").write_bytes(teacher.read_bytes())
    (folder / "rock.yaml").write_text(ROCK)
    (folder / "spec.yaml").write_text(text)
    return folder


def parsed(folder: Path, text: str = SPEC) -> schema.SearchSpec:
    """A spec whose files lie in `folder`."""
    return reading.parse(text, folder=folder)


def inline(made: Workload) -> Cluster:
    """This process as the cluster."""
    return InlineCluster(made.worker_inputs())


def quiet(stage: str, done: int, total: int, note: str) -> None:
    """A report nobody reads."""
