"""`paredown export`: a registered version as files that need neither this project nor its store."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from search.archive import load_program
from search.base import SearchError, SpecError, TrackingError
from search.export import TOLERANCE, parity
from search.limits import Limits
from search.record.logged_models import Files, Models, files_of
from search.record.registry import Version, find_version
from search.record.searches import search_of
from search.results import BudgetResult
from search.shipping.card import Shipped, card
from search.shipping.page import page

PROGRAM, ONNX, PAGE, CARD = "model.pt2", "model.onnx", "README.md", "card.json"
DRAWN = 14
"""Images drawn at random, beside the two stored with the model, on which its files are compared."""


def ship(uri: str, name: str, out: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Write the program, the ONNX file and the card of a registered version to `out`; return the card.

    Args:
        uri: the MLflow store.
        name: `NAME@ALIAS` or `NAME/VERSION`, with or without `models:/`.
        out: a folder that is new or empty, unless `overwrite`.

    Raises:
        SpecError: `out` is a file, or holds something.
        TrackingError: there is no such version, or no search registered it.
        ArchiveError: the stored program is not one of ours.
        SearchError: the two files give different outputs.
        OSError: `out` cannot be written.
    """
    name = "models:/" + name.removeprefix("models:/")
    version = find_version(uri, name)
    _check_folder(out, overwrite=overwrite)
    shipped = _shipped(uri, name, version)
    files = files_of(uri, name, version.tags.get("onnx_uri"))
    contents = {PROGRAM: files.program} | ({} if files.onnx is None else {ONNX: files.onnx})
    found = card(shipped, **_checked(name, files), files={key: _facts(content) for key, content in contents.items()})
    contents |= {PAGE: page(found).encode(), CARD: json.dumps(found, indent=2).encode()}
    out.mkdir(parents=True, exist_ok=True)
    for file in (PROGRAM, ONNX, PAGE, CARD):
        (out / file).unlink(missing_ok=True)
    for file, content in contents.items():
        (out / file).write_bytes(content)
    return found


def _check_folder(out: Path, *, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise SpecError(f"--out {out} is a file; expected a folder; choose another")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise SpecError(
            f"--out {out} is not empty; expected a new or an empty folder; choose another, or write over the files of "
            "an export there with --overwrite"
        )


def _shipped(uri: str, name: str, version: Version) -> Shipped:
    """Everything that the record says of a version."""
    budget = version.tags.get("budget")
    if version.run_id is None or budget is None:
        raise TrackingError(
            f"{name} was registered by hand; expected a version that a search registered; name one of those"
        )
    record = search_of(uri, version.run_id)
    result = record.read.result()
    (candidate,) = [one for one in result.candidates if one.run_id == version.run_id]
    plan = record.read.plan(version.run_id).to_json()
    limits = next((one.limits for one in result.budgets if one.name == budget), Limits())
    return Shipped(
        name,
        uri,
        version,
        BudgetResult(budget, limits, candidate, name, top1_test=float(version.tags["top1_test"])),
        result,
        plan,
        record.search.decisive(),
        Models(record.client).onnx_refused(candidate.same_as or candidate.run_id),
    )


def _checked(name: str, files: Files) -> dict[str, Any]:
    """The shapes of what the program takes and gives, and how far the ONNX file's outputs are from the program's."""
    images = _samples(files.images)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, PROGRAM)
        path.write_bytes(files.program)
        program = load_program(path, name)
    with torch.no_grad():
        logits = program(images)
    shapes = {"images": list(images.shape[1:]), "logits": list(logits.shape[1:])}
    if files.onnx is None:
        return {"shapes": shapes, "parity": None}
    deviation = parity(program, files.onnx, images)
    if not deviation <= TOLERANCE:  # NaN too
        raise SearchError(
            f"the ONNX file of {name} differs from its program by {deviation:.1e} of the largest output; expected at "
            f"most {TOLERANCE}; run the search again in a new store, which stores both anew"
        )
    return {"shapes": shapes, "parity": {"images": len(images), "deviation": deviation, "tolerance": TOLERANCE}}


def _samples(stored: np.ndarray) -> torch.Tensor:
    """The stored images, and others drawn with their mean and deviation."""
    drawn = np.random.default_rng(0).normal(stored.mean(), stored.std(), (DRAWN, *stored.shape[1:]))
    return torch.from_numpy(np.concatenate([stored, drawn]).astype(np.float32))


def _facts(content: bytes) -> Mapping[str, Any]:
    return {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
