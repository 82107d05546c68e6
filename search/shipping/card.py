"""The card of a shipped model as JSON-ready values: what it costs, how it was made, and how to run it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version as version_of
from typing import Any

from search.base import SECRET, masked
from search.record.registry import Version
from search.report import costs
from search.report.costs import CostRow
from search.results import BudgetResult, SearchResult
from search.spec.schema import DataSpec
from search.trials import Candidate
from search.workload.data.pictures import preparation
from search.workload.data.sources import DIGITS, FASHION_MNIST

FOLDERS = re.compile(r"(?<![\w.:/~-])(?:(?:file|sqlite)://+|~?/)(?:[^\s/'\"]+/)*(?=[^\s/'\"])")
"""The folders of an absolute path."""


@dataclass(frozen=True)
class Shipped:
    """All that the record says of a registered version.

    `budget` is the one it was registered for, with the version's trial as winner; `plan` is the trial's, `decisive` as
    `SearchSpec.decisive` gave it.
    """

    name: str
    uri: str
    version: Version
    budget: BudgetResult
    result: SearchResult
    plan: Mapping[str, Any]
    decisive: Mapping[str, Any]
    onnx_refused: str | None

    @property
    def candidate(self) -> Candidate:
        """The version's trial."""
        assert self.budget.winner is not None
        return self.budget.winner


def card(
    shipped: Shipped,
    *,
    files: Mapping[str, Mapping[str, Any]],
    shapes: Mapping[str, list[int]],
    parity: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The card of `shipped`, without secrets and without the folders of absolute paths.

    Args:
        files: size and hash of each file by name.
        shapes: of one image, and of its logits.
        parity: of the files' outputs; None if there is one file only.
    """
    tags, result, candidate = shipped.version.tags, shipped.result, shipped.candidate
    data = _without_secrets(shipped.decisive["data"])
    known = {key: tags.get(key) for key in ("spec_hash", "git_commit", "teacher_hash")}
    found = {
        "model": shipped.name.removeprefix("models:/"),
        "version": shipped.version.version,
        "search": result.name,
        "started": result.started,
        **known,
        "files": files,
        "onnx_refused": shipped.onnx_refused,
        "parity": parity,
        "input": {"name": "images", "dtype": "float32", "shape": ["batch", *shapes["images"]]},
        "output": {"name": "logits", "dtype": "float32", "shape": ["batch", *shapes["logits"]]},
        "preprocessing": preprocessing(data),
        "budget": shipped.budget.name,
        "costs": [_cost(row) for row in costs.rows(result, shipped.budget).values()],
        "metric": _metric(shipped),
        "latency_ms": {device: dict(timing.latency_ms) for device, timing in candidate.timings.items()},
        "teacher_latency_ms": {device: dict(times) for device, times in result.teacher.latency_ms.items()},
        "noise": {device: timing.noise for device, timing in candidate.timings.items()},
        "devices": {device: dict(facts) for device, facts in result.devices.items()},
        "method": candidate.method,
        "knobs": dict(candidate.knobs),
        "plan": shipped.plan,
        "teacher": _without_secrets(shipped.decisive["model"]),
        "data": data,
        "recovery": _without_secrets(shipped.decisive["recovery"]),
        "versions": {package: version_of(package) for package in ("torch", "onnx", "onnxruntime", "mlflow")},
    }
    cleaned: dict[str, Any] = _shareable(found)
    return cleaned | {"load": _load(shipped, shapes["images"])}


def preprocessing(data: Mapping[str, Any]) -> str:
    """How an image becomes the network's input, as a sentence.

    >>> preprocessing({"source": "digits"})
    'Pixels are multiplied by 0.0625, then 0.305 is taken off and the rest divided by 0.376.'
    """
    if (scaling := {"digits": DIGITS, "fashion-mnist": FASHION_MNIST}.get(data["source"])) is not None:
        return (
            f"Pixels are multiplied by {scaling['scale']:.6g}, then {scaling['mean']:g} is taken off and the rest "
            f"divided by {scaling['std']:g}."
        )
    if data["source"] == "imagefolder":
        way = preparation(DataSpec.model_construct(**data))
        return (
            f"The shorter side of an RGB picture is resized to {way.resize or way.size * 8 // 7} ({way.interpolation}, "
            f"antialiased), its middle {way.size} x {way.size} is cut out, pixels are scaled to [0, 1], then the mean "
            f"{tuple(way.mean)} is taken off and the rest divided by {tuple(way.std)}."
        )
    return f"Images are used as {data['name']} gives them, {data.get('args') or 'without arguments'}."


def _cost(row: CostRow) -> dict[str, Any]:
    facts = {key: getattr(row, key) for key in ("cost", "name", "value", "limit", "teacher", "share")}
    return facts | {"is_inside": row.is_inside}


def _metric(shipped: Shipped) -> dict[str, Any]:
    """The metric's scale and its values as shares: of the model and of its teacher, validation and test."""
    scale, teacher, top1 = shipped.result.metric, shipped.result.teacher, shipped.candidate.top1_validation
    return {
        "name": scale.name,
        "worst": scale.worst,
        "best": scale.best,
        "validation": top1,
        "test": shipped.budget.top1_test,
        "teacher_validation": teacher.top1_validation,
        "teacher_test": teacher.top1_test,
    }


def _load(shipped: Shipped, image: list[int]) -> dict[str, str]:
    """A few lines of Python per runtime; the first two run in this folder, the last one beside the store."""
    shape = ", ".join(map(str, (1, *image)))
    store = FOLDERS.sub("sqlite:///", shipped.uri) if shipped.uri.startswith("sqlite:") else masked(shipped.uri)
    return {
        "torch": (
            f'import torch\n\nmodel = torch.export.load("model.pt2").module()\nlogits = model(torch.zeros({shape}))'
        ),
        "onnxruntime": (
            "import numpy\nimport onnxruntime\n\n"
            'session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])\n'
            f'(logits,) = session.run(None, {{"images": numpy.zeros(({shape}), numpy.float32)}})'
        ),
        "mlflow": (
            f'import mlflow\n\nmlflow.set_tracking_uri("{store}")\nmodel = mlflow.pytorch.load_model("{shipped.name}")'
        ),
    }


def _without_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a spec's section, those of arguments hidden whose names are of secrets."""
    args = values.get("args") or {}
    hidden = {key: "***" if re.search(f"{SECRET}$", key, re.IGNORECASE) else args[key] for key in args}
    return {**values, **({"args": hidden} if args else {})}


def _shareable(value: Any) -> Any:
    """JSON-ready values whose texts have no secret and no folders of absolute paths."""
    if isinstance(value, Mapping):
        return {key: _shareable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_shareable(part) for part in value]
    return FOLDERS.sub("", masked(value)) if isinstance(value, str) else value
