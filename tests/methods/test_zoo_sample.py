"""A sample of the networks of `benchmarks/zoo.py`: five that stay, and five that change with the week."""

from __future__ import annotations

import datetime
import random
from importlib.util import find_spec

import pytest
import torch

from benchmarks.zoo_networks import ENTRIES, network
from methods.base import Budget
from methods.network import count_macs, count_params, profile
from methods.uniform import Uniform

FIXED = ("shufflenet_v2_x0_5", "squeezenet1_1", "mobilenet_v3_small", "mnasnet0_5", "regnet_x_400mf")
OTHERS = (
    "mobilenet_v2 mobilenet_v3_large efficientnet_b0 regnet_y_400mf googlenet ghostnet_050 levit_128s "
    "mobilenetv3_small_050 lcnet_050 repghostnet_050 mobilenetv4_conv_small_050 starnet_s050 efficientvit_b0 "
    "edgenext_xx_small regnetx_002 shvit_s1 mobilevit_xxs tf_efficientnet_lite0 efficientformerv2_s0 "
    "ese_vovnet19b_slim_dw rexnet_100 inception_next_atto"
)
"""Those that are quickly profiled; the ones of timm count where it is installed."""

WEEK = datetime.date.today().strftime("%G%V")
"""The year and its week, the seed of the sample."""

PRESENT = [name for name in OTHERS.split() if find_spec(ENTRIES[name].source)]
SAMPLE = (*FIXED, *random.Random(WEEK).sample(PRESENT, 5))


@pytest.mark.filterwarnings("ignore")  # of networks that are not ours
@pytest.mark.parametrize("name", SAMPLE)
def test_a_network_of_the_zoo_meets_its_budget_as_counted(name: str) -> None:
    print(f"the sample of seed {WEEK} is {', '.join(SAMPLE)}")
    entry = ENTRIES[name]
    images = torch.rand(4, 3, entry.pixels, entry.pixels, generator=torch.Generator().manual_seed(1))
    teacher = network(entry, images)
    found = profile(teacher, images)
    budget = Budget("60 %", macs=found.macs * 6 // 10)
    plan = Uniform().allocate({}, found, budget, {"criterion": "l1"})
    student = Uniform().apply(teacher, plan, images)
    assert (count_macs(student, images), count_params(student)) == (plan.macs, plan.params)
    assert plan.macs <= found.macs * 6 // 10
    assert student(images).isfinite().all()
