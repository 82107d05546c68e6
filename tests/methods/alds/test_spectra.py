"""One layer's decomposition: the outputs of the two layers, and every measure of the error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from methods.alds import decompose, relative_errors
from methods.alds.spectra import MEASURES, SCHEMES, GroupedLinear, factors, fold
from methods.base import Unsupported

seeds = st.integers(0, 10**6)
measures = st.sampled_from(sorted(MEASURES))
axis_pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


def tensor(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def full_rank(layer: nn.Conv2d | nn.Linear, slices: int, scheme: int) -> int:
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    return min(fold(layer.weight, groups=groups, slices=slices, scheme=scheme).shape[-2:])


# The two layers


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_full_rank_computes_what_the_convolution_did(data: st.DataObject) -> None:
    draw = data.draw
    groups = draw(st.sampled_from([1, 2]))
    padding = draw(st.sampled_from(["same", "valid", (0, 0), (1, 0), (0, 2), (2, 1)]))
    layer = nn.Conv2d(
        6 * groups,
        4,
        kernel_size=draw(st.sampled_from([(3, 3), (1, 3), (3, 1), (1, 1), (5, 3)])),
        stride=1 if padding == "same" else draw(axis_pairs),
        padding=padding,
        dilation=draw(st.sampled_from([(1, 1), (2, 1), (1, 2)])),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    )
    slices, scheme = draw(st.sampled_from([1, 2, 3, 6])), draw(st.sampled_from(SCHEMES))
    pair = decompose(layer, slices=slices, rank=full_rank(layer, slices, scheme), scheme=scheme)
    maps = tensor(draw(seeds), 2, 6 * groups, 12, 11)
    torch.testing.assert_close(pair(maps), layer(maps), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("slices", [1, 2, 3, 6])
@pytest.mark.parametrize("shape", [(2, 6), (2, 5, 6)])
def test_full_rank_computes_what_the_linear_layer_did(slices: int, shape: tuple[int, ...]) -> None:
    layer = nn.Linear(6, 4)
    pair = decompose(layer, slices=slices, rank=full_rank(layer, slices, 0), scheme=0)
    rows = tensor(slices, *shape)
    torch.testing.assert_close(pair(rows), layer(rows), atol=1e-5, rtol=1e-4)


def truncated_by_hand(weight: np.ndarray, slices: int, rank: int, scheme: int) -> np.ndarray:
    """Slice, fold, numpy's SVD, cut, unfold: one slice after the other."""
    axes = {0: (0,), 1: (0, 2), 2: (0, 3), 3: (0, 2, 3)}[scheme]
    columns = tuple(axis for axis in range(4) if axis not in axes)
    parts = []
    for part in np.split(weight, slices, axis=1):
        folded = part.transpose(*axes, *columns)
        matrix = folded.reshape(np.prod([part.shape[axis] for axis in axes]), -1)
        u, s, v = np.linalg.svd(matrix, full_matrices=False)
        cut = (u[:, :rank] * s[:rank]) @ v[:rank]
        parts.append(cut.reshape(folded.shape).transpose(np.argsort([*axes, *columns])))
    return np.concatenate(parts, axis=1)


def merged(pair: nn.Module, slices: int) -> Tensor:
    """The dense kernel of encoder and decoder; on each axis one of their kernels has size 1."""
    encoder, decoder = pair[0].weight.double(), pair[1].weight.double()  # type: ignore[index]
    parts = zip(encoder.chunk(slices, 0), decoder.chunk(slices, 1), strict=True)
    kernels = [torch.einsum("mcyx,fmhw->fchywx", encode, decode) for encode, decode in parts]
    return torch.cat([kernel.flatten(4, 5).flatten(2, 3) for kernel in kernels], dim=1)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("slices", [1, 2, 3])
def test_the_pair_merges_to_the_truncated_weight(slices: int, scheme: int) -> None:
    layer = nn.Conv2d(6, 5, (3, 2)).double()
    for rank in range(1, full_rank(layer, slices, scheme) + 1):
        pair = decompose(layer, slices=slices, rank=rank, scheme=scheme)
        expected = truncated_by_hand(layer.weight.detach().numpy(), slices, rank, scheme)
        np.testing.assert_allclose(merged(pair, slices).detach().numpy(), expected, atol=1e-7)


def test_shapes_groups_mode_and_dtype() -> None:
    layer = nn.Conv2d(8, 10, (3, 5), stride=(2, 3), padding=(1, 2), padding_mode="circular", bias=True).bfloat16()
    encoder, decoder = decompose(layer.eval(), slices=4, rank=3, scheme=2)  # type: ignore[misc]
    assert (tuple(encoder.weight.shape), encoder.groups, encoder.bias) == ((12, 2, 3, 1), 4, None)
    assert (tuple(decoder.weight.shape), decoder.groups) == ((10, 12, 1, 5), 1)
    assert torch.equal(decoder.bias, layer.bias)
    assert decoder.bias is not layer.bias
    assert (encoder.stride, encoder.padding, decoder.stride, decoder.padding) == ((2, 1), (1, 0), (1, 3), (0, 2))
    assert {encoder.padding_mode, decoder.padding_mode} == {"circular"}
    assert {encoder.weight.dtype, decoder.weight.dtype} == {torch.bfloat16}
    assert not encoder.training


def test_factors_share_the_singular_values_evenly() -> None:
    left, right = factors(tensor(0, 2, 7, 4).double(), 3)
    torch.testing.assert_close(left.norm(dim=-2), right.norm(dim=-1))


