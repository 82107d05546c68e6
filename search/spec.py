"""The spec file: one YAML document, read once, strictly, into frozen models; all its mistakes are told at once."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from methods import METHODS, named
from methods.base import Budget
from methods.profile import Profile
from search.amounts import Amount, amount, seconds
from search.base import SpecError


def _unique(values: tuple[Any, ...], what: str) -> None:
    twice = sorted({str(v) for v in values if values.count(v) > 1})
    if twice:
        raise ValueError(f"{what} {', '.join(twice)} given twice; name each once")


def _method(entry: object) -> str:
    """The name of a method, or `first+second` for a list of methods, which is a chain."""
    links = [str(name).strip() for name in (entry if isinstance(entry, list) else str(entry).split("+"))]
    known = [name for name in METHODS if name != "uniform"]
    for name in links:
        if name == "uniform":
            raise ValueError("'uniform' is the baseline of every search; leave it out of the list")
        if name not in known:
            raise ValueError(f"{name!r} is not a method{_nearest(name, known)}")
    if isinstance(entry, list) and len(entry) < 2:
        raise ValueError(f"the chain {entry} is too short; give at least two methods, or one without brackets")
    return named("+".join(links)).name


def _sorted_out(entries: list[object]) -> tuple[list[str], list[str]]:
    """The names of the methods among `entries`, and what is wrong with the others."""
    names, refusals = [], []
    for entry in entries:
        try:
            names.append(_method(entry))
        except ValueError as error:
            refusals.append(str(error))
    return names, refusals


def _methods(value: object) -> object:
    if not isinstance(value, list) or not value:
        raise ValueError("expected a list with at least one method, such as [itpruner, alds, [practise, alds]]")
    names, refusals = _sorted_out(value)
    if refusals:
        raise ValueError("; ".join(refusals))
    _unique(tuple(names), "method")
    return tuple(names)


def _budgets(value: object) -> object:
    if not isinstance(value, list) or not value:
        raise ValueError("expected a list with at least one budget, such as [{name: half, macs: 50%}]")
    _unique(tuple(b.get("name") for b in value if isinstance(b, dict)), "budget")
    return tuple(value)


def _alias(value: object) -> object:
    if isinstance(value, str) and (value.lower() == "latest" or re.fullmatch(r"[vV][0-9]+", value)):
        raise ValueError(f"{value!r} is reserved by the model registry; choose another name, such as edge")
    return value


def _gpus(value: float) -> float:
    if value > 1 and not value.is_integer():
        raise ValueError(f"{value} GPUs cannot be had; write 0, a share up to 1, or a whole number")
    return value


def _registered(value: object) -> object:
    if isinstance(value, str) and (not value.strip() or set(value) & set("/:")):
        raise ValueError(f"{value!r} is no name for MLflow; write one that is not empty and has no '/' and no ':'")
    return value


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)


Limit = Annotated[Amount, BeforeValidator(amount)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0)]


class ModelSpec(_Strict):
    """Where the teacher comes from. `weights`: a .safetensors or .pt file, a torchvision enum, or `train` (zoo)."""

    source: Literal["zoo", "torchvision", "factory", "mlflow"]
    name: str
    weights: str | None = None
    args: dict[str, Any] = {}


class DataSpec(_Strict):
    """Where images come from and how they are split. `seed` is the split's own, so it outlives a change of search."""

    source: Literal["digits", "fashion-mnist", "imagefolder", "factory"]
    name: str | None = None
    root: str | None = None
    args: dict[str, Any] = {}
    size: Positive = 224
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    calibration: Annotated[int, Field(ge=4)] = 512
    seed: Seed = 0


class DeviceSpec(_Strict):
    """A device latency is measured on, and the channel multiple it likes."""

    runtime: Literal["torch"] = "torch"
    threads: Positive = 1
    batch: Positive = 1
    channels: Positive = 8


class BudgetSpec(_Strict):
    """Upper limits one winner must meet, and the device they are meant for (the first one where none is named).

    `macs` hold for every input; `macs_expected` are the mean over inputs, which gated models may meet too.
    """

    name: Annotated[Name, BeforeValidator(_alias)]
    device: str | None = None
    macs: Limit | None = None
    macs_expected: Limit | None = None
    params: Limit | None = None


