"""The task of a search: one of ours, or the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from methods.training import Classification, Regression, Segmentation, Task
from search.base import WorkloadError
from search.spec import SearchSpec
from search.workload.data.labels import Form
from search.workload.usercode import blaming, call_factory

T = TypeVar("T")

OURS: dict[str, Task] = {
    "classification": Classification(),
    "segmentation": Segmentation(),
    "regression": Regression(),
}

NEEDED = ("losses", "score")
"""The verbs of a task that have no default."""


@dataclass(frozen=True)
class UserTask:
    """A task of the user's own, with the verbs that `given` has; it leaves out what is as in `Regression`."""

    name: str
    given: Any

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the loss `(n,)` of each image."""
        return self._rows("losses", outputs, labels)

    def mimicry(self, outputs: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """Return how far outputs are from the teacher's: `(n,)`."""
        if not hasattr(self.given, "mimicry"):
            return Regression().mimicry(outputs, targets, temperature)
        return self._rows("mimicry", outputs, targets, temperature)

    def answers(self, outputs: Tensor) -> Tensor:
        """Return what `score` reads of outputs `(n, ...)`."""
        return self._optional("answers", outputs)

    def labels(self, outputs: Tensor) -> Tensor:
        """Return the labels `(n, ...)` that outputs amount to."""
        return self._optional("labels", outputs)

    def score(self, answers: Tensor, labels: Tensor) -> float:
        """Return a share from 0 to 1.

        Raises:
            WorkloadError: it is none.
        """
        with blaming(f"score of the task {self.name}", "a number for answers and labels; run it by itself to mend it"):
            value = float(self.given.score(answers, labels))
        if not 0 <= value <= 1:
            raise WorkloadError(
                f"score of the task {self.name} gave {value:.4g}; expected a share from 0 to 1, larger if better; mend "
                "it, or give another measure and its range as metric"
            )
        return value

    def _rows(self, verb: str, outputs: Tensor, *given: Any) -> Tensor:
        """Call a verb that gives a number for each image."""
        with blaming(f"{verb} of the task {self.name}", "a tensor (n,); run it by itself to mend it"):
            found = getattr(self.given, verb)(outputs, *given)
        if not isinstance(found, Tensor) or found.shape != outputs.shape[:1]:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise WorkloadError(
                f"{verb} of the task {self.name} returned {shape} for {len(outputs)} images; expected a tensor (n,) "
                "with a number for each; do not average over the images"
            )
        return found

    def _optional(self, verb: str, outputs: Tensor) -> Tensor:
        if not hasattr(self.given, verb):
            return outputs.float()
        with blaming(f"{verb} of the task {self.name}", "a tensor (n, ...); run it by itself to mend it"):
            return torch.as_tensor(getattr(self.given, verb)(outputs))


def task_of(spec: SearchSpec) -> Task:
    """The task of `spec`.

    Raises:
        WorkloadError: the user's own cannot be made, or lacks a verb.
    """
    if spec.task.factory is None:
        return OURS[spec.task.name]
    given = call_factory(spec.task.factory, spec.task.args, spec.folder)
    if missing := [verb for verb in NEEDED if not callable(getattr(given, verb, None))]:
        raise WorkloadError(
            f"the task {spec.task.factory} has no {' and no '.join(missing)}; expected an object with the verbs "
            "losses(outputs, labels) and score(answers, labels); add them"
        )
    return UserTask(spec.task.factory, given)


def form_of(spec: SearchSpec) -> Form:
    """What the labels of a search are."""
    forms: dict[str, Form] = {"classification": "class", "segmentation": "map"}
    return forms.get(spec.task.name, "numbers")
