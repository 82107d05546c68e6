"""Tasks beyond one label: networks of maps and of numbers are read, compressed and judged, or refused in words."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from cluster import InlineCluster
from methods.training import Regression, Segmentation
from methods.training.task import IGNORED
from search.base import DataError, SearchError, WorkloadError
from search.driver.compress import compress
from search.spec import SearchSpec, parse
from search.units import Scale
from search.workload import Workload, load

CODE = """
import numpy as np
import torch
from torch import nn

class Maps(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.BatchNorm2d(16),
            nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Conv2d(16, classes, 1)

    def forward(self, x):
        return nn.functional.interpolate(self.head(self.body(x)), size=x.shape[-2:], mode="bilinear")

def numbers(outputs=2):
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU()]
    network = nn.Sequential(*body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, outputs))
    for _ in range(30):  # in train mode, so that its norm knows what it reads
        network(torch.randn(32, 1, 12, 12))
    return network

def pictures(kind, count=96, **changes):
    chance = np.random.default_rng(0)
    images = chance.normal(0, 1, (count, 1, 12, 12)).astype(np.float32)
    labels = {
        "maps": (images[:, 0] > 0).astype(np.int64) + (images[:, 0] > 1),
        "numbers": np.stack([12 * images.mean((1, 2, 3)), 17 * images.std((1, 2, 3)) - 17], 1),
        "classes": chance.integers(0, 3, count),
    }[kind]
    return {"images": images, "labels": labels}

class Pairs:
    def __init__(self, kind):
        self.all = pictures(kind)
    def __len__(self):
        return 96
    def __getitem__(self, index):
        return self.all["images"][index], self.all["labels"][index]

class Task:
    def __init__(self, scale=1.0):
        self.scale = scale
    def losses(self, outputs, labels):
        return (outputs - labels).abs().mean(1)
    def score(self, answers, labels):
        return self.scale / (1 + float((answers - labels).abs().mean()))

class Averaging(Task):
    def losses(self, outputs, labels):
        return (outputs - labels).abs().mean()

class Silent:
    def losses(self, outputs, labels):
        return outputs
"""


def spec(folder: Path, task: object, network: str, kind: str, **changes: Any) -> SearchSpec:
    """A spec of a network of `CODE` on its pictures."""
    (folder / "mine.py").write_text(CODE)
    document: dict[str, Any] = {
        "name": "tiny",
        "task": task,
        "model": {"source": "factory", "name": f"./mine.py:{network}"},
        "data": {"source": "factory", "name": "./mine.py:pictures", "args": {"kind": kind}, "calibration": 16},
        "budgets": [{"name": "most", "macs": "70%"}],
        "recovery": {"steps": 3, "batch_size": 16},
        "tracking": {"uri": f"sqlite:///{folder}/paredown.db"},
    }
    for key, value in changes.items():
        document[key] = {**document.get(key, {}), **value}
    return parse(yaml.safe_dump(document), folder=folder)


def loaded(*given: Any, **changes: Any) -> Workload:
    return load(spec(*given, **changes), lambda *_: None)


OWN = {"factory": "./mine.py:Task"}


@pytest.mark.parametrize(
    ("task", "network", "kind", "metric"),
    [
        ("segmentation", "Maps", "maps", "mIoU"),
        ("regression", "numbers", "numbers", "R\u00b2"),
        (OWN, "numbers", "numbers", "score"),
    ],
)
@pytest.mark.parametrize("method", ["channels", "alds", "manidp"])
def test_a_network_of_any_task_is_compressed(
    tmp_path: Path, task: object, network: str, kind: str, metric: str, method: str
) -> None:
    given = spec(tmp_path, task, network, kind)
    assert given.metric.scale == Scale(metric)
    figures = compress(
        given, lambda made: InlineCluster(made.worker_inputs()), method=method, budget="most", out=tmp_path / "out",
        report=lambda *_: None,
    )  # fmt: skip
    assert figures["metric"]["name"] == metric
    assert 0 <= figures["top1_validation"] <= 1
    assert figures["top1_error"] is None
    program = torch.export.load(tmp_path / "out" / "student.pt2").module()
    assert program(torch.zeros(5, 1, 12, 12)).shape == ((5, 3, 12, 12) if network == "Maps" else (5, 2))


def test_labels_keep_their_form_in_arrays_and_in_data_sets(tmp_path: Path) -> None:
    for task, network, kind, shape, dtype in (
        ("segmentation", "Maps", "maps", (12, 12), torch.int64),
        ("regression", "numbers", "numbers", (2,), torch.float32),
    ):
        for name in ("pictures", "Pairs"):
            found = loaded(tmp_path, task, network, kind, data={"name": f"./mine.py:{name}"})
            labels = found.splits.validation.batch(np.arange(3))[1]
            assert labels.shape == (3, *shape)
            assert labels.dtype == dtype
    assert isinstance(found.task, Regression)
    assert found.splits.classes == 0


def test_without_labels_the_teachers_answers_are_the_labels(tmp_path: Path) -> None:
    for task, network in (("segmentation", "Maps"), ("regression", "numbers"), (OWN, "numbers")):
        found = loaded(tmp_path, task, network, "classes", data={"labels": False})
        assert found.judge(found.teacher, found.splits.validation).value == pytest.approx(1)


@pytest.mark.parametrize(
    ("task", "network", "kind", "told"),
    [
        ("classification", "Maps", "classes", "expected logits (n, classes); return them, or name what it returns as"),
        ("segmentation", "numbers", "maps", "(2, 2) for inputs of shape (2, 1, 12, 12); expected logits (n, classes, "),
        ("segmentation", "Maps", "classes", "labels (96,); expected (n, c, h, w) and (n, h, w)"),
        ("regression", "Maps", "numbers", "the network returns (3, 12, 12), and its label is (2,)"),
        ({"factory": "./mine.py:Silent"}, "numbers", "numbers", "has no score; expected an object with the verbs"),
        ({"factory": "./mine.py:Task", "args": {"scale": 3.0}}, "numbers", "numbers", "expected a share from 0 to 1"),
        ({"factory": "./mine.py:Task", "args": {"x": 1}}, "numbers", "numbers", "the factory ./mine.py:Task raised"),
    ],
)
def test_what_does_not_fit_the_task_is_told(tmp_path: Path, task: object, network: str, kind: str, told: str) -> None:
    with pytest.raises(SearchError) as caught:
        loaded(tmp_path, task, network, kind)
    assert told in str(caught.value)


def test_a_loss_that_is_averaged_over_images_is_told(tmp_path: Path) -> None:
    found = loaded(tmp_path, {"factory": "./mine.py:Averaging"}, "numbers", "numbers")
    with pytest.raises(WorkloadError, match=r"returned \(\) for 4 images; expected a tensor \(n,\)"):
        found.task.losses(torch.zeros(4, 2), torch.zeros(4, 2))


def test_a_teacher_that_tells_nothing_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        loaded(tmp_path, "regression", "numbers", "numbers")
    assert "the teacher's score on" in caplog.text


def masks(folder: Path, count: int = 12, mode: str = "L") -> None:
    """Pictures and masks of a bright half, in `images` and `masks`."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for index in range(count):
        mask = np.zeros((16, 16), np.uint8)
        mask[:, index % 8 :] = 1
        mask[0] = IGNORED
        Image.fromarray(np.stack([40 + 150 * (mask == 1)] * 3, 2).astype(np.uint8)).save(folder / f"images/{index}.jpg")
        Image.fromarray(mask).convert(mode).save(folder / f"masks/{index}.png")


