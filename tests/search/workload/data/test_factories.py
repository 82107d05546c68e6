"""A user's data factory: the results that can be read, and the reason for refusing each other one."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from search.base import DataError
from search.workload.data.samples import Indexed
from search.workload.data.sources import from_factory
from tests.search.workload.numbered import parted


class Pairs:
    """A map-style data set of `(image, label)`, read one by one."""

    def __init__(self, *pairs: Any) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        return self.pairs[index]


def pairs(count: int) -> list[tuple[Tensor, int]]:
    return [(torch.full((1, 2, 2), float(index)), index % 3) for index in range(count)]


def test_every_kind_of_factory_result_is_read() -> None:
    arrays = {"images": np.ones((4, 1, 2, 2), dtype=np.float64), "labels": np.array([0, 1, 2, 0], dtype=np.int32)}
    tensors = {"images": torch.ones(4, 1, 2, 2), "labels": torch.tensor([0, 1, 2, 0])}
    lazy = Pairs(*[(np.ones((1, 2, 2)), np.int64(label)) for label in (0, 1, 2, 0)])
    for made in (arrays, tensors, lazy, pairs(4)):
        train, test = from_factory(made)
        assert test is None
        inputs, labels = train.batch(np.array([1, 2]))
        assert (inputs.dtype, tuple(inputs.shape)) == (torch.float32, (2, 1, 2, 2))
        assert (labels.dtype, labels.tolist()) == (torch.int64, [1, 2])
    train, test = from_factory((arrays, lazy))
    assert test is not None
    assert (len(train), len(test)) == (4, 4)
    assert torch.equal(train.batch(np.array([3]))[0], test.batch(np.array([3]))[0])


def test_tensors_that_take_part_in_training_are_read() -> None:
    images, labels = torch.rand(9, 1, 2, 2, requires_grad=True) * 2, torch.arange(9) % 3
    for made in ({"images": images, "labels": labels}, list(zip(images, labels.tolist(), strict=True))):
        found = parted(from_factory(made)[0])
        inputs, _ = found.train.batch(np.arange(len(found.train)))
        assert not inputs.requires_grad
        assert found.calibration.shape == (5, 1, 2, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensors_on_a_gpu_are_read() -> None:
    images, labels = torch.rand(9, 1, 2, 2, device="cuda"), torch.arange(9, device="cuda") % 3
    for made in ({"images": images, "labels": labels}, list(zip(images, labels, strict=True))):
        assert parted(from_factory(made)[0]).calibration.shape == (5, 1, 2, 2)


def test_what_is_no_data_set_is_refused() -> None:
    images, labels = np.ones((4, 1, 2, 2)), np.arange(4)
    for made, told in (
        (None, "returned NoneType"),
        (iter(pairs(3)), "returned list_iterator"),
        ((images, labels), "returned ndarray"),
        ({"x": images, "y": labels}, "returned dict"),
        ("train", "returned str"),
    ):
        with pytest.raises(DataError, match=told) as caught:
            from_factory(made)
        assert "expected a torch dataset" in str(caught.value)
        assert "return one of these, or a pair (train, test) of them" in str(caught.value)


@pytest.mark.parametrize(
    ("images", "labels", "told"),
    [
        (np.ones((4, 2, 2)), np.arange(4), r"images \(4, 2, 2\) and labels \(4,\); expected \(n, c, h, w\) and \(n,\)"),
        (np.ones((4, 1, 2, 2)), np.arange(5), r"labels \(5,\)"),
        (np.ones((4, 1, 2, 2)), np.eye(4), r"labels \(4, 4\)"),
        (np.ones((4, 1, 2, 2)), np.arange(4) / 2, "labels of float64; expected real numbers and integers; convert"),
        (np.full((4, 1, 2, 2), "a"), np.arange(4), "images of <U1"),
        (np.ones((4, 1, 2, 2), dtype=np.complex64), np.arange(4), "images of complex64"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(images: np.ndarray, labels: np.ndarray, told: str) -> None:
    with pytest.raises(DataError, match=told):
        from_factory({"images": images, "labels": labels})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none_are_refused(value: float) -> None:
    images = np.ones((4, 1, 2, 2), dtype=np.float32)
    images[2, 0, 0] = value
    with pytest.raises(DataError, match=r"2 pixels .* are NaN or infinite; expected finite values; clean the data"):
        from_factory({"images": images, "labels": np.arange(4)})
    lazy, _ = from_factory(Pairs(*[(image, 0) for image in images]))
    with pytest.raises(DataError, match=r"image 2 .* holds NaN or infinity; expected finite pixels .*; clean the data"):
        parted(lazy)


@pytest.mark.parametrize(
    ("item", "told"),
    [
        (torch.ones(1, 2, 2), "item 0 of the data set raised ValueError"),
        (("cat.png", 0), "item 0 of the data set raised"),
        ((torch.ones(1, 2, 2), 0.5), "raised TypeError"),
        ((torch.ones(2, 2), 0), r"image 0 of the data set has shape \(2, 2\); expected"),
        ((torch.ones(1, 2, 3), 0), r"the shapes \(1, 2, 2\) and \(1, 2, 3\); expected one shape"),
    ],
)
def test_items_that_are_no_pairs_are_refused(item: object, told: str) -> None:
    lazy, _ = from_factory(Pairs(item, *pairs(9)))
    with pytest.raises(DataError, match=told) as caught:
        parted(lazy, calibration=9)
    assert "the data set" in str(caught.value).rpartition(";")[2]


def test_a_set_that_raises_names_the_item() -> None:
    short = Pairs(*pairs(5))
    short.__class__ = type("Longer", (Pairs,), {"__len__": lambda self: 8})
    with pytest.raises(DataError, match=r"item [567] of the data set raised IndexError"):
        parted(Indexed(short))


def test_a_set_that_exits_or_has_no_length_is_named() -> None:
    leaving = type("Leaving", (Pairs,), {"__getitem__": lambda self, index: sys.exit(0)})(*pairs(5))
    with pytest.raises(DataError, match=r"item \d of the data set raised SystemExit: 0; expected a pair of an image"):
        parted(Indexed(leaving))
    negative = type("Negative", (Pairs,), {"__len__": lambda self: -1})(*pairs(5))
    with pytest.raises(DataError, match=r"the length of the data set raised ValueError: .*; expected the number"):
        parted(Indexed(negative))


def test_a_set_of_absurd_length_is_refused() -> None:
    endless = type("Endless", (Pairs,), {"__len__": lambda self: 10**12})(*pairs(5))
    with pytest.raises(DataError, match=r"says that it has 1,000,000,000,000 items; expected at most 100,000,000"):
        from_factory(endless)


def test_lists_and_arrays_of_another_byte_order_are_read() -> None:
    images, labels = np.arange(16, dtype=np.float32).reshape(4, 1, 2, 2), np.array([0, 1, 2, 0])
    for made in (
        {"images": images.astype(">f4"), "labels": labels.astype(">i2")},
        {"images": images.tolist(), "labels": labels.tolist()},
        {"images": list(torch.from_numpy(images)), "labels": list(torch.from_numpy(labels))},
        {"images": images.astype(np.longdouble), "labels": labels.astype(np.uint64)},
        {"images": images[::-1][::-1], "labels": labels},
    ):
        for train, test in (from_factory(made), from_factory([made, made])):
            inputs, truth = (test or train).batch(np.arange(4))
            assert torch.equal(inputs, torch.from_numpy(images))
            assert truth.tolist() == [0, 1, 2, 0]
    flags, _ = from_factory({"images": images, "labels": labels == 0})
    assert flags.batch(np.arange(4))[1].tolist() == [1, 0, 0, 1]
    with pytest.raises(DataError, match=r"a list of values of different shapes: .*; expected one shape for all; make"):
        from_factory({"images": [np.ones((1, 2, 2)), np.ones((1, 3, 2))], "labels": [0, 1]})
