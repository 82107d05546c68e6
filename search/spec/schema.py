"""Every key of the spec file, as strict and frozen models with their defaults."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from methods.names import NAMES, links_of
from search.base import DEFAULT_STORE, DEFAULT_STUDIES
from search.limits import TOP1_DROP, Limits, latency_on
from search.spec.amounts import Amount, Time, amount, drop, latency, seconds
from search.spec.documents import suggestion
from search.spec.targets import Target
from search.trials import Teacher


def _refuse_repeats(values: tuple[Any, ...], what: str) -> None:
    twice = sorted({str(v) for v in values if values.count(v) > 1})
    if twice:
        raise ValueError(f"{what} {', '.join(twice)} given twice; name each once")


def _method_name(entry: object) -> str:
    """The name of a method, or `first+second` for a chain, which is a list of methods."""
    links = [str(name).strip() for name in (entry if isinstance(entry, list) else str(entry).split("+"))]
    known = [name for name in NAMES if name != "uniform"]
    for name in links:
        if name == "uniform":
            raise ValueError("'uniform' is the baseline of every search; leave it out of the list")
        if name not in known:
            raise ValueError(f"{name!r} is not a method{suggestion(name, known)}")
    if isinstance(entry, list) and len(entry) < 2:
        raise ValueError(f"the chain {entry} is too short; give at least two methods, or one without brackets")
    return "+".join(links_of("+".join(links)))


def read_methods(value: object) -> tuple[list[str], list[str]]:
    """The names of the methods in the list `value`, and a reason for refusing each other entry."""
    names, refusals = [], []
    for entry in value if isinstance(value, list) else ():
        try:
            names.append(_method_name(entry))
        except ValueError as error:
            refusals.append(str(error))
    return names, refusals


def _check_methods(value: object) -> object:
    if not isinstance(value, list) or not value:
        raise ValueError("expected a list with at least one method, such as [itpruner, alds, [practise, alds]]")
    names, refusals = read_methods(value)
    if refusals:
        raise ValueError("; ".join(refusals))
    _refuse_repeats(tuple(names), "method")
    return tuple(names)


def _check_budgets(value: object) -> object:
    if not isinstance(value, list) or not value:
        raise ValueError("expected a list with at least one budget, such as [{name: half, macs: 50%}]")
    _refuse_repeats(tuple(b.get("name") for b in value if isinstance(b, dict)), "budget")
    return tuple(value)


def _check_alias(value: object) -> object:
    if isinstance(value, str) and (value.lower() == "latest" or re.fullmatch(r"[vV][0-9]+", value)):
        raise ValueError(f"{value!r} is reserved by the model registry; choose another name, such as edge")
    return value


def _check_gpus(value: float) -> float:
    if value > 1 and not value.is_integer():
        raise ValueError(f"{value} GPUs cannot be had; write 0, a share up to 1, or a whole number")
    return value


def _check_model_name(value: object) -> object:
    if isinstance(value, str) and (not value.strip() or set(value) & set("/:")):
        raise ValueError(f"{value!r} is no name for MLflow; write one that is not empty and has no '/' and no ':'")
    return value


def _check_resources(value: dict[str, float]) -> dict[str, float]:
    if taken := sorted(set(value) & {"CPU", "GPU", "memory", "object_store_memory"}):
        raise ValueError(f"{taken[0]!r} is what workers take; name a resource of the node's own, such as board: 1")
    return value


def _check_channels(value: object) -> tuple[float, ...]:
    found = [float(one) for one in value if isinstance(one, int | float)] if isinstance(value, list) else []
    if len(found) != 3 or not isinstance(value, list) or len(value) != 3 or not all(0 <= one < 256 for one in found):
        raise ValueError("expected three numbers, of red, green and blue in [0, 1], such as [0.5, 0.5, 0.5]")
    if max(found) > 1:
        raise ValueError(f"{max(found):g} is above 1; pixels are scaled to [0, 1] first, so divide by 255")
    return tuple(found)


def _check_deviation(value: object) -> tuple[float, ...]:
    channels = _check_channels(value)
    if 0 in channels:
        raise ValueError("0 is no deviation; give three numbers above 0")
    return channels


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)


Limit = Annotated[Amount, BeforeValidator(amount), PlainSerializer(str, when_used="json")]
Latency = Annotated[Time, BeforeValidator(latency), PlainSerializer(str, when_used="json")]
Drop = Annotated[float, BeforeValidator(drop)]
NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$"
Name = Annotated[str, Field(pattern=NAME)]
Positive = Annotated[int, Field(gt=0)]
ResourceAmount = Annotated[float, Field(gt=0, strict=False)]
Seed = Annotated[int, Field(ge=0)]
Channels = Annotated[tuple[float, ...], BeforeValidator(_check_channels)]
Deviation = Annotated[tuple[float, ...], BeforeValidator(_check_deviation)]


WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")
"""The endings of files of weights; all but the first may hold pickles."""


class ModelSpec(_Strict):
    """The teacher's source. `weights`: a .safetensors or .pt file, a torchvision enum, or `train` (zoo)."""

    source: Literal["zoo", "torchvision", "factory", "mlflow"]
    name: str
    weights: str | None = None
    args: dict[str, Any] = {}


