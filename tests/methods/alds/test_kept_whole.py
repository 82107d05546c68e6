"""Layers that ALDS keeps whole, because the network uses their weights in other ways too."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from methods.alds import ALDS
from methods.base import Budget, Plan
from methods.network import count_macs, count_params, profile
from tests.methods.alds.test_method import CALIBRATION, EXAMPLE, scored
from tests.support.networks import NETWORKS


class Attending(nn.Module):
    """One token per row of the image, attention, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(48, 16)
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.transpose(1, 2).flatten(2))
        return self.head((tokens + self.attend(tokens, tokens, tokens)[0]).mean(1))


class Reusing(nn.Module):
    """One convolution run at two sizes and known by two names, one weight read by two layers, 'same' padding."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, padding="same", padding_mode="circular")
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.alias = self.shared
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.stem(x)).relu()
        x = self.alias(x[..., ::2, ::2]).relu().mean((2, 3))
        return self.head(self.second(self.first(x).relu()).relu())


def planned(network: nn.Module, share: float) -> Iterator[tuple[Plan, nn.Module]]:
    rows, scores = scored(network.eval())
    for cost in ("macs", "params"):
        plan = ALDS().allocate(scores, rows, Budget("part", **{cost: int(share * getattr(rows, cost))}), {})
        student = ALDS().apply(network, plan)
        assert (plan.macs, plan.params) == (count_macs(student, EXAMPLE), count_params(student))
        yield plan, student


def test_attentions_projection_is_never_replaced() -> None:
    network = Attending()
    assert "attend.out_proj" not in {layer.name for layer in profile(network, EXAMPLE).layers}
    for plan, student in planned(network, 0.8):
        assert {choice["name"] for choice in plan.choices["layers"]} <= {"embed", "head"}
        assert student(EXAMPLE).shape == (2, 4)


def test_what_an_encoder_layer_of_torch_reads_itself_is_never_replaced() -> None:
    """In eval mode it hands the weights of its own linear layers to one kernel."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2)
    network = nn.Sequential(nn.Conv2d(3, 16, 4, stride=4), nn.Flatten(2), encoder, nn.Flatten(), nn.Linear(256, 10))
    network = network.eval()
    rows, scores = scored(network)
    plan = ALDS().allocate(scores, rows, Budget("most", int(0.9 * rows.macs)), {})
    student = ALDS().apply(network, plan, CALIBRATION)
    with torch.no_grad():
        assert student(EXAMPLE).shape == (2, 10)
    assert "2.layers.0.linear1" in plan.notes[0]


def test_shared_layers_are_replaced_everywhere_and_shared_weights_not_at_all() -> None:
    for plan, student in planned(Reusing(), 0.8):
        assert {choice["name"] for choice in plan.choices["layers"]} <= {"shared", "head"}
        assert {choice["scheme"] for choice in plan.choices["layers"]} == {0}
        assert isinstance(student.shared, nn.Sequential)
        assert student.alias is student.shared
        assert student.second.weight is student.first.weight
        (note,) = plan.notes
        assert note.startswith("kept whole (a subclass, a shared, parametrized or directly read weight, or uneven")
        assert note.endswith(": first, second, stem")


def test_layers_that_share_a_bias_are_kept_whole() -> None:
    """Each would get a copy of it, so the student would have more params than planned."""
    network = NETWORKS["plain"]()
    two, three = (nn.Conv2d(24, 24, 3, padding=1) for _ in range(2))
    two.bias = three.bias
    network = nn.Sequential(*network[:6], two, three, *network[6:])
    for plan, _ in planned(network, 0.7):
        assert plan.choices["layers"]
        assert plan.notes[0].endswith(": 6, 7")
