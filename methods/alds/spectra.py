"""One layer's decomposition: the error of every rank, from singular values alone, and the two layers that replace it.

A weight `(f, c, k1, k2)` is cut into `slices` along its input channels; each slice is then folded into a matrix. The
scheme says which kernel axes fall to the decoder and so become rows: bit 0 the height, bit 1 the width. Scheme 0, the
paper's, leaves both to the encoder. Everything is float64: a float32 Gram matrix would be noise below 3e-4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from methods.base import Unsupported
from methods.refit.moments import numeric_padding, spans

SCHEMES = (0, 1, 2, 3)


def encoder_owns(scheme: int) -> tuple[bool, bool]:
    """Whether the encoder keeps the kernel, stride, padding and dilation of the (height, width) axis.

    >>> [encoder_owns(scheme) for scheme in SCHEMES]
    [(True, True), (False, True), (True, False), (False, False)]
    """
    return not scheme & 1, not scheme & 2


def fold(weight: Tensor, *, groups: int, slices: int, scheme: int) -> Tensor:
    """Every slice of `weight` as one matrix: `(groups, slices, rows, columns)`, float64.

    Rows are output channels, then the kernel axes the decoder owns; columns are the slice's input channels, then those
    the encoder owns. Slices are cut before they are folded, because only whole input channels can be grouped.

    Args:
        weight: `(f, c / groups, k1, k2)` of a convolution or `(f, c)` of a linear layer.
        groups: the convolution's own groups, each of which is cut into `slices`.

    Raises:
        ValueError: `slices` does not divide the input channels of a group, or there is no such scheme.

    Source: Liebenwein et al. 2021 (arXiv 2107.11442), the per-layer step (scheme 0) and ALDS+ (the other schemes).
    Differs: the authors' code folds schemes 1 and 2 before it slices, so its errors belong to another decomposition.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme is {scheme}, expected one of {SCHEMES}; scheme 0 is the paper's")
    channels = weight.shape[1]
    if slices < 1 or channels % slices:
        raise ValueError(f"{slices} slices do not divide {channels} input channels; choose a divisor of {channels}")
    kernel = tuple(weight.shape[2:]) or (1, 1)
    tensor = weight.detach().double().reshape(groups, -1, slices, channels // slices, *kernel)
    owns = encoder_owns(scheme)
    rows = [4 + axis for axis in (0, 1) if not owns[axis]]
    columns = [4 + axis for axis in (0, 1) if owns[axis]]
    row_count = tensor.shape[1] * int(np.prod([tensor.shape[axis] for axis in rows], initial=1))
    return tensor.permute(0, 2, 1, *rows, 3, *columns).reshape(groups, slices, row_count, -1)


def singular_values(matrices: Tensor) -> Tensor:
    """Singular values `(..., rank)` of `matrices` `(..., rows, columns)`, largest first; noise becomes 0.

    They are square roots of the eigenvalues of the small side's Gram matrix, ten times faster than an SVD. That loses
    values below `sqrt(side * eps)` of the largest, about 3e-7 at side 512: less than a float32 weight can express.
    """
    squares = torch.linalg.eigvalsh(_gram(matrices)).flip(-1)
    noise = squares.shape[-1] * torch.finfo(squares.dtype).eps * squares[..., :1]
    return torch.where(squares > noise, squares, 0.0).sqrt()


def factors(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of that rank, `left @ right`: `(..., rows, rank)` and `(..., rank, columns)`.

    A projection onto the leading singular subspace of the small side, so full rank loses nothing. The singular values
    are split evenly between the two, which keeps the two layers' gradients of one size.

    Raises:
        ValueError: `rank` is below 1 or above the matrices' shorter side.

    Source: Eckart and Young 1936 and Mirsky 1960: no matrices of that rank come closer, in either norm.
    """
    side = min(matrices.shape[-2:])
    if not 1 <= rank <= side:
        raise ValueError(f"rank is {rank}, expected 1 to {side} (the shorter side of one slice); choose one in between")
    is_wide = matrices.shape[-2] <= matrices.shape[-1]
    wide = matrices if is_wide else matrices.mT
    squares, vectors = torch.linalg.eigh(_gram(wide))
    basis = vectors[..., -rank:].flip(-1)
    scale = squares[..., -rank:].flip(-1).clamp(min=1e-24).pow(0.25).unsqueeze(-2)
    left, right = basis * scale, basis.mT @ wide / scale.mT
    return (left, right) if is_wide else (right.mT, left.mT)


def curves(weight: Tensor, *, groups: int, slices: int, scheme: int) -> np.ndarray:
    """The numbers that measures need of one decomposition: `(3, rank)`, column j for j singular values kept.

    Rows: the largest first singular value left out of any slice; the root of their sum of squares over the slices
    (the largest such root over the groups); the Frobenius norm of all that is left out.
    """
    values = singular_values(fold(weight, groups=groups, slices=slices, scheme=scheme))
    squares = values.square()
    tails = squares.flip(-1).cumsum(-1).flip(-1)
    rows = (values.amax((0, 1)), squares.sum(1).amax(0).sqrt(), tails.sum((0, 1)).sqrt())
    stacked: np.ndarray = torch.stack(rows).cpu().numpy()
    return stacked


def _group_max(curve: np.ndarray, whole: np.ndarray, slices: int) -> np.ndarray:
    return _ratio(curve[0], whole[0, 0])


def _paper(curve: np.ndarray, whole: np.ndarray, slices: int) -> np.ndarray:
    return _ratio(curve[0] * np.sqrt(slices), whole[0, 0])


def _rss(curve: np.ndarray, whole: np.ndarray, slices: int) -> np.ndarray:
    return _ratio(curve[1], whole[0, 0])


def _fro(curve: np.ndarray, whole: np.ndarray, slices: int) -> np.ndarray:
    return _ratio(curve[2], whole[2, 0])


MEASURES: Mapping[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "group_max": _group_max,
    "paper": _paper,
    "rss": _rss,
    "fro": _fro,
}
"""Relative error (rank,) from a decomposition's curves, the uncut layer's curves (one slice) and the slice count."""


def relative_errors(weight: Tensor, *, slices: int, scheme: int, measure: str = "group_max") -> Tensor:
    """Relative error `(rank,)` of cutting `weight` into slices: entry j is the error with j singular values kept.

    With E the rest that the cut leaves out, sigma_g its largest singular value in slice g, W the whole folded weight:
    `group_max` is max_g sigma_g / |W| (never above |E| / |W|), `rss` is sqrt(sum_g sigma_g^2) / |W| and `paper`
    sqrt(slices) max_g sigma_g / |W| (both never below it), in the spectral norm; `fro` is |E| / |W| in the Frobenius
    norm, exactly. A weight of zeros has error 0 at every rank.

    Args:
        weight: `(f, c, k1, k2)` or `(f, c)`.
        slices: a divisor of c.
        scheme: 0 to 3, see the module's docstring.

    Raises:
        ValueError: unknown measure or scheme, or `slices` does not divide c.

    Source: Liebenwein et al. 2021, theorem 1 (`paper`); E E' is the sum over slices, so its norm is below theirs.
    Differs: the authors' code uses `group_max`, without theorem 1's sqrt(slices): a lower bound, not a guarantee.

    >>> weight = torch.diag(torch.tensor([4.0, 3.0, 2.0, 0.0]))
    >>> [round(error, 6) for error in relative_errors(weight, slices=1, scheme=0).tolist()]
    [1.0, 0.75, 0.5, 0.0]
    >>> [round(error, 6) for error in relative_errors(weight, slices=2, scheme=0, measure="group_max").tolist()]
    [1.0, 0.75]
    """
    if measure not in MEASURES:
        raise ValueError(f"measure is {measure!r}, expected one of {', '.join(MEASURES)}; group_max is the authors'")
    curve = curves(weight, groups=1, slices=slices, scheme=scheme)
    whole = curves(weight, groups=1, slices=1, scheme=scheme)
    return torch.from_numpy(MEASURES[measure](curve, whole, slices))


class GroupedLinear(nn.Module):
    """A linear layer of independent slices, without bias: `(..., slices * width)` to `(..., slices * rank)`.

    Args:
        weight: `(slices, rank, width)`; the module owns it from now on.

    >>> GroupedLinear(torch.ones(2, 1, 3))(torch.arange(6.0)).tolist()
    [3.0, 12.0]
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        slices, rank, width = self.weight.shape
        rows = x.reshape(-1, slices, width).transpose(0, 1)
        return torch.bmm(rows, self.weight.mT).transpose(0, 1).reshape(*x.shape[:-1], slices * rank)


@torch.no_grad()
def decompose(layer: nn.Module, *, slices: int, rank: int, scheme: int) -> nn.Module:
    """`layer` as an encoder and a decoder in a `nn.Sequential`, the best of that rank in each slice.

    A convolution's encoder has `slices` times its groups and no bias, its decoder the layer's groups and bias; stride,
    padding and dilation of each axis go to the one that has that axis of the kernel. A linear layer's encoder is a
    `GroupedLinear` if there are several slices; the schemes coincide. Device, dtype and mode are kept.

    Raises:
        Unsupported: not a plain `Conv2d` or `Linear`, a depthwise convolution, or a 'same' padding that is uneven.
        ValueError: `slices`, `rank` or `scheme` is out of range.

    Source: Liebenwein et al. 2021, the per-layer step; merging the two gives back the truncated weight.

    >>> decompose(nn.Conv2d(6, 4, 3, stride=2), slices=2, rank=1, scheme=1)
    Sequential(
      (0): Conv2d(6, 2, kernel_size=(1, 3), stride=(1, 2), groups=2, bias=False)
      (1): Conv2d(2, 4, kernel_size=(3, 1), stride=(2, 1))
    )
    """
    if obstacle := obstacle_of(layer):
        raise Unsupported(f"{type(layer).__name__} cannot be decomposed: {obstacle}; protect it with `skip`")
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    left, right = factors(fold(layer.weight, groups=groups, slices=slices, scheme=scheme), rank)
    return paired(layer, left, right, scheme=scheme)


def paired(layer: nn.Module, left: Tensor, right: Tensor, *, scheme: int) -> nn.Module:
    """The encoder and decoder of `decompose` with these factors of the folded weight.

    Args:
        layer: a plain `Conv2d` or `Linear`.
        left: `(groups, slices, rows, rank)`, the decoder's.
        right: `(groups, slices, rank, columns)`, the encoder's.
    """
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    pair = _conv_pair(layer, left, right, scheme) if isinstance(layer, nn.Conv2d) else _linear_pair(layer, left, right)
    for name, parameter in pair.named_parameters():  # the parts of a frozen layer stay frozen
        parameter.requires_grad_(layer.get_parameter(name.rpartition(".")[2]).requires_grad)
    return pair.train(layer.training)


def obstacle_of(module: nn.Module) -> str | None:
    """The reason why `module` cannot be replaced by two layers, or `None`. A subclass may compute something else."""
    if type(module) not in (nn.Conv2d, nn.Linear):
        return "it is not exactly a Conv2d or a Linear"
    if "weight" not in module._parameters:
        return "its weight is computed from other parameters"
    if not isinstance(module, nn.Conv2d):
        return None
    if module.groups > 1 and module.groups == module.in_channels:
        return "it is depthwise"
    if module.padding == "same" and any(span % 2 for span in spans(module)):
        return f"padding 'same' is uneven for kernel {module.kernel_size} and dilation {module.dilation}"
    return None


def _ratio(values: np.ndarray, norm: float) -> np.ndarray:
    relative: np.ndarray = values / norm if norm > 0 else np.zeros_like(values)
    return relative


def _gram(matrices: Tensor) -> Tensor:
    """Gram matrix of the shorter side."""
    is_wide = matrices.shape[-2] <= matrices.shape[-1]
    return matrices @ matrices.mT if is_wide else matrices.mT @ matrices


def _conv_pair(layer: nn.Conv2d, left: Tensor, right: Tensor, scheme: int) -> nn.Sequential:
    """The two convolutions of `paired`."""
    groups, slices, _, rank = left.shape
    owns = encoder_owns(scheme)
    narrow = [size if is_owned else 1 for size, is_owned in zip(layer.kernel_size, owns, strict=True)]
    rest = [1 if is_owned else size for size, is_owned in zip(layer.kernel_size, owns, strict=True)]
    encoder = right.reshape(groups * slices * rank, layer.in_channels // (groups * slices), *narrow)
    decoder = left.reshape(groups, slices, layer.out_channels // groups, *rest, rank).permute(0, 2, 1, 5, 3, 4)
    decoder = decoder.reshape(layer.out_channels, slices * rank, *rest)
    return nn.Sequential(
        _conv(layer, encoder, None, groups * slices, owns),
        _conv(layer, decoder, layer.bias, groups, (not owns[0], not owns[1])),
    )


def _conv(layer: nn.Conv2d, weight: Tensor, bias: Tensor | None, groups: int, owns: tuple[bool, bool]) -> nn.Conv2d:
    """A convolution of that weight with the stride, padding and dilation of `layer` on the axes it owns."""

    def owned(values: Sequence[int], default: int) -> tuple[int, int]:
        return (values[0] if owns[0] else default, values[1] if owns[1] else default)

    conv = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        (weight.shape[2], weight.shape[3]),
        stride=owned(layer.stride, 1),
        padding=owned(numeric_padding(layer), 0),
        dilation=owned(layer.dilation, 1),
        groups=groups,
        bias=bias is not None,
        padding_mode=layer.padding_mode,
        device="meta",
    )
    return _with(conv, weight.to(layer.weight.dtype), bias)


def _linear_pair(layer: nn.Linear, left: Tensor, right: Tensor) -> nn.Sequential:
    """The encoder and decoder of `left` `(1, slices, f, rank)` and `right` `(1, slices, rank, c / slices)`."""
    left, right = left[0].to(layer.weight.dtype), right[0].to(layer.weight.dtype)
    slices, outputs, rank = left.shape
    width = slices * rank
    decoder = nn.Linear(width, outputs, bias=layer.bias is not None, device="meta")
    decoder = _with(decoder, left.transpose(0, 1).reshape(outputs, width), layer.bias)
    if slices > 1:
        return nn.Sequential(GroupedLinear(right.contiguous()), decoder)
    encoder = nn.Linear(layer.in_features, rank, bias=False, device="meta")
    return nn.Sequential(_with(encoder, right[0], None), decoder)


_Module = TypeVar("_Module", nn.Conv2d, nn.Linear)


def _with(module: _Module, weight: Tensor, bias: Tensor | None) -> _Module:
    """`module`, built without memory or random numbers, given its own copies of the parameters.

    The weight's strides are the standard ones: a kernel chosen by others would round differently once it was reloaded.
    """
    module.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().clone())
    return module
