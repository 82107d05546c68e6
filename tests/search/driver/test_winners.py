"""The end of a search on a real workload and record: what is stored, what a version says of itself, and kills."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import Tensor

from methods.base import Budget, Plan
from methods.network import profile
from methods.pipeline import Outcome, size_bytes, trial
from methods.training import Recipe, Samples, evaluate
from methods.training.recipe import WHOLE, Chance
from methods.uniform import Uniform
from search.driver.winners import TAG_BYTES, register, student
from search.record.logged_models import Models, load_model
from search.record.record import Record
from search.record.registry import version_tags
from search.record.searches import open_search
from search.spec import reading, schema
from search.trials import Fitted, Proposal, Teacher, Timing
from search.workload import Workload, loading
from tests.support.searches import empty_store

THINGS = """
import numpy as np
import torch
from torch import nn


def images():
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 120)
    pixels = random.normal(0, 0.3, (120, 1, 8, 8)).astype(np.float32)
    pixels[np.arange(120), 0, 2 * labels] += 1
    return {"images": pixels, "labels": labels}


class Net(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
        )
"""

SPEC = """
name: tiny
model: {source: factory, name: "./things.py:Net"}
data: {source: factory, name: "./things.py:images", calibration: 16}
methods: [alds]
devices: {cpu-1: {channels: 1}, nano: {channels: 1, threads: 2}}
budgets:
  - {name: half, macs: 60%, device: nano}
  - {name: slim, macs: 60%, latency: 90%, top1_drop: 0.9}
  - {name: none, params: 1}
"""

DEVICES = {"cpu-1": {"host": "bench", "is_predicted": False}, "nano": {"host": None, "is_predicted": True}}


def quiet(stage: str, done: int, total: int, note: str) -> None:
    """A report nobody reads."""


@dataclass
class Counted:
    """Samples that count how often they were read."""

    inner: Samples
    batches: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.inner)

    def batch(self, indices: np.ndarray, augment: Chance = None, part: slice = WHOLE) -> tuple[Tensor, Tensor]:
        self.batches.append(len(indices))
        return self.inner.batch(indices, augment, part)

    @property
    def times(self) -> float:
        """The number of times the whole set was read."""
        return sum(self.batches) / len(self)


@dataclass
class Search:
    """A search whose trials are made by hand, from real plans and trained students."""

    spec: schema.SearchSpec
    workload: Workload
    record: Record
    test: Counted
    trials: int = 0

    def plan(self, macs: float) -> Plan:
        """A uniform plan for a share of the teacher's MACs."""
        rows = profile(self.workload.teacher, self.workload.example)
        budget = Budget("half", macs=round(macs * rows.macs), channels=1)
        return Uniform().allocate({}, rows, budget, {"criterion": "l1"})

    def begin(self, budget: str, plan: Plan, latency_ms: float) -> str:
        """The run of a trial that was planned and timed."""
        proposal = Proposal(budget, self.trials, "uniform", {"criterion": "l1"}, {"learning_rate": 0.1})
        self.trials += 1
        run_id = self.record.trials.start(proposal)
        times = {"min": latency_ms - 0.1, "p50": latency_ms, "p95": latency_ms + 0.5}
        both = {"cpu-1": Timing(times, times, noise=0.25), "nano": Timing(times, times)}
        self.record.trials.planned(run_id, Fitted(plan, both, 1), f"work {self.trials}")
        return run_id

    def train(
        self, budget: str, macs: float, *, top1: float, latency_ms: float = 1.0, notes: tuple[str, ...] = ()
    ) -> str:
        """The run of a trial that was trained; its top-1 is as told, so that a test decides who wins."""
        plan = replace(self.plan(macs), notes=notes)
        run_id = self.begin(budget, plan, latency_ms)
        outcome = replace(_outcome(self.workload, plan), top1_validation=top1)
        self.record.trials.complete(run_id, outcome, 1.0, top1_drop=0.95 - top1, keep_weights=True)
        return run_id

    def register(self) -> None:
        """Do what the end of a search does."""
        register(self.spec, self.workload, self.record, quiet)

    def version(self, budget: str) -> dict[str, str]:
        """The tags of the version that a budget's alias points at."""
        return dict(version_tags(self.spec.tracking.uri, f"models:/tiny@{budget}"))


def _outcome(made: Workload, plan: Plan) -> Outcome:
    """Return the outcome of a trial without recovery."""
    steps = trial(made.worker_inputs(), Uniform(), plan, Recipe(steps=0), 0)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            found: Outcome = stop.value
            return found


@pytest.fixture
def searched(tmp_path: Path) -> Search:
    return begun(tmp_path)


