"""Turn a network and a device's `Runtime` into a call that runs one batch to its end."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import nn

Program: TypeAlias = "bytes | nn.Module"
"""A network in the form that its runtime takes: an ONNX file for onnxruntime and OpenVINO, a module for the others."""

PACKAGES = {"openvino": "openvino"}
"""The runtimes whose library comes with an extra of ours, and its name."""


@dataclass(frozen=True)
class Runtime:
    """The way a device runs networks: the library, its threads, and the images in one call.

    `providers` are onnxruntime's execution providers, the one to be preferred first; none is its CPU.
    """

    kind: Literal["onnxruntime", "openvino", "torch", "torch-compiled"]
    threads: int = 1
    batch: int = 1
    providers: tuple[str, ...] = ()

    @property
    def takes_files(self) -> bool:
        """Whether its programs are ONNX files."""
        return self.kind in ("onnxruntime", "openvino")

    @property
    def version(self) -> str:
        """The version of the library.

        Raises:
            RuntimeError: it is not installed here.
        """
        return str(_library(self.kind.partition("-")[0]).__version__)

    def identity(self) -> dict[str, Any]:
        """Return what tells this runtime's readings from another's, JSON-ready."""
        return {key: value for key, value in asdict(self).items() if key != "providers" or value}


def _library(name: str) -> Any:
    """Import the library of a runtime."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"the runtime {name} needs a package that is missing on this device; install it there: "
            f"pip install '.[{PACKAGES.get(name, name)}]'"
        ) from error


@contextmanager
def loaded(program: Program, runtime: Runtime, images: NDArray[np.float32]) -> Iterator[Callable[[], object]]:
    """Yield a call that runs `program` once over a batch of `images` on this machine, while the context is open.

    That is on its CPU, unless the runtime names an execution provider.

    A module is run as a copy in evaluation mode, its maps channels-last, as training leaves them: on the zoo that takes
    0.75 to 0.87 of the time. The threads are torch's own again afterwards.

    Args:
        images: `(n, ...)` inputs; the first `runtime.batch` of them are used, repeated where they are too few.

    Raises:
        TypeError: this runtime does not run such programs.
        ValueError: the program was exported for another batch.
        RuntimeError: what the runtime needs is missing: a library, an execution provider, or a C++ compiler.
    """
    batch = np.resize(np.asarray(images, np.float32), (runtime.batch, *images.shape[1:]))
    is_file = isinstance(program, bytes)
    if is_file != runtime.takes_files:
        needed = "an ONNX file as bytes; export the network" if not is_file else "a torch module; load the network"
        raise TypeError(f"{runtime.kind} cannot run a program of type {type(program).__name__}; it needs {needed}")
    if isinstance(program, bytes):
        yield (_request if runtime.kind == "openvino" else _session)(program, runtime, batch)
        return
    with _module(program, runtime, batch) as call:
        yield call


def _session(program: bytes, runtime: Runtime, batch: NDArray[np.float32]) -> Callable[[], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = runtime.threads, 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # errors are raised too
    session = onnxruntime.InferenceSession(program, options, providers=_providers(runtime))
    (images,) = session.get_inputs()
    if isinstance(images.shape[0], int) and images.shape[0] != runtime.batch:
        raise ValueError(
            f"the ONNX file takes batches of {images.shape[0]}, but the device runs batches of {runtime.batch}; "
            "export it with a dynamic batch"
        )
    return partial(session.run, None, {images.name: batch})


def _providers(runtime: Runtime) -> list[str]:
    """The execution providers to ask for: onnxruntime itself would go on without those that it lacks."""
    import onnxruntime

    known = onnxruntime.get_available_providers()
    if missing := [name for name in runtime.providers if name not in known]:
        raise RuntimeError(
            f"onnxruntime has no {missing[0]} on this device, only {', '.join(known)}; install its build for that "
            "hardware there, such as onnxruntime-gpu, or correct the device's providers"
        )
    return list(dict.fromkeys([*runtime.providers, "CPUExecutionProvider"]))


def _request(program: bytes, runtime: Runtime, batch: NDArray[np.float32]) -> Callable[[], object]:
    """A call of OpenVINO's on an Intel CPU, in one stream of `runtime.threads` threads."""
    core = _library("openvino").Core()
    model = core.read_model(program)
    try:
        model.reshape(list(batch.shape))
    except RuntimeError as error:
        raise ValueError(
            f"the ONNX file takes no batches of {runtime.batch}; export it with a dynamic batch"
        ) from error
    settings = {"INFERENCE_NUM_THREADS": runtime.threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    return lambda: list(request.infer([batch], share_inputs=True, share_outputs=True).values())


@contextmanager
def _module(program: nn.Module, runtime: Runtime, batch: NDArray[np.float32]) -> Iterator[Callable[[], object]]:
    import torch

    images = torch.from_numpy(batch)
    if images.ndim == 4:
        images = images.to(memory_format=torch.channels_last)
    module = copy.deepcopy(program).cpu().eval().to(memory_format=torch.channels_last)
    threads = torch.get_num_threads()
    torch.set_num_threads(runtime.threads)
    try:
        with torch.inference_mode():
            yield partial(_compiled(module, runtime.threads) if runtime.kind == "torch-compiled" else module, images)
    finally:
        torch.set_num_threads(threads)
        if runtime.kind == "torch-compiled":
            torch.compiler.reset()  # or the code of every network ever compiled would stay


def _compiled(module: nn.Module, threads: int) -> Callable[..., object]:
    """Compile `module` by inductor, which it does at the first call.

    Each has its own compilations: they are counted by the code they come from, which all `nn.Sequential` share, and
    after eight of them the compiler would go back to eager without an error.
    """
    import torch
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise RuntimeError(
            "there is no C++ compiler on this device; the runtime torch-compiled needs one: install g++, name yours in "
            "CXX, or choose the runtime torch"
        ) from error
    compiled: Callable[..., object] = torch.compile(  # type: ignore[call-overload]  # torch's stubs lack an argument
        module, dynamic=False, isolate_recompiles=True, options={"cpp.threads": threads}
    )
    return compiled
