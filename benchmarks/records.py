"""The files of the benchmarks: results as JSON, and students as ONNX, which are only timed."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from torch import Tensor, nn

from cluster.devices.meter import identity
from cluster.devices.runtimes import Runtime
from methods.network import count_macs
from search.export import onnx_file

RESULTS = Path(__file__).parent / "results"
"""The committed results, which docs/benchmarks.md is made from."""

SCRATCH = Path("paredown.quality")
"""The folder of results that are not committed."""

TEACHER = "teacher"


def begun(path: Path, settings: Mapping[str, Any], *packages: str) -> dict[str, Any]:
    """Return the results so far, or the head of new ones: the day, the machine and the versions.

    A package that earlier results did not need is added to their versions.

    Raises:
        SystemExit: those of `path` were made with other settings.
    """
    if path.is_file():
        kept: dict[str, Any] = json.loads(path.read_text())
        if kept["settings"] != settings:
            raise SystemExit(
                f"{path} was made with settings {kept['settings']}; expected {settings}; give another --out"
            )
        kept["made"]["versions"] = made(*packages)["versions"] | kept["made"]["versions"]
        return kept
    return {"made": made(*packages), "settings": settings, "runs": []}


def made(*packages: str) -> dict[str, Any]:
    """Return the day, the machine, and the versions of some packages and of this repository."""
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "date": datetime.date.today().isoformat(),
        "processor": identity(Runtime("torch"))["processor"],
        "cores": os.cpu_count(),
        "commit": subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip(),
        "versions": {"python": platform.python_version(), **versions},
    }


def write(path: Path, kept: Mapping[str, Any]) -> None:
    """Replace the file at once, so that a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".part")
    fresh.write_text(json.dumps(kept, indent=1) + "\n")
    fresh.replace(path)


def file_of(students: Path, row: str, share: int) -> Path:
    """Return where the student of a row and a budget is kept."""
    return students / f"{row.replace(' ', '-')}-{share}.onnx"


def keep(path: Path, student: nn.Module, images: Tensor) -> None:
    """Keep a student with its MACs, if there is none yet: it is only timed, so the weights of one seed serve."""
    if path.is_file():
        return
    model = onnx.load_from_string(onnx_file(student.eval(), images[:3]))
    model.metadata_props.add(key="macs", value=str(count_macs(student, images[:1])))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())


def macs_of(program: bytes) -> int:
    """Return the MACs that `keep` wrote into a file."""
    return next(int(entry.value) for entry in onnx.load_from_string(program).metadata_props if entry.key == "macs")
