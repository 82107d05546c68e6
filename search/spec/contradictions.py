"""Contradictions between the keys of a spec, looked for beside the checks of each key's own type."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from search.spec.checks import check_builder, read_methods
from search.spec.documents import quoted, suggestion
from search.spec.schema import METRICS, OURS, DataSpec, ModelSpec, task_name

MOST = 10**12
"""More than any number of a spec may be; only amounts go further."""

LIMITABLE = ("macs", "macs_expected", "params", "size_bytes", "latency")
"""The costs that a budget may limit; each budget limits at least one."""


def contradictions(raw: Mapping[str, Any], methods: Sequence[str]) -> Iterator[str]:
    """Find the contradictions in the document `raw`; `methods` are those of a spec that names none.

    >>> list(contradictions({"recovery": {"workers": 4, "batch_size": 2}, "methods": []}, ()))
    ['recovery.workers: 4 are too many for batches of 2 images; give each worker one at least']
    """
    devices = raw.get("devices", {"cpu-1": None})
    if devices == {}:
        yield "devices: empty; name at least one device or leave the key out"
    yield from _device_mistakes(devices if isinstance(devices, dict) else {})
    yield from _budget_mistakes(raw.get("budgets"), devices)
    recovery = _section(raw, "recovery")
    yield from _model_mistakes(_section(raw, "model"))
    yield from _data_mistakes("data", _section(raw, "data"))
    yield from _metric_mistakes(raw.get("metric"))
    yield from _task_mistakes(raw)
    yield from _data_mistakes("recovery.data", _section(recovery, "data"))
    for key in ("validation", "calibration", "seed"):
        if _is_given(_section(recovery, "data"), key):
            yield f"recovery.data.{key}: images to mimic on are not split; leave it out"
    has_labels = _section(raw, "data").get("labels") is not False
    if recovery.get("data") is not None and recovery.get("labels", has_labels):
        yield "recovery.data: its labels mean nothing to the teacher; give recovery.labels: false too"
    if _is_given(_section(recovery, "data"), "labels"):
        yield "recovery.data.labels: those of images to mimic on are never read; leave it out"
    yield from _label_mistakes(raw, has_labels=has_labels)
    for reason in _worker_mistakes(recovery, _section(raw, "cluster")):
        yield f"recovery.workers: {reason}"
    count = len(set(read_methods(raw["methods"])[0] if "methods" in raw else methods))
    search = _section(raw, "search")
    trials, explore = _number(search, "trials", 8), _number(search, "explore", 3) or 1
    if recovery.get("steps") == 0 or search.get("asynchronous") is True:
        explore = 1
    least = math.ceil((count + 1) / max(explore, 1))
    if count and trials is not None and 0 < trials < least:
        yield (
            f"search.trials: {trials} is too few for {count} methods and the baseline, which are each tried "
            f"once per budget; give at least {least}" + (", or more search.explore" if explore > 1 else "")
        )


def _task_mistakes(raw: Mapping[str, Any]) -> Iterator[str]:
    """Find networks, images and metrics of classification beside another task, and the reverse."""
    task, metric = raw.get("task", "classification"), raw.get("metric")
    name = task_name(task)
    if isinstance(task, dict) and "factory" in task:
        yield from _function_mistakes("task.factory", task["factory"])
    wanted = next((one for one, own in METRICS.items() if own == metric), name)
    if wanted != name and name in list(METRICS):
        yield f"metric: {metric} is that of {wanted}, and the task is {name}; leave it out for the task's own"
    if name == "classification" or not isinstance(name, str) or name not in METRICS:
        return
    data, model = _section(raw, "data"), _section(raw, "model")
    if model.get("source") == "zoo":
        yield f"model.source: the zoo has classifiers, and the task is {name}; give a factory, or torchvision"
    if data.get("source") in ("digits", "fashion-mnist"):
        yield f"data.source: {data['source']} has classes, and the task is {name}; give a factory"
    if data.get("source") == "imagefolder" and name != "segmentation" and data.get("labels") is not False:
        yield f"data.source: imagefolder has classes or masks, and the task is {name}; give a factory"


def _label_mistakes(raw: Mapping[str, Any], *, has_labels: bool) -> Iterator[str]:
    """Find what needs labels where `data.labels` says that there are none."""
    model, metric = _section(raw, "model"), raw.get("metric")
    function = metric.get("function") if isinstance(metric, dict) else metric
    if has_labels:
        if function == "agreement":
            yield "metric: agreement takes the teacher's answers for labels; give data.labels: false too"
        return
    if function is not None and function != "agreement":
        yield (
            f"metric: {quoted(function)} compares answers with labels, and data.labels is false, where agreement with "
            "the teacher decides; leave one of them out"
        )
    if _section(raw, "recovery").get("labels") is True:
        yield "recovery.labels: true needs labels, and data.labels is false; leave one of them out"
    if model.get("source") == "zoo" and model.get("weights") in (None, "train"):
        yield "model.weights: zoo networks are trained with labels, and data.labels is false; give a file of weights"


def _device_mistakes(devices: Mapping[str, Any]) -> Iterator[str]:
    for name, device in devices.items():
        if not isinstance(device, dict):
            continue
        is_profile = device.get("runtime") == "profile"
        if is_profile != (device.get("file") is not None):
            yield f"devices.{name}: runtime 'profile' and file, its roofline, belong together; give both"
        if _is_given(device, "providers") and device.get("runtime", "onnxruntime") != "onnxruntime":
            yield f"devices.{name}.providers: only runtime 'onnxruntime' has them; leave it out"
        for key in ("threads", "resources"):
            if is_profile and _is_given(device, key):
                yield f"devices.{name}.{key}: runtime 'profile' measures nothing; leave it out"


def _budget_mistakes(budgets: object, devices: object) -> Iterator[str]:
    for index, budget in enumerate(budgets if isinstance(budgets, list) else []):
        if not isinstance(budget, dict):
            continue
        device = budget.get("device")
        if isinstance(device, str) and isinstance(devices, dict) and device not in devices:
            known = [str(name) for name in devices]
            yield f"budgets.{index}.device: no device {quoted(device)}{suggestion(device, known)}"
        if all(budget.get(cost) is None for cost in LIMITABLE):
            yield f"budgets.{index}: limits no cost; give one or several of {', '.join(LIMITABLE)}"


SOURCES = {
    section: get_args(fields["source"].annotation)
    for section, fields in {"model": ModelSpec.model_fields, "data": DataSpec.model_fields}.items()
}
USED_BY = {
    "model": {
        "weights": ("zoo", "torchvision", "timm", "factory"),
        "args": ("torchvision", "timm", "factory"),
        "output": ("torchvision", "timm", "factory", "mlflow"),
    },
    "data": {"name": ("factory",), "args": ("factory",), "root": ("imagefolder", "fashion-mnist")},
}
"""The sources that use a key of a section; every other key is used by all."""

PREPARATION = ("size", "resize", "crop", "mean", "std", "interpolation", "preset")


def _metric_mistakes(metric: object) -> Iterator[str]:
    own = metric.get("function") if isinstance(metric, dict) else metric
    if own not in tuple(OURS):
        yield from _function_mistakes("metric", own)
    elif isinstance(metric, dict) and len(metric) > 1:
        yield f"metric: {own} has a name, a direction and a range of its own; write metric: {own}"


def _model_mistakes(model: Mapping[str, Any]) -> Iterator[str]:
    yield from _unused_keys("model", "model", model)
    if model.get("source") == "factory":
        yield from _function_mistakes("model.name", model.get("name"))
    if model.get("weights") == "train" and model.get("source") in ("torchvision", "timm", "factory"):
        yield "model.weights: only source 'zoo' trains its networks; give a file of weights, or leave it out"
    if model.get("weights") == "pretrained" and model.get("source") in ("zoo", "factory"):
        yield "model.weights: only source 'timm' has pretrained ones; give a file of weights, or leave it out"
    if model.get("source") in ("torchvision", "timm"):
        try:
            check_builder(_section(model, "args"))
        except ValueError as error:
            yield f"model.args: {error}"


def _data_mistakes(place: str, data: Mapping[str, Any]) -> Iterator[str]:
    yield from _unused_keys("data", place, data)
    needed = {"imagefolder": "root", "factory": "name"}
    if (key := needed.get(str(data.get("source")))) and data.get(key) is None:
        yield f"{place}.{key}: missing; source {data['source']!r} needs it"
    if data.get("source") == "factory":
        yield from _function_mistakes(f"{place}.name", data.get("name"))
    yield from _preparation_mistakes(place, data)


def _function_mistakes(place: str, name: object) -> Iterator[str]:
    if isinstance(name, str) and not re.fullmatch(r".+:[^\W\d]\w*", name):
        yield f"{place}: {quoted(name)} is no function; write pkg.mod:fn or ./file.py:fn"


def _unused_keys(section: str, place: str, given: Mapping[str, Any]) -> Iterator[str]:
    """Find the keys that the chosen source does not use: whoever gives one expects something of it."""
    source = given.get("source")
    for key, sources in USED_BY[section].items():
        if source in SOURCES[section] and source not in sources and _is_given(given, key):
            yield f"{place}.{key}: source {source!r} does not use it, only {' and '.join(sources)}; leave it out"


def _is_given(section: Mapping[str, Any], key: str) -> bool:
    """Whether a key says something: none and an empty mapping are as if it were left out."""
    return section.get(key) not in (None, {})


def _preparation_mistakes(place: str, data: Mapping[str, Any]) -> Iterator[str]:
    """Find keys of preparation that say a thing twice, or to a source that prepares its images itself."""
    given = [key for key in PREPARATION if _is_given(data, key)]
    if given and data.get("source") != "imagefolder":
        yield f"{place}.{given[0]}: only source 'imagefolder' prepares its pictures; leave it out"
    elif "preset" in given and len(given) > 1:
        yield f"{place}.preset: it says {', '.join(given[:-1])} already; leave one of them out"
    elif {"crop", "size"} <= set(given):
        yield f"{place}.crop: it is the same as size, which is given too; leave one of them out"
    side, crop = _number(data, "resize", math.inf), _number(data, "crop", _number(data, "size", 224) or 1)
    if side is not None and crop is not None and side < crop:
        yield f"{place}.resize: {side:g} is less than the {crop:g} pixels that are cropped; give at least as many"


def _worker_mistakes(recovery: Mapping[str, Any], cluster: Mapping[str, Any]) -> Iterator[str]:
    """Find the reasons why the requested workers cannot share a recovery."""
    workers = _number(recovery, "workers", 1)
    if workers is None or workers < 2:
        return
    sizes = [size for key in ("batch_size", "images") if (size := _number(recovery, key, 128)) is not None]
    if (size := min(sizes, default=workers)) < workers:
        yield f"{workers:g} are too many for batches of {size:g} images; give each worker one at least"
    most = _number(cluster, "max_parallel", workers)
    if most is not None and most < workers:
        yield f"{workers:g} are more than cluster.max_parallel, {most:g}; raise that, or lower this"
    gpus = _number(cluster, "gpus_per_trial", 0)
    if gpus is not None and 0 < gpus < 1:
        yield (
            f"{workers:g} workers cannot share a GPU, and cluster.gpus_per_trial is {gpus:g} for each; give each a "
            "whole one, or none"
        )


def _section(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The mapping at `key`; anything else counts as empty."""
    found = raw.get(key)
    return found if isinstance(found, dict) else {}


def _number(section: Mapping[str, Any], key: str, default: float) -> float | None:
    """The number at `key`; anything else counts as None, as do those that a key's own bounds refuse."""
    value = section.get(key, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and (value == default or -MOST < value < MOST) else None
