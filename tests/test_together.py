"""Steps that several processes share are those of one: weights, statistics, losses and what is evaluated."""

from __future__ import annotations

import copy
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import ray
import torch
import yaml
from searches import SPEC
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from cluster import ClusterError, Done, Failed, InlineCluster, RayCluster, Step, Stopped
from methods import METHODS, together
from methods.base import Budget, defaults
from methods.pipeline import Bench, trial
from methods.profile import profile
from methods.training import WHOLE, Chance, Recipe, Samples, evaluate, recover, top1, train
from search import data, spec, zoo
from search.base import SpecError

STEPS = 20
RECIPE = Recipe(STEPS, batch_size=64, learning_rate=0.05, report_every=10)
SHARED = (2, 3)
"""Numbers of processes; 64 images make 21, 21 and 22 of three."""

State = dict[str, Tensor]


def splits() -> data.Splits:
    pool, test = data.digits()
    return data.split(pool, test, validation=0.2, calibration=128, seed=0)


def original(weights: Path) -> nn.Module:
    from safetensors.torch import load_file

    teacher = zoo.build("resnet8", 1, 10, 0)
    teacher.load_state_dict(load_file(weights))
    return teacher.eval()


def shaken(teacher: nn.Module, seed: int = 0) -> nn.Module:
    """A student that has something to learn again: every filter of the teacher moved by a tenth of its size."""
    generator = torch.Generator().manual_seed(seed)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for value in student.parameters():
            value += 0.1 * value.std(correction=0) * torch.randn(value.shape, generator=generator)
    return student


@dataclass(frozen=True)
class Exact:
    """The samples of `source` in float64, in which no rounding moves an activation across a kink within few steps."""

    source: Samples

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, indices: np.ndarray, augment: Chance = None, part: slice = WHOLE) -> tuple[Tensor, Tensor]:
        images, labels = self.source.batch(indices, augment, part)
        return images.double(), labels


def smoothed(network: nn.Module) -> nn.Module:
    """The network with SiLU for every ReLU, at whose kink the last bit of an activation decides about a gradient."""
    for name, module in [*network.named_modules()]:
        if isinstance(module, nn.ReLU):
            parent, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(parent), leaf, nn.SiLU())
    return network


def with_labels(teacher: nn.Module, found: data.Splits) -> tuple[nn.Module, Iterator[int]]:
    """Labels, the teacher's outputs, augmentation, batch norms; all but the first process begin with other weights."""
    student = shaken(teacher, together.own_seed(0)).double()
    return student, recover(student, copy.deepcopy(teacher).double(), Exact(found.train), RECIPE, 0)


def without_labels(teacher: nn.Module, found: data.Splits) -> tuple[nn.Module, Iterator[int]]:
    """The teacher's last feature map, in units of the whole batch's variance."""
    student = shaken(teacher).double()
    recipe = replace(RECIPE, labels=False)
    return student, recover(student, copy.deepcopy(teacher).double(), Exact(found.train), recipe, 0)


def in_float32(teacher: nn.Module, found: data.Splits) -> tuple[nn.Module, Iterator[int]]:
    """As it is done, but for ReLU's kink."""
    teacher = smoothed(copy.deepcopy(teacher))
    student = shaken(teacher)
    return student, recover(student, teacher, found.train, RECIPE, 0)


