"""torch's and torchvision's attention, made of layers: the same answers, and heads that go."""

from __future__ import annotations

import itertools

import pytest
import torch
import torchvision
from torch import Tensor, nn

from methods import METHODS
from methods.base import Budget
from methods.network import count_macs, count_params, profile
from methods.network.attention.opened import opened
from methods.network.keeping import keep
from methods.protocol import defaults
from methods.state import arrays_of, load_arrays
from search.export import exported, onnx_program
from tests.support.odd_networks import seeded

IMAGES = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def vit() -> nn.Module:
    return lively(
        torchvision.models.VisionTransformer(
            image_size=16, patch_size=4, num_layers=2, num_heads=4, hidden_dim=24, mlp_dim=48, num_classes=10
        )
    )


def swin(window: int = 3) -> nn.Module:
    """Maps of 8 x 8 and 4 x 4, which no window of 3 fits."""
    return lively(
        torchvision.models.SwinTransformer(
            [2, 2], embed_dim=12, depths=[2, 2], num_heads=[3, 6], window_size=[window] * 2, num_classes=10
        )
    )


def lively(model: nn.Module) -> nn.Module:
    """Spread the weights, which are nearly alike before training."""
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


BUILDS = {"vit": vit, "swin": swin, "swin of whole windows": lambda: swin(4)}


@pytest.mark.parametrize("name", BUILDS)
def test_an_opened_network_answers_as_before(name: str) -> None:
    model = seeded(BUILDS[name])
    ours = opened(model, IMAGES[:2])
    assert ours is not model
    assert (count_macs(ours, IMAGES), count_params(ours)) == (count_macs(model, IMAGES), count_params(model))
    with torch.no_grad():
        torch.testing.assert_close(ours(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "name"), list(itertools.product(["uniform", "itpruner", "channels"], BUILDS)))
def test_its_heads_go(method: str, name: str) -> None:
    model = opened(seeded(BUILDS[name]), IMAGES[:2])
    found, one = profile(model, IMAGES), METHODS[method]
    attended = [group for group in found.groups if "att" in group.name]
    assert len(attended) == (4 if "swin" in name else 2)
    assert not any(group.fixed for group in attended)
    scores = one.merge([one.score(shard, model, IMAGES, 0) for shard in one.shards(found, IMAGES)], found)
    plan = one.allocate(scores, found, Budget("small", macs=found.macs * 4 // 10), defaults(one))
    student = one.apply(model, plan, IMAGES)
    assert (count_macs(student, IMAGES), count_params(student)) == (plan.macs, plan.params)
    assert student(IMAGES).isfinite().all()
    assert any(row[1] < row[2] for row in plan.choices["groups"] if "att" in row[0])


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_its_students_are_exported(name: str) -> None:
    model = opened(seeded(BUILDS[name]), IMAGES[:2])
    found, one = profile(model, IMAGES), METHODS["uniform"]
    scores = one.merge([one.score(shard, model, IMAGES, 0) for shard in one.shards(found, IMAGES)], found)
    plan = one.allocate(scores, found, Budget("small", macs=found.macs * 4 // 10), defaults(one))
    student = one.apply(model, plan)
    with torch.no_grad():
        expected = student(IMAGES)
    torch.testing.assert_close(exported(student, IMAGES[:2]).module()(IMAGES), expected, rtol=1e-4, atol=1e-5)
    assert onnx_program(student, IMAGES[:2])


def test_a_search_that_began_with_swin_as_it_was_goes_on() -> None:
    model = seeded(swin)
    ours = opened(model, IMAGES[:2])
    assert str(ours) == str(model)
    load_arrays(ours, arrays_of(model))


class Encoder(nn.Module):
    """torch's own encoder, which reads the weights of its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 24, 4, 4), nn.Linear(24, 10)
        self.layer = nn.TransformerEncoderLayer(24, 4, 48, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.patches(x).flatten(2).transpose(1, 2)).mean(1))  # type: ignore[no-any-return]


class Weighing(nn.Module):
    """Returns by what weights its attention mixes."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.attend = nn.Conv2d(3, 24, 4, 4), nn.MultiheadAttention(24, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.attend(tokens, tokens, tokens)[1].flatten(1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("build", [Encoder, Weighing])
def test_attention_stays_where_more_of_it_is_read(build: type[nn.Module]) -> None:
    model = seeded(build)
    ours = opened(model, IMAGES[:2])
    assert any(isinstance(module, nn.MultiheadAttention) for module in ours.modules())
    assert torch.equal(ours(IMAGES), model(IMAGES))


def test_what_is_kept_or_has_no_attention_stays_itself() -> None:
    model = seeded(vit)
    keep(model, ["*.out_proj"])
    assert opened(model, IMAGES[:2]) is model
    plain = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    assert opened(plain, IMAGES[:2]) is plain


def test_tokens_may_come_first() -> None:
    torch.manual_seed(0)

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(6, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = x.transpose(0, 1)
            return self.attend(query=x, key=x, value=x)[0].transpose(0, 1)  # type: ignore[no-any-return]

    model, x = First().eval(), torch.rand(2, 5, 6)
    ours = opened(model, x)
    assert ours is not model
    torch.testing.assert_close(ours(x), model(x))