def _is_none(value: object) -> bool:
    """Whether a key was not given: records older than the key lack it, and equal those that leave it out."""
    return value is None


class DataSpec(_Strict):
    """The source of images and their split. `seed` is the split's own, so it outlives a change of search.

    A folder's pictures are resized to `resize`, cropped to `crop` (which is `size` by default) and normalised by `mean`
    and `std`; or all of that is as torchvision prepares images for the weights `preset`.
    """

    source: Literal["digits", "fashion-mnist", "imagefolder", "factory"]
    name: str | None = None
    root: str | None = None
    args: dict[str, Any] = {}
    size: Positive = 224
    resize: Annotated[int | None, Field(gt=0, exclude_if=_is_none)] = None
    crop: Annotated[int | None, Field(gt=0, exclude_if=_is_none)] = None
    mean: Annotated[Channels | None, Field(exclude_if=_is_none)] = None
    std: Annotated[Deviation | None, Field(exclude_if=_is_none)] = None
    interpolation: Annotated[
        Literal["nearest", "nearest-exact", "bilinear", "bicubic"] | None, Field(exclude_if=_is_none)
    ] = None
    preset: Annotated[str | None, Field(exclude_if=_is_none)] = None
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    calibration: Annotated[int, Field(ge=4)] = 512
    seed: Seed = 0


class DeviceSpec(_Strict):
    """A device to measure latency on, and the channel multiple it likes.

    `resources` are Ray's: they pin the meter to a node that has them, and it holds them alone. `file` is the roofline
    of a device that is not there; its predictions are never called measured.
    """

    runtime: Literal["onnxruntime", "torch", "torch-compiled", "profile"] = "onnxruntime"
    threads: Positive = 1
    batch: Positive = 1
    channels: Positive = 8
    resources: Annotated[dict[str, ResourceAmount], AfterValidator(_check_resources)] = {}
    file: str | None = None


class BudgetSpec(_Strict):
    """Limits that one winner must meet all at once, and the device they are meant for (the first one if none is named).

    `macs` hold for every input; `macs_expected` are the mean over inputs, which gated models may meet too. `size_bytes`
    are those of the stored weights, `latency` is the median on the device, and `top1_drop` is the validation top-1 that
    may be lost.
    """

    name: Annotated[Name, BeforeValidator(_check_alias)]
    device: str | None = None
    macs: Limit | None = None
    macs_expected: Limit | None = None
    params: Limit | None = None
    size_bytes: Limit | None = None
    latency: Latency | None = None
    top1_drop: Drop | None = None


class SearchSettings(_Strict):
    """`trials` per budget; no new round of trials starts once `timeout` seconds have passed.

    An `asynchronous` search starts a trial whenever a worker is free: it keeps a large cluster busy, but its proposals
    then depend on which trial ended first, so it cannot be repeated. With `timing: auto` students are timed in the
    search only where a budget limits latency or the spec names a device; else what is registered is, at the end.
    """

    trials: Positive = 8
    timeout: Annotated[float, BeforeValidator(seconds)] = 3600.0
    seed: Seed = 0
    asynchronous: bool = False
    timing: Literal["auto", "all"] = "auto"


class RecoverySpec(_Strict):
    """The training of students after the cut; without `labels` they mimic the teacher.

    `images` is the number of training images they may see. Those of `data`, another source, take their place: any
    pictures will do for mimicking. As many `workers` share each student's batches.
    """

    steps: Annotated[int, Field(ge=0)] = 400
    labels: bool = True
    images: Annotated[int | None, Field(ge=8)] = None
    data: DataSpec | None = None
    batch_size: Positive = 128
    precision: Literal["fp32", "bf16"] = "fp32"
    workers: Positive = 1