def begun(folder: Path) -> Search:
    """A search without a trial, in the current folder."""
    (folder / "things.py").write_text(THINGS)
    (folder / "paredown.db").write_bytes(empty_store())
    wanted = reading.parse(SPEC, folder=folder)
    made = loading.load(wanted, quiet)
    test = Counted(made.splits.test)
    made = replace(made, splits=replace(made.splits, test=test))
    record = open_search(wanted.tracking.uri, "tiny", decisive=wanted.decisive(), spec=wanted.text, model="tiny")
    rows = profile(made.teacher, made.example)
    teacher = Teacher(
        top1_validation=0.95, top1_test=None, macs=rows.macs, params=rows.params, size_bytes=size_bytes(made.teacher),
        latency_ms={device: {"min": 1.8, "p50": 2.0, "p95": 2.5} for device in wanted.devices},
    )  # fmt: skip
    record.search.write_teacher(teacher)
    record.search.write_limits({target.name: target.limits for target in wanted.targets(teacher)})
    record.search.write_devices(DEVICES)
    return Search(wanted, made, record, test)


def test_a_version_says_where_it_is_from_and_how_it_meets_its_limits(searched: Search) -> None:
    run_id = searched.train("half", 0.5, top1=0.8)
    searched.register()
    result = searched.record.read.result()
    half, slim, none = result.budgets
    assert (half.alias, half.model_uri, slim.model_uri) == ("half", "models:/tiny@half", "models:/tiny@slim")
    assert none.winner is none.model_uri is None

    tags = searched.version("slim")
    assert half.winner is not None
    assert json.loads(tags["plan"]) == searched.record.read.plan(run_id).to_json() == half.winner.plan
    assert json.loads(tags["knobs"]) == {"criterion": "l1", "recovery.learning_rate": 0.1}
    for name, device in searched.spec.devices.items():
        assert schema.DeviceSpec.model_validate_json(tags[f"device_spec/{name}"]) == device
    expected = {
        "budget": "slim",
        "method": "uniform",
        "spec_hash": searched.record.search.spec_digest,
        "teacher_hash": searched.workload.fingerprint,
        "device": "cpu-1",
        "host": "bench",
        "onnx_uri": Models(searched.record.client).onnx_uri(run_id),
        "top1_validation": "0.8",
        "top1_test": repr(slim.top1_test),
        "top1_drop": repr(0.95 - 0.8),
        "macs": str(half.winner.macs),
        "params": str(half.winner.params),
        "size_bytes": str(half.winner.size_bytes),
        "limit_macs": str(slim.limits["macs"]),
        "limit_latency_ms/cpu-1": "1.8",
        "limit_top1_drop": "0.9",
        "is_predicted/cpu-1": "false",
        "is_predicted/nano": "true",
        "noise/cpu-1": "0.25",
        "teacher_uri": Models(searched.record.client).stored(searched.record.search.run_id),
        "teacher_latency_ms/cpu-1/p50": "2.0",
        "teacher_latency_ms/nano/p50": "2.0",
    }
    for device in ("cpu-1", "nano"):
        expected |= {
            f"latency_ms/{device}/{key}": value for key, value in (("min", "0.9"), ("p50", "1.0"), ("p95", "1.5"))
        }
    assert {key: tags[key] for key in tags if not key.startswith(("plan", "knobs", "device_spec"))} == expected
    assert searched.version("half")["device"] == "nano"
    assert "host" not in searched.version("half")

    model: Any = load_model(searched.spec.tracking.uri, "models:/tiny@half")
    images = torch.from_numpy(searched.workload.splits.calibration)
    with torch.no_grad():
        torch.testing.assert_close(model(images), student(searched.workload, searched.record, run_id)(images))


def test_the_test_set_is_read_once_per_version_and_once_for_the_teacher(searched: Search) -> None:
    run_id = searched.train("half", 0.5, top1=0.8)
    searched.register()
    assert searched.test.times == 3  # the teacher, half, slim
    known = searched.record.read.result()
    searched.register()
    assert searched.record.read.result() == known
    assert searched.test.times == 3

    found = evaluate(student(searched.workload, searched.record, run_id), searched.test.inner, searched.workload.metric)
    assert [budget.top1_test for budget in known.budgets] == [found, found, None]
    searched.train("half", 0.55, top1=0.85, latency_ms=1.9)  # too slow for slim
    searched.register()
    assert searched.test.times == 4
    assert [one.top1_validation for one in _winners(searched)] == [0.85, 0.8]


def _winners(searched: Search) -> list[Any]:
    return [one.winner for one in searched.record.read.result().budgets if one.winner is not None]


