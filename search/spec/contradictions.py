"""Contradictions between the keys of a spec, looked for beside the checks of each key's own type."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from search.spec.documents import suggestion

LIMITABLE = ("macs", "macs_expected", "params", "size_bytes", "latency")
"""The costs that a budget may limit; each budget limits at least one."""


def contradictions(raw: Mapping[str, Any], methods: Collection[str]) -> Iterator[str]:
    """Find the contradictions in the document `raw`, whose valid methods are `methods`.

    >>> list(contradictions({"recovery": {"workers": 4, "batch_size": 2}}, []))
    ['recovery.workers: 4 are too many for batches of 2 images; give each worker one at least']
    """
    devices = raw.get("devices", {"cpu-1": None})
    if devices == {}:
        yield "devices: empty; name at least one device or leave the key out"
    yield from _device_mistakes(devices if isinstance(devices, dict) else {})
    yield from _budget_mistakes(raw.get("budgets"), devices)
    recovery = _section(raw, "recovery")
    yield from _data_mistakes("data", raw.get("data"))
    yield from _data_mistakes("recovery.data", recovery.get("data"))
    if recovery.get("data") is not None and recovery.get("labels", True):
        yield "recovery.data: its labels mean nothing to the teacher; give recovery.labels: false too"
    for reason in _worker_mistakes(recovery, _section(raw, "cluster")):
        yield f"recovery.workers: {reason}"
    trials = _number(_section(raw, "search"), "trials", 8)
    if methods and trials is not None and 0 < trials < len(methods) + 1:
        yield (
            f"search.trials: {trials} is too few for {len(methods)} methods and the baseline, which are each tried "
            f"once per budget; give at least {len(methods) + 1}"
        )


def _device_mistakes(devices: Mapping[str, Any]) -> Iterator[str]:
    for name, device in devices.items():
        if isinstance(device, dict) and (device.get("runtime") == "profile") != (device.get("file") is not None):
            yield f"devices.{name}: runtime 'profile' and file, its roofline, belong together; give both"


def _budget_mistakes(budgets: object, devices: object) -> Iterator[str]:
    for index, budget in enumerate(budgets if isinstance(budgets, list) else []):
        if not isinstance(budget, dict):
            continue
        device = budget.get("device")
        if isinstance(device, str) and isinstance(devices, dict) and device not in devices:
            yield f"budgets.{index}.device: no device {device!r}{suggestion(device, list(devices))}"
        if all(budget.get(cost) is None for cost in LIMITABLE):
            yield f"budgets.{index}: limits no cost; give one or several of {', '.join(LIMITABLE)}"


def _data_mistakes(place: str, data: object) -> Iterator[str]:
    needed = {"imagefolder": "root", "factory": "name"}
    if isinstance(data, dict) and (key := needed.get(str(data.get("source")))) and data.get(key) is None:
        yield f"{place}.{key}: missing; source {data['source']!r} needs it"
    yield from _preparation_mistakes(place, data if isinstance(data, dict) else {})


PREPARATION = ("resize", "crop", "mean", "std", "interpolation")


def _preparation_mistakes(place: str, data: Mapping[str, Any]) -> Iterator[str]:
    """Find keys of preparation that say a thing twice, or to a source that prepares its images itself."""
    given = [key for key in (*PREPARATION, "preset") if data.get(key) is not None]
    if given and data.get("source") != "imagefolder":
        yield f"{place}.{given[0]}: only source 'imagefolder' prepares its pictures; leave it out"
    elif "preset" in given and (twice := [key for key in ("size", *given) if key != "preset" and key in data]):
        yield f"{place}.preset: it says {', '.join(twice)} already; leave one of them out"
    elif "crop" in given and "size" in data:
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
    """The number at `key`; anything else counts as None."""
    value = section.get(key, default)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
