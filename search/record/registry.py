"""MLflow's model registry: the registered versions of stored models, and the aliases that point at them.

One registered model per search, one version per budget and winning run; the alias of a budget is its name. Every step
may be cut short by a kill and taken again: what is there already is found and used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from search.base import SpecError, TrackingError, shortened
from search.limits import TOP1_DROP, Costs, Limits, latencies_in
from search.record.store import connect_existing

MADE_BY = "paredown.search"
"""The tag of a registered model that names the search it was made for."""


@dataclass(frozen=True)
class Version:
    """A version of the registered model: the run whose model it is (one made by hand may have none), and its tags."""

    run_id: str | None
    version: int
    tags: Mapping[str, str]


class Registry:
    """The registered model `model` of the store that `client`, made by `search.record.store.connect`, talks to."""

    def __init__(self, client: MlflowClient, model: str) -> None:
        self._client = client
        self.model = model

    def check_made_by(self, search: str) -> None:
        """Refuses a registered model that was not made for this search: what its aliases point at is somebody's.

        Raises:
            SpecError: there is one of this name, by hand or for another search.
        """
        try:
            maker = self._client.get_registered_model(self.model).tags.get(MADE_BY)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return
        if maker != search:
            made = "by hand" if maker is None else f"for search {maker!r}"
            raise SpecError(
                f"there is a registered model {self.model!r}, made {made}; expected none, or the search's own, whose "
                "aliases it may move; rename the search, or name the model as tracking.registered_model to share it"
            )

    def register(self, budget: str, run_id: str, uri: str, tags: Mapping[str, object], limits: Limits) -> Version:
        """The version of a trial's model for a budget, added with `tags` if it is not there; its alias moves to it.

        A version of another search keeps the alias if it is better: its own tags meet `limits`, and it has more
        validation top-1, or as much for fewer MACs.

        Args:
            uri: of the stored model, which another run may have stored that trained the very same.
            limits: the budget's, by cost; `tags` name measured values as the costs are named, with a latency under
                `latency_ms/DEVICE/p50`.
        """
        made = self.version_of(run_id, budget) or self._add(budget, run_id, uri, tags)
        held = self.holder(budget)
        is_better = held is None or not limits.met_by(costs_of_tags(held.tags)) or _rank(held.tags) < _rank(made.tags)
        if held is None or is_better or self._is_of_one_search(held.run_id, run_id):
            self._client.set_registered_model_alias(self.model, budget, str(made.version))
        return made

    def version_of(self, run_id: str, budget: str) -> Version | None:
        """The version that holds the model of a run for a budget, if there is one."""
        found = self._client.search_model_versions(f"run_id = '{run_id}'")
        mine = [one for one in found if one.name == self.model and one.tags.get("budget") == budget]
        return _version(mine[0]) if mine else None

    def holder(self, alias: str) -> Version | None:
        """The version an alias points at, if it does."""
        try:
            return _version(self._client.get_model_version_by_alias(self.model, alias))
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return None

    def promote(self, budget: str, alias: str) -> dict[str, Any]:
        """Points `alias` at the version that the alias of a budget points at now; what was done, ready for JSON.

        Raises:
            SpecError: `alias` cannot be an alias, or is that of a budget.
            TrackingError: no model is registered for the budget.
        """
        check_alias(alias)
        found = self._client.search_model_versions(f"tags.budget = '{alias}'")
        if any(one.name == self.model for one in found):
            raise SpecError(of_a_budget(alias))
        held = self.holder(budget)
        if held is None:
            raise TrackingError(
                f"no version of {self.model!r} is registered for budget {budget!r}; expected a search that found it a "
                "winner; run the search to its end, which registers a deleted one anew, or raise the budget's limits"
            )
        before = self.holder(alias)
        self._client.set_registered_model_alias(self.model, alias, str(held.version))
        return {
            "model": self.model,
            "alias": alias,
            "version": held.version,
            "budget": budget,
            "previous_version": None if before is None else before.version,
            "run_id": held.run_id,
            "model_uri": f"models:/{self.model}@{alias}",
        }

    def _is_of_one_search(self, *run_ids: str | None) -> bool:
        """Whether all runs belong to the same search; one that is gone belongs to none."""
        try:
            found = {self._client.get_run(run_id).info.experiment_id for run_id in run_ids if run_id is not None}
        except MlflowException:
            return False
        return len(found) == 1 and None not in run_ids

    def _add(self, budget: str, run_id: str, uri: str, tags: Mapping[str, object]) -> Version:
        search = self._client.get_experiment(self._client.get_run(run_id).info.experiment_id).name
        try:
            self._client.create_registered_model(self.model, tags={MADE_BY: search})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        told = {"budget": budget} | {key: str(value) for key, value in tags.items()}
        stored = uri.removeprefix("models:/")  # a server asks for it beside the source
        return _version(
            self._client.create_model_version(self.model, source=uri, run_id=run_id, tags=told, model_id=stored)
        )


def check_alias(alias: str) -> None:
    """Refuses what MLflow does not take as an alias, or reads as something else.

    Raises:
        SpecError: it does not.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,255}", alias):
        raise SpecError(
            f"alias {alias!r} is no name for MLflow; expected up to 255 letters, digits, '_' and '-'; choose another"
        )
    if alias.lower() == "latest" or re.fullmatch(r"[vV][0-9]+", alias):
        raise SpecError(
            f"alias {alias!r} is reserved by the model registry; expected a name of your own; choose another, such as "
            "production"
        )