class ClusterSpec(_Strict):
    """The Ray cluster: `auto` starts one on this machine; `max_parallel` bounds the workers.

    Work that reports nothing for `stall_timeout` is taken to hang: its worker is replaced, and it runs again.
    """

    address: str = "auto"
    gpus_per_trial: Annotated[float, Field(ge=0), AfterValidator(_check_gpus)] = 0
    max_parallel: Literal["auto"] | Positive = "auto"
    stall_timeout: Annotated[float, BeforeValidator(seconds)] = 3600.0


class TrackingSpec(_Strict):
    """The record of results: an MLflow store, the registered model's name, and Optuna's journal file or database."""

    uri: str = DEFAULT_STORE
    registered_model: Annotated[str | None, BeforeValidator(_check_model_name)] = None
    studies: str = DEFAULT_STUDIES


class SearchSpec(_Strict):
    """A whole search, as the user asked for it. Relative files lie in `folder`."""

    name: Name
    model: ModelSpec
    data: DataSpec
    metric: str = "top1"
    methods: Annotated[tuple[str, ...], BeforeValidator(_check_methods)]
    devices: dict[Name, DeviceSpec] = {"cpu-1": DeviceSpec()}
    budgets: Annotated[tuple[BudgetSpec, ...], BeforeValidator(_check_budgets)]
    search: SearchSettings = SearchSettings()
    recovery: RecoverySpec = RecoverySpec()
    cluster: ClusterSpec = ClusterSpec()
    tracking: TrackingSpec = TrackingSpec()
    text: Annotated[str, Field(exclude=True, repr=False)] = ""
    folder: Annotated[str, Field(exclude=True, repr=False)] = "."

    @property
    def candidates(self) -> tuple[str, ...]:
        """Every method that competes: those asked for, and the baseline."""
        return (*self.methods, "uniform")

    @property
    def registered_model(self) -> str:
        """The registered model's name: the search's own unless another is given."""
        return self.tracking.registered_model or self.name

    def decisive(self) -> dict[str, Any]:
        """All values that decide the proposals and their outcomes, but none of the place, the record or the time.

        Budgets and devices are by name: a search may be given more of them, as it may be given more trials or time.
        """
        found = self.model_dump(
            mode="json",
            exclude={
                **dict.fromkeys(("cluster", "tracking", "budgets", "name"), True),
                "search": {"trials", "timeout", "timing"},
                "recovery": {"workers"},
            },
        )
        budgets = {one.name: one.model_dump(mode="json", exclude={"name"}) for one in self.budgets}
        return found | {
            "budgets": {one.name: budgets[one.name] | {"device": self.device_of(one)} for one in self.budgets}
        }

    def device_of(self, budget: BudgetSpec) -> str:
        """The name of the device a budget is meant for."""
        return budget.device or next(iter(self.devices))

    def needs_latency(self) -> bool:
        """Whether some budget limits latency."""
        return any(budget.latency is not None for budget in self.budgets)

    def times_all(self) -> bool:
        """Whether every student is timed: the spec says so, limits latency, or names a device."""
        is_named = "devices" in self.model_fields_set or any(budget.device is not None for budget in self.budgets)
        return self.search.timing == "all" or self.needs_latency() or is_named

    def targets(self, teacher: Teacher) -> tuple[Target, ...]:
        """Every budget in absolute units of this teacher, whose latency is needed only if a budget limits it."""
        return tuple(self._target(budget, teacher) for budget in self.budgets)

    def _target(self, budget: BudgetSpec, teacher: Teacher) -> Target:
        device = self.device_of(budget)
        units = {
            name: limit.of(getattr(teacher, "macs" if name == "macs_expected" else name))
            for name in ("macs", "macs_expected", "params", "size_bytes")
            if (limit := getattr(budget, name)) is not None
        }
        limits = Limits(units)
        if budget.latency is not None:
            limits[latency_on(device)] = budget.latency.of(teacher.latency_ms[device]["p50"])
        if budget.top1_drop is not None:
            limits[TOP1_DROP] = budget.top1_drop
        return Target(budget.name, limits, device, self.devices[device].channels)