def test_a_reused_trial_shares_the_stored_model(searched: Search) -> None:
    source = searched.train("half", 0.5, top1=0.8, latency_ms=1.9)
    run_id = searched.begin("slim", searched.plan(0.5), 1.0)
    searched.record.trials.reuse(run_id, source)
    searched.register()
    half, slim = _winners(searched)
    assert (half.run_id, slim.run_id, slim.same_as) == (source, run_id, source)
    client = MlflowClient()
    versions = {one.tags["budget"]: one for one in client.search_model_versions("name = 'tiny'")}
    assert {budget: one.run_id for budget, one in versions.items()} == {"half": source, "slim": run_id}
    assert versions["half"].source == versions["slim"].source == Models(searched.record.client).stored(source)
    assert searched.version("slim")["onnx_uri"] == searched.version("half")["onnx_uri"]
    assert Models(searched.record.client).stored(run_id) is None


def test_a_frontier_member_that_wins_nothing_is_stored_too(searched: Search) -> None:
    best = searched.train("half", 0.55, top1=0.8)
    cheap = searched.train("half", 0.3, top1=0.5)
    beaten = searched.train("half", 0.58, top1=0.4, latency_ms=1.5)
    searched.register()
    assert {one.run_id for one in _winners(searched)} == {best}
    stored = {run_id for run_id in (best, cheap, beaten) if Models(searched.record.client).stored(run_id)}
    assert stored == {best, cheap}
    assert Models(searched.record.client).onnx_uri(best)
    assert Models(searched.record.client).onnx_uri(cheap) is None  # only what is registered needs it


def test_a_better_model_of_another_search_keeps_the_alias(searched: Search) -> None:
    first = searched.train("half", 0.5, top1=0.8)
    searched.register()
    uri, decisive = searched.spec.tracking.uri, searched.spec.decisive()
    other = open_search(uri, "second", decisive=decisive, spec="", model="tiny")
    teacher = searched.record.search.teacher()
    assert teacher is not None
    other.search.write_teacher(replace(teacher, top1_test=None))
    other.search.write_limits(
        json.loads(json.dumps({one.name: dict(one.limits) for one in searched.record.read.result().budgets}))
    )
    second = replace(searched, record=other)
    worse = second.train("half", 0.4, top1=0.7)
    second.register()
    half, slim, _ = other.read.result().budgets
    assert half.winner is not None
    assert (half.winner.run_id, half.alias, half.model_uri) == (worse, None, "models:/tiny/3")
    assert (slim.alias, slim.model_uri) == (None, "models:/tiny/4")
    assert half.top1_test == slim.top1_test is not None
    assert searched.record.read.result().budgets[0].alias == "half"
    holder = other.registry.holder("half")
    assert holder is not None
    assert holder.run_id == first


class Killed(BaseException):
    """The driver is gone: nothing catches this."""


@pytest.mark.parametrize("step", ["log_batch", "create_model_version", "set_registered_model_alias"])
def test_a_killed_registration_goes_on(searched: Search, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Killed after the first of the two winners' steps, and after the teacher was tested."""
    searched.train("half", 0.5, top1=0.8)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, step, _last(getattr(MlflowClient, step)))
        with pytest.raises(Killed):
            searched.register()
    searched.register()
    versions = MlflowClient().search_model_versions("name = 'tiny'")
    assert sorted(one.tags["budget"] for one in versions) == ["half", "slim"]
    assert searched.test.times == 3
    assert [one.alias for one in searched.record.read.result().budgets] == ["half", "slim", None]
    assert {run.info.status for run in MlflowClient().search_runs(["1"], "tags.`paredown.state` != ''")} == {"FINISHED"}


def _last(real: Callable[..., Any]) -> Callable[..., Any]:
    """A call that the process does not survive."""

    def call(*args: Any, **more: Any) -> Any:
        real(*args, **more)
        raise Killed

    return call


@pytest.mark.parametrize("over", [0, 1])
def test_a_plan_too_long_for_a_tag_leaves_its_digest(searched: Search, over: int) -> None:
    bare = len(_text(replace(searched.plan(0.5), notes=("",))))
    searched.train("half", 0.5, top1=0.8, notes=("x" * (TAG_BYTES - bare + over),))
    searched.register()
    tags = searched.version("half")
    (winner, _) = _winners(searched)
    text = _text(Plan.from_json(winner.plan))
    assert len(text) == TAG_BYTES + over
    assert tags.get("plan") == (None if over else text)
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    assert tags.get("plan_digest") == (digest if over else None)


def _text(plan: Plan) -> str:
    """A plan as it is written to a tag."""
    return json.dumps(plan.to_json(), sort_keys=True, separators=(",", ":"))
