"""The workload: every source of a teacher, and a reason for every refusal."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from methods import named
from methods.base import Budget
from methods.network import profile
from methods.pipeline import trial
from methods.training import Recipe, evaluate
from search.base import WorkloadError
from search.workload import Workload, loading, usercode
from search.workload.teacher import save_weights
from search.workload.zoo import build
from tests.support.tiny_workloads import THINGS, StageReport, factory, load, refused, spec


def same(first: nn.Module, second: nn.Module) -> bool:
    others = second.state_dict()
    return all(torch.equal(value, others[name]) for name, value in first.state_dict().items())


# The zoo


def test_a_zoo_teacher_is_trained_once(folder: Path) -> None:
    asked = spec(folder, {"source": "zoo", "name": "resnet8"}, data=tiny_data(side=4, count=30))
    untrained = loading.load(asked, StageReport(), fit=False)
    first, again = StageReport(), StageReport()
    trained, cached = loading.load(asked, first), loading.load(asked, again)
    assert "training the teacher" in first.stages
    assert "training the teacher" not in again.stages
    assert same(trained.teacher, cached.teacher)
    assert trained.fingerprint == cached.fingerprint != untrained.fingerprint
    assert evaluate(cached.teacher, cached.splits.train, cached.metric) == 1.0
    assert outcome(trained) == outcome(cached)
    assert [layout(value) for value in trained.teacher.parameters()] == [
        layout(value) for value in cached.teacher.parameters()
    ]
    # unless it must not be trained: then what is cached is used all the same
    assert same(loading.load(asked, StageReport(), fit=False).teacher, trained.teacher)
    other = spec(folder, {"source": "zoo", "name": "resnet8"}, data=tiny_data(side=4, count=30) | {"seed": 1})
    assert not same(loading.load(other, StageReport(), fit=False).teacher, trained.teacher)


def layout(value: nn.Parameter) -> tuple[Any, ...]:
    """All about a parameter that decides how sums over it are rounded, or that training leaves behind."""
    return value.stride(), value.is_contiguous(), value.grad, value.dtype, value.device


def outcome(loaded: Workload) -> tuple[Any, ...]:
    """The figures of a trial of the baseline, and the bytes of its student."""
    baseline, inputs = named("uniform"), loaded.worker_inputs()
    found = profile(loaded.teacher, loaded.example)
    plan = baseline.allocate({}, found, Budget("half", macs=found.macs // 2), {"criterion": "l1"})
    steps = trial(inputs, baseline, plan, Recipe(steps=3, report_every=1, batch_size=8), seed=0)
    seen = []
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as ended:
            return seen, {name: value.tobytes() for name, value in ended.value.state.items()}


def tiny_data(**args: Any) -> dict[str, Any]:
    return {"source": "factory", "name": "./things.py:images", "args": args}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_zoo_teacher_with_weights(folder: Path, suffix: str) -> None:
    teacher = build("resnet8", 1, 3, seed=9)
    if suffix == ".pt":
        torch.save(teacher.state_dict(), folder / "w.pt")
    else:
        save_weights(teacher, folder / "w.safetensors")
    found = load(folder, {"source": "zoo", "name": "resnet8", "weights": f"w{suffix}"})
    assert same(found.teacher, teacher)
    assert not found.teacher.training
    assert all(parameter.requires_grad for parameter in found.teacher.parameters())
    assert found.example.shape == (2, 1, 8, 8)
    assert found.splits.classes == 3


def test_an_unknown_zoo_name(folder: Path) -> None:
    with pytest.raises(WorkloadError, match="no network 'resnet9' in the zoo; expected one of resnet8, resnet14"):
        load(folder, {"source": "zoo", "name": "resnet9"})


# torchvision


def test_a_torchvision_network_without_weights_on_a_folder_of_pictures(folder: Path) -> None:
    for name in ("ant", "bee"):
        for number in range(3):
            place = folder / "pictures" / name
            place.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 36), (number, 90, 9)).save(place / f"{number}.png")
    model = {"source": "torchvision", "name": "mobilenet_v3_small", "args": {"num_classes": 2}}
    pictures = {"source": "imagefolder", "root": "pictures", "size": 32, "validation": 0.2}
    found = load(folder, model, data=pictures)
    assert type(found.teacher).__name__ == "MobileNetV3"
    assert found.example.shape == (2, 3, 32, 32)
    with torch.no_grad():
        assert found.teacher(found.example).shape == (2, 2)
    torch.save(found.teacher.state_dict(), folder / "w.pt")
    again = load(folder, model | {"weights": "w.pt"}, data=pictures)
    assert again.fingerprint == found.fingerprint


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"name": "resnet19"}, "torchvision has no classifier 'resnet19'"),
        ({"name": "fasterrcnn_resnet50_fpn"}, "torchvision has no classifier"),
        ({"weights": "IMAGENET1K_V9"}, "torchvision could not make mobilenet_v3_small with weights 'IMAGENET1K_V9'"),
        ({"name": "resnet18", "args": {"colour": 1}}, "unexpected keyword argument 'colour'"),
        ({"args": {"num_classes": -3}}, "could not make mobilenet_v3_small with weights None: RuntimeError: Trying to"),
        ({"weights": "gone.pt"}, "gone.pt; expected a .safetensors or .pt file; correct model.weights"),
    ],
)
def test_torchvision_networks_that_cannot_be_had(folder: Path, change: dict[str, Any], told: str) -> None:
    assert told in refused(folder, {"source": "torchvision", "name": "mobilenet_v3_small"} | change)


# Factories


@pytest.mark.parametrize("name", ["./things.py:network", "things.py:network", "things:network", "inner.nets:network"])
def test_factories_from_files_and_packages(folder: Path, name: str) -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "nets.py").write_text(THINGS)
    found = load(folder, factory(name, args={"width": 6}))
    assert found.teacher[0].weight.shape == (6, 1, 3, 3)
    assert len(found.splits.test) == len(found.splits.validation) == 6


ATTENTIVE = """
from torch import nn


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.attend = nn.Conv2d(1, 12, 2, 2), nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head((x + self.attend(x, x, x)[0]).mean(1))
"""


def test_attention_is_opened(folder: Path) -> None:
    (folder / "attentive.py").write_text(ATTENTIVE)
    found = profile(load(folder, factory("./attentive.py:Attentive")).teacher, torch.rand(1, 1, 8, 8))
    assert {group.name: group.width for group in found.groups if group.fixed is None} == {
        "patches": 12,
        "attend.qkv": 3,
    }


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("./gone.py:network", "gone.py; expected a Python file beside the spec; correct the path"),
        ("./things.py:netwrk", "./things.py has no function 'netwrk'"),
        ("./things.py:np", "./things.py has no function 'np'"),
        ("nowhere.at.all:network", "importing nowhere.at.all raised ModuleNotFoundError: No module named 'nowhere'"),
        ("./faulty.py:network", "raised ZeroDivisionError"),
        ("./unfinished.py:network", "raised SyntaxError"),
        ("./script.py:network", "raised SystemExit"),
        ("./things.py:broken", "./things.py:broken raised ValueError: out of luck, and out of lines; expected it to"),
        ("./things.py:leaving", "./things.py:leaving raised SystemExit: 0; expected it to return"),
        ("./things.py:number", "returned int; expected a torch.nn.Module; return one"),
    ],
)
def test_factories_that_fail(folder: Path, name: str, told: str) -> None:
    (folder / "faulty.py").write_text("1 / 0")
    (folder / "unfinished.py").write_text("def network(")
    (folder / "script.py").write_text("raise SystemExit(0)")
    assert told in refused(folder, factory(name))


def test_a_data_factory_that_fails(folder: Path) -> None:
    message = refused(folder, factory(), data={"source": "factory", "name": "./things.py:broken"})
    assert "the factory ./things.py:broken raised ValueError" in message
    message = refused(folder, factory(), data=tiny_data(colour="red"))
    assert "raised TypeError: images() got an unexpected keyword argument 'colour'" in message


# What goes in and comes out


def test_networks_that_do_not_fit_the_data(folder: Path) -> None:
    message = refused(folder, factory(args={"channels": 3}))
    assert "does not take inputs of shape (2, 1, 8, 8)" in message
    assert "check the input channels and the image size" in message
    message = refused(folder, factory(args={"classes": 2}))
    assert "the network has 2 outputs, but the labels go up to 2" in message


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Maps", "in evaluation, the network returned a tensor of shape (2, 64, 1) for inputs of shape (2, 1, 8, 8)"),
        ("Summed", "in evaluation, the network returned a tensor of shape (1, 64)"),
        (
            "Auxiliary",
            "in training, the network returned a tuple of 0 and 1 for inputs of shape (2, 1, 8, 8); expected",
        ),
        (
            "Untrainable",
            "in training, the network does not take inputs of shape (2, 1, 8, 8): it raised RuntimeError: no training;",
        ),
        ("Leaving", "in evaluation, the network does not take inputs of shape (2, 1, 8, 8): it raised SystemExit: 3;"),
        ("Holding", "copying the network raised TypeError: cannot pickle '_thread.lock' object; expected one that"),
        ("Branching", "torch.export cannot export the network: "),
    ],
)
def test_networks_that_no_search_can_use(folder: Path, name: str, told: str) -> None:
    assert told in refused(folder, factory(f"./things.py:{name}"))


def test_a_network_of_several_outputs_names_one(folder: Path) -> None:
    found = load(folder, factory("./things.py:Auxiliary", output=1))
    assert found.teacher.train()(found.example).shape == (2, 64)
    assert "model.output is 'aux', but the network returned a tuple of 0 and 1; expected" in refused(
        folder, factory("./things.py:Auxiliary", output="aux")
    )


def test_looking_at_a_teacher_changes_nothing(folder: Path) -> None:
    weights = folder / "w.safetensors"
    save_weights(before := build("resnet8", 1, 3, seed=9), weights)
    found = load(folder, {"source": "zoo", "name": "resnet8", "weights": str(weights)})
    assert same(found.teacher, before)
    assert not any(module.training for module in found.teacher.modules())


def test_one_training_image_is_enough_to_look_at_a_network(folder: Path) -> None:
    save_weights(build("resnet8", 1, 3, seed=9), folder / "w.safetensors")
    model = {"source": "zoo", "name": "resnet8", "weights": "w.safetensors"}
    found = load(folder, model, data=tiny_data(count=3))
    assert len(found.splits.train) == 1
    assert found.example.shape == (2, 1, 8, 8)


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/new"])
def test_a_cache_that_cannot_be_written_is_found_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (folder / "file").write_text("a file")
    monkeypatch.setenv("PAREDOWN_CACHE", str(folder / place))
    message = refused(folder, factory(), data={"source": "factory", "name": "./things.py:broken"})
    assert message.startswith(f"the cache folder {folder / place} cannot be written: ")
    assert "set the environment variable PAREDOWN_CACHE" in message


def test_a_network_that_gives_no_numbers(folder: Path) -> None:
    teacher = load(folder, factory()).teacher
    nn.init.constant_(teacher[0].bias, np.nan)
    save_weights(teacher, folder / "nan.safetensors")
    message = refused(folder, factory(weights="nan.safetensors"))
    assert "outputs hold NaN or infinity" in message


def test_the_metric_is_top1_or_the_users(folder: Path) -> None:
    logits, labels = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 1])
    assert load(folder, factory()).metric(logits, labels) == 0.5
    assert load(folder, factory(), metric="./things.py:agreement").metric(logits, labels) == 0.25
    for name, told in (
        ("broken", "raised TypeError"), ("nothing", "gave nan; expected a finite number"),
        ("ending", "raised SystemExit: 0; expected a number"), ("odd", "raised Odd: at all; expected a number"),
    ):  # fmt: skip
        with pytest.raises(WorkloadError, match=rf"the metric \./things\.py:{name} {told}"):
            load(folder, factory(), metric=f"./things.py:{name}").metric(logits, labels)
    loss = {"function": "./things.py:agreement", "direction": "minimize", "range": [0, 2]}
    assert load(folder, factory(), metric=loss).metric(logits, labels) == 0.875


def test_the_fingerprint_changes_with_the_teacher_and_the_data(folder: Path) -> None:
    first = load(folder, factory())
    assert load(folder, factory()).fingerprint == first.fingerprint
    others = [
        load(folder, factory(args={"width": 5})),
        load(folder, factory(), data=tiny_data(count=61)),
        load(folder, factory(), data=tiny_data() | {"seed": 1}),
        load(folder, factory(keep=["4"])),
        load(folder, factory(keep=["0"])),
    ]
    assert len({found.fingerprint for found in (first, *others)}) == 6
    assert load(folder, factory(keep=[])).fingerprint == first.fingerprint
    with torch.no_grad():
        first.teacher[-1].bias[0] += 1e-6
    assert loading.fingerprint(first.teacher, first.splits) != first.fingerprint


def test_workers_never_see_the_test_set(folder: Path) -> None:
    found = load(folder, factory())
    bench = found.worker_inputs()
    hidden: Tensor = found.splits.test.batch(np.arange(len(found.splits.test)))[0]
    seen = torch.cat([part.batch(np.arange(len(part)))[0] for part in (bench.train, bench.validation)])
    assert not any(torch.equal(one, other) for one in hidden for other in seen)
    assert not hasattr(bench, "test")


# MLflow


@pytest.mark.filterwarnings("ignore")
def test_a_teacher_from_mlflow(folder: Path) -> None:
    import mlflow

    uri = f"sqlite:///{folder / 'store.db'}"
    before = mlflow.get_tracking_uri()
    (folder / "homemade.py").write_text(textwrap.dedent(THINGS) + "\n\nclass Own(nn.Sequential):\n    pass\n")
    teacher = load(folder, factory()).teacher
    own = usercode.load_function("homemade:Own", str(folder))(*teacher)
    mlflow.set_tracking_uri(uri)
    try:
        with mlflow.start_run():
            for name, model, form in (("plain", teacher, "pickle"), ("own", own, "pickle"), ("graph", teacher, "pt2")):
                mlflow.pytorch.log_model(
                    model,
                    name=name,
                    registered_model_name=name,
                    serialization_format=form,
                    input_example=np.zeros((2, 1, 8, 8), dtype=np.float32),
                    pip_requirements=[],
                )
        store = {"tracking": {"uri": uri}}
        assert same(load(folder, {"source": "mlflow", "name": "models:/plain/1"}, **store).teacher, teacher)
        for number in (7, 8):
            message = refused(folder, {"source": "mlflow", "name": f"models:/plain/{number}"}, **store)
            assert f"MLflow cannot load 'models:/plain/{number}'" in message
        assert "check tracking.uri and the version" in message
        message = refused(folder, {"source": "mlflow", "name": "models:/graph/1"}, **store)
        assert "logged as an exported graph, which cannot be cut or trained" in message
        # the class lives beside the spec, and is found there
        del sys.modules["homemade"]
        assert same(load(folder, {"source": "mlflow", "name": "models:/own/1"}, **store).teacher, own)
        (folder / "homemade.py").unlink()
        del sys.modules["homemade"]
        message = refused(folder, {"source": "mlflow", "name": "models:/own/1"}, **store)
        assert "No module named 'homemade'" in message
    finally:
        mlflow.set_tracking_uri(before)
