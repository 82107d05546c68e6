"""The end of a search: frontier members are stored as loadable programs, and each budget's winner is registered."""

from __future__ import annotations

import json
import logging
import subprocess
from dataclasses import replace
from typing import Any

from torch import nn

from cluster import Cluster, Done, Failed
from methods import named
from methods.pipeline import rebuild, trial
from methods.training import Recipe
from search.base import Report, SearchError, SpecError, TrackingError
from search.cache import digest
from search.devices.device import LatencyError
from search.devices.stopwatch import Stopwatch
from search.frontier import frontier
from search.limits import latency_on
from search.record.logged_models import Models
from search.record.record import Record
from search.record.registry import Registry, check_alias, of_a_budget
from search.record.searches import find_search
from search.record.store import FAULTS, connect, unwritable
from search.results import BudgetResult, SearchResult
from search.spec import SearchSpec
from search.trials import Candidate
from search.workload import Workload

log = logging.getLogger(__name__)

IMAGES = 16
"""Calibration images on which a stored program is compared with its student."""

TAG_BYTES = 65_535
"""The longest tag: MLflow takes 100,000 characters, but the column of its MySQL stores holds this many bytes."""


def check_model(spec: SearchSpec) -> None:
    """Refuses a search that takes its registered model's name from its own where another has made a model of that name.

    Raises:
        SpecError: there is one.
        TrackingError: the store cannot be reached.
    """
    if spec.tracking.registered_model is not None:
        return
    uri = spec.tracking.uri
    try:
        Registry(connect(uri), spec.registered_model).check_made_by(spec.name)
    except FAULTS as error:
        raise TrackingError(unwritable(uri, str(error))) from error


def time_registered(record: Record, stopwatch: Stopwatch) -> bool:
    """Time the teacher and every student to be registered that was not timed yet; return whether there was one.

    A search that nobody asked for latency does this once, at the end. So a device that cannot run the teacher costs it
    the latencies alone.
    """
    result = record.read.result()
    trained, members = _trained(result), set(_members(result))
    untimed = [one for one in result.candidates if trained[one.run_id] in members and not one.timings]
    plans = [record.read.plan(one.run_id) for one in untimed]
    if not untimed:
        return False
    try:
        latency_ms = stopwatch.teacher()
        rows = stopwatch.time([(named(plan.method), plan) for plan in plans], stopwatch.devices)
    except LatencyError as error:
        log.warning("no latency is measured: %s", error)
        return False
    record.search.write_devices(stopwatch.described())
    record.search.write_teacher(replace(result.teacher, latency_ms=latency_ms))
    for one, row in zip(untimed, rows, strict=True):
        record.trials.write_timings(one.run_id, row)
    return True


def keep_untrained(record: Record, cluster: Cluster) -> None:
    """Record the weights of every student to be stored that was never trained: on the workers that judged it.

    Raises:
        SearchError: one of them cannot be built again.
    """
    result = record.read.result()
    known = {one.run_id: one for one in result.candidates}
    missing = [run for run in _members(result) if known[run].state == "stopped" and not record.read.has_weights(run)]
    plans = [record.read.plan(run_id) for run_id in missing]
    for event in cluster.run(trial, [(named(plan.method), plan, Recipe(steps=0), 0) for plan in plans]):
        if isinstance(event, Failed):
            raise SearchError(
                f"a student of {plans[event.index].method} that was judged before cannot be built again: "
                f"{event.error}; expected the same student; run the same command again"
            )
        if isinstance(event, Done):
            record.trials.write_weights(missing[event.index], event.value.state)


def register(spec: SearchSpec, workload: Workload, record: Record, report: Report) -> None:
    """Stores every frontier member and registers the winners; what is already there stays.

    The test set is read here and nowhere else: once for the teacher, once per registered version.

    Raises:
        SpecError: the registered model is another's.
        WorkloadError: a student's exported program does not do what the student does; it is not registered.
    """
    check_model(spec)
    result = record.read.result()
    if result.teacher.top1_test is None:
        test = workload.judge(workload.teacher.cpu(), workload.splits.test).value
        record.search.write_teacher(replace(result.teacher, top1_test=test))
    uris = _store(workload, record, result, report)
    trained = _trained(result)
    for budget in result.budgets:
        if budget.winner is None:
            continue
        run_id = budget.winner.run_id
        known = record.registry.version_of(run_id, budget.name)
        tags = known.tags if known else _tags(spec, workload, record, result, budget)
        record.registry.register(budget.name, run_id, uris[trained[run_id]], tags, budget.limits)


def promote(uri: str, name: str, budget: str, alias: str) -> dict[str, Any]:
    """Points `alias` at the version that holds a budget of search `name` now; what was done, ready for JSON.

    Returns:
        `model`, `alias`, `version`, `budget`, `previous_version` (None where the alias is new), `run_id`, `model_uri`.

    Raises:
        SpecError: the search has no such budget, or `alias` cannot be an alias or is that of a budget.
        TrackingError: there is no such search, or no winner is registered for the budget.
    """
    check_alias(alias)
    record = find_search(uri, name)
    known = [one.name for one in record.read.result().budgets]
    if budget not in known:
        raise SpecError(
            f"search {name!r} has no budget {budget!r}; expected one of {', '.join(known)}; correct the budget"
        )
    if alias in known:
        raise SpecError(of_a_budget(alias))
    return record.registry.promote(budget, alias)


