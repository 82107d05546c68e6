"""Stored programs, registered versions and their aliases, on a real MLflow store: kills at every step, and refusals."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import Tensor, nn
from torch.nn import functional as F

from search.archive import ArchiveError
from search.base import SpecError, TrackingError, WorkloadError
from search.driver.winners import promote
from search.limits import Limits
from search.record.logged_models import Models, load_model, load_pickled
from search.record.registry import Registry, Version, version_tags
from search.record.searches import open_search
from search.record.store import connect
from search.trials import Teacher

IMAGES = np.random.default_rng(0).normal(size=(8, 1, 4, 4)).astype(np.float32)
LIMITS = Limits({"macs": 100, "latency_ms/cpu-1": 2.0})
TAGS = {"top1_validation": 0.9, "macs": 90, "latency_ms/cpu-1/p50": 1.5}


class Net(nn.Module):
    """Sixteen pixels to three logits, which `head` has the last word on."""

    def __init__(self, head: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(16, 3)
        self.head = head
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.linear(x.flatten(1)))


@dataclass(frozen=True)
class Planted:
    """An object whose reading makes a file."""

    path: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@dataclass(frozen=True)
class Store:
    """An MLflow store with an experiment to put runs in."""

    uri: str
    experiment: str

    def run(self, search: str | None = None) -> str:
        """A new run that has ended, of this search or another one."""
        client = connect(self.uri)
        experiment = self.experiment if search is None else client.create_experiment(search)
        run_id: str = client.create_run(experiment).info.run_id
        client.log_metric(run_id, "macs", 90)
        client.set_terminated(run_id, "FINISHED")
        return run_id

    @property
    def models(self) -> Models:
        return Models(connect(self.uri))

    def registry(self, model: str) -> Registry:
        return Registry(connect(self.uri), model)

    def listed(self, run_id: str) -> dict[str, str]:
        """The name and URI of every model stored with a run, all of them whole."""
        found = connect(self.uri).search_logged_models([self.experiment], f"source_run_id = '{run_id}'")
        assert {str(one.status) for one in found} <= {"READY"}
        assert len({one.name for one in found}) == len(found)
        return {str(one.name): str(one.model_uri) for one in found}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder / 'paredown.db'}"
    return Store(uri, connect(uri).create_experiment("tiny", (folder / "artifacts").as_uri()))


@pytest.fixture(scope="module")
def stored(store: Store) -> str:
    """The URI of a stored model, for tests that only register it."""
    return store.models.store(store.run(), Net(), IMAGES)


# Storing


def test_both_programs_say_what_the_student_says(store: Store) -> None:
    run_id, student = store.run(), Net()
    models, client = store.models, connect(store.uri)
    before = client.get_run(run_id).info
    assert models.stored(run_id) is models.onnx_uri(run_id) is None

    uri = models.store(run_id, student, IMAGES)

    assert store.listed(run_id) == {"model": uri, "onnx": models.onnx_uri(run_id)}
    assert models.stored(run_id) == uri
    expected = student(torch.from_numpy(IMAGES)).detach().numpy()
    program: Any = load_model(store.uri, uri)
    np.testing.assert_allclose(program(torch.from_numpy(IMAGES)).detach().numpy(), expected, atol=1e-6)
    file: Any = onnx.load_from_string(mlflow.onnx.load_model(models.onnx_uri(run_id)).SerializeToString())
    session = onnxruntime.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"images": IMAGES})[0], expected, atol=1e-4)
    after = client.get_run(run_id)
    assert (after.info.status, after.info.end_time) == (before.status, before.end_time)
    assert "paredown.onnx_refused" not in after.data.tags

    client.delete_tag(run_id, "paredown.model_uri")  # as if the driver had died before it wrote that
    assert models.store(run_id, student, IMAGES) == uri


def test_a_model_stored_without_onnx_gets_it_when_it_wins(store: Store) -> None:
    run_id, models = store.run(), store.models
    uri = models.store(run_id, Net(), IMAGES, with_onnx=False)
    assert store.listed(run_id) == {"model": uri}
    assert models.is_stored(run_id, with_onnx=False)
    assert not models.is_stored(run_id, with_onnx=True)
    assert models.store(run_id, Net(), IMAGES) == uri
    assert store.listed(run_id) == {"model": uri, "onnx": models.onnx_uri(run_id)}
    assert models.is_stored(run_id, with_onnx=True)


def test_a_stored_program_that_somebody_changed_is_refused_and_runs_nothing(store: Store, tmp_path: Path) -> None:
    uri = store.models.store(store.run(), Net(), IMAGES)
    place = Path(connect(store.uri).get_logged_model(uri.rpartition("/")[2]).artifact_location.removeprefix("file://"))
    program = place / "data" / "model.pt2"
    planted = tmp_path / "planted"
    with zipfile.ZipFile(program) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(program, "w") as archive:
        for name, content in records.items():
            is_inputs = name.endswith("sample_inputs/model.pt")
            archive.writestr(name, pickle.dumps(Planted(planted)) if is_inputs else content)
    with pytest.raises(ArchiveError, match=f"cannot read {uri}: its sample inputs are more than tensors; expected"):
        load_model(store.uri, uri)
    with pytest.raises(ArchiveError, match=f"{uri} was logged as an exported graph"):
        load_pickled(store.uri, uri)
    assert not planted.exists()


def test_a_random_student_is_refused_before_anything_is_stored(store: Store) -> None:
    run_id = store.run()
    student = Net(lambda logits: F.dropout(logits, 0.5, training=True))
    with pytest.raises(WorkloadError, match=rf"run {run_id} differs .* expected at most 0.0001"):
        store.models.store(run_id, student, IMAGES)
    assert store.listed(run_id) == {}
    assert store.models.stored(run_id) is None


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (torch.special.bessel_j0, "cannot write the network as ONNX"),  # an operator that ONNX lacks
        (lambda logits: torch.erf(logits.double()).float(), "onnxruntime cannot run"),  # one that ONNX alone has
        (lambda logits: torch.sin(1e7 * logits), "differs by"),  # what rounding leaves of it is another number
    ],
)
def test_what_onnx_cannot_hold_is_stored_without_it(
    store: Store, head: Callable[[Tensor], Tensor], reason: str
) -> None:
    run_id = store.run()
    models = store.models
    uri = models.store(run_id, Net(head), IMAGES)
    assert store.listed(run_id) == {"model": uri}
    assert models.onnx_uri(run_id) is None
    told = connect(store.uri).get_run(run_id).data.tags["paredown.onnx_refused"]
    assert reason in told
    assert "\n" not in told


class Killed(BaseException):
    """The driver is gone: nothing catches this."""


def dying(method: str, calls: int) -> Callable[..., Any]:
    """MLflow's `method` in a process that dies right after so many calls of it; with 0, at the door of the first."""
    real, left = getattr(MlflowClient, method), [calls]

    def last(*args: Any, **more: Any) -> Any:
        found = real(*args, **more) if left[0] else None
        left[0] -= 1
        if left[0] <= 0:
            raise Killed
        return found

    return last


