"""Load the workload of a spec: the teacher, the data splits and the metric that a search works on."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from methods.network.attention.opened import opened
from methods.network.keeping import kept
from methods.pipeline import WorkerInputs
from methods.training import CLASSIFICATION, Judgement, Metric, Samples, Task, judge, top1
from search import cache
from search.base import Report, WorkloadError
from search.spec import SearchSpec
from search.spec.schema import DataSpec
from search.workload.data import folders, sources
from search.workload.data.labels import Form
from search.workload.data.pictures import check_pictures, preparation
from search.workload.data.samples import Arrays, Masked, Pictures, ResizedSamples, unlabelled
from search.workload.data.splits import Splits, answered, check_stable, split
from search.workload.forms import freed, protect
from search.workload.judging import answers, check_metric, warn_of, warn_of_nothing
from search.workload.outputs import OneOutput
from search.workload.tasks import form_of, task_of
from search.workload.teacher import check_labels_fit, check_teacher, load_teacher
from search.workload.threads import set_threads
from search.workload.usercode import UserMetric, call_factory, load_function


@dataclass(frozen=True)
class Workload:
    """The teacher, data and metric of a search, and its task: what the teacher's outputs mean.

    The test set stays in the driver: workers are given `worker_inputs()` only. `recovery_images` are images of another
    source, given if recovery is to see those instead of the training set. Unless students are `refit`, their weights
    are their teacher's until they are trained.
    """

    teacher: nn.Module
    splits: Splits
    metric: Metric
    fingerprint: str
    recovery_images: Samples | None = None
    refit: bool = True
    task: Task = CLASSIFICATION

    def judge(self, model: nn.Module, samples: Samples) -> Judgement:
        """Judge a network on images of this workload."""
        return judge(model, samples, self.metric, task=self.task)

    def worker_inputs(self) -> WorkerInputs:
        """The part of the workload that workers may see."""
        splits = self.splits
        train = splits.train if self.recovery_images is None else self.recovery_images
        return WorkerInputs(
            self.teacher, train, splits.validation, splits.calibration, self.metric, self.refit, self.task
        )

    @property
    def example(self) -> Tensor:
        """Two calibration images `(2, c, h, w)`."""
        return _first_and_last(self.splits)


def _first_and_last(splits: Splits) -> Tensor:
    """The first and the last calibration image, which are the same if there is only one."""
    return torch.from_numpy(splits.calibration[[0, -1]])


def load(spec: SearchSpec, report: Report, *, fit: bool = True) -> Workload:
    """Load the workload of `spec`; a zoo teacher without weights is trained on first use, unless `fit` is false.

    Raises:
        WorkloadError: a source, a file, a factory, a shape or the cache folder is wrong.
        DataError: the data cannot be used.
    """
    _check_cache(cache.folder())
    report("data", 0, 1, spec.data.source)
    splits = read_splits(spec, report)
    sizes = f"{len(splits.train):,} train, {len(splits.validation):,} validation, {len(splits.test):,} test"
    report("data", 1, 1, sizes)
    task = task_of(spec)
    metric = _metric(spec, task)
    teacher = load_teacher(spec, splits, report, fit=fit)
    teacher = (teacher if spec.model.output is None else OneOutput(teacher, spec.model.output)).eval()
    freed(teacher, report)
    protect(teacher, spec.model.keep)
    check_teacher(teacher, _first_and_last(splits), splits.classes, form_of(spec))
    if spec.data.labels and spec.task.name in ("segmentation", "regression"):
        check_labels_fit(teacher, splits, spec.task)
    teacher = opened(teacher, _first_and_last(splits))
    set_threads(teacher, _first_and_last(splits))
    if not spec.data.labels:
        splits = answered(splits, teacher, task)
    _look_at_answers(spec, teacher, splits, metric, task, is_trained=fit or spec.model.source != "zoo")
    images = _recovery_images(spec, splits, report)
    return Workload(teacher, splits, metric, fingerprint(teacher, splits), images, spec.recovery.refit, task)


def _look_at_answers(
    spec: SearchSpec, teacher: nn.Module, splits: Splits, metric: Metric, task: Task, *, is_trained: bool
) -> None:
    """Warn of a teacher that is odd, and refuse a metric that is none of its answers."""
    outputs, labels = answers(teacher, splits.train)
    if spec.task.name != "classification":
        warn_of_nothing(task, outputs, labels if spec.data.labels else task.labels(outputs))
        return
    if is_trained:
        warn_of(outputs, labels if spec.data.labels else None)
    if isinstance(metric, UserMetric):
        check_metric(metric, outputs, labels)


def _metric(spec: SearchSpec, task: Task) -> Metric:
    """The metric that decides: the task's, or the user's own, as a share of its range."""
    given = spec.metric
    if given.is_ours:
        return top1 if spec.task.name == "classification" else task.score
    function = load_function(given.function, spec.folder)
    return UserMetric(given.function, function, given.scale, is_clipped=given.range is not None)


def _check_cache(place: Path) -> None:
    """Write to the cache folder before anything costs time."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise WorkloadError(
            f"the cache folder {place} cannot be written: {error.strerror}; expected a place this process may write; "
            "set the environment variable PAREDOWN_CACHE to one"
        ) from error


