"""The inputs of layers, against torch's own unfolding, for any padding, stride and groups, alone and among others."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from methods.base import ScoreError
from methods.hooks import hooked
from methods.refit import moments
from methods.refit.moments import input_rows, output_rows, positions, ridged, second_moments
from tests.support.networks import NETWORKS

IMAGES = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))
axis_pairs = st.tuples(st.integers(1, 2), st.integers(1, 3))


def unfolded(layer: nn.Conv2d, maps: Tensor) -> Tensor:
    """All rows `(n * positions, groups, columns)`, by `F.unfold` of the padded map."""
    spans = [step * (size - 1) for step, size in zip(layer.dilation, layer.kernel_size, strict=True)]
    padding = [span // 2 for span in spans] if isinstance(layer.padding, str) else list(layer.padding)
    sides = [int(padding[axis]) for axis in (1, 1, 0, 0)]
    padded = F.pad(maps, sides, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    columns = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
    return columns.transpose(1, 2).reshape(-1, layer.groups, columns.shape[1] // layer.groups).double()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_are_the_unfolded_map_and_explain_the_outputs(data: st.DataObject) -> None:
    draw = data.draw
    paddings: list[str | tuple[int, int]] = ["same", (0, 0), (1, 0), (0, 2)]
    padding = draw(st.sampled_from(paddings))
    layer = nn.Conv2d(
        4, 6, draw(st.sampled_from([(3, 3), (1, 3), (1, 1)])),
        stride=1 if padding == "same" else draw(axis_pairs),
        padding=padding,
        dilation=draw(st.sampled_from([(1, 1), (2, 1), (1, 2)])),
        groups=draw(st.sampled_from([1, 2])),
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    ).double()  # fmt: skip
    maps = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(1)).double()
    rows = input_rows(layer, maps, images=2)
    torch.testing.assert_close(rows, unfolded(layer, maps), rtol=0, atol=0)
    weight = layer.weight.reshape(layer.groups, 6 // layer.groups, -1)
    explained = torch.einsum("rgn,gfn->rgf", rows, weight)
    torch.testing.assert_close(output_rows(layer, layer(maps), images=2), explained)


@pytest.mark.parametrize("shape", [(5, 6), (5, 3, 6), (5, 2, 3, 6)])
def test_rows_of_a_linear_layer_are_all_its_positions(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(6, 4).double()
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()
    rows = input_rows(layer, inputs, images=5)
    torch.testing.assert_close(rows[:, 0], inputs.reshape(-1, 6), rtol=0, atol=0)
    torch.testing.assert_close(output_rows(layer, layer(inputs), images=5), rows @ layer.weight.T)


def test_where_positions_abound_the_same_few_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(positions(nn.Conv2d(1, 1, 3), 1000, images=128)) == moments.PLENTY * 9 / 128
    monkeypatch.setattr(moments, "PLENTY", moments.ROWS)
    layer = nn.Conv2d(1, 1, 1)
    chosen = positions(layer, 1000, images=256)
    assert len(chosen) == moments.ROWS // 256 == 64
    assert len(set(chosen.tolist())) == 64
    assert chosen.equal(chosen.sort().values)
    assert chosen.equal(positions(layer, 1000, images=256))
    assert len(positions(layer, 50, images=256)) == 50
    assert len(positions(nn.Linear(4608, 1), 1000, images=256)) == moments.ROWS_PER_COLUMN * 4608 / 256
    image = torch.arange(1000.0).reshape(1, 1, 20, 50)
    assert input_rows(layer, image, images=256).flatten().long().equal(chosen)
    assert (output_rows(layer, layer(image), images=256) / layer.weight.item()).flatten().round().long().equal(chosen)


@torch.no_grad()
def test_moments_are_the_mean_product_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "PLENTY", moments.ROWS)
    network = NETWORKS["grouped"]().double()
    images = IMAGES.double()
    seen: dict[str, Tensor] = {}
    layers = {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    hooks = (
        module.register_forward_pre_hook(lambda module, inputs, name=name: seen.update({name: inputs[0]}))
        for name, module in layers.items()
    )
    with hooked(hooks):
        network(images)
    found = second_moments(network, list(layers), images)
    assert {name: layer.groups for name, layer in layers.items() if layer.groups > 1} == {"body.3.spread.0": 4}
    for name, layer in layers.items():
        rows = unfolded(layer, seen[name])
        expected = torch.einsum("rgm,rgn->gmn", rows, rows) / len(rows)
        mean = expected.diagonal(dim1=1, dim2=2).mean(1)
        off = (found[name] - expected).diagonal(dim1=1, dim2=2) / mean[:, None]
        torch.testing.assert_close(off, torch.full_like(off, 1e-6), rtol=0, atol=1e-7)
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5 * float(mean.max()))
        assert bool((torch.linalg.eigvalsh(found[name]) > 0).all())


def test_no_layers_moments_depend_on_the_others_or_touch_the_network() -> None:
    network = NETWORKS["residual"]().train()
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    together = second_moments(network, names, IMAGES)
    alone = {name: second_moments(network, [name], IMAGES)[name] for name in reversed(names)}
    assert all(torch.equal(together[name], alone[name]) for name in names)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_only_the_first_images_are_read() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    images = torch.randn(300, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(second_moments(network, ["1"], images)["1"], second_moments(network, ["1"], images[:256])["1"])


def test_the_ridge_grows_where_rows_are_missing() -> None:
    second = torch.diag(torch.tensor([4.0, 2.0, 0.0, 0.0]).double())[None]
    # The mean of the diagonal is 1.5. With 8 rows per column the ridge is least; 2 rows for 4 columns miss 2 - 1/8.
    assert (ridged(second, 32) - second).diagonal(dim1=1, dim2=2).flatten().tolist() == pytest.approx([1.5e-6] * 4)
    missing = 1.5 * (1e-6 + 0.1 * (2 - 0.125))
    assert (ridged(second, 2) - second).diagonal(dim1=1, dim2=2).flatten().tolist() == pytest.approx([missing] * 4)
    assert bool((torch.linalg.eigvalsh(ridged(0 * second, 9)) > 0).all())


class Overflowing(nn.Module):
    """A network whose second layer reads infinity, its third one nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.second(self.first(x.flatten(1)) / 0))


def test_what_cannot_be_measured_is_named() -> None:
    images = torch.ones(4, 1, 2, 2)
    assert list(second_moments(Overflowing(), ["first"], images)) == ["first"]
    with pytest.raises(ScoreError, match="layer 'second' reads NaN or infinity"):
        second_moments(Overflowing(), ["first", "second"], images)
    with pytest.raises(ScoreError, match="layer 'third' reads nothing"):
        second_moments(Overflowing(), ["third"], images)
