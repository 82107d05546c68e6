"""`paredown measure`: the latency of a saved model, measured as a search does it, beside the search's own figures."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import fx, nn

from cluster import Cluster, InlineCluster, Program, RayCluster, predicted_ms
from search.archive import load_program
from search.base import SearchError, SpecError
from search.devices.device import described, kind_of
from search.devices.layer_table import layers_of
from search.devices.meter import Meter, timing_of
from search.devices.predicted import flat, roofline_of
from search.export import onnx_file
from search.limits import latency_on
from search.spec import SearchSpec
from search.spec.schema import MOST_THREADS, DeviceSpec
from search.trials import Times, Timing

COPIES = 4
"""The times that a batch of images must fit into memory: as it is, in the runtime, and as what layers make of it."""

STUDENT = "student.pt2"
"""The program in a folder that `paredown compress` wrote."""


@dataclass(frozen=True)
class Model:
    """A saved model: its program for inputs of `shape` `(c, h, w)`, and the tags of its registered version."""

    program: Program
    shape: tuple[int, ...]
    tags: Mapping[str, str] = field(default_factory=dict)


def measure(model: str, device: str, *, spec: SearchSpec | None, address: str | None, uri: str) -> dict[str, Any]:
    """The latency of a saved model on a device, as JSON-ready values.

    Args:
        model: a `.pt2` or `.onnx` file, a folder that `paredown compress` wrote, `models:/NAME@ALIAS` or
            `models:/NAME/VERSION`.
        device: a device of the spec if there is one, else one that a registered version was searched for, else
            `cpu-N`: onnxruntime with N threads.
        address: a running Ray cluster with the node of a device that needs resources.
        uri: the MLflow store of registered models.

    Returns:
        `model`, `device`, `runtime`, `threads`, `batch`, `host`, `processor`, `is_predicted`, `latency_ms` (`min`,
        `p50`, `p95` of one call, which runs the device's batch), `noise` (how far the median lay above the fastest
        call, as a share, where that was too far after all repeats, else None), and `searched`: the search's own figures
        for this device, `latency_ms`, `noise`, `host`, and the `ratio` of the median now to the one then; None where
        the search had no such device.
        A registered version is measured in turn with its teacher; `teacher_latency_ms` is that, and the ratio is
        corrected for drift by it, as a search's own figures are.

    Raises:
        SpecError: there is no such device, or a roofline is wrong.
        TrackingError: there is no such registered version.
        SearchError: the model cannot be read, or the device cannot run it.
        ClusterError: the device's resources are nowhere.
    """
    saved = _loaded(model, uri)
    wanted = _device(device, spec, saved.tags)
    _check_room(model, (wanted.batch, *saved.shape))
    known: Mapping[str, str] = {}
    if wanted.runtime == "profile":
        timing, beside = _predicted(saved, wanted, spec), None
    else:
        teacher = _teacher(saved.tags, uri)
        known, timing = _measured(saved, teacher or saved, wanted, address)
        beside = None if teacher is None else timing.teacher_latency_ms
    is_same = _searched_devices(saved.tags).get(device) == wanted  # a name may mean another device today
    searched = _searched_figures(device, saved.tags, timing.latency_ms["p50"], beside) if is_same else None
    timed = {"latency_ms": timing.latency_ms, "noise": timing.noise, "teacher_latency_ms": beside}
    return {"model": model, "device": device, **described(wanted, known), **timed, "searched": searched}


def _check_room(model: str, shape: tuple[int, ...]) -> None:
    """Refuse inputs that do not fit into this machine's memory together with what a network makes of them."""
    size, room = 4 * math.prod(shape), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if min(shape) < 1 or COPIES * size > room:
        raise SearchError(
            f"{model} takes images {shape[1:]}, {size:,} bytes for {shape[0]} of them; expected sides of at least 1, "
            f"and a batch that fits {COPIES} times into this machine's {room:,} bytes; export it for other images, or "
            "lower the device's batch"
        )


def _device(name: str, spec: SearchSpec | None, tags: Mapping[str, str]) -> DeviceSpec:
    """The device of that name: of the spec if there is one, else of the tags, else `cpu-N`."""
    known = dict(_searched_devices(tags) if spec is None else spec.devices)
    if name in known:
        return known[name]
    if spec is None and (found := re.fullmatch(r"cpu-([1-9][0-9]{0,3})", name)) and int(found[1]) <= MOST_THREADS:
        return DeviceSpec(threads=int(found[1]))
    expected = list(known) if spec else [*known, f"cpu-N, which is onnxruntime with N threads, {MOST_THREADS} at most"]
    raise SpecError(
        f"no device {name!r}; expected {' or '.join(expected)}; correct --device, or give the --spec that names it"
    )


def _teacher(tags: Mapping[str, str], uri: str) -> Model | None:
    """The teacher of a registered version, or None if its tags do not name it."""
    from search.record.logged_models import load_model

    if (where := tags.get("teacher_uri")) is None:
        return None
    return _exported(load_model(uri, where), where, {})


def _searched_devices(tags: Mapping[str, str]) -> dict[str, DeviceSpec]:
    """The devices of the search that a registered version came from, which checked them by the bounds of its time."""
    prefix = "device_spec/"
    return {
        tag.removeprefix(prefix): DeviceSpec.model_construct(**json.loads(text))
        for tag, text in tags.items()
        if tag.startswith(prefix)
    }


