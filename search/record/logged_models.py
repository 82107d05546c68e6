"""MLflow's logged models: the programs stored with trials, a pt2 file and ONNX, which load without this project.

Every step may be cut short by a kill and taken again: what is there already is found and used.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import mlflow
import numpy as np
import onnx
import torch
from mlflow.entities import LoggedModelStatus
from mlflow.models import Model, ModelSignature, infer_signature
from mlflow.tracking import MlflowClient
from torch import fx, nn
from torch.export import ExportedProgram

from search.archive import ArchiveError, bare_program, load_program
from search.base import WorkloadError, first_line, shortened
from search.export import TOLERANCE, ExportError, bare_onnx, exported, onnx_file, parity
from search.record.store import connect_existing, holding_signals


class Models:
    """The models stored with runs of the store that `client`, made by `search.record.store.connect`, talks to."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client

    def stored(self, run_id: str) -> str | None:
        """The URI of the model stored with a trial, if that is done."""
        uri: str | None = self._client.get_run(run_id).data.tags.get("paredown.model_uri")
        return uri

    def onnx_uri(self, run_id: str) -> str | None:
        """The URI of the ONNX model beside it; None where the student could not be exported so."""
        uri: str | None = self._client.get_run(run_id).data.tags.get("paredown.onnx_uri")
        return uri

    def onnx_refused(self, run_id: str) -> str | None:
        """The reason why there is none."""
        reason: str | None = self._client.get_run(run_id).data.tags.get("paredown.onnx_refused")
        return reason

    def is_stored(self, run_id: str, *, with_onnx: bool) -> bool:
        """Whether there is nothing left to `store`."""
        tags = self._client.get_run(run_id).data.tags
        has_onnx = "paredown.onnx_uri" in tags or "paredown.onnx_refused" in tags
        return "paredown.model_uri" in tags and (has_onnx or not with_onnx)

    def store(self, run_id: str, student: nn.Module, images: np.ndarray, *, with_onnx: bool = True) -> str:
        """Stores `student` with its trial, as a pt2 program and if asked as ONNX too; the pt2 program's URI.

        Neither needs project code or a pickle to load. The tag `paredown.onnx_refused` says why there is no ONNX
        although it was asked for.

        Args:
            student: in eval mode, on the CPU.
            images: `(n, c, h, w)` float32, n at least 2: both programs are compared with the student on them, and the
                first two are stored as an example.

        Raises:
            WorkloadError: the exported program gives other outputs than the student; nothing was stored.
        """
        program = exported(student, torch.from_numpy(images[:2]))
        _check_program(run_id, student, program, images)
        file = None
        try:
            file = _onnx(student, images) if with_onnx else None
        except ExportError as error:
            self._client.set_tag(run_id, "paredown.onnx_refused", shortened(str(error), 500))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            uri = self._log_pt2(run_id, student, images[:2])
            if file is not None:
                signature = infer_signature(images[:2], _outputs(student, images[:2]))
                self._client.set_tag(run_id, "paredown.onnx_uri", self._log_onnx(run_id, file, signature))
        self._client.set_tag(run_id, "paredown.model_uri", uri)
        return uri

    def _log_pt2(self, run_id: str, student: nn.Module, example: np.ndarray) -> str:
        model = {"pytorch_model": student, "input_example": example, "serialization_format": "pt2"}
        return self._log(run_id, "model", mlflow.pytorch, ("torch", "mlflow", "numpy"), model)

    def _log_onnx(self, run_id: str, file: bytes, signature: ModelSignature) -> str:
        model = {"onnx_model": onnx.load_from_string(file), "signature": signature, "save_as_external_data": False}
        return self._log(run_id, "onnx", mlflow.onnx, ("onnx", "onnxruntime", "mlflow", "numpy"), model)

    def _log(
        self, run_id: str, name: str, flavor: ModuleType, packages: tuple[str, ...], model: Mapping[str, Any]
    ) -> str:
        """The URI of a run's model of that name: the one a killed driver left whole, or a new one.

        The run itself stays ended: `log_model` of a flavor would open it again, and a kill would leave it open.
        """
        run = self._client.get_run(run_id)
        experiment: str = run.info.experiment_id
        for left in self._client.search_logged_models([experiment], f"source_run_id = '{run_id}' AND name = '{name}'"):
            if left.status == LoggedModelStatus.READY:
                return str(left.model_uri)
            self._client.delete_logged_model(left.model_id)
        made = self._client.create_logged_model(experiment, name, source_run_id=run_id, params=run.data.params)
        requirements = [f"{package}=={version(package)}" for package in packages]
        with holding_signals():
            Model.log(None, flavor, run_id=run_id, model_id=made.model_id, pip_requirements=requirements, **model)
        return str(made.model_uri)