class SearchSettings(_Strict):
    """`trials` per budget; no new round of trials starts once `timeout` seconds have passed."""

    trials: Positive = 8
    timeout: Annotated[float, BeforeValidator(seconds)] = 3600.0
    seed: Seed = 0


class RecoverySpec(_Strict):
    """How students are trained after the cut; without `labels` they mimic the teacher.

    `images` is how many of the training images they may see. Those of `data`, another source, take their place: any
    pictures will do for mimicking.
    """

    steps: Annotated[int, Field(ge=0)] = 400
    labels: bool = True
    images: Annotated[int | None, Field(ge=8)] = None
    data: DataSpec | None = None
    batch_size: Positive = 128
    precision: Literal["fp32", "bf16"] = "fp32"
    workers: Literal[1] = 1


class ClusterSpec(_Strict):
    """The Ray cluster: `auto` starts one on this machine; `max_parallel` bounds the workers."""

    address: str = "auto"
    gpus_per_trial: Annotated[float, Field(ge=0), AfterValidator(_gpus)] = 0
    max_parallel: Literal["auto"] | Positive = "auto"


class TrackingSpec(_Strict):
    """Where results go: an MLflow store, the registered model's name, and Optuna's journal file or database URL."""

    uri: str = "sqlite:///paredown.db"
    registered_model: Annotated[str | None, BeforeValidator(_registered)] = None
    studies: str = "paredown.studies"


class SearchSpec(_Strict):
    """A whole search, as the user asked for it. `folder` is where relative files are looked for."""

    name: Name
    model: ModelSpec
    data: DataSpec
    metric: str = "top1"
    methods: Annotated[tuple[str, ...], BeforeValidator(_methods)]
    devices: dict[Name, DeviceSpec] = {"cpu-1": DeviceSpec()}
    budgets: Annotated[tuple[BudgetSpec, ...], BeforeValidator(_budgets)]
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
        """The registered model's name: the search's own unless told otherwise."""
        return self.tracking.registered_model or self.name

    def digest(self) -> str:
        """A hash of all that decides what is proposed and what comes of it: not of where it runs or is recorded.

        A search may be given more trials or more time: it goes on, because neither changes what is proposed next.
        """
        decisive = self.model_dump(
            mode="json", exclude={"cluster": True, "tracking": True, "search": {"trials", "timeout"}}
        )
        return hashlib.blake2b(json.dumps(decisive, sort_keys=True).encode(), digest_size=8).hexdigest()

    def limits(self, profile: Profile) -> tuple[Budget, ...]:
        """Every budget in absolute units of this teacher."""
        first = next(iter(self.devices.values()))
        return tuple(
            Budget(
                name=budget.name,
                macs=budget.macs.of(profile.macs) if budget.macs else None,
                params=budget.params.of(profile.params) if budget.params else None,
                macs_expected=budget.macs_expected.of(profile.macs) if budget.macs_expected else None,
                channels=(self.devices[budget.device] if budget.device else first).channels,
            )
            for budget in self.budgets
        )


