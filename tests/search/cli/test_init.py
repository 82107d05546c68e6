"""The first spec that `paredown init` writes for a network and a folder, and the reasons why it writes none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from search.base import DataError, SearchError, SpecError, WorkloadError
from search.cli.init import first_spec, init
from search.spec import reading
from search.workload import loading
from tests.support.tiny_workloads import users_code


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with the user's code and twelve pictures of three classes, in which the command runs."""
    random = np.random.default_rng(0)
    for number in range(36):
        place = tmp_path / "pictures" / "abc"[number % 3] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(place)
    (tmp_path / "mine.py").write_text(
        "from things import network\n\ndef make(classes=3, channels=3):\n"
        "    return network(classes=classes, channels=channels)\n\ndef grey():\n    return make(channels=1)\n\n"
        "def small():\n    return make(classes=2)\n\ndef large():\n    return make(classes=5)\n"
    )
    with pytest.MonkeyPatch.context() as patch, users_code(tmp_path):
        patch.chdir(tmp_path)
        yield tmp_path


def test_the_spec_loads_as_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    init("./mine.py:make", Path("pictures"), Path("first.yaml"))
    spec = reading.load(Path("first.yaml"))
    assert (spec.name, spec.model.name, spec.data.root) == ("mine", "./mine.py:make", "pictures")
    assert (spec.data.size, spec.recovery.steps, spec.recovery.labels) == (224, 400, True)
    assert capsys.readouterr().out == "wrote first.yaml; try  paredown check first.yaml\n"
    found = loading.load(spec, lambda *_: None)
    assert found.teacher(found.example).shape == (2, 3)
    with pytest.raises(SpecError, match=r"first\.yaml is there already; expected a new file"):
        init("./mine.py:make", Path("pictures"), Path("first.yaml"))


def test_a_spec_in_another_folder_finds_both(folder: Path) -> None:
    (folder / "specs").mkdir()
    (folder / "alone.py").write_text(
        "from torch import nn\n\ndef make():\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))\n"
    )
    init("alone.py:make", Path("pictures"), Path("specs/second.yaml"))
    spec = reading.load(Path("specs/second.yaml"))
    assert spec.model.name == "../alone.py:make"
    assert spec.data.root == str(folder / "pictures")


def test_pictures_without_classes_need_no_labels(folder: Path) -> None:
    text, notes = first_spec("./mine.py:make", folder / "pictures" / "a", folder)
    spec = reading.parse(text, folder=folder)
    assert (spec.data.labels, spec.recovery.steps, spec.metric.function) == (False, 0, "agreement")
    assert notes[0].startswith("no labels are read: ")


def test_torchvision_takes_the_folders_classes(folder: Path) -> None:
    text, notes = first_spec("torchvision:squeezenet1_1", Path("pictures"), folder)
    spec = reading.parse(text, folder=folder)
    assert (spec.name, spec.model.source, spec.model.args) == ("squeezenet1_1", "torchvision", {"num_classes": 3})
    assert notes == []


@pytest.mark.parametrize(
    ("model", "kind", "told"),
    [
        ("./mine.py:grey", WorkloadError, "takes images of 1 channel, and pictures of a folder have 3"),
        ("./mine.py:small", WorkloadError, "the network has 2 outputs, but pictures has 3 classes"),
        ("mine", SpecError, "--model is 'mine'; expected ./mine.py:make, torchvision:NAME or timm:NAME"),
        ("torchvision:resnet1", WorkloadError, "torchvision has no classifier 'resnet1'"),
    ],
)
def test_a_mismatch_is_told(folder: Path, model: str, kind: type[SearchError], told: str) -> None:
    with pytest.raises(kind, match=told):
        first_spec(model, Path("pictures"), folder)


def test_more_outputs_than_classes_are_told_and_no_pictures_are_refused(folder: Path) -> None:
    _, notes = first_spec("./mine.py:large", Path("pictures"), folder)
    assert notes == ["the network has 5 outputs, and pictures 3 classes: check that they go together"]
    with pytest.raises(DataError):
        first_spec("./mine.py:make", Path("nowhere"), folder)
