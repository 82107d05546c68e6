"""Gates: their places, their silence until they should act, and the cost of each image then."""

from __future__ import annotations

import copy
import io
from functools import cache
from typing import Any, cast

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from methods.base import Budget, Unsupported
from methods.manidp.gates import Gate, Gated, active, gated, mask_inputs, saliencies
from methods.manidp.losses import quantile_threshold
from methods.manidp.method import ManiDP
from methods.manidp.sites import (
    Site,
    find_sites,
    from_columns,
    gate_macs,
    gate_params,
    gated_macs,
    to_columns,
    trace,
    widths,
)
from methods.manidp.thresholds import least_macs
from methods.network import count_macs, count_params, profile
from search.workload import zoo
from tests.support.networks import NETWORKS

GENERATOR = torch.Generator().manual_seed(1)
IMAGES = torch.randn(12, 3, 16, 16, generator=GENERATOR) + 2 * torch.randn(12, 3, 1, 1, generator=GENERATOR)
networks = pytest.mark.parametrize("name", NETWORKS)


def sites_of(model: nn.Module, squeeze: int = 2) -> tuple[tuple[Site, ...], dict[str, str]]:
    return find_sites(trace(model), IMAGES[:2], squeeze)


def with_gates(model: nn.Module) -> Gated:
    sites, _ = sites_of(model)
    return gated(model, sites, count_macs(model, IMAGES) - int(gated_macs(sites, widths(sites))), seed=0)


@cache
def live(name: str) -> Gated:
    """A gated network whose channels are never all zero by themselves, so that every zero channel is a mask's."""
    model = NETWORKS[name]()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.ReLU):
            model.set_submodule(path, nn.SiLU())
    student = with_gates(model)
    for node in student.network.graph.nodes:
        if node.target is torch.relu:
            node.target = F.silu
    student.network.recompile()
    return student


def at_rates(name: str, seed: int) -> Gated:
    """The live network at a random remain rate per gate."""
    student = live(name)
    rates = torch.rand(len(student.masks), generator=torch.Generator().manual_seed(seed)) * 0.8 + 0.1
    for mask in student.masks:
        mask.threshold.zero_()
    for gate, rate in enumerate(rates.tolist()):
        student.masks[gate].threshold.copy_(quantile_threshold(saliencies(student, IMAGES)[gate], rate))
    return student


class Gather(fx.Interpreter):
    """The slow, obvious executor: one image, and every masked convolution cut to its active, nonzero channels."""

    def __init__(self, student: Gated) -> None:
        super().__init__(student.network)
        self.student = student
        self.rows = {site.conv: site for site in student.sites}
        self.given: dict[str, Tensor] = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target not in self.rows:
            output = super().call_module(target, args, kwargs)
            self.given[target] = output
            return output
        site, x = self.rows[target], args[0]
        conv = cast(nn.Conv2d, self.student.network.get_submodule(target))
        saliency = self.given[f"manidp.gates.{site.gate}"]
        rows = active(saliency, self.student.masks[site.gate].threshold)[0]
        columns = rows if site.is_depthwise else x.abs().amax((0, 2, 3)) > 0
        columns[0] |= ~columns.any()  # a convolution keeps a channel, even of zeros
        weight = conv.weight[rows] if site.is_depthwise else conv.weight[rows][:, columns]
        groups = int(rows.sum()) if site.is_depthwise else 1
        found = F.conv2d(x[:, columns], weight, None, conv.stride, conv.padding, conv.dilation, groups)
        output = found.new_zeros(1, site.outputs, *found.shape[2:])
        output[:, rows] = found
        return output


# Where gates are put


def test_the_sites_of_a_residual_network() -> None:
    sites, skipped = sites_of(NETWORKS["residual"]())
    assert [(site.conv, site.inputs, site.outputs, site.unit, site.gate, site.source) for site in sites] == [
        ("body.3.inner.0", 16, 16, 9 * 256, 0, -1),
        ("body.3.outer.0", 16, 16, 9 * 256, 1, 0),
        ("body.4.inner.0", 16, 24, 9 * 64, 2, -1),
        ("body.4.outer.0", 24, 24, 9 * 64, 3, 2),
    ]
    assert skipped == {"body.0": "it is the stem", "body.4.shortcut.0": "it is the projection of a shortcut"}
    assert [(site.norm, site.activation != "") for site in sites[:2]] == [
        ("body.3.inner.1", True),
        ("body.3.outer.1", False),
    ]


def test_a_depthwise_convolution_inherits_its_inputs_mask() -> None:
    for name in ("depthwise", "squeeze"):
        sites, _ = sites_of(NETWORKS[name]())
        found = [(site.conv.split(".")[2], site.gate, site.source, site.is_depthwise) for site in sites]
        assert found == [("expand", 0, -1, False), ("depth", 0, 0, True), ("project", 1, 0, False)]


