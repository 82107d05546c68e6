"""Blocks found removable, the reasons why others are not, and the network without them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from methods.practise import removable_blocks
from methods.practise.blocks import Blocks, drop, find_blocks
from tests.support.networks import NETWORKS, _Basic, _Bottleneck, _conv, _Headed, _Inverted, _seeded

EXAMPLE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class PreNorm(nn.Module):
    """Tokens through a norm and two linear layers, added to themselves."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, x + self.inner(self.norm(x)))


class Linearly(nn.Module):
    """`x + f(x)` with a linear f of channels alone."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return x + cast(Tensor, self.layer(x))


class Patches(nn.Module):
    """A map as tokens `(n, t, c)`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.embed(x)).flatten(2).transpose(1, 2)


class Averaged(nn.Module):
    """Tokens, averaged and classified."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.body(x).mean(1)))


def residual() -> nn.Module:
    first, second = [_Basic(8, 8) for _ in range(3)], [_Basic(16, 16) for _ in range(2)]
    return _Headed(nn.Sequential(*_conv(3, 8), *first, _Basic(8, 16, stride=2), *second), 16)


def bottleneck() -> nn.Module:
    first, second = [_Bottleneck(16, 8, 16) for _ in range(2)], [_Bottleneck(24, 8, 24) for _ in range(2)]
    return _Headed(nn.Sequential(*_conv(3, 16), *first, _Bottleneck(16, 8, 24), *second), 24)


def grouped() -> nn.Module:
    return _Headed(nn.Sequential(*_conv(3, 16), *[_Bottleneck(16, 16, 16, groups=4) for _ in range(3)]), 16)


def depthwise() -> nn.Module:
    first, second = [_Inverted(8, 16) for _ in range(2)], [_Inverted(12, 24) for _ in range(2)]
    return _Headed(nn.Sequential(*_conv(3, 8, stride=2), *first, *_conv(8, 12, stride=2), *second), 12)


def squeeze() -> nn.Module:
    return _Headed(nn.Sequential(*_conv(3, 8, stride=2), *[_Inverted(8, 16, is_gated=True) for _ in range(3)]), 8)


def tokens() -> nn.Module:
    return Averaged(nn.Sequential(Patches(12), *[PreNorm(12) for _ in range(3)]), 12)


DEEP: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "residual": (residual, ["body.3", "body.4", "body.5", "body.7", "body.8"]),
    "bottleneck": (bottleneck, ["body.3", "body.4", "body.6", "body.7"]),
    "grouped": (grouped, ["body.3", "body.4", "body.5"]),
    "depthwise": (depthwise, ["body.3", "body.4", "body.8", "body.9"]),
    "squeeze": (squeeze, ["body.3", "body.4", "body.5"]),
    "tokens": (tokens, ["body.1", "body.2", "body.3"]),
}
"""Networks of several removable blocks, and the names of those."""


@cache
def deep(name: str) -> nn.Module:
    """One of `DEEP`, seeded and in eval mode; not to be changed."""
    return _seeded(DEEP[name][0])


def silenced(model: nn.Module, block: str) -> nn.Module:
    """A copy in which the branch of `block` returns zeros: its last norm or layer is cleared."""
    model = copy.deepcopy(model)
    last = [m for m in model.get_submodule(block).modules() if isinstance(m, nn.BatchNorm2d | nn.Linear)][-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return model


# What is found

COUNTS = {
    "resnet18": 5, "mobilenet_v2": 10, "mobilenet_v3_small": 6, "efficientnet_b0": 9, "regnet_y_400mf": 12,
    "swin_t": 12, "densenet121": 0,
}  # fmt: skip
MORE_COUNTS = {
    "resnet34": 13, "resnet50": 12, "mobilenet_v3_large": 10, "mnasnet1_0": 10, "regnet_x_400mf": 18,
    "convnext_tiny": 18, "vit": 3, "shufflenet_v2_x1_0": 0, "squeezenet1_1": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "count"),
    [*COUNTS.items(), *(pytest.param(*item, marks=pytest.mark.slow) for item in MORE_COUNTS.items())],
)
def test_the_blocks_of_torchvision_are_found(name: str, count: int) -> None:
    import torchvision

    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "vit":  # the ones that torchvision names are too large
            model = torchvision.models.VisionTransformer(64, 16, num_layers=3, num_heads=2, hidden_dim=32, mlp_dim=64)
        else:
            model = torchvision.models.get_model(name, weights=None)
    found = removable_blocks(model, torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert len(found) == count
    if name == "mobilenet_v2":  # the list in the code of PRACTISE's authors
        assert found == [f"features.{place}" for place in (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)]
    if name == "resnet18":
        assert found == ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"]


@pytest.mark.parametrize("name", DEEP)
def test_every_kind_of_block_is_found(name: str) -> None:
    blocks = find_blocks(deep(name), EXAMPLE)
    assert dict(blocks.removable) == dict.fromkeys(DEEP[name][1], "identity")
    assert removable_blocks(deep(name), EXAMPLE) == DEEP[name][1]


def test_a_projection_on_the_way_past_keeps_a_block() -> None:
    assert "it turns shape" in find_blocks(NETWORKS["residual"](), EXAMPLE).rejected["body.4"]
    widened = _seeded(lambda: _Headed(nn.Sequential(*_conv(3, 16), _Bottleneck(16, 8, 16)), 16))
    widened.get_submodule("body.3").shortcut = nn.Conv2d(16, 16, 1)
    assert find_blocks(widened, EXAMPLE).rejected["body.3"] == "it does not add its input to what it computes"


@settings(max_examples=20)
@given(st.lists(st.sampled_from(["block", "narrowing", "conv"]), max_size=5))
def test_any_order_of_layers_gives_the_residual_ones(kinds: list[str]) -> None:
    makers: dict[str, Callable[[], nn.Module]] = {
        "block": lambda: _Basic(8, 8),
        "narrowing": lambda: _Basic(8, 8, 2),
        "conv": lambda: nn.Conv2d(8, 8, 1),
    }
    body = _seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 1), *[makers[kind]() for kind in kinds]))
    expected = [str(place) for place, kind in enumerate(kinds, start=1) if kind == "block"]
    assert removable_blocks(body, EXAMPLE) == expected


class Around(nn.Module):
    """A convolution whose result `rule` joins to the input."""

    def __init__(self, rule: Callable[[Tensor, Tensor], Tensor], past: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = nn.Conv2d(3, 3, 3, padding=1)
        self.past = past or nn.Identity()
        self.rule = rule

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(self.past(x), self.branch(x))


def judged(*modules: nn.Module, images: Tensor = EXAMPLE) -> Blocks:
    return find_blocks(nn.Sequential(*modules), images)


def test_the_graph_refuses_what_only_looks_like_an_identity() -> None:
    """`x (1 + f(x))` passes its input on when f is silent, but it is no residual block."""
    assert judged(Around(lambda x, f: x * (1 + f))).rejected == {"0": "it does not add its input to what it computes"}
    assert judged(Around(lambda x, f: torch.relu(x))).rejected == {"0": "it does not add its input to what it computes"}


def test_the_numbers_refuse_a_weightless_change_of_the_input() -> None:
    blurred = Around(torch.add, nn.AvgPool2d(3, 1, 1, count_include_pad=False))
    assert judged(blurred).rejected == {"0": "without its weights it does not pass its input on"}
    assert judged(Around(lambda x, f: x + f + x)).rejected == {"0": "without its weights it does not pass its input on"}


def test_a_block_that_cannot_be_traced_is_judged_by_its_numbers() -> None:
    assert judged(Around(lambda x, f: x + f if f.sum() > 1e9 else f + x)).removable == {"0": "identity"}
    assert judged(Around(lambda x, f: x - f if f.sum() > 1e9 else f - x)).removable == {}


def test_weights_and_modules_used_elsewhere_keep_a_block() -> None:
    one, two, twice = Around(torch.add), Around(torch.add), Around(torch.add)
    two.branch.weight = one.branch.weight
    shared = "its weights are known by other names too"
    assert judged(one, two, Around(torch.add)) == Blocks({"2": "identity"}, {"0": shared, "1": shared})
    assert judged(twice, twice).rejected == {"0": "it runs 2 times"}


def test_of_nested_blocks_the_innermost_counts() -> None:
    outer = Around(torch.add)
    outer.branch = Around(torch.add)  # type: ignore[assignment]
    assert judged(outer) == Blocks({"0.branch": "identity"}, {"0": "a removable block lies inside it"})


def test_the_closing_activation_stays_where_the_input_needs_it() -> None:
    closing = {
        "relu": Around(lambda x, f: torch.relu(x + f)),
        "relu6": Around(lambda x, f: torch.nn.functional.relu6(x + f)),
    }
    for kept, block in closing.items():
        assert judged(block, images=4 * EXAMPLE).removable == {"0": kept}
        assert judged(nn.ReLU6(), block, images=4 * EXAMPLE).removable == {"1": "identity"}
    leaky = Around(lambda x, f: nn.functional.leaky_relu(x + f), nn.Identity())
    assert judged(leaky).removable == {}
    assert judged(Around(lambda x, f: nn.functional.gelu(x + f))).removable == {}


def test_finding_leaves_the_model_as_it_was() -> None:
    model = _seeded(residual).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find_blocks(model, EXAMPLE)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


# What is left


@torch.no_grad()
@pytest.mark.parametrize("name", DEEP)
def test_dropping_a_block_is_silencing_its_branch(name: str) -> None:
    for block, closing in find_blocks(deep(name), EXAMPLE).removable.items():
        student = copy.deepcopy(deep(name))
        drop(student, {block: closing})
        assert torch.equal(student(EXAMPLE), silenced(deep(name), block)(EXAMPLE))
        assert not torch.equal(student(EXAMPLE), deep(name)(EXAMPLE))


@torch.no_grad()
def test_a_closing_activation_takes_the_place_of_its_block() -> None:
    model = _seeded(lambda: nn.Sequential(Around(lambda x, f: torch.relu(x + f)), nn.Conv2d(3, 4, 1)))
    blocks = find_blocks(model, EXAMPLE).removable
    student = copy.deepcopy(model)
    drop(student, blocks)
    assert torch.equal(student(EXAMPLE), model[1](torch.relu(EXAMPLE)))  # type: ignore[index]


@pytest.mark.parametrize("name", DEEP)
def test_every_other_weight_keeps_its_name_and_value(name: str) -> None:
    blocks = find_blocks(deep(name), EXAMPLE).removable
    gone = dict(list(blocks.items())[::2])
    student = copy.deepcopy(deep(name))
    drop(student, gone)
    left = {
        key: value
        for key, value in deep(name).state_dict().items()
        if not any(key.startswith(f"{block}.") for block in gone)
    }
    assert list(student.state_dict()) == list(left)
    assert all(torch.equal(value, left[key]) for key, value in student.state_dict().items())
    assert removable_blocks(student, EXAMPLE) == [block for block in blocks if block not in gone]


@pytest.mark.parametrize("name", ["residual", "tokens"])
def test_students_can_be_exported_for_any_batch_size(name: str) -> None:
    student = copy.deepcopy(deep(name))
    drop(student, find_blocks(student, EXAMPLE).removable)
    program = torch.export.export(student, (EXAMPLE,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    five = torch.cat([EXAMPLE, EXAMPLE, EXAMPLE[:1]])
    torch.testing.assert_close(program.module()(five), student(five))


def test_an_unknown_block_is_named() -> None:
    with pytest.raises(ValueError, match=r"no module 'body\.99' in the network, expected one of its own"):
        drop(_seeded(residual), {"body.99": "identity"})


def test_a_block_that_the_network_looks_into_stays() -> None:
    class Curious(_Headed):
        def forward(self, x: Tensor) -> Tensor:
            stride = cast(nn.Conv2d, self.body.get_submodule("3.inner.0")).stride
            return super().forward(x[..., :: stride[0], :: stride[1]])

    layers = [*_conv(3, 16), _Basic(16, 16), _Basic(16, 16)]
    found = find_blocks(Curious(nn.Sequential(*layers), 16), torch.randn(2, 3, 16, 16))
    assert list(found.removable) == ["body.4"]
    assert "the network does not run without it: AttributeError" in found.rejected["body.3"]
