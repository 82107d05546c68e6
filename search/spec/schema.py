"""Every key of the spec file, as strict and frozen models with their defaults."""

from __future__ import annotations

import operator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from methods.names import NAMES
from search.base import DEFAULT_STORE, DEFAULT_STUDIES
from search.frontier import Rule
from search.limits import TOP1_DROP, Limits, latency_on
from search.spec.amounts import Amount, Time, amount, drop, latency, seconds, size
from search.spec.checks import (
    check_address,
    check_alias,
    check_args,
    check_budgets,
    check_channels,
    check_deviation,
    check_gpus,
    check_keep,
    check_methods,
    check_model_name,
    check_most_workers,
    check_output,
    check_providers,
    check_range,
    check_resources,
    check_store,
    check_task,
    check_text,
)
from search.spec.targets import Target
from search.trials import Teacher
from search.units import Scale


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)


Limit = Annotated[Amount, BeforeValidator(amount), PlainSerializer(str, when_used="json")]
Size = Annotated[Amount, BeforeValidator(size), PlainSerializer(str, when_used="json")]
Latency = Annotated[Time, BeforeValidator(latency), PlainSerializer(str, when_used="json")]
Drop = Annotated[float, BeforeValidator(drop)]
NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$"
Name = Annotated[str, Field(pattern=NAME)]
Text = Annotated[str, AfterValidator(check_text)]
Place = Annotated[str, AfterValidator(check_store)]
Arguments = Annotated[dict[str, Any], AfterValidator(check_args)]
Pixels = Annotated[int, Field(gt=0, le=8192)]
ResourceAmount = Annotated[float, Field(gt=0, le=1_000_000)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Channels = Annotated[tuple[float, ...], BeforeValidator(check_channels)]
Deviation = Annotated[tuple[float, ...], BeforeValidator(check_deviation)]


EVERY_METHOD = (*(name for name in NAMES if name != "uniform"), "channels+alds")
"""The methods of a spec that names none, and the chain that loses least without training."""

MOST_THREADS = 1024
"""The threads of one call, which no machine has more of."""

WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")
"""The endings of files of weights; all but the first may hold pickles."""


def _is_none(value: object) -> bool:
    """Whether a key was not given: records older than the key lack it, and equal those that leave it out."""
    return value is None


class ModelSpec(_Strict):
    """The teacher's source. `weights`: a weight file, a torchvision enum, `train` (zoo) or `pretrained` (timm).

    Of a network that returns several, `output` names the one that counts. `keep` names modules, or patterns of names,
    that no method may change.
    """

    source: Literal["zoo", "torchvision", "timm", "factory", "mlflow"]
    name: Text
    weights: Text | None = None
    args: Arguments = {}
    output: Annotated[str | int | None, BeforeValidator(check_output), Field(exclude_if=_is_none)] = None
    keep: Annotated[tuple[Text, ...], BeforeValidator(check_keep), Field(exclude_if=operator.not_)] = ()


class DataSpec(_Strict):
    """The source of images and their split. `seed` is the split's own, so it outlives a change of search.

    A folder's pictures are resized to `resize`, cropped to `crop` (which is `size` by default) and normalised by `mean`
    and `std`; or all of that is as torchvision or timm prepares images for the weights `preset`. Without `labels` the
    source has none, or they are not read: the teacher's own answers take their place.
    """

    source: Literal["digits", "fashion-mnist", "imagefolder", "factory"]
    name: Text | None = None
    root: Text | None = None
    args: Arguments = {}
    labels: Annotated[bool, Field(exclude_if=bool)] = True
    size: Pixels = 224
    resize: Annotated[Pixels | None, Field(exclude_if=_is_none)] = None
    crop: Annotated[Pixels | None, Field(exclude_if=_is_none)] = None
    mean: Annotated[Channels | None, Field(exclude_if=_is_none)] = None
    std: Annotated[Deviation | None, Field(exclude_if=_is_none)] = None
    interpolation: Annotated[
        Literal["nearest", "nearest-exact", "bilinear", "bicubic"] | None, Field(exclude_if=_is_none)
    ] = None
    preset: Annotated[Text | None, Field(exclude_if=_is_none)] = None
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    calibration: Annotated[int, Field(ge=4, le=1_000_000)] = 512
    seed: Seed = 0


OURS = {"top1": "top-1", "miou": "mIoU", "r2": "R\u00b2", "score": "score", "agreement": "agreement"}
"""The metrics that are no function of the user's, and what tables call them."""

METRICS = {"classification": "top1", "segmentation": "miou", "regression": "r2", "custom": "score"}
"""The tasks, and the metric that decides in each: a task of the user's own, `custom`, brings it along."""


class TaskSpec(_Strict):
    """What the network's outputs mean: one of ours by its name, or the user's own, which `factory` makes."""

    name: Literal["classification", "segmentation", "regression", "custom"] = "classification"
    factory: Text | None = None
    args: Arguments = {}


def _read_task(value: object) -> object:
    """A task that is a name, alone or in a section, is one of ours; one with a factory is the user's own."""
    section = {"name": value} if isinstance(value, str) else value
    if not isinstance(section, dict):
        return value
    if set(section) <= {"name"} and isinstance(name := section.get("name", "classification"), str):
        return {"name": check_task(name, list(METRICS)[:-1])}
    if not {"factory"} <= set(section) <= {"factory", "args"}:
        raise ValueError("expected a name, or a section with factory, and args if it takes some")
    return section | {"name": "custom"}


def task_name(task: object) -> object:
    """The name of the task that a document's key has, which may be anything."""
    return task.get("name", "custom" if task else "classification") if isinstance(task, dict) else task


def _task_json(task: TaskSpec) -> object:
    return task.name if task.factory is None else task.model_dump(mode="json", exclude={"name"})


def _is_classification(task: TaskSpec) -> bool:
    return task.name == "classification"


class MetricSpec(_Strict):
    """The user's own measure of what is better, of values in `range`: a share from 0 to 1 unless given."""

    function: Text
    name: Annotated[Text | None, Field(max_length=40)] = None
    direction: Literal["maximize", "minimize"] = "maximize"
    range: Annotated[tuple[float, float], BeforeValidator(check_range)] | None = None

    @property
    def is_ours(self) -> bool:
        """Whether this is no function of the user's: top-1, or that of the teacher's own answers."""
        return self.function in OURS

    @property
    def scale(self) -> Scale:
        """How its values are called and shown."""
        low, high = self.range or (0.0, 1.0)
        worst, best = (low, high) if self.direction == "maximize" else (high, low)
        own = OURS.get(self.function) or self.function.rpartition(":")[2]
        return Scale(self.name or own, worst, best)


def _read_metric(value: object) -> object:
    """A metric that is a name alone is that function."""
    return MetricSpec(function=check_text(value)) if isinstance(value, str) else value


def _metric_json(metric: MetricSpec) -> object:
    """What decides of a metric: its name in tables does not, and a plain one is its function, as before it had more."""
    is_plain = metric.direction == "maximize" and metric.range is None
    return metric.function if is_plain else metric.model_dump(mode="json", exclude={"name"})


class DeviceSpec(_Strict):
    """A device to measure latency on, and the channel multiple it likes.

    `providers` are onnxruntime's, the preferred one first. `resources` are Ray's: they pin the meter to a node that has
    them, and it holds them alone. `file` is the roofline of a device that is not there; its predictions are never
    called measured.
    """

    runtime: Literal["onnxruntime", "openvino", "torch", "torch-compiled", "profile"] = "onnxruntime"
    providers: Annotated[tuple[Text, ...], BeforeValidator(check_providers), Field(exclude_if=operator.not_)] = ()
    threads: Annotated[int, Field(gt=0, le=MOST_THREADS)] = 1
    batch: Annotated[int, Field(gt=0, le=65_536)] = 1
    channels: Annotated[int, Field(gt=0, le=4096)] = 8
    resources: Annotated[dict[str, ResourceAmount], AfterValidator(check_resources)] = {}
    file: Text | None = None


class BudgetSpec(_Strict):
    """Limits that one winner must meet all at once, and the device they are meant for (the first one if none is named).

    `macs` hold for every input; `macs_expected` are the mean over inputs, which gated models may meet too. `size_bytes`
    are those of the stored weights, `latency` is the median on the device, and `top1_drop` is the validation top-1 that
    may be lost.
    """

    name: Annotated[Name, BeforeValidator(check_alias)]
    device: Text | None = None
    macs: Limit | None = None
    macs_expected: Limit | None = None
    params: Limit | None = None
    size_bytes: Size | None = None
    latency: Latency | None = None
    top1_drop: Drop | None = None


class SearchSettings(_Strict):
    """`trials` per budget; no new round of trials starts once `timeout` seconds have passed.

    An `asynchronous` search starts a trial whenever a worker is free: it keeps a large cluster busy, but its proposals
    then depend on which trial ended first, so it cannot be repeated. With `timing: auto` students are timed in the
    search only where a budget limits latency or the spec names a device; else what is registered is, at the end. The
    `winner` of a budget is the simplest of its candidates that are the best but for noise, or the best as it is. For
    each trial that is trained, `explore` are built and judged, and the best go on.
    """

    trials: Annotated[int, Field(gt=0, le=100_000)] = 8
    timeout: Annotated[float, BeforeValidator(seconds)] = 3600.0
    seed: Seed = 0
    asynchronous: bool = False
    timing: Literal["auto", "all"] = "auto"
    winner: Rule = "simplest"
    explore: Annotated[int, Field(gt=0, le=100)] = 3


class RecoverySpec(_Strict):
    """The training of students after the cut; without `labels` they mimic the teacher.

    Before it, `refit` fits what the cut left to the teacher, layer by layer, on the calibration images. `images` is the
    number of training images that students may see. Those of `data`, another source, take their place: any pictures
    will do for mimicking. As many `workers` share each student's batches.
    """

    steps: Annotated[int, Field(ge=0, le=10_000_000)] = 400
    refit: bool = True
    labels: bool = True
    images: Annotated[int, Field(ge=8, le=10**9)] | None = None
    data: DataSpec | None = None
    batch_size: Annotated[int, Field(gt=0, le=65_536)] = 128
    precision: Literal["fp32", "bf16"] = "fp32"
    workers: Annotated[int, Field(gt=0, le=1024)] = 1


class ClusterSpec(_Strict):
    """The Ray cluster: `auto` starts one on this machine; `max_parallel` bounds the workers.

    Work that reports nothing for `stall_timeout` is taken to hang: its worker is replaced, and it runs again.
    """

    address: Annotated[str, AfterValidator(check_address)] = "auto"
    gpus_per_trial: Annotated[float, Field(ge=0), AfterValidator(check_gpus)] = 0
    max_parallel: Annotated[Literal["auto"] | int, BeforeValidator(check_most_workers)] = "auto"
    stall_timeout: Annotated[float, BeforeValidator(seconds)] = 3600.0


class TrackingSpec(_Strict):
    """The record of results: an MLflow store, the registered model's name, and Optuna's journal file or database."""

    uri: Place = DEFAULT_STORE
    registered_model: Annotated[Text | None, BeforeValidator(check_model_name)] = None
    studies: Place = DEFAULT_STUDIES


class SearchSpec(_Strict):
    """A whole search, as the user asked for it. Relative files lie in `folder`."""

    name: Name
    model: ModelSpec
    data: DataSpec
    task: Annotated[
        TaskSpec,
        BeforeValidator(_read_task),
        PlainSerializer(_task_json, when_used="json"),
        Field(exclude_if=_is_classification),
    ] = TaskSpec()
    metric: Annotated[MetricSpec, BeforeValidator(_read_metric), PlainSerializer(_metric_json, when_used="json")] = (
        MetricSpec(function="top1")
    )
    methods: Annotated[tuple[str, ...], BeforeValidator(check_methods)] = EVERY_METHOD
    devices: dict[Name, DeviceSpec] = {"cpu-1": DeviceSpec()}
    budgets: Annotated[tuple[BudgetSpec, ...], BeforeValidator(check_budgets)]
    search: SearchSettings = SearchSettings()
    recovery: RecoverySpec = RecoverySpec()
    cluster: ClusterSpec = ClusterSpec()
    tracking: TrackingSpec = TrackingSpec()
    text: Annotated[str, Field(exclude=True, repr=False)] = ""
    folder: Annotated[str, Field(exclude=True, repr=False)] = "."

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, given: Any) -> Any:
        """The metric is the task's; without labels agreement with the teacher decides, and students mimic it."""
        data, recovery, task = given.get("data"), given.get("recovery", {}), given.get("task", "classification")
        if not isinstance(data, dict) or data.get("labels") is not False:
            name = task_name(task)
            return ({"metric": METRICS[name]} if isinstance(name, str) and name in METRICS else {}) | given
        mimicking = {"labels": False} | recovery if isinstance(recovery, dict) else recovery
        return {"metric": "agreement"} | given | {"recovery": mimicking}

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
                "search": {"trials", "timeout", "timing", "winner"},
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
