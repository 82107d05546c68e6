"""The student of NVIDIA's FastNAS, which comes with its Model Optimizer: a teacher cut to a limit of MACs.

pip install --editable '.[fastnas]'
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import sys
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from methods.base import Infeasible
from methods.network import count_macs
from methods.training import Samples

ROW = "fastnas"
IS_INSTALLED = importlib.util.find_spec("modelopt") is not None
PACKAGES = ("nvidia-modelopt",) if IS_INSTALLED else ()

MULTIPLE = 8
"""Of all widths. The default is 32, of which ResNet-20 has at most two in a layer."""

SCORED = 512
"""Labelled training images that the sensitivity of every layer is measured on."""


def within(teacher: nn.Module, limit: int, train: Samples, calibration: Tensor) -> nn.Module:
    """Return what FastNAS leaves of the teacher with at most `limit` MACs, as we count them.

    It measures what top-1 each width of each layer costs alone, and takes the narrowest widths below one threshold,
    which it bisects. Its norms are set on the calibration images `(n, c, h, w)`.

    Raises:
        Infeasible: the student has more than `limit` MACs.
    """
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        from modelopt.torch import prune

        images, labels = train.batch(np.arange(SCORED))

        def top1(network: nn.Module) -> float:
            with torch.no_grad():
                return float((network(images).argmax(1) == labels).float().mean())

        student, _ = prune.prune(
            copy.deepcopy(teacher).eval().to(memory_format=torch.contiguous_format),
            mode=[("fastnas", _widths())],
            constraints={"flops": 2 * limit},  # it counts a product and a sum as two
            dummy_input=calibration[:1],
            config={"score_func": top1, "data_loader": [calibration], "collect_func": lambda batch: batch},
        )
    if (macs := count_macs(student, calibration[:1])) > limit:
        raise Infeasible(f"{ROW} left {macs:,} MACs; expected at most {limit:,}", {})
    return student


def _widths() -> dict[str, Any]:
    """The widths that a layer may have: the default shares, in multiples of `MULTIPLE`."""
    shares = tuple(index / 20 for index in range(1, 21))
    channels = {"*": {"channels_ratio": shares, "kernel_size": (), "channel_divisor": MULTIPLE}}
    features = {"*": {"features_ratio": shares, "feature_divisor": MULTIPLE}}
    return {"nn.Conv2d": channels, "nn.BatchNorm2d": features, "nn.Linear": features}
