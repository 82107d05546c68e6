"""Export a network: as a program of torch (pt2), or as ONNX."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.jit._trace import TracerWarning

from search.base import SearchError, first_line

log = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""The most that outputs of a program may differ from its network's, as a share of the largest one or of 1."""

OPSET = 18
"""The version of ONNX's operators, whichever exporter writes a file."""

NOISY = ("torch.onnx", "onnxscript", "onnx_ir")
"""Loggers that report every step of an export."""


class ExportError(SearchError):
    """A network cannot be written as ONNX; the message says why."""


def exported(model: nn.Module, example: Tensor) -> ExportedProgram:
    """`model` as a program for any batch size, which `torch.export.load` reads without this project."""
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(model, (example,), dynamic_shapes=({0: batch},))


def onnx_program(model: nn.Module | ExportedProgram, example: Tensor) -> bytes:
    """`model`, on the CPU and in eval mode, as an ONNX file for any batch size; its one input is called `images`.

    Args:
        model: the network, or its program for any batch size, as `search.export.exported` gives it.
        example: images `(n, c, h, w)`, n >= 1.

    Raises:
        ExportError: torch cannot write it.
    """
    pair = example[[0, -1]]  # a batch of one would be fixed in the program
    batch = torch.export.Dim("batch", min=1)
    try:
        with _silence():
            made = torch.onnx.export(
                model, (pair,), dynamo=True, optimize=True, verbose=False, opset_version=OPSET,
                input_names=["images"], output_names=["logits"], dynamic_shapes=({0: batch},),
            )  # fmt: skip
        assert made is not None
        return bytes(made.model_proto.SerializeToString())
    except Exception as error:
        reason = error.__cause__ or error
        raise ExportError(
            f"torch cannot write the network as ONNX: {type(reason).__name__}: {first_line(reason)}; "
            "expected operators that ONNX has, for any batch size; rewrite its forward, or use the runtime torch"
        ) from error


def onnx_file(model: nn.Module, example: Tensor) -> bytes:
    """`model` as an ONNX file, to be timed or stored: by a trace, in a twentieth of the time of `onnx_program`.

    That takes over where a trace fails, depends on the values of images, or gives other outputs. Arguments and errors
    are those of `onnx_program`.
    """
    try:
        return _traced_onnx(model, example)
    except ExportError as error:
        log.debug("%s", error)
        return onnx_program(model, example)


def _traced_onnx(model: nn.Module, example: Tensor) -> bytes:
    """`model` as torch's exporter of traces writes it; its outputs are compared on `example` and on its negative."""
    file, names = io.BytesIO(), ("images", "logits")
    try:
        with _silence():
            warnings.simplefilter("error", TracerWarning)  # a value of these very images would be kept
            torch.onnx.export(
                model, (example[[0, -1]],), file, dynamo=False, opset_version=OPSET,  # type: ignore[arg-type]  # a buffer
                input_names=names[:1], output_names=names[1:], dynamic_axes={name: {0: "batch"} for name in names},
            )  # fmt: skip
        is_equal = all(parity(model, file.getvalue(), images) <= TOLERANCE for images in (example, -example))
    except Exception as error:
        raise ExportError(f"a trace does not do as ONNX: {type(error).__name__}: {first_line(error)}") from error
    if not is_equal:
        raise ExportError("a trace does not do as ONNX: its outputs differ from the network's")
    return file.getvalue()


def bare_onnx(content: bytes) -> bytes:
    """An ONNX file without its notes, which hold the lines and the folders of the code that it was made from."""
    model = onnx.load_from_string(content)
    _drop_notes(model)
    return bytes(model.SerializeToString())


def _drop_notes(message: Any) -> None:
    for field, value in message.ListFields():
        if field.name in ("doc_string", "metadata_props"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                _drop_notes(part)


def parity(model: nn.Module, onnx_bytes: bytes, images: Tensor) -> float:
    """The largest difference of outputs between `model`, in eval mode, and its ONNX file on `images` `(n, c, h, w)`.

    It is relative to the largest output, or to 1 if that is smaller; NaN if either gives NaN.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(onnx_bytes, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        expected = model(images.clone()).numpy()
    return float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Silence the prints, logs and warnings of the exporter: its error says all that matters."""
    levels = {name: logging.getLogger(name).level for name in NOISY}
    try:
        for name in NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