@pytest.mark.parametrize(
    ("name", "conv", "reason"),
    [
        ("grouped", "body.3.spread.0", "its channels only leave in whole groups"),
        ("concat", "body.3.left.0", "its output is concatenated"),
        ("squeeze", "body.3.gate.excite", "a gate would need over 25% of its MACs"),
    ],
)
def test_every_other_convolution_has_a_reason(name: str, conv: str, reason: str) -> None:
    assert sites_of(NETWORKS[name]())[1][conv] == reason


def test_further_reasons() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.twice = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
            self.narrow, self.lone = nn.Conv2d(16, 4, 3), nn.Conv2d(4, 4, 3, groups=4)
            self.wide, self.head = nn.Conv2d(4, 16, 1), nn.Conv2d(16, 10, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.lone(self.narrow(self.twice(self.twice(self.stem(x)))))
            return cast(Tensor, self.head(self.wide(x)).mean((2, 3)))

    sites, skipped = sites_of(Odd())
    assert sites == ()
    assert skipped == {
        "stem": "it is the stem",
        "twice": "it is called more than once",
        "narrow": "it has fewer than 8 channels",
        "lone": "it is depthwise and its input has no mask",
        "wide": "it has fewer than 8 channels",
        "head": "it gives the outputs of the network",
    }


def test_a_trunk_is_no_shortcut_though_a_sum_reads_it() -> None:
    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.trunk = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1)
            self.expand, self.project, self.head = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 16, 1), nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.trunk(self.stem(x))
            return cast(Tensor, self.head((x + self.project(torch.relu(self.expand(x)))).mean((2, 3))))

    sites, skipped = sites_of(Trunk())
    assert [(site.conv, site.source) for site in sites] == [("trunk", -1), ("expand", 0), ("project", 1)]
    assert skipped == {"stem": "it is the stem"}


def test_networks_that_branch_on_values_are_refused() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(Unsupported, match=r"torch.fx cannot trace the network: TraceError: .*; expected .*; rewrite"):
        trace(Branching())


