"""Images of another source are resized to the teacher's input, and replace the training set in recovery alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from search.spec import reading
from search.workload import loading
from search.workload.data.samples import Arrays, ResizedSamples

SPEC = """
name: other
model: {source: zoo, name: resnet8, weights: train}
data: {source: factory, name: "./mine.py:images", calibration: 8}
methods: [alds]
budgets: [{name: half, macs: 50%}]
search: {trials: 2}
recovery: {labels: false, data: {source: digits}}
"""

MINE = """
import numpy as np

def images():
    random = np.random.default_rng(0)
    return {"images": random.random((60, 3, 12, 12), dtype=np.float32), "labels": np.arange(60) % 3}
"""


def test_images_take_the_shape_of_the_teachers_input() -> None:
    images = np.stack([np.full((3, 4, 4), (1.0, 2.0, 6.0)[i]) for i in range(3)])[None].reshape(3, 3, 4, 4)
    source = Arrays(images, np.array([7, 8, 9]))
    grey, labels = ResizedSamples(source, (1, 8, 6)).batch(np.array([2, 0]))
    assert grey.shape == (2, 1, 8, 6)
    torch.testing.assert_close(grey[:, 0, 0, 0], torch.tensor([6.0, 1.0]))
    assert labels.tolist() == [9, 7]
    same, _ = ResizedSamples(source, (3, 4, 4)).batch(np.array([1]))
    assert torch.equal(same, source.batch(np.array([1]))[0])
    assert len(ResizedSamples(source, (3, 4, 4))) == 3


def test_grey_images_are_repeated_for_every_channel() -> None:
    source = Arrays(np.arange(16.0).reshape(1, 1, 4, 4), np.array([0]))
    images, _ = ResizedSamples(source, (3, 4, 4)).batch(np.array([0]))
    assert images.shape == (1, 3, 4, 4)
    assert torch.equal(images[:, 0], images[:, 2])


def test_recovery_is_given_the_other_images_and_nothing_else_is(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    found = loading.load(reading.parse(SPEC, folder=tmp_path), lambda *_: None, fit=False)
    bench = found.worker_inputs()
    assert (len(bench.train), len(found.splits.train)) == (1797, 48)
    assert bench.train.batch(np.arange(2))[0].shape == (2, 3, 12, 12)
    assert bench.calibration.shape == (8, 3, 12, 12)
    assert bench.validation is found.splits.validation