def load(path: Path) -> SearchSpec:
    """The spec in the file at `path`.

    Raises:
        SpecError: the file cannot be read or is wrong; every mistake is listed, with the nearest valid key.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read the spec {path}: {error}; expected a YAML file; check the path") from error
    return parse(text, folder=path.resolve().parent)


def parse(text: str, *, folder: Path) -> SearchSpec:
    """The spec in `text`; relative files in it are looked for in `folder`. Raises as `load` does."""
    try:
        raw, mistakes = _read(text)
    except yaml.YAMLError as error:
        raise SpecError(f"the spec is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise SpecError(f"the spec is {type(raw).__name__}; expected keys such as name, model, data and budgets")
    mistakes += [f"unknown key {key!r}; it is set from outside" for key in ("text", "folder") if key in raw]
    spec = None
    try:
        spec = SearchSpec.model_validate({**raw, "text": text, "folder": str(folder)})
    except ValidationError as error:
        mistakes += [_told(mistake) for mistake in error.errors()]
    mistakes += _cross_checks(raw)
    if mistakes or spec is None:
        raise SpecError(f"{_count(mistakes)} in the spec:\n" + "\n".join(f"  - {m}" for m in mistakes))
    return spec


class _Loader(yaml.SafeLoader):
    """YAML that remembers the keys which a mapping gives twice."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.twice: list[str] = []

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """The mapping; the last of two equal keys would win without a word."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                self.twice.append(f"line {key.start_mark.line + 1}: key {key.value!r} given twice; keep one of them")
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else key)
        return node


def _read(text: str) -> tuple[object, list[str]]:
    """The YAML document and the mistakes that only its text shows."""
    loader = _Loader(text)
    try:
        return loader.get_single_data(), loader.twice
    finally:
        loader.dispose()


def _count(mistakes: list[str]) -> str:
    return "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"


def _told(mistake: Any) -> str:
    """One of pydantic's errors as a sentence that says where, what and what instead."""
    place = ".".join(str(part) for part in mistake["loc"])
    if mistake["type"] == "extra_forbidden":
        parent, key = mistake["loc"][:-1], str(mistake["loc"][-1])
        return f"{place}: unknown key{_nearest(key, _keys(parent))}"
    if mistake["type"] == "missing":
        return f"{place}: missing; it has to be given"
    reason = str(mistake["msg"]).removeprefix("Value error, ")
    given = "" if mistake["type"] == "value_error" else f", but it is {mistake['input']!r}"
    return f"{place}: {reason}{given}"


def _keys(parent: Iterable[object]) -> list[str]:
    """The valid keys at a place in the spec."""
    sections: dict[str, type[BaseModel]] = {
        "model": ModelSpec, "data": DataSpec, "devices": DeviceSpec, "budgets": BudgetSpec,
        "search": SearchSettings, "recovery": RecoverySpec, "cluster": ClusterSpec, "tracking": TrackingSpec,
    }  # fmt: skip
    section = next((str(part) for part in reversed(list(parent)) if str(part) in sections), None)
    fields = (sections[section] if section else SearchSpec).model_fields
    return [key for key in fields if key not in ("text", "folder")]


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; expected one of {', '.join(known)}"


def _cross_checks(raw: dict[str, Any]) -> list[str]:
    """What no single key can tell; works on the raw document, so that it is told beside all other mistakes."""
    mistakes = []
    devices = raw.get("devices", {"cpu-1": None})
    budgets = raw.get("budgets")
    for index, budget in enumerate(budgets if isinstance(budgets, list) else []):
        if not isinstance(budget, dict):
            continue
        device = budget.get("device")
        if isinstance(device, str) and isinstance(devices, dict) and device not in devices:
            mistakes.append(f"budgets.{index}.device: no device {device!r}{_nearest(device, list(devices))}")
        if all(budget.get(cost) is None for cost in ("macs", "macs_expected", "params")):
            mistakes.append(f"budgets.{index}: limits nothing; give macs, macs_expected, params or several")
    if devices == {}:
        mistakes.append("devices: empty; name at least one device or leave the key out")
    recovery = raw.get("recovery")
    other = recovery.get("data") if isinstance(recovery, dict) else None
    needed = {"imagefolder": "root", "factory": "name"}
    for place, data in (("data", raw.get("data")), ("recovery.data", other)):
        if isinstance(data, dict) and (key := needed.get(str(data.get("source")))) and data.get(key) is None:
            mistakes.append(f"{place}.{key}: missing; source {data['source']!r} needs it")
    if other is not None and isinstance(recovery, dict) and recovery.get("labels", True):
        mistakes.append("recovery.data: its labels mean nothing to the teacher; give recovery.labels: false too")
    given, search = raw.get("methods"), raw.get("search")
    methods = set(_sorted_out(given)[0]) if isinstance(given, list) else set()
    trials = search.get("trials", 8) if isinstance(search, dict) else 8
    if methods and isinstance(trials, int) and 0 < trials < len(methods) + 1:
        mistakes.append(
            f"search.trials: {trials} is too few for {len(methods)} methods and the baseline, which are each tried "
            f"once per budget; give at least {len(methods) + 1}"
        )
    return mistakes