def fingerprint(teacher: nn.Module, splits: Splits) -> str:
    """Hash the teacher's structure and weights, what of it is to be kept, and the data it is judged by."""
    tensors = {name: value for name, value in teacher.state_dict().items() if isinstance(value, Tensor)}
    state = ((name, _bytes_of(value)) for name, value in tensors.items())
    protected = [f"kept {', '.join(names)}"] if (names := sorted(kept(teacher))) else []
    return cache.digest(str(teacher), *chain.from_iterable(state), splits.fingerprint, *protected)


def _bytes_of(value: Tensor) -> memoryview:
    return value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _recovery_images(spec: SearchSpec, splits: Splits, report: Report) -> Samples | None:
    """The images of the spec's other source for recovery, in the shape that the teacher takes."""
    if spec.recovery.data is None:
        return None
    images, _ = _read_unlabelled(spec.recovery.data, spec.folder)
    check_images(images, report)
    return ResizedSamples(images, splits.calibration.shape[1:])


def read_splits(spec: SearchSpec, report: Report = lambda *_: None) -> Splits:
    """Read and split the data of `spec`. Raises as `load` does."""
    settings = spec.data
    if settings.labels:
        pool, test = _read_source(settings, spec.folder, form_of(spec))
    else:
        pool, test = _read_unlabelled(settings, spec.folder)
    for samples in (pool, test):
        if samples is not None:
            check_images(samples, report)
    return split(
        pool,
        test,
        validation=settings.validation,
        calibration=settings.calibration,
        seed=settings.seed,
        form=form_of(spec) if settings.labels else "class",
    )


def check_images(samples: Samples, report: Report) -> None:
    """Read every picture of a folder once, and some items of a data set twice; arrays are at hand.

    Raises:
        DataError: one cannot be used.
    """
    if isinstance(samples, Pictures | Masked):
        check_pictures(samples.paths, lambda done, total: report("pictures", done, total, ""))
    check_stable(samples)


def _read_source(settings: DataSpec, folder: str, form: Form) -> tuple[Samples, Samples | None]:
    """Read the images of a source, and its own test set if it has one."""
    if settings.source == "imagefolder":
        read = folders.mask_folder if form == "map" else folders.image_folder
        return read(_root(settings, folder), preparation(settings))
    if settings.source == "factory":
        assert settings.name is not None
        return sources.from_factory(call_factory(settings.name, settings.args, folder), form)
    return _built_in(settings, folder)


def _read_unlabelled(settings: DataSpec, folder: str) -> tuple[Samples, Samples | None]:
    """Read the images of a source that has no labels, or whose labels are of no use; each then is 0."""
    if settings.source == "imagefolder":
        return folders.unlabelled_pictures(_root(settings, folder), preparation(settings))
    if settings.source == "factory":
        assert settings.name is not None
        return sources.from_factory(call_factory(settings.name, settings.args, folder), None)
    pool, test = _built_in(settings, folder)
    return unlabelled(pool), None if test is None else unlabelled(test)


def _built_in(settings: DataSpec, folder: str) -> tuple[Arrays, Arrays | None]:
    if settings.source == "digits":
        return sources.digits()
    return sources.fashion_mnist(None if settings.root is None else _root(settings, folder))


def _root(settings: DataSpec, folder: str) -> Path:
    assert settings.root is not None
    return Path(folder, settings.root).expanduser()