def student(workload: Workload, record: Record, run_id: str) -> nn.Module:
    """The student of a trial whose weights were kept, in eval mode."""
    plan = record.read.plan(run_id)
    return rebuild(workload.teacher.cpu(), named(plan.method), plan, record.read.weights(run_id))


def _store(workload: Workload, record: Record, result: SearchResult, report: Report) -> dict[str, str]:
    """The URI of the stored model of every run that trained a winner or a member of a frontier; winners have ONNX too.

    The teacher is stored with the search itself, so that a student can be measured beside it again.
    """
    images, models = workload.splits.calibration[:IMAGES], Models(record.client)
    if models.stored(record.search.run_id) is None:
        report("storing models", 0, 1, "the teacher")
        models.store(record.search.run_id, workload.teacher.cpu(), images, with_onnx=False)
    members, trained = _members(result), _trained(result)
    winners = {trained[budget.winner.run_id] for budget in result.budgets if budget.winner is not None}
    uris: dict[str, str] = {}
    for done, run_id in enumerate(members):
        report("storing models", done, len(members), "")
        is_winner = run_id in winners
        if not models.is_stored(run_id, with_onnx=is_winner):
            models.store(run_id, student(workload, record, run_id), images, with_onnx=is_winner)
        uris[run_id] = str(models.stored(run_id))
    report("storing models", len(members), len(members), "")
    return uris


def _members(result: SearchResult) -> list[str]:
    """The runs, each once, that trained what is stored: the winners and every member of a frontier."""
    trained = _trained(result)
    winners = [one.winner.run_id for one in result.budgets if one.winner is not None]
    return list(dict.fromkeys(trained[run_id] for run_id in [*winners, *_frontier_runs(result)]))


def _trained(result: SearchResult) -> dict[str, str]:
    """The run that trained each run's student: itself, or the one whose plan and recipe it shares."""
    return {one.run_id: one.same_as or one.run_id for one in result.candidates}


def _frontier_runs(result: SearchResult) -> list[str]:
    """The runs of every axis's frontier, each once, the teacher left out."""
    points = [point for axis in result.axes for point in frontier(result.teacher, result.candidates, axis)]
    return list(dict.fromkeys(point["run_id"] for point in points if point["run_id"] is not None))


def _tags(
    spec: SearchSpec, workload: Workload, record: Record, result: SearchResult, budget: BudgetResult
) -> dict[str, object]:
    """Return the tags of a version: its origin, every limit and every measured value."""
    winner = budget.winner
    assert winner is not None
    trained = _trained(result)[winner.run_id]
    found, models = student(workload, record, trained), Models(record.client)
    origin = {
        "method": winner.method,
        "metric": spec.metric.scale.name if spec.metric.scale.described else None,
        "knobs": _json(winner.knobs),
        "spec_hash": record.search.spec_digest,
        "teacher_hash": workload.fingerprint,
        "teacher_uri": models.stored(record.search.run_id),
        "git_commit": commit(spec.folder),
        "onnx_uri": models.onnx_uri(trained),
    }
    limits = {f"limit_{cost}": limit for cost, limit in budget.limits.items()}
    test = {"top1_test": workload.judge(found, workload.splits.test).value}
    tags = origin | _plan(winner) | _device(spec, result, budget) | limits | _measured(winner, result) | test
    return {key: value for key, value in tags.items() if value is not None}


def _measured(winner: Candidate, result: SearchResult) -> dict[str, object]:
    """Every measured value of a candidate by the name of its cost, latency as `latency_ms/DEVICE/p50`.

    Beside it stands the teacher's when the search began, which it is scaled to.
    """
    assert winner.top1 is not None
    values: dict[str, object] = {"top1_validation": winner.top1.validation, "top1_drop": winner.top1.drop}
    values |= {name: getattr(winner, name) for name in ("macs", "macs_expected", "params", "size_bytes")}
    for device, times in winner.latency_ms.items():
        values |= {f"{latency_on(device)}/{key}": value for key, value in times.items()}
        values[f"teacher_{latency_on(device)}/p50"] = result.teacher.latency_ms[device]["p50"]
        values[f"is_predicted/{device}"] = str(bool(result.devices.get(device, {}).get("is_predicted"))).lower()
    return values | {f"noise/{device}": timing.noise for device, timing in winner.timings.items()}


def commit(folder: str) -> str | None:
    """The commit that the files of `folder` are at, with `-dirty` where git knows of changes since.

    None where there is no git, no repository or no commit yet.
    """
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(
            ["git", "--no-optional-locks", "-C", folder, *describe],
            capture_output=True, text=True, check=True, timeout=30,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def _plan(winner: Candidate) -> dict[str, object]:
    """The plan, or its digest where it is too long for a tag: then it is in the run's plan.json only."""
    text = _json(winner.plan)
    if len(text) <= TAG_BYTES:
        return {"plan": text}
    return {"plan_digest": digest(text)}


def _device(spec: SearchSpec, result: SearchResult, budget: BudgetResult) -> dict[str, object]:
    """The device the budget is meant for, the host that measured for it, and what every device was."""
    name = next(spec.device_of(one) for one in spec.budgets if one.name == budget.name)
    return {
        "device": name,
        "host": result.devices.get(name, {}).get("host"),
        **{f"device_spec/{one}": device.model_dump_json() for one, device in spec.devices.items()},
    }


def _json(value: object) -> str:
    """JSON in ASCII and without spaces, keys in order."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