def with_gates(teacher: nn.Module, found: data.Splits) -> tuple[nn.Module, Iterator[int]]:
    """ManiDP's losses compare images with each other; its thresholds are quantiles of a batch's saliencies."""
    manidp, images = METHODS["manidp"], torch.from_numpy(found.calibration).double()
    teacher = copy.deepcopy(teacher).double()
    rows = profile(teacher, images[:2])
    scores = manidp.merge([manidp.score(("sites",), teacher, images, 0)], rows)
    plan = manidp.allocate(scores, rows, Budget("half", macs=rows.macs // 2), defaults(manidp))
    student = manidp.apply(teacher, plan, images).double()
    return student, manidp.recover(student, teacher, Exact(found.train), RECIPE, 0)


Case = Callable[[nn.Module, data.Splits], tuple[nn.Module, Iterator[int]]]
CASES: dict[str, Case] = {case.__name__: case for case in (with_labels, without_labels, in_float32, with_gates)}
FARTHEST = {"in_float32": 1e-5}
"""What may lie between the states of one process and of several: 1e-10 in float64."""


def trained(weights: Path) -> dict[str, tuple[State, list[float]]]:
    """What every case comes to: the state, and top-1 whenever the training told of a step."""
    found, teacher = splits(), original(weights)
    results = {}
    for name, case in CASES.items():
        is_exact = name not in FARTHEST
        validation = Exact(found.validation) if is_exact else found.validation
        with patch.object(Tensor, "float", Tensor.double) if is_exact else nullcontext():  # gates and losses ask for it
            student, steps = case(teacher, found)
            looks = [evaluate(student, validation, top1) for _ in steps]
        results[name] = student.state_dict(), looks
    return results


def normed(rows: slice) -> State:
    """A batch norm in train mode on some rows of a fixed batch, in float64: outputs, gradients and statistics."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    images, weight, bias, wanted = 3 + 2 * draw(5, 4, 2, 3), draw(4), draw(4), draw(5, 4, 2, 3)
    mean, variance = torch.zeros(4).double(), torch.ones(4).double()
    leaves = [images[rows].requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    with together.joint_norms():
        output = F.batch_norm(leaves[0], mean, variance, leaves[1], leaves[2], training=True, momentum=0.3)
    (together.joined(output, len(images)) * wanted).sin().sum().backward()
    gradients = {name: leaf.grad for name, leaf in zip(("images", "weight", "bias"), leaves, strict=True)}
    return {"output": output.detach(), "mean": mean, "variance": variance, **gradients}


def refused() -> str:
    """What training says of batches with too few images."""
    found = splits()
    try:
        next(train(zoo.build("resnet8", 1, 10, 0), found.train, replace(RECIPE, batch_size=1), 0))
    except ValueError as error:
        return str(error)
    return ""


def process(rank: int, count: int, folder: str, weights: str) -> None:
    """One of `count` processes: does everything there is, and leaves what came of it in `folder`."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/met{count}", rank=rank, world_size=count)
    results = {
        "trained": trained(Path(weights)),
        "normed": normed(together.part(5)),
        "part": together.part(5),
        "few": evaluate(original(Path(weights)), data.Subset(splits().validation, np.arange(count - 1)), top1),
        "refused": refused(),
        "draw": torch.rand((), generator=torch.Generator().manual_seed(together.own_seed(7))),
    }
    torch.save(results, f"{folder}/{count}-{rank}")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def alone(teacher: Path) -> dict[str, Any]:
    return {"trained": trained(teacher), "normed": normed(slice(0, 5))}


@pytest.fixture(scope="module", params=SHARED)
def shared(request: pytest.FixtureRequest, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of several processes came to."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(process, (request.param, str(folder), str(teacher)), nprocs=request.param)
    return [torch.load(folder / f"{request.param}-{rank}", weights_only=False) for rank in range(request.param)]


def distance(one: State, other: State) -> float:
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in other)


@pytest.mark.parametrize("case", CASES)
def test_shared_steps_are_those_of_one_process(shared: list[Any], alone: dict[str, Any], case: str) -> None:
    state, looks = alone["trained"][case]
    first, first_looks = shared[0]["trained"][case]
    assert first.keys() == state.keys()
    assert distance(first, state) < FARTHEST.get(case, 1e-10)
    assert first_looks == looks
    for other, other_looks in (one["trained"][case] for one in shared[1:]):
        assert all(torch.equal(other[name], first[name]) for name in first)
        assert other_looks == first_looks


def test_training_moved_what_is_compared(alone: dict[str, Any], teacher: Path) -> None:
    before = shaken(original(teacher)).state_dict()
    assert distance(before, alone["trained"]["with_labels"][0]) > 0.01


def test_a_joint_norm_is_that_of_all_images(shared: list[Any], alone: dict[str, Any]) -> None:
    expected = alone["normed"]
    for one in shared:
        for name in ("mean", "variance"):
            torch.testing.assert_close(one["normed"][name], expected[name], rtol=0, atol=1e-13)
        torch.testing.assert_close(one["normed"]["output"], expected["output"][one["part"]], rtol=0, atol=1e-12)
        found = one["normed"]["images"] / len(shared)
        torch.testing.assert_close(found, expected["images"][one["part"]], rtol=0, atol=1e-12)
    for name in ("weight", "bias"):
        mean = sum(one["normed"][name] for one in shared) / len(shared)
        torch.testing.assert_close(mean, expected[name], rtol=0, atol=1e-12)


def test_parts_are_all_images_once(shared: list[Any]) -> None:
    assert [index for one in shared for index in range(5)[one["part"]]] == [*range(5)]


def test_too_few_images_for_all_are_evaluated_by_each_and_trained_by_none(shared: list[Any]) -> None:
    assert all(0 <= one["few"] <= 1 for one in shared)
    assert shared[0]["refused"] == (
        f"a batch has 1 images for {len(shared)} processes, expected one for each at least; "
        "raise recovery.batch_size or recovery.images, or lower recovery.workers"
    )


def test_each_process_draws_for_its_own_images(shared: list[Any]) -> None:
    draws = [float(one["draw"]) for one in shared]
    assert draws[0] == float(torch.rand((), generator=torch.Generator().manual_seed(7)))
    assert len({*draws}) == len(draws)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("recovery: {workers: 0}", "recovery.workers: Input should be greater than 0, but it is 0"),
        ("recovery: {workers: 4, batch_size: 3}", "recovery.workers: 4 are too many for batches of 3 images"),
        ("recovery: {workers: 9, images: 8}", "recovery.workers: 9 are too many for batches of 8 images"),
        ("{recovery: {workers: 4}, cluster: {max_parallel: 3}}", "4 are more than cluster.max_parallel, 3; raise that"),
        ("{recovery: {workers: 2}, cluster: {gpus_per_trial: 0.5}}", "2 workers cannot share a GPU, and cluster.gpus_"),
    ],
)
def test_what_cannot_be_shared_is_refused_at_the_door(change: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        spec.parse(yaml.safe_dump(yaml.safe_load(SPEC) | yaml.safe_load(change)), folder=tmp_path)
    assert str(caught.value).startswith("1 mistake ")
    assert told in str(caught.value)


def test_a_search_goes_on_with_other_workers(tmp_path: Path) -> None:
    texts = (SPEC, SPEC.replace("batch_size: 64", "batch_size: 64, workers: 4"))
    one, several = (spec.parse(text, folder=tmp_path) for text in texts)
    assert (one.recovery.workers, several.recovery.workers) == (1, 4)
    assert one.decisive() == several.decisive()


# On Ray


def wavering(bench: Bench, folder: str) -> Iterator[int]:
    """Tells how many processes there are; the second one dies after the first step of the first attempt."""
    rank = distributed.get_rank()
    for step in range(3):
        if (rank, step) == (1, 1) and not Path(folder, "died").exists():
            Path(folder, "died").touch()
            os._exit(1)
        there = torch.ones(())
        distributed.all_reduce(there)
        yield int(there)


def lopsided(bench: Bench) -> None:
    """Fails in one process, for which the other waits."""
    if distributed.get_rank() == 1:
        raise ValueError("only here")
    distributed.barrier()


def size_of(bench: Bench, name: str) -> int:
    return len(getattr(bench, name))


@pytest.fixture(scope="module")
def bench(teacher: Path) -> Bench:
    found = splits()
    return Bench(original(teacher), found.train, found.validation, found.calibration, top1)


@pytest.fixture(scope="module")
def cluster(bench: Bench) -> Iterator[RayCluster]:
    """As many CPUs as processes share an item: the workers have to make room."""
    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    ray.init("local", num_cpus=2, object_store_memory=2**28, **options)
    shared = {trial: 2, wavering: 2, lopsided: 2, size_of: 1}
    made = RayCluster(bench, shared=shared, by_value=[sys.modules[__name__]])
    yield made
    made.close()
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.ray
def test_a_trial_of_two_workers_comes_to_what_one_does(cluster: RayCluster, bench: Bench) -> None:
    uniform, images = METHODS["uniform"], torch.from_numpy(bench.calibration)
    rows = profile(bench.teacher, images[:2])
    scores = uniform.merge([uniform.score(one, bench.teacher, images, 0) for one in uniform.shards(rows, images)], rows)
    plan = uniform.allocate(scores, rows, Budget("half", macs=rows.macs // 2), defaults(uniform))
    item = (uniform, plan, replace(RECIPE, steps=6, report_every=3), 0)

    *expected_steps, expected = InlineCluster(bench).run(trial, [item])
    *steps, done = cluster.run(trial, [item])
    assert isinstance(expected, Done)
    assert isinstance(done, Done)
    assert [event.value.step for event in steps if isinstance(event, Step)] == [3, 6]
    for one, other in zip(steps, expected_steps, strict=True):
        assert one.value.top1 == pytest.approx(other.value.top1, abs=0.02)
    assert (done.value.macs, done.value.params) == (expected.value.macs, expected.value.params)
    assert done.value.top1_surgery == pytest.approx(expected.value.top1_surgery, abs=0.01)
    assert done.value.top1_validation == pytest.approx(expected.value.top1_validation, abs=0.02)
    states = [
        {name: torch.from_numpy(np.array(value)) for name, value in one.value.state.items()} for one in (done, expected)
    ]
    assert distance(*states) < 1e-3
    assert done.seconds > 2 * done.value.seconds


@pytest.mark.slow
@pytest.mark.ray
def test_a_group_that_loses_a_process_is_made_anew_and_stops_where_it_is_told(
    cluster: RayCluster, tmp_path: Path
) -> None:
    answers = iter((True, True, False))
    *steps, end = cluster.run(wavering, [(str(tmp_path),)], lambda index, value: next(answers))
    assert steps == [Step(0, 2)] * 3
    assert isinstance(end, Stopped)
    assert (tmp_path / "died").exists()


@pytest.mark.slow
@pytest.mark.ray
def test_what_one_process_raises_is_the_items_error(cluster: RayCluster) -> None:
    (failed,) = cluster.run(lopsided, [()])
    assert isinstance(failed, Failed)
    assert failed.error == "ValueError: only here"
    assert "lopsided" in failed.trace


@pytest.mark.slow
@pytest.mark.ray
def test_workers_come_back_after_a_group_that_was_given_up(cluster: RayCluster, bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "died").touch()
    given_up = cluster.run(wavering, [(str(tmp_path),)], lambda index, value: True)
    assert next(given_up) == Step(0, 2)
    given_up.close()
    (done,) = cluster.run(size_of, [("train",)])
    assert isinstance(done, Done)
    assert done.value == len(bench.train)


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_groups_beyond_the_cluster_are_refused(bench: Bench) -> None:
    with pytest.raises(ClusterError, match="has room for 2 workers, and 3 are to share an item"):
        RayCluster(bench, shared={trial: 3})
