"""The whole story on real parts: digits, a real Optuna study, a real MLflow store; inline, and once on Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from mlflow.tracking._tracking_service.utils import _artifact_repos_cache

from cluster import Cluster, InlineCluster, RayCluster
from methods.base import Plan
from search.driver import loop
from search.driver.prepare import prepare
from search.record.searches import find_search
from search.results import SearchResult
from search.spec import schema
from search.workload import Workload, loading, usercode
from search.workload.data import sources
from search.workload.data.splits import split
from tests.support.searches import inline, parsed, place, quiet

SPEC = """
name: digits
model: {source: zoo, name: resnet8, weights: teacher.safetensors}
data: {source: digits, validation: 0.2, calibration: 128}
metric: %s
methods: [itpruner, alds]
devices: {rock: {runtime: profile, file: rock.yaml}}
budgets:
  - {name: half, macs: 50%%}
  - {name: small, params: 30%%, macs: 60%%}
  - {name: impossible, params: 100}
search: {trials: 4, explore: 1}
recovery: {steps: 4, batch_size: 64}
"""


@pytest.fixture
def wanted(teacher: Path, tmp_path: Path) -> schema.SearchSpec:
    return parsed(place(tmp_path, teacher, has_store=False), SPEC % "top1")


def test_a_search_from_spec_to_registry(
    wanted: schema.SearchSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = wanted.text.replace("rock: {runtime: profile, file: rock.yaml}", "cpu-1: {runtime: onnxruntime}")
    wanted = parsed(tmp_path, text)
    result = loop.search(wanted, inline, quiet)

    half, small, impossible = result.budgets
    assert impossible.winner is None
    for budget in (half, small):
        assert budget.winner is not None
        assert budget.winner.fits(budget.limits)
        assert budget.model_uri == f"models:/digits@{budget.name}"
    assert len(result.candidates) == 8
    assert {one.method for one in result.candidates} == {"itpruner", "alds", "uniform"}
    assert all(one.state == "complete" and one.latency_ms["cpu-1"]["min"] > 0 for one in result.candidates)
    assert find_search(wanted.tracking.uri, "digits").read.result() == result

    client = MlflowClient()
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 9
    assert {run.info.status for run in runs} == {"FINISHED"}
    for candidate in result.candidates:
        assert "plan.json" in {file.path for file in client.list_artifacts(candidate.run_id)}
    assert Path("paredown.reports/digits.html").stat().st_size > 1_000_000

    _move(tmp_path, tmp_path / "another place")
    monkeypatch.chdir(tmp_path / "another place")
    again = loop.search(parsed(Path.cwd(), text), inline, quiet)
    assert again == result
    client = MlflowClient()
    assert len(client.search_runs([experiment.experiment_id])) == 9
    assert [int(found.version) for found in client.search_model_versions("name='digits'")] == [2, 1]

    _check_in_a_fresh_python(result, Path.cwd())


def _move(folder: Path, place: Path) -> None:
    """Move the search of a folder with all that it needs."""
    place.mkdir()
    for name in ("paredown.db", "paredown.artifacts", "paredown.studies", "teacher.safetensors", "rock.yaml"):
        (folder / name).rename(place / name)
    _artifact_repos_cache.clear()  # a process of its own would have none


def test_chains_and_gates_in_one_search(wanted: schema.SearchSpec, tmp_path: Path) -> None:
    text = wanted.text.replace("[itpruner, alds]", "[manidp, [itpruner, alds]]").replace("trials: 4", "trials: 3")
    text = text.replace("{name: small, params: 30%, macs: 60%}", "{name: light, macs_expected: 60%}")
    result = loop.search(parsed(tmp_path, text), inline, quiet)

    half, light, _ = result.budgets
    assert half.winner is not None
    assert half.winner.macs_expected is None
    assert light.limits.keys() == {"macs_expected"}
    assert light.winner is not None
    assert light.winner.fits(light.limits)
    gated = {one.budget: one for one in result.candidates if one.method == "manidp"}
    for budget in (half, light):
        one = gated[budget.name]
        (limit,) = budget.limits.values()
        assert one.macs is not None
        assert one.macs_expected is not None
        assert 0.98 * limit <= one.macs_expected <= limit < result.teacher.macs < one.macs
    assert not gated["half"].fits(half.limits)
    assert gated["light"].fits(light.limits)
    assert result.to_json()["frontier"].keys() == {"macs", "macs_expected", "params", "latency_ms/rock"}
    chains = [one for one in result.candidates if one.method == "itpruner+alds"]
    assert len(chains) == 2
    for chain in chains:
        links = find_search(wanted.tracking.uri, "digits").read.plan(chain.run_id).choices["links"]
        assert [link["method"] for link in links] == ["itpruner", "alds"]
        assert result.teacher.macs > links[0]["macs"] > links[1]["macs"] == chain.macs


def _check_in_a_fresh_python(result: SearchResult, folder: Path) -> None:
    """The winner loads without this project and has the registered accuracy and cost."""
    import numpy as np

    pool, _ = sources.digits()
    splits = split(pool, None, validation=0.2, calibration=128, seed=0)
    images, labels = splits.test.batch(np.arange(len(splits.test)))
    np.savez(folder / "test.npz", images=images.numpy(), labels=labels.numpy())
    program = """
