"""Networks of timm, which is an extra: asked for where it is missing, and built where it is there."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from search.base import DataError, WorkloadError
from search.spec.schema import DataSpec
from search.workload import zoo
from search.workload.data.pictures import Preparation, preparation
from tests.support.tiny_workloads import load, refused

IMAGES = {"source": "factory", "name": "./things.py:images", "args": {"side": 32}}
is_missing = importlib.util.find_spec("timm") is None
with_timm = pytest.mark.skipif(is_missing, reason="timm is an extra")


def timm(name: str, **more: Any) -> dict[str, Any]:
    return {"source": "timm", "name": name} | more


@pytest.mark.skipif(not is_missing, reason="timm is there")
def test_the_extra_is_named_where_timm_is_missing(folder: Path) -> None:
    told = "timm cannot be imported: No module named 'timm'; expected the extra that has it; run pip install '.[timm]'"
    assert refused(folder, timm("resnet10t"), data=IMAGES) == told
    with pytest.raises(WorkloadError, match="run pip install"):
        preparation(DataSpec(source="imagefolder", root="a", preset="timm:resnet10t"))


@with_timm
def test_a_network_of_timm_takes_its_arguments_and_a_file_of_weights(folder: Path) -> None:
    args = {"num_classes": 3, "in_chans": 1}
    built = zoo.imported_timm().create_model("resnet10t", **args)
    torch.save(built.state_dict(), folder / "weights.pt")
    found = load(folder, timm("resnet10t", args=args, weights="weights.pt"), data=IMAGES)
    assert found.teacher(found.example).shape == (2, 3)
    assert torch.equal(found.teacher.state_dict()["fc.weight"], built.fc.weight)


@with_timm
def test_what_timm_has_not_is_told(folder: Path) -> None:
    assert "timm has no network 'resnet10tt'; expected a name from timm.list_models(), such as resnet10t, " in refused(
        folder, timm("resnet10tt"), data=IMAGES
    )
    assert "no weights at " in refused(
        folder, timm("resnet10t", args={"num_classes": 3, "in_chans": 1}, weights="IMAGENET1K"), data=IMAGES
    )
    assert "timm could not make resnet10t: TypeError: " in refused(
        folder, timm("resnet10t", args={"colour": 1}), data=IMAGES
    )


@with_timm
def test_a_preset_prepares_as_timm_evaluates() -> None:
    asked = DataSpec(source="imagefolder", root="a", preset="timm:resnet10t.c3_in1k")
    assert preparation(asked) == Preparation(176, 201, interpolation="bicubic")
    for name in ("timm:resnet10t.nowhere", "timm:nothing"):
        with pytest.raises(DataError, match=f"data.preset is '{name}', which names no pretrained network of timm"):
            preparation(DataSpec(source="imagefolder", root="a", preset=name))