def of_a_budget(alias: str) -> str:
    """Why an alias that names a budget is refused."""
    return (
        f"alias {alias!r} is the name of a budget, which the search itself points at that budget's winner; expected "
        "another name; choose one, such as production"
    )


def find_version(uri: str, name: str) -> Version:
    """The registered version at `name`, `models:/x@alias` or `models:/x/3`, in the store at `uri`.

    Raises:
        TrackingError: there is no such version.
    """
    found = re.fullmatch(r"models:/([^/@]+)(?:@([\w-]+)|/([0-9]+))", name)
    if not found:
        raise TrackingError(
            f"{name!r} names no registered version; expected models:/NAME@ALIAS or models:/NAME/VERSION; correct it"
        )
    model, alias, number = found.groups()
    client = connect_existing(uri)
    try:
        one = client.get_model_version_by_alias(model, alias) if alias else client.get_model_version(model, number)
    except MlflowException as error:
        raise TrackingError(
            f"there is no {name} in the MLflow store: {shortened(str(error), 300)}; expected a registered "
            "version; check its name and --uri"
        ) from error
    return _version(one)


def version_tags(uri: str, name: str) -> Mapping[str, str]:
    """The tags of the registered version at `name`. Arguments and errors are those of `find_version`."""
    return find_version(uri, name).tags


def _version(found: ModelVersion) -> Version:
    return Version(found.run_id, int(found.version), dict(found.tags))


def costs_of_tags(tags: Mapping[str, str]) -> Costs:
    """Return the measured costs among a version's tags; without gates expected MACs are the MACs."""
    names = ("macs", "macs_expected", "params", "size_bytes", TOP1_DROP)
    found = {cost: float(tags[cost]) for cost in names if cost in tags}
    if "macs" in found:
        found.setdefault("macs_expected", found["macs"])
    medians = {key.removesuffix("/p50"): value for key, value in tags.items() if key.endswith("/p50")}
    return found | {cost: float(medians[cost]) for cost in latencies_in(medians)}


def _rank(tags: Mapping[str, str]) -> tuple[float, float]:
    """Return the order of versions: more validation top-1 first, then fewer MACs."""
    return _top1(tags), -costs_of_tags(tags).get("macs", math.inf)


def _top1(tags: Mapping[str, str]) -> float:
    return float(tags.get("top1_validation", "-inf"))