import sys
sys.modules.update(dict.fromkeys(["cluster", "search", "methods"]))
import json, mlflow, numpy, torch
from torch.utils.flop_counter import FlopCounterMode
mlflow.set_tracking_uri("sqlite:///paredown.db")
model = mlflow.pytorch.load_model("models:/digits@half")
test = numpy.load("test.npz")
images = torch.from_numpy(test["images"])
with torch.no_grad(), FlopCounterMode(display=False) as flops:
    model(images[:1])
top1 = (model(images).argmax(1).numpy() == test["labels"]).mean()
params = sum(parameter.numel() for parameter in model.parameters())
print(json.dumps({"top1": top1, "macs": flops.get_total_flops() // 2, "params": params}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=folder)
    found = json.loads(done.stdout.splitlines()[-1])
    half = result.budgets[0]
    assert half.winner is not None
    assert found["top1"] == pytest.approx(half.top1_test, abs=1e-6)
    assert found["macs"] == half.winner.macs <= half.limits["macs"]
    assert found["params"] == half.winner.params


METRIC = """
from pathlib import Path

def brittle(logits, labels):
    calls = Path("calls")
    calls.write_text(calls.read_text() + "." if calls.exists() else ".")
    if len(calls.read_text()) == 6:
        raise RuntimeError("the sixth call is too much")
    return float((logits.argmax(1) == labels).double().mean())
"""


def test_an_exception_in_a_trial_is_recorded_and_the_search_goes_on(wanted: schema.SearchSpec, tmp_path: Path) -> None:
    (tmp_path / "metric.py").write_text(METRIC)
    text = (SPEC % "./metric.py:brittle").replace("  - {name: small, params: 30%, macs: 60%}\n", "")
    result = loop.search(parsed(tmp_path, text), inline, quiet)
    failed = [one for one in result.candidates if one.state == "failed"]
    assert len(failed) == 1
    assert "RuntimeError: the sixth call is too much" in str(failed[0].error)
    assert len(result.models()) == 3
    assert MlflowClient().get_run(failed[0].run_id).info.status == "FAILED"
    assert result.budgets[0].winner is not None


PLAIN = """
def plain(logits, labels):
    return float((logits.argmax(1) == labels).float().mean())
"""


@pytest.mark.ray
def test_a_search_on_ray_follows_the_plans_of_this_process(wanted: schema.SearchSpec, tmp_path: Path) -> None:
    """Scores do not depend on where shards ran; a user's metric travels to the workers by value."""
    (tmp_path / "metric.py").write_text(PLAIN)
    wanted = parsed(tmp_path, SPEC % "./metric.py:plain")
    here = loading.load(wanted, quiet)
    planned = prepare(wanted, here, InlineCluster(here.worker_inputs()), quiet)

    def on_ray(made: Workload) -> Cluster:
        (tmp_path / "cache").rename(tmp_path / "scored here")
        return RayCluster(made.worker_inputs(), max_parallel=2, by_value=usercode.user_modules())

    result = loop.search(wanted, on_ray, quiet)
    assert [one.state for one in result.candidates] == ["complete"] * 8
    for one in result.candidates:
        plan = planned.first_plans[one.budget][one.method]
        assert isinstance(plan, Plan)
        if one.trial < 3:
            assert (one.macs, one.params) == (plan.macs, plan.params)