STEPS = [
    ("create_logged_model", 1),  # nothing is written yet
    ("delete_logged_model", 1),
    ("log_outputs", 1),
    ("log_model_artifacts", 0),  # the run knows of a program that is not there
    ("create_logged_model", 2),  # the program is there, the ONNX file not
    ("log_model_artifacts", 1),
    ("set_tag", 0),  # both are there, and the run does not say so
    ("set_tag", 1),
    ("set_tag", 2),
    ("create_registered_model", 1),
    ("create_model_version", 1),
    ("set_registered_model_alias", 1),
]


def test_a_driver_killed_at_any_step_leaves_nothing_twice(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id, models, registry = store.run(), store.models, store.registry("killed")

    def go_on() -> Version:
        uri = models.stored(run_id) or models.store(run_id, Net(), IMAGES)
        return registry.register("half", run_id, uri, TAGS, LIMITS)

    for method, calls in STEPS:
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, method, dying(method, calls))
            with pytest.raises(Killed):
                go_on()
    made = go_on()

    client = connect(store.uri)
    assert store.listed(run_id).keys() == {"model", "onnx"}
    (version,) = client.search_model_versions("name = 'killed'")
    assert version.source == store.listed(run_id)["model"]
    assert registry.holder("half") == made
    assert made == Version(run_id, 1, {"budget": "half"} | {key: str(value) for key, value in TAGS.items()})
    assert client.get_run(run_id).info.status == "FINISHED"
    load_model(store.uri, "models:/killed@half")


# Registering


@pytest.mark.parametrize(
    ("name", "second", "limits", "moves"),
    [
        ("better", {"top1_validation": 0.91}, LIMITS, True),
        ("worse", {"top1_validation": 0.89}, LIMITS, False),
        ("equal", {}, LIMITS, False),
        ("cheaper", {"macs": 50}, LIMITS, True),
        ("over-macs", {"top1_validation": 0.5, "macs": 80}, Limits({"macs": 85}), True),
        ("over-latency", {"top1_validation": 0.5, "latency_ms/cpu-1/p50": 1}, Limits({"latency_ms/cpu-1": 1.4}), True),
        ("not-measured", {"top1_validation": 0.5, "top1_drop": 0.01}, Limits({"top1_drop": 0.02}), True),
        ("ungated", {"top1_validation": 0.5}, Limits({"macs_expected": 90}), False),
    ],
)
def test_an_alias_of_another_search_moves_only_to_what_is_better(
    store: Store, stored: str, name: str, second: dict[str, float], limits: Limits, moves: bool
) -> None:
    registry = store.registry(name)
    first = registry.register("half", store.run(), stored, TAGS, LIMITS)
    other = registry.register("half", store.run(f"the second of {name}"), stored, TAGS | second, limits)
    assert (first.version, other.version) == (1, 2)
    assert registry.holder("half") == (other if moves else first)


def test_within_a_search_its_winner_has_the_alias(store: Store, stored: str) -> None:
    """As trials are added the simplest of the equals may be one of less top-1."""
    registry = store.registry("simpler")
    registry.register("half", store.run(), stored, TAGS, LIMITS)
    simpler = registry.register("half", store.run(), stored, TAGS | {"top1_validation": 0.899, "macs": 40}, LIMITS)
    assert registry.holder("half") == simpler


