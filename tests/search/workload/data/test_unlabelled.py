"""Images without labels: folders, factories and arrays of them are read, and the teacher's answers are the labels."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from methods.training import evaluate, top1
from search.base import DataError, WorkloadError
from search.workload import Workload, loading
from search.workload.data import folders
from search.workload.data.pictures import Preparation
from search.workload.data.samples import Answered, Arrays, Indexed
from search.workload.data.sources import from_factory
from search.workload.teacher import save_weights
from search.workload.zoo import build
from tests.support.tiny_workloads import StageReport, factory, spec, users_code


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A spec's folder with the user's own code in it."""
    with users_code(tmp_path):
        yield tmp_path


def paint(root: Path, *places: str) -> None:
    """A picture in each of these places, each of another grey."""
    for number, place in enumerate(places):
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (12, 12), 20 * number).save(path)


def greys(samples: Any) -> list[int]:
    """The order in which pictures were painted, as they are read."""
    inputs, labels = samples.batch(np.arange(len(samples)))
    assert labels.tolist() == [0] * len(samples)
    return torch.round((inputs[:, 0, 0, 0] * 0.229 + 0.485) * 255 / 20).int().tolist()


def test_a_folder_is_read_with_all_below_it(tmp_path: Path) -> None:
    paint(tmp_path, "0.png", "1.png", "bee/0.png", "bee/more/0.png", "train/0.png")
    paint(tmp_path / ".hidden", "0.png")
    pool, test = folders.unlabelled_pictures(tmp_path, Preparation(8))
    assert test is None
    assert greys(pool) == [0, 1, 2, 3, 4]  # a folder beside others may be called train


@pytest.mark.parametrize(("train", "held_out"), [("train", "test"), ("Training", "val")])
def test_the_sets_of_a_folder_are_kept_apart(tmp_path: Path, train: str, held_out: str) -> None:
    paint(tmp_path, f"{train}/0.png", f"{train}/ant/0.png", f"{held_out}/0.png")
    pool, test = folders.unlabelled_pictures(tmp_path, Preparation(8))
    assert (greys(pool), greys(test)) == ([0, 1], [2])


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"no pictures in .*; expected some \(\.jpg.*; correct data\.root"):
            folders.unlabelled_pictures(root, Preparation(8))


def test_who_has_no_labels_is_told_of_the_key(tmp_path: Path) -> None:
    paint(tmp_path, "0.png", "1.png")
    with pytest.raises(
        DataError, match=r"holds 2 pictures and no folder of a class; expected .* give data\.labels: fal"
    ):
        folders.image_folder(tmp_path, Preparation(8))
    paint(tmp_path / "both", "train/0.png", "test/0.png")
    with pytest.raises(DataError, match=r"look like sets .*; rename them, or give data\.labels: false if the pictures"):
        folders.image_folder(tmp_path / "both", Preparation(8))
    images = np.ones((4, 1, 2, 2), np.float32)
    for made in (images, {"images": images}, torch.from_numpy(images)):
        with pytest.raises(
            DataError, match=r"the data factory returned .* give data\.labels: false if there are no lab"
        ):
            from_factory(made)
    with pytest.raises(DataError, match=r"item 0 of the data set .* or give data\.labels: false if it has none"):
        Indexed(list(torch.from_numpy(images))).batch(np.arange(1))


def test_factories_give_images_in_any_form() -> None:
    images = np.arange(32, dtype=np.float32).reshape(8, 1, 2, 2)
    tensors = torch.from_numpy(images)
    for made in (
        images, tensors, {"images": images}, {"images": images, "labels": np.arange(8)}, list(tensors),
        [(image, "cat") for image in tensors], [(image,) for image in tensors],
    ):  # fmt: skip
        for pool, test in (from_factory(made, None), from_factory((made, made), None)):
            for samples in (pool, test or pool):
                inputs, labels = samples.batch(np.arange(8))
                assert torch.equal(inputs, tensors)
                assert labels.tolist() == [0] * 8
    for wrong, told in ((np.ones(4), "gave images (4,)"), ({"labels": 1}, "gave images ()"), ("a", "returned str")):
        with pytest.raises(DataError) as caught:
            from_factory(wrong, None)
        assert told in str(caught.value)


def load(folder: Path, model: dict[str, Any], data: dict[str, Any]) -> Workload:
    return loading.load(spec(folder, model, data=data | {"labels": False}), StageReport())


def test_the_teachers_answers_are_the_labels(folder: Path) -> None:
    found = load(folder, factory(), {"source": "factory", "name": "./things.py:images"})
    for samples in (found.splits.validation, found.splits.test):
        assert evaluate(found.teacher, samples, found.metric) == 1.0
        images, labels = samples.batch(np.arange(len(samples)))
        assert torch.equal(labels, found.teacher(images).argmax(1))
    assert found.metric is top1
    inputs = pickle.loads(pickle.dumps(found.worker_inputs()))
    assert (
        inputs.validation.__dict__["labels"].tolist() == found.splits.validation.labels.tolist()
    )  # and asks no teacher
    other = factory(args={"classes": 5})
    assert load(folder, other, {"source": "digits"}).teacher[-1].out_features == 5


def test_the_test_set_is_asked_for_no_answer_until_it_is_read(folder: Path) -> None:
    found = load(folder, factory(), {"source": "digits"})
    assert isinstance(found.splits.test, Answered)
    assert "labels" not in found.splits.test.__dict__


def test_a_zoo_network_has_as_many_outputs_as_its_file(folder: Path) -> None:
    paint(folder / "shelf", *(f"{number}.png" for number in range(10)))
    data = {"source": "imagefolder", "root": "shelf", "size": 8, "validation": 0.2}
    save_weights(build("resnet8", 3, 7, 0), folder / "seven.safetensors")
    found = load(folder, {"source": "zoo", "name": "resnet8", "weights": "seven.safetensors"}, data)
    assert found.teacher[-1].out_features == 7
    assert [len(part) for part in (found.splits.train, found.splits.validation, found.splits.test)] == [6, 2, 2]
    assert len(found.splits.calibration) == 6
    for name, told in (("resnet14", "do not fit the network"), ("vgg16-cifar", "do not fit the network")):
        with pytest.raises(WorkloadError, match=told):
            load(folder, {"source": "zoo", "name": name, "weights": "seven.safetensors"}, data)


def test_a_teacher_of_one_answer_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(folder, factory(args={"classes": 1}), {"source": "digits"})
    assert "the teacher gives all of 128 training images the same answer, 0" in caplog.text
    assert "no more than chance" not in caplog.text


def test_images_to_mimic_on_need_no_labels(folder: Path) -> None:
    paint(folder / "shelf", "0.png", "1.png", "ant/0.png")
    recovery = {"labels": False, "data": {"source": "imagefolder", "root": "shelf", "size": 8}}
    found = loading.load(spec(folder, factory(), recovery=recovery), StageReport())
    assert len(found.worker_inputs().train) == 3
    assert isinstance(found.splits.validation.source, Arrays)  # type: ignore[attr-defined]
