"""Picture files of every mode: read right, or refused by name, and all of them before anything is trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from search.base import DataError, SpecError
from search.spec import parse
from search.spec.schema import DataSpec
from search.workload.data.pictures import Preparation, check_pictures, decode, preparation


def read(path: Path, picture: Image.Image, **how: object) -> np.ndarray:
    picture.save(path, **how)
    return decode(str(path))


def test_grey_of_16_bits_and_floats_equals_its_copy_of_8_bits(tmp_path: Path) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (6, 5)).astype(np.uint16)
    expected = np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, axis=2)
    for name in ("a.png", "a.tif"):
        assert np.array_equal(read(tmp_path / name, Image.fromarray(deep)), expected)
    (tmp_path / "a.pgm").write_bytes(b"P5 5 6 65535\n" + deep.astype(">u2").tobytes())
    assert np.array_equal(decode(str(tmp_path / "a.pgm")), expected)
    floats = expected[..., 0].astype(np.float32) / 255
    assert np.array_equal(read(tmp_path / "f.tif", Image.fromarray(floats)), expected)


def test_other_modes_are_read_as_their_colours(tmp_path: Path) -> None:
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], dtype=np.uint8)
    plain = Image.fromarray(colours)
    clear = np.dstack([colours, np.full((2, 2, 1), 128, dtype=np.uint8)])
    palette = plain.quantize(4)
    for name, picture, how in (
        ("p.png", palette, {}),
        ("t.png", palette, {"transparency": bytes([0, 255, 9, 255])}),
        ("a.png", Image.fromarray(clear), {}),
        ("c.tif", plain.convert("CMYK"), {}),
        ("g.png", plain, {}),
    ):
        assert np.array_equal(read(tmp_path / name, picture, **how), colours), name
    grey = np.array([[0, 200]], dtype=np.uint8)
    for name, picture in (("l.png", Image.fromarray(grey)), ("la.png", Image.fromarray(grey).convert("LA"))):
        assert read(tmp_path / name, picture)[0, :, 1].tolist() == [0, 200]
    assert read(tmp_path / "1.png", Image.new("1", (1, 1), 1)).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("values", [np.full((2, 2), 3.5, np.float32), np.full((2, 2), 70000, np.int32)])
def test_values_of_no_known_range_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"cannot read the picture .*x\.tif: its mode is '[FI]' with values from"):
        read(tmp_path / "x.tif", Image.fromarray(values))


def test_a_picture_that_pillow_takes_for_a_bomb_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (30, 30)).save(tmp_path / "slide.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(
        DataError, match=r"the picture .*slide\.png is too large: .*; expected at most 200 pixels; make"
    ):
        decode(str(tmp_path / "slide.png"))


def test_every_picture_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAREDOWN_CACHE", str(tmp_path / "cache"))
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    paths = [tmp_path / f"{number}.jpg" for number in range(3)]
    for path in paths:
        Image.fromarray(noise).save(path)
    told: list[tuple[int, int]] = []
    for _ in range(2):
        check_pictures([str(path) for path in paths], lambda done, total: told.append((done, total)))
    assert told == [(3, 3)]
    paths[2].write_bytes(paths[2].read_bytes()[:400])
    with pytest.raises(DataError, match=r"cannot read the picture .*2\.jpg: "):
        check_pictures([str(path) for path in paths], lambda *_: None)


def settings(**more: object) -> DataSpec:
    return DataSpec.model_validate({"source": "imagefolder", "root": "x", **more})


def test_the_preparation_is_what_the_spec_says() -> None:
    assert preparation(settings()) == Preparation()
    assert preparation(settings(size=96)) == Preparation(96)
    given = {"resize": 40, "crop": 32, "mean": [0.5, 0.4, 0.3], "std": [1, 0.5, 0.25], "interpolation": "bicubic"}
    found = preparation(settings(**given))
    assert found == Preparation(32, 40, (0.5, 0.4, 0.3), (1.0, 0.5, 0.25), "bicubic")
    image = torch.full((3, 50, 60), 51, dtype=torch.uint8)
    for draw in (None, np.full(4, 0.3)):
        assert torch.allclose(found(image, draw)[:, 3, 5], torch.tensor([-0.3, -0.4, -0.4]), atol=1e-6)
    preset = preparation(settings(preset="ResNet50_Weights.IMAGENET1K_V2"))
    assert preset == Preparation(224, 232)
    assert preparation(settings(preset="EfficientNet_B0_Weights.DEFAULT")) == Preparation(
        224, 256, interpolation="bicubic"
    )
    for name in ("ResNet50_Weights.V9", "Raft_Large_Weights.DEFAULT", "nonsense"):
        with pytest.raises(
            DataError, match=rf"data\.preset is '{name}', which is no torchvision weights of a classifier"
        ):
            preparation(settings(preset=name))


SPEC = (
    "{{name: a, model: {{source: zoo, name: resnet8}}, methods: [alds], budgets: [{{name: b, macs: 50%}}], data: {}}}"
)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (
            "{source: digits, mean: [0, 0, 0]}",
            "data.mean: only source 'imagefolder' prepares its pictures; leave it out",
        ),
        ("{source: imagefolder, root: x, preset: A, std: [1, 1, 1]}", "data.preset: it says std already; leave one"),
        ("{source: imagefolder, root: x, size: 9, crop: 8}", "data.crop: it is the same as size, which is given too"),
        ("{source: imagefolder, root: x, crop: 64, resize: 32}", "data.resize: 32 is less than the 64 pixels"),
        ("{source: imagefolder, root: x, mean: [123, 116, 103]}", "data.mean: 123 is above 1; pixels are scaled to"),
        ("{source: imagefolder, root: x, std: [0, 1, 1]}", "data.std: 0 is no deviation; give three numbers above 0"),
        ("{source: imagefolder, root: x, mean: 0.5}", "data.mean: expected three numbers, of red, green and blue"),
    ],
)
def test_preparations_that_make_no_sense_are_mistakes(data: str, told: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse(SPEC.format(data), folder=Path())
    assert told in str(caught.value)


def test_a_spec_without_the_keys_equals_the_records_of_before() -> None:
    decisive = parse(SPEC.format("{source: digits}"), folder=Path()).decisive()["data"]
    assert set(decisive) == {"source", "name", "root", "args", "size", "validation", "calibration", "seed"}