def test_a_module_that_branches_on_values_is_called_as_a_whole() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.conv(x if x.sum() > 0 else -x))

    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), Branching(), nn.Conv2d(16, 16, 3), nn.ReLU())
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    found = profile(model, images)
    method = ManiDP()
    scores = method.score(("sites",), model, images, 0)
    assert scores["conv"].tolist() == ["1", "3"]
    assert "2.conv: the traced forward does not call it" in scores["skipped"].tolist()
    plan = method.allocate(scores, found, Budget("80 %", macs=found.macs * 8 // 10), {})
    student = method.apply(model, plan, images)
    method.settle(student, plan, images)
    assert isinstance(student, Gated)
    assert (count_macs(student, images), count_params(student)) == (plan.macs, plan.params)
    assert student.instance_macs(images).double().mean() <= found.macs * 8 // 10


@networks
def test_rows_survive_as_columns(name: str) -> None:
    sites, _ = sites_of(NETWORKS[name]())
    columns = to_columns(sites)
    assert from_columns(columns) == sites
    assert from_columns({name: column.tolist() for name, column in columns.items()}) == sites
    assert all(not column.dtype.hasobject for column in columns.values())


# What gates do


@pytest.mark.parametrize("name", [*NETWORKS, "resnet20", "vgg16-cifar", "mobilenet-cifar"])
def test_saliencies_of_one_change_nothing_but_the_cost_of_the_gates(name: str) -> None:
    model = NETWORKS[name]() if name in NETWORKS else zoo.build(name, 3, 10, 0).eval()
    student = with_gates(model)
    own = [site for site in student.sites if not site.is_depthwise]
    assert count_macs(student, IMAGES) - count_macs(model, IMAGES) == sum(map(gate_macs, own))
    assert count_params(student) - count_params(model) == sum(map(gate_params, own))
    for gate in student.gates:
        nn.init.zeros_(gate.expand.weight)
    with torch.no_grad():
        torch.testing.assert_close(student(IMAGES), model(IMAGES), rtol=0, atol=1e-6)
    assert student.instance_macs(IMAGES).tolist() == [count_macs(student, IMAGES)] * len(IMAGES)


@networks
@pytest.mark.parametrize("seed", [0, 1])
def test_masking_is_the_same_as_leaving_out_at_the_counted_cost(name: str, seed: int) -> None:
    student = at_rates(name, seed)
    expected = student.instance_macs(IMAGES).tolist()
    assert len(set(expected)) > 1
    for image, macs in zip(IMAGES[:4].unsqueeze(1), expected, strict=False):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            output = Gather(student).run(image)
        assert counter.get_total_flops() // 2 == macs
        with torch.no_grad():
            torch.testing.assert_close(output, student(image), rtol=1e-4, atol=1e-5)


@networks
def test_a_batch_is_its_images(name: str) -> None:
    student = at_rates(name, 2)
    with torch.no_grad():
        alone = torch.cat([student(image) for image in IMAGES.unsqueeze(1)])
        torch.testing.assert_close(student(IMAGES), alone, rtol=1e-4, atol=1e-5)
    assert student.instance_macs(IMAGES).tolist() == [int(student.instance_macs(i)) for i in IMAGES.unsqueeze(1)]


@networks
def test_a_gate_that_gives_nothing_leaves_one_channel_of_zeros(name: str) -> None:
    student = copy.deepcopy(live(name))
    for gate in student.gates:
        nn.init.zeros_(gate.expand.weight)
        nn.init.zeros_(gate.expand.bias)
    assert student.instance_macs(IMAGES[:2]).tolist() == [least_macs(student.sites, student.fixed_macs)] * 2
    with torch.no_grad():
        assert student(IMAGES).isfinite().all()
        torch.testing.assert_close(Gather(student).run(IMAGES[:1]), student(IMAGES[:1]), rtol=1e-4, atol=1e-5)


@given(st.integers(0, 10**6), st.floats(0, 3), st.floats(0, 3))
def test_a_higher_threshold_never_activates_a_channel(seed: int, first: float, second: float) -> None:
    saliency = torch.randn(5, 9, generator=torch.Generator().manual_seed(seed)).clamp(min=0)
    low, high = (active(saliency, torch.tensor(value)) for value in sorted((first, second)))
    assert (low >= high).all()
    assert (high.sum(1) >= 1).all()
    assert (saliency[low & (low.sum(1, keepdim=True) > 1)] > 0).all()


def test_the_mean_of_products_is_not_the_product_of_means() -> None:
    pair = [Site("a", "", "", "a", 0, 8, 10, 4, 0, -1), Site("b", "", "", "b", 1, 10, 10, 5, 1, 0)]
    full_or_nothing = gated_macs(pair, torch.tensor([[10, 10], [0, 0]])).double() / gated_macs(pair, widths(pair))
    assert float(full_or_nothing.mean()) == 0.5


@settings(max_examples=20)
@given(st.integers(0, 10**6))
def test_gates_compute_in_float32_under_autocast(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gate = Gate(6, 4, 8, generator)
    x = torch.randn(3, 6, 5, 5, generator=generator).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        under = gate(x)
    assert under.dtype == torch.float32
    assert torch.equal(under, gate(x.float()))
    assert (under >= 0).all()


def test_the_gradient_reaches_what_is_kept_and_no_threshold() -> None:
    student = copy.deepcopy(at_rates("plain", 0))
    with mask_inputs(student) as found:
        output = student(IMAGES)
    saliency = found[0][1]
    (gradient,) = torch.autograd.grad(output.square().sum(), saliency)
    kept = active(saliency, student.masks[0].threshold)
    assert (gradient[~kept] == 0).all()
    assert (gradient[kept] != 0).double().mean() > 0.9
    assert {name for name, _ in student.named_buffers()} >= {"network.manidp.masks.0.threshold"}


# How a gated network is kept


@networks
def test_a_copy_and_a_restored_state_give_the_same_outputs(name: str) -> None:
    student = at_rates(name, 3)
    fresh = copy.deepcopy(student)
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        wanted = student(IMAGES)
        assert torch.equal(copy.deepcopy(student)(IMAGES), wanted)
        fresh.load_state_dict(
            {key: torch.from_numpy(value.numpy().copy()) for key, value in student.state_dict().items()}
        )
        assert torch.equal(fresh(IMAGES), wanted)


@pytest.mark.parametrize("name", ["residual", "squeeze"])
def test_an_exported_program_masks_any_batch(name: str) -> None:
    student = at_rates(name, 4)
    program = torch.export.export(student, (IMAGES[:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    stored = io.BytesIO()
    torch.export.save(program, stored)
    stored.seek(0)
    loaded = torch.export.load(stored).module()
    with torch.no_grad():
        for count in (1, 4):
            torch.testing.assert_close(loaded(IMAGES[:count]), student(IMAGES[:count]), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_onnxruntime_masks_any_batch() -> None:
    student = at_rates("depthwise", 5)
    dynamic = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.onnx.export(student, (IMAGES[:2],), dynamo=True, dynamic_shapes=dynamic, verbose=False)
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for count in (1, 4):
        (output,) = session.run(None, {session.get_inputs()[0].name: IMAGES[:count].numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(output, student(IMAGES[:count]).numpy(), rtol=1e-4, atol=1e-5)