def load_model(uri: str, name: str) -> fx.GraphModule:
    """The program at `name`, such as `models:/x/1`, in the store at `uri`; nothing that was stored there is run.

    Raises:
        ArchiveError: it is no program of torch, or holds more than numbers and arithmetic.
        MlflowException: there is no such model.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = _downloaded(uri, name, folder)
        if path.suffix != ".pt2":
            raise ArchiveError(
                f"{name} was logged with its modules, as a pickle, and reading that runs its code; expected a program "
                "(serialization_format='pt2'); log it so"
            )
        return load_program(path, name)


def load_pickled(uri: str, name: str) -> object:
    """The network at `name` in the store at `uri`, with its modules; reading it runs its maker's code.

    Raises:
        ArchiveError: it was logged as a program, which has no modules.
        MlflowException: there is no such model.
    """
    with tempfile.TemporaryDirectory() as folder:
        if _downloaded(uri, name, folder).suffix == ".pt2":
            raise ArchiveError(
                f"{name} was logged as an exported graph, which cannot be cut or trained; expected one logged with "
                "its modules (serialization_format='pickle'); log it so, or use model.source factory with a weights "
                "file"
            )
        return mlflow.pytorch.load_model(name)


@dataclass(frozen=True)
class Files:
    """A stored model as files that hold no more than they need to run, and the two images stored with it.

    `program` is the content of a pt2 file, `onnx` of the ONNX file beside it if there is one.
    """

    program: bytes
    onnx: bytes | None
    images: np.ndarray


def files_of(uri: str, name: str, onnx_uri: str | None) -> Files:
    """The files of the model at `name`, such as `models:/x@edge`, and of the ONNX model stored beside it.

    Raises:
        ArchiveError: the program holds more than numbers and arithmetic.
        MlflowException: there is no such model.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = _downloaded(uri, name, folder)
        place = str(path.parents[1])
        images = np.asarray(Model.load(place).load_input_example(place), np.float32)
        program = bare_program(path, name)
        if onnx_uri is None:
            return Files(program, None, images)
        beside = mlflow.artifacts.download_artifacts(onnx_uri, dst_path=str(Path(folder, "onnx")))
        (file,) = Path(beside).rglob("*.onnx")
        return Files(program, bare_onnx(file.read_bytes()), images)


def _downloaded(uri: str, name: str, folder: str) -> Path:
    """The file of a stored network below `folder`: a `.pt2` program, or a pickle."""
    connect_existing(uri)
    place = Path(mlflow.artifacts.download_artifacts(name, dst_path=folder))
    if found := sorted(place.glob("*/model.pt*")):
        return found[0]
    raise ArchiveError(
        f"{name} holds no network of torch; expected a model that mlflow.pytorch logged; name the one stored as "
        "'model', not as 'onnx'"
    )


def _check_program(run_id: str, student: nn.Module, program: ExportedProgram, images: np.ndarray) -> None:
    """Refuses a student whose exported program gives other outputs than it does."""
    expected, found = _outputs(student, images), _outputs(program.module(), images)
    deviation = float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))
    if not deviation <= TOLERANCE:  # NaN too
        raise WorkloadError(
            f"the exported program of run {run_id} differs from the student by {deviation:.1e} of its largest output; "
            f"expected at most {TOLERANCE}, because the program is what is registered; look in the network's forward "
            "for randomness, and for decisions that an export takes once and for all"
        )


def _onnx(student: nn.Module, images: np.ndarray) -> bytes:
    """The student as ONNX, the file that is timed; raises `ExportError` where that cannot be done or differs."""
    given = torch.from_numpy(images)
    file = onnx_file(student, given)
    try:
        deviation = parity(student, file, given)
    except Exception as error:  # onnxruntime's errors share no class of their own
        raise ExportError(f"onnxruntime cannot run the ONNX model: {first_line(error)}") from error
    if not deviation <= TOLERANCE:
        raise ExportError(f"the ONNX model differs by {deviation:.1e} of the largest output; expected {TOLERANCE}")
    return file


def _outputs(model: nn.Module, images: np.ndarray) -> np.ndarray:
    """Return the outputs of `model` for the images, `(n, classes)`."""
    with torch.no_grad():
        found: np.ndarray = model(torch.from_numpy(images.copy())).numpy()
    return found