def test_a_pair_survives_export_and_state_dict() -> None:
    layer = nn.Linear(6, 4)
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), layer)
    network[0] = decompose(network[0], slices=3, rank=1, scheme=1)
    network[3] = decompose(layer, slices=2, rank=2, scheme=0)
    assert isinstance(network[3][0], GroupedLinear)
    images = tensor(0, 2, 3, 16, 16)
    exported = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},))
    torch.testing.assert_close(exported.module()(images[:1]), network(images[:1]))
    state = {key: value.clone() for key, value in network.state_dict().items()}
    before = network(images)
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    network.load_state_dict(state)
    torch.testing.assert_close(network(images), before)


def test_decompose_draws_no_random_numbers() -> None:
    torch.manual_seed(3)
    layer = nn.Conv2d(4, 4, 3)
    before = torch.get_rng_state()
    decompose(layer, slices=2, rank=1, scheme=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv2d(4, 8, 3, groups=4), "depthwise"),
        (nn.Conv2d(4, 8, 2, padding="same"), "'same' is uneven for kernel"),
        (nn.ConvTranspose2d(4, 8, 3), "ConvTranspose2d cannot be decomposed"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), "not exactly"),
    ],
)
def test_what_cannot_be_decomposed_is_named(layer: nn.Module, message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        decompose(layer, slices=1, rank=1, scheme=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"slices": 3}, "3 slices do not divide 4"),
        ({"rank": 0}, "rank is 0, expected 1 to 8"),
        ({"rank": 9}, "rank is 9, expected 1 to 8"),
        ({"scheme": 4}, "scheme is 4"),
    ],
)
def test_what_is_out_of_range_is_named(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decompose(nn.Conv2d(4, 8, 3), **{"slices": 1, "rank": 1, "scheme": 0, **wrong})
    if "rank" not in wrong:
        with pytest.raises(ValueError, match=message):
            relative_errors(torch.ones(8, 4, 3, 3), **{"slices": 1, "scheme": 0, **wrong})


# Errors


@settings(max_examples=60, deadline=None)
@given(seeds, st.sampled_from([1, 2, 3, 6]), st.sampled_from(SCHEMES), st.data())
def test_measures_bound_the_true_error(seed: int, slices: int, scheme: int, data: st.DataObject) -> None:
    weight = tensor(seed, 5, 6, 3, 2)
    errors = {measure: relative_errors(weight, slices=slices, scheme=scheme, measure=measure) for measure in MEASURES}
    rank = data.draw(st.integers(0, len(errors["rss"]) - 1))
    cut = truncated_by_hand(weight.double().numpy(), slices, rank, scheme)
    whole = fold(weight, groups=1, slices=1, scheme=scheme)
    lost = whole - fold(torch.from_numpy(cut), groups=1, slices=1, scheme=scheme)
    spectral = float(torch.linalg.matrix_norm(lost, 2) / torch.linalg.matrix_norm(whole, 2))
    group_max, rss, paper = (float(errors[measure][rank]) for measure in ("group_max", "rss", "paper"))
    assert group_max - 1e-9 <= spectral <= rss + 1e-9
    assert rss <= paper + 1e-9
    assert paper == pytest.approx(group_max * slices**0.5)
    assert float(errors["fro"][rank]) == pytest.approx(float(lost.norm() / whole.norm()), abs=1e-9)
    assert all(bool((error.diff() <= 1e-12).all()) for error in errors.values())


def test_rss_exceeds_group_max_where_slices_share_an_output() -> None:
    # On paper: two slices, each one row (1, 0): the whole has norm sqrt(2), and so has what rank 0 loses.
    weight = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 0.5, 0.0, 0.5]])
    at_zero = {measure: float(relative_errors(weight, slices=2, scheme=0, measure=measure)[0]) for measure in MEASURES}
    assert at_zero == pytest.approx({"group_max": 0.5**0.5, "rss": 1.0, "paper": 1.0, "fro": 1.0})
    at_one = {measure: float(relative_errors(weight, slices=2, scheme=0, measure=measure)[1]) for measure in MEASURES}
    assert at_one == pytest.approx({"group_max": 0.125**0.5, "rss": 0.5, "paper": 0.5, "fro": 0.2**0.5})


@settings(max_examples=30, deadline=None)
@given(seeds, st.sampled_from(SCHEMES), measures, st.floats(1e-3, 1e3))
def test_errors_agree_with_an_svd_and_ignore_scale(seed: int, scheme: int, measure: str, scale: float) -> None:
    weight = tensor(seed, 8, 6, 3, 3)
    errors = relative_errors(weight, slices=1, scheme=scheme, measure=measure)
    values = torch.linalg.svdvals(fold(weight, groups=1, slices=1, scheme=scheme)[0, 0])
    tails = values.square().flip(0).cumsum(0).flip(0).sqrt()
    expected = tails / tails[0] if measure == "fro" else values / values[0]
    torch.testing.assert_close(errors, expected, atol=1e-6, rtol=0)
    scaled = relative_errors(weight.double() * scale, slices=1, scheme=scheme, measure=measure)
    torch.testing.assert_close(scaled, errors, atol=1e-9, rtol=0)


@pytest.mark.parametrize("measure", sorted(MEASURES))
def test_a_weight_of_low_rank_is_exact_at_its_rank(measure: str) -> None:
    weight = tensor(0, 8, 2).double() @ tensor(1, 2, 8).double()
    errors = relative_errors(weight, slices=1, scheme=0, measure=measure)
    assert errors[1] > 0.01
    assert (errors[2:] == 0).all()
    assert (relative_errors(torch.zeros(4, 6, 3, 3), slices=2, scheme=1, measure=measure) == 0).all()


def test_a_measure_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="measure is 'l1', expected one of group_max"):
        relative_errors(torch.ones(2, 2), slices=1, scheme=0, measure="l1")