def folder_spec(folder: Path) -> SearchSpec:
    (folder / "mine.py").write_text(CODE.replace("Conv2d(1, 16", "Conv2d(3, 16"))
    return parse(
        yaml.safe_dump(
            {
                "name": "tiny",
                "task": "segmentation",
                "model": {"source": "factory", "name": "./mine.py:Maps"},
                "data": {"source": "imagefolder", "root": "set", "size": 8, "resize": 8, "validation": 0.3},
                "budgets": [{"name": "most", "macs": "70%"}],
            }
        ),
        folder=folder,
    )


@pytest.mark.parametrize("sets", [("",), ("train", "val")])
def test_pictures_and_masks_are_read_from_folders(tmp_path: Path, sets: tuple[str, ...]) -> None:
    for name in sets:
        masks(tmp_path / "set" / name)
    found = load(folder_spec(tmp_path), lambda *_: None)
    assert isinstance(found.task, Segmentation)
    assert found.splits.classes == 2
    for chance in (None, np.random.default_rng(0)):
        images, labels = found.splits.train.batch(np.arange(4), chance)
        assert images.shape == (4, 3, 8, 8)
        assert labels.shape == (4, 8, 8)
        counted = labels != IGNORED
        bright = images.mean(1) > images.mean()
        assert float((bright == labels.bool())[counted].float().mean()) > 0.8  # cropped and mirrored together


def test_masks_that_cannot_be_used_are_told(tmp_path: Path) -> None:
    def refusal() -> str:
        with pytest.raises(DataError) as caught:
            load(folder_spec(tmp_path), lambda *_: None)
        return str(caught.value)

    place = tmp_path / "set"
    place.mkdir()
    assert "has the folders none; expected images and masks" in refusal()
    masks(place)
    (place / "masks/3.png").unlink()
    assert "3 has no mask in" in refusal()
    Image.new("RGB", (16, 16)).save(place / "masks/3.png")
    assert "3.png: its mode is 'RGB', of 1, L, P that hold classes" in refusal()
    Image.new("L", (9, 9)).save(place / "masks/3.png")
    assert "is (9, 9) and its picture (16, 16); expected one height" in refusal()
