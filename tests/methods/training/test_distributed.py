"""Steps that several processes share are those of one: weights, statistics, losses and evaluations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from methods import METHODS
from methods.base import Budget
from methods.network import profile
from methods.protocol import defaults
from methods.training import Recipe, Samples, distributed, evaluate, recover, top1, train
from methods.training.recipe import WHOLE, Chance
from search.base import SpecError
from search.spec import reading
from search.workload import zoo
from search.workload.data import samples, sources
from search.workload.data.splits import Splits, split
from tests.support.searches import SPEC

RECIPE = Recipe(20, batch_size=64, learning_rate=0.05, report_every=10)
SHORT = replace(RECIPE, steps=4, report_every=2)

State = dict[str, Tensor]


def splits() -> Splits:
    pool, test = sources.digits()
    return split(pool, test, validation=0.2, calibration=128, seed=0)


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


def with_labels(teacher: nn.Module, found: Splits) -> tuple[nn.Module, Iterator[int]]:
    """Labels, the teacher's outputs, augmentation, batch norms; all but the first process begin with other weights."""
    student = shaken(teacher, distributed.own_seed(0)).double()
    return student, recover(student, copy.deepcopy(teacher).double(), Exact(found.train), RECIPE, 0)


def without_labels(teacher: nn.Module, found: Splits) -> tuple[nn.Module, Iterator[int]]:
    """The teacher's last feature map, in units of the whole batch's variance."""
    student = shaken(teacher).double()
    recipe = replace(SHORT, labels=False)
    return student, recover(student, copy.deepcopy(teacher).double(), Exact(found.train), recipe, 0)


def in_float32(teacher: nn.Module, found: Splits) -> tuple[nn.Module, Iterator[int]]:
    """As in real use, but for ReLU's kink."""
    teacher = smoothed(copy.deepcopy(teacher))
    student = shaken(teacher)
    return student, recover(student, teacher, found.train, RECIPE, 0)


def with_gates(teacher: nn.Module, found: Splits) -> tuple[nn.Module, Iterator[int]]:
    """ManiDP's losses compare images with each other; its thresholds are quantiles of a batch's saliencies."""
    manidp, images = METHODS["manidp"], torch.from_numpy(found.calibration).double()
    teacher = copy.deepcopy(teacher).double()
    rows = profile(teacher, images[:2])
    scores = manidp.merge([manidp.score(("sites",), teacher, images, 0)], rows)
    plan = manidp.allocate(scores, rows, Budget("half", macs=rows.macs // 2), defaults(manidp))
    student = manidp.apply(teacher, plan, images).double()
    return student, manidp.recover(student, teacher, Exact(found.train), SHORT, 0)


Case = Callable[[nn.Module, Splits], tuple[nn.Module, Iterator[int]]]
SHARED: dict[int, list[Case]] = {2: [with_labels, in_float32], 3: [without_labels, with_gates]}
"""The cases by number of processes; 64 images make 21, 21 and 22 of three."""
FARTHEST = {"in_float32": 1e-5}
"""The most that the states of one process and of several may differ: 1e-10 in float64."""


def trained(weights: Path, cases: list[Case]) -> dict[str, tuple[State, list[float]]]:
    """The results of cases: the state, and top-1 whenever the training reported a step."""
    found, teacher = splits(), original(weights)
    results = {}
    for case in cases:
        is_exact = case.__name__ not in FARTHEST
        validation = Exact(found.validation) if is_exact else found.validation
        with patch.object(Tensor, "float", Tensor.double) if is_exact else nullcontext():  # gates and losses ask for it
            student, steps = case(teacher, found)
            looks = [evaluate(student, validation, top1) for _ in steps]
        results[case.__name__] = student.state_dict(), looks
    return results


def normed(rows: slice) -> State:
    """A batch norm in train mode on some rows of a fixed batch, in float64: outputs, gradients and statistics."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    images, weight, bias, wanted = 3 + 2 * draw(5, 4, 2, 3), draw(4), draw(4), draw(5, 4, 2, 3)
    mean, variance = torch.zeros(4).double(), torch.ones(4).double()
    leaves = [images[rows].requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    with distributed.joint_norms():
        output = F.batch_norm(leaves[0], mean, variance, leaves[1], leaves[2], training=True, momentum=0.3)
    (distributed.joined(output, len(images)) * wanted).sin().sum().backward()
    gradients = {name: leaf.grad for name, leaf in zip(("images", "weight", "bias"), leaves, strict=True)}
    return {"output": output.detach(), "mean": mean, "variance": variance, **gradients}


def refused() -> str:
    """The message of training about batches with too few images."""
    found = splits()
    try:
        next(train(zoo.build("resnet8", 1, 10, 0), found.train, replace(RECIPE, batch_size=1), 0))
    except ValueError as error:
        return str(error)
    return ""


def process(rank: int, folder: str, weights: str) -> None:
    """One of the processes: of two first, if it is one of those, then of three; starting them takes longest."""
    torch.set_num_threads(1)
    for count in SHARED:
        if rank < count:
            work(rank, count, folder, weights)


def work(rank: int, count: int, folder: str, weights: str) -> None:
    """One of `count` processes: run all cases, and leave the results in `folder`."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/met{count}", rank=rank, world_size=count)
    results = {
        "trained": trained(Path(weights), SHARED[count]),
        "normed": normed(distributed.part(5)),
        "part": distributed.part(5),
        "few": evaluate(original(Path(weights)), samples.Subset(splits().validation, np.arange(count - 1)), top1),
        "refused": refused(),
        "draw": torch.rand((), generator=torch.Generator().manual_seed(distributed.own_seed(7))),
    }
    torch.save(results, f"{folder}/{count}-{rank}")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def alone(teacher: Path) -> dict[str, Any]:
    return {"trained": trained(teacher, [*SHARED[2], *SHARED[3]]), "normed": normed(slice(0, 5))}


@pytest.fixture(scope="module")
def folder(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of the processes."""
    results = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(process, (str(results), str(teacher)), nprocs=max(SHARED))
    return results


@pytest.fixture(scope="module", params=SHARED)
def shared(request: pytest.FixtureRequest, folder: Path) -> list[Any]:
    """The results of each of several processes."""
    return [torch.load(folder / f"{request.param}-{rank}", weights_only=False) for rank in range(request.param)]


def distance(one: State, other: State) -> float:
    """The largest distance of two states, as a share of a tensor's largest value or of 1."""
    gaps = {name: (one[name].double() - value.double()).abs().max() for name, value in other.items()}
    return max(float(gap / other[name].abs().max().clamp(min=1)) for name, gap in gaps.items())


def test_shared_steps_are_those_of_one_process(shared: list[Any], alone: dict[str, Any]) -> None:
    assert list(shared[0]["trained"]) == [case.__name__ for case in SHARED[len(shared)]]
    for case, (first, first_looks) in shared[0]["trained"].items():
        state, looks = alone["trained"][case]
        assert first.keys() == state.keys()
        assert distance(first, state) < FARTHEST.get(case, 1e-10), case
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
        reading.parse(yaml.safe_dump(yaml.safe_load(SPEC) | yaml.safe_load(change)), folder=tmp_path)
    assert str(caught.value).startswith("1 mistake ")
    assert told in str(caught.value)


def test_a_search_goes_on_with_other_workers(tmp_path: Path) -> None:
    texts = (SPEC, SPEC.replace("batch_size: 64", "batch_size: 64, workers: 4"))
    one, several = (reading.parse(text, folder=tmp_path) for text in texts)
    assert (one.recovery.workers, several.recovery.workers) == (1, 4)
    assert one.decisive() == several.decisive()