def _measured(model: Model, teacher: Model, device: DeviceSpec, address: str | None) -> tuple[dict[str, str], Timing]:
    """Measure a model; return the device's identity and the timing.

    A search measures a student in turn with its teacher, so the model takes turns with that, or with a copy of itself:
    alone it would find its weights in the processor's caches, and small networks seem up to 8 % faster.
    """
    images = np.random.default_rng(0).standard_normal((device.batch, *model.shape), np.float32)
    programs = {"student": _program(model, device), "teacher": _program(teacher, device)}
    with closing(_cluster(device, address)) as cluster:
        meter = Meter(cluster, device, partial(_refusal, device))
        return meter.identity(), timing_of(meter.read(programs, images))


def _cluster(device: DeviceSpec, address: str | None) -> Cluster:
    """Return the cluster with the device's node, or this process if it needs no resources."""
    if device.resources:
        return RayCluster(None, address=address or "auto", max_parallel=1)
    return InlineCluster(None)


def _refusal(device: DeviceSpec, reason: str) -> str:
    return (
        f"{device.runtime} cannot run the model: {reason}; expected a network it runs for batches of {device.batch}; "
        "choose a device with another runtime or batch"
    )


def _predicted(model: Model, device: DeviceSpec, spec: SearchSpec | None) -> Timing:
    """Return the timing by the roofline of a device that is not there."""
    module = _module(model, "a roofline")
    layers = layers_of(module, torch.zeros(1, *model.shape))
    latency_ms = flat(predicted_ms(layers, roofline_of(device, Path(spec.folder if spec else ".")), device.batch))
    return Timing(latency_ms, latency_ms)


def _program(model: Model, device: DeviceSpec) -> Program:
    """The model as the device runs it."""
    if kind_of(device) == "torch":
        return _module(model, f"the runtime {device.runtime}")
    if isinstance(model.program, bytes):
        return model.program
    return onnx_file(model.program, torch.randn(3, *model.shape, generator=torch.Generator().manual_seed(0)))


def _module(model: Model, needer: str) -> nn.Module:
    if isinstance(model.program, bytes):
        raise SearchError(f"{needer} cannot read an ONNX file; expected a .pt2 program; give that, or another device")
    return model.program


def _searched_figures(device: str, tags: Mapping[str, str], now: float, beside: Times | None) -> dict[str, Any] | None:
    """The search's own figures for this device, and how `now` compares with them at the speed its teacher had then."""
    prefix = f"{latency_on(device)}/"
    latency_ms = {tag.removeprefix(prefix): float(value) for tag, value in tags.items() if tag.startswith(prefix)}
    if "p50" not in latency_ms:
        return None
    if beside is not None:
        now *= float(tags[f"teacher_{prefix}p50"]) / beside["p50"]
    noise = tags.get(f"noise/{device}")
    host = tags.get("host") if tags.get("device") == device else None
    return {
        "latency_ms": latency_ms,
        "noise": None if noise is None else float(noise),
        "host": host,
        "ratio": now / latency_ms["p50"],
    }


def _loaded(model: str, uri: str) -> Model:
    """The model at a path, or of a registered version.

    Raises:
        SearchError: it cannot be read.
    """
    if model.startswith("models:/"):
        from search.record.logged_models import load_model  # takes seconds to import
        from search.record.registry import version_tags

        tags = version_tags(uri, model)
        return _exported(load_model(uri, model), model, tags)
    path = Path(model, STUDENT) if Path(model).is_dir() else Path(model)
    if path.suffix not in (".pt2", ".onnx") or not path.is_file():
        raise SearchError(
            f"no model at {path}; expected a .pt2 or .onnx file, a folder with {STUDENT}, or models:/NAME@ALIAS; "
            "correct the path"
        )
    return _from_pt2(path) if path.suffix == ".pt2" else _from_onnx(path)


def _from_pt2(path: Path) -> Model:
    return _exported(load_program(path, str(path)), str(path), {})


def _exported(module: fx.GraphModule, name: str, tags: Mapping[str, str]) -> Model:
    """The model of an exported module; the module itself holds the shape of its inputs."""
    inputs = [node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"]
    shape = tuple(inputs[0].shape[1:]) if len(inputs) == 1 and isinstance(inputs[0], torch.Tensor) else ()
    if not shape or not all(isinstance(side, int) for side in shape):
        raise SearchError(
            f"{name} does not say what images it takes; expected an exported program with one input of fixed size but "
            "for the batch; export it with torch.export"
        )
    return Model(fx.GraphModule(module, module.graph).eval(), shape, tags)  # an exported module refuses eval()


def _from_onnx(path: Path) -> Model:
    try:
        content = path.read_bytes()
        graph = onnx.load_from_string(content).graph
    except Exception as error:
        raise SearchError(_unreadable(path, "an ONNX file", error)) from error
    weights = {one.name for one in graph.initializer}
    inputs = [one.type.tensor_type.shape.dim for one in graph.input if one.name not in weights]
    shape = tuple(int(side.dim_value) for side in inputs[0][1:]) if len(inputs) == 1 else ()
    if not shape or not all(shape):
        raise SearchError(
            f"{path} does not say what images it takes; expected one input of fixed size but for the batch; export it "
            "with torch.onnx.export"
        )
    return Model(content, shape)


def _unreadable(path: Path, expected: str, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0]
    return f"cannot read {path}: {type(error).__name__}: {reason}; expected {expected}; make it anew"