def test_one_version_per_run_and_budget(store: Store, stored: str) -> None:
    registry, run_id = store.registry("it's one"), store.run()
    half = registry.register("half", run_id, stored, TAGS, LIMITS)
    assert registry.register("half", run_id, stored, TAGS | {"macs": 1}, LIMITS) == half
    tiny = registry.register("tiny", run_id, stored, TAGS, LIMITS)
    assert tiny.version == half.version + 1 == 2
    assert registry.version_of(run_id, "half") == registry.holder("half") == half
    assert registry.version_of(run_id, "other") is registry.holder("other") is None
    assert store.registry("another").version_of(run_id, "half") is None
    assert store.registry("another").register("half", run_id, stored, TAGS, LIMITS).version == 1


def test_a_version_made_by_hand_gives_way(store: Store, stored: str) -> None:
    client = connect(store.uri)
    client.create_registered_model("handmade")
    client.set_registered_model_alias("handmade", "half", client.create_model_version("handmade", stored).version)
    registry = store.registry("handmade")
    made = registry.register("half", store.run(), stored, TAGS, Limits())
    assert registry.holder("half") == made


def test_the_tags_of_a_version_by_either_name(store: Store, stored: str) -> None:
    plan = "x" * 65_535
    store.registry("tagged").register("half", store.run(), stored, TAGS | {"plan": plan}, LIMITS)
    by_alias, by_number = (version_tags(store.uri, f"models:/tagged{end}") for end in ("@half", "/1"))
    assert by_alias == by_number
    assert by_alias["latency_ms/cpu-1/p50"] == "1.5"
    assert by_alias["plan"] == plan
    for name, reason in (
        ("models:/tagged/2", "there is no models:/tagged/2"),
        ("models:/tagged@tiny", "there is no models:/tagged@tiny"),
        ("models:/nothing@half", "there is no models:/nothing@half"),
        ("tagged/1", "'tagged/1' names no registered version; expected models:/NAME@ALIAS"),
    ):
        with pytest.raises(TrackingError, match=reason):
            version_tags(store.uri, name)


# Promoting


def test_promote_points_an_alias_at_a_budgets_winner(store: Store, stored: str) -> None:
    registry = _searched(store, "promoted")
    first = registry.register("half", store.run(), stored, TAGS, LIMITS)
    told = promote(store.uri, "promoted", "half", "production")
    assert told == json.loads(json.dumps(told))
    assert told == {
        "model": "promoted-net",
        "alias": "production",
        "version": first.version,
        "budget": "half",
        "previous_version": None,
        "run_id": first.run_id,
        "model_uri": "models:/promoted-net@production",
    }
    second = registry.register("half", store.run(), stored, TAGS | {"top1_validation": 0.95}, LIMITS)
    assert registry.holder("production") == first  # until it is told otherwise
    told = promote(store.uri, "promoted", "half", "production")
    assert (told["version"], told["previous_version"]) == (second.version, first.version)
    assert registry.holder("production") == registry.holder("half") == second


@pytest.mark.parametrize(
    ("search", "budget", "alias", "reason"),
    [
        ("nobody", "half", "production", "no search 'nobody' in"),
        ("refusing", "huge", "production", "search 'refusing' has no budget 'huge'; expected one of half, tiny"),
        ("refusing", "tiny", "production", "no version of 'refusing-net' is registered for budget 'tiny'"),
        ("refusing", "half", "tiny", "alias 'tiny' is the name of a budget"),
        ("refusing", "half", "elsewhere", "alias 'elsewhere' is the name of a budget"),
        ("refusing", "half", "Latest", "alias 'Latest' is reserved"),
        ("refusing", "half", "v1", "alias 'v1' is reserved"),
        ("refusing", "half", "a/b", "alias 'a/b' is no name for MLflow"),
        ("refusing", "half", "", "alias '' is no name for MLflow"),
        ("refusing", "half", "live\n", "is no name for MLflow"),
    ],
)
def test_promote_refuses(store: Store, stored: str, search: str, budget: str, alias: str, reason: str) -> None:
    registry = _searched(store, "refusing")
    held = registry.register("half", store.run(), stored, TAGS, LIMITS)
    registry.register("elsewhere", store.run(), stored, TAGS, LIMITS)  # of another search with the same model
    aliases = connect(store.uri).get_registered_model("refusing-net").aliases
    with pytest.raises((SpecError, TrackingError), match=reason):
        promote(store.uri, search, budget, alias)
    assert connect(store.uri).get_registered_model("refusing-net").aliases == aliases
    assert held.version > 0


def _searched(store: Store, name: str) -> Registry:
    """The registry of a search on record with the budgets half and tiny."""
    record = open_search(store.uri, name, decisive={}, spec="", model=f"{name}-net")
    record.search.write_teacher(Teacher(top1_validation=0.95, top1_test=None, macs=180, params=51, size_bytes=204))
    record.search.write_limits({"half": LIMITS, "tiny": Limits(macs=1)})
    return record.registry
