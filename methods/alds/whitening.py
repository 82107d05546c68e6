"""The error of a pair of layers in reproducing a layer's outputs on real inputs, and the pair that does it best.

Singular values of a weight W weigh all inputs alike. Here the second moments C of the layer's inputs weigh them. Each
slice g keeps the directions U_g in which its output W_g x_g is largest: its encoder is V_g = U_g' W_g, the same as
truncating the whitened weight and undoing the whitening. The decoder is U_g (`white`), or the least squares fit to all
slices together (`refit`), which makes good through the other slices the loss of each. Scheme 0 only: for the others a
truncation weighted by C has no closed form.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from methods.alds.spectra import fold, paired
from methods.refit.fit import Solve

FITTED = ("white", "refit")
"""The measures that need data, in the order of the rows of `fitted_curves`."""

JITTER = 1e-9
"""Added to the Gram matrix of encoder outputs of unit variance: equal outputs are not told apart."""


def crossed_moments(weight: Tensor, second: Tensor) -> Tensor:
    """The second moments of a layer's outputs with its inputs, W C: `(groups, f / groups, n)`."""
    return weight.detach().double().reshape(len(second), -1, second.shape[-1]) @ second


def fitted_curves(weight: Tensor, second: Tensor, *, slices: int, crossed: Tensor | None = None) -> np.ndarray:
    """Relative errors of the outputs, `(2, ranks + 1)`: `white`, then `refit`, column j with rank j in each slice.

    `refit` is sqrt(E|(W - UV) x|^2 / E|W x|^2), exactly, x being of the given second moments. `white` is the same of
    each slice alone, summed over the slices as if they were uncorrelated: an estimate. Ranks end where the pair would
    cost more than the layer. A weight of zeros has error 0 at every rank.

    All ranks of `refit` come from one factorisation. Encoder rows go by rank, then by slice, so those of rank j lead
    those of rank j + 1; with K the second moments of their outputs and L L' = K, column i of W C V' inverse(L') is the
    part that row i explains beyond those before it. Rows of one slice are uncorrelated already: both curves are one.

    Args:
        weight: `(f, c / groups, k1, k2)` or `(f, c)`.
        second: `(groups, n, n)` with n = c / groups * k1 * k2, positive definite; see `second_moments`.
        slices: a divisor of c / groups.
        crossed: `crossed_moments` of the two, where they are at hand.

    Differs: not in the paper, whose errors are those of the weights.
    """
    matrices = fold(weight, groups=len(second), slices=slices, scheme=0)
    groups, _, outputs, width = matrices.shape
    crossed = crossed_moments(weight, second) if crossed is None else crossed
    directions = _directions(matrices, second, crossed)
    tails = directions.squares.flip(-1).cumsum(-1).flip(-1).sum((0, 1))
    total = float((crossed * matrices.transpose(1, 2).flatten(2)).sum())
    dearest = weight.numel() // (slices * len(weight) + groups * slices * width)
    rank = min(dearest, min(outputs, width) - 1)
    if slices == 1 or rank == 0:
        explained = directions.squares[..., :rank].sum((0, 1))
    else:
        encoder = _encoder(matrices, directions, rank)
        explained = _explained(*_normal_equations(encoder, second, crossed), rank)
    lost = torch.cat((second.new_full((1,), total), total - explained.cumsum(0)))
    curves = torch.stack((_ratio(tails[: rank + 1], float(tails[0])), _ratio(lost, total)))
    found: np.ndarray = curves.cpu().numpy()
    return found


def fitted_factors(weight: Tensor, second: Tensor, *, slices: int, rank: int, measure: str) -> tuple[Tensor, Tensor]:
    """Decoder `(groups, slices, f / groups, rank)` and encoder `(groups, slices, rank, n / slices)`, see the module.

    Each component's decoder column and encoder row are scaled to one norm, so that both layers' gradients are of one
    size. Arguments as in `fitted_curves`; `measure` is one of `FITTED`.
    """
    matrices = fold(weight, groups=len(second), slices=slices, scheme=0)
    groups, _, outputs, _ = matrices.shape
    crossed = crossed_moments(weight, second)
    directions = _directions(matrices, second, crossed)
    encoder = _encoder(matrices, directions, rank)
    if measure == "white":
        decoder = directions.basis[..., :rank] * directions.squares[..., None, :rank].sqrt()
    else:
        gram, cross = _normal_equations(encoder, second, crossed)
        solved = torch.cholesky_solve(cross, torch.linalg.cholesky(gram))
        decoder = solved.reshape(groups, rank, slices, outputs).permute(0, 2, 3, 1)
    scale = (decoder.norm(dim=-2) / encoder.norm(dim=-1).clamp(min=1e-30)).sqrt().clamp(min=1e-30)
    return decoder / scale.unsqueeze(-2), encoder * scale.unsqueeze(-1)


def fitting(layer: nn.Module, slices: int, rank: int) -> Solve:
    """How `refit` fits the pair in the place of `layer`: the fitted weight is decomposed like any other."""

    def solve(pair: nn.Module, weight: Tensor, second: Tensor) -> None:
        left, right = fitted_factors(weight, second, slices=slices, rank=rank, measure="refit")
        pair.load_state_dict(paired(layer, left, right, scheme=0).state_dict())

    return solve


class _Directions(NamedTuple):
    """Per slice, the energies of its output, falling `(groups, slices, r)`, and directions `(groups, slices, f, r)`."""

    squares: Tensor
    basis: Tensor


def _directions(matrices: Tensor, second: Tensor, crossed: Tensor) -> _Directions:
    """Eigenvectors of the second moments of every slice's output, from the shorter side of its weight."""
    groups, slices, outputs, width = matrices.shape
    blocks = second.reshape(groups, slices, width, slices, width).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    if outputs <= width:
        own = crossed.unsqueeze(1) if slices == 1 else matrices @ blocks
        squares, basis = torch.linalg.eigh(own @ matrices.mT)
        return _Directions(squares.flip(-1).clamp(min=0), basis.flip(-1))
    whitened = matrices @ torch.linalg.cholesky(blocks)
    squares, vectors = torch.linalg.eigh(whitened.mT @ whitened)
    squares = squares.flip(-1).clamp(min=0)
    return _Directions(squares, whitened @ vectors.flip(-1) * _inverse_root(squares).unsqueeze(-2))


def _encoder(matrices: Tensor, directions: _Directions, rank: int) -> Tensor:
    """Encoder `(groups, slices, rank, width)` whose outputs have variance one; rows of no variance are zero."""
    rows = directions.basis[..., :rank].mT @ matrices
    return rows * _inverse_root(directions.squares)[..., :rank].unsqueeze(-1)


def _inverse_root(squares: Tensor) -> Tensor:
    noise = squares.shape[-1] * torch.finfo(squares.dtype).eps * squares.amax()
    return torch.where(squares > noise, squares.rsqrt(), 0.0)


def _normal_equations(encoder: Tensor, second: Tensor, crossed: Tensor) -> tuple[Tensor, Tensor]:
    """Second moments of the encoder's outputs `(groups, rows, rows)`, and theirs with the layer's `(groups, rows, f)`.

    Rows go by rank, then by slice. Those of one slice are uncorrelated, and of variance one or zero; each pair of
    slices is multiplied once.
    """
    groups, slices, rank, width = encoder.shape
    gram = second.new_empty(groups, slices, slices, rank, rank)
    own = torch.diag_embed((encoder != 0).any(-1).to(gram))
    for one in range(slices):
        stop = (one + 1) * width
        read = encoder[:, one] @ second[:, stop - width : stop, stop:]
        gram[:, one, one] = own[:, one]
        by_slice = read.reshape(groups, rank, slices - one - 1, width).transpose(1, 2)
        gram[:, one, one + 1 :] = by_slice @ encoder[:, one + 1 :].mT
        gram[:, one + 1 :, one] = gram[:, one, one + 1 :].mT
    gram = gram.permute(0, 3, 1, 4, 2).reshape(groups, rank * slices, rank * slices)
    gram.diagonal(dim1=1, dim2=2).add_(JITTER)
    cross = encoder @ crossed.mT.reshape(groups, slices, width, -1)
    return gram, cross.transpose(1, 2).flatten(1, 2)


def _explained(gram: Tensor, cross: Tensor, rank: int) -> Tensor:
    """The part of the outputs' energy that each rank adds to those before it: `(rank,)`."""
    parts: Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), cross, upper=False)
    return parts.square().sum((0, 2)).reshape(rank, -1).sum(1)


def _ratio(energies: Tensor, total: float) -> Tensor:
    return (energies / total).clamp(min=0).sqrt() if total > 0 else torch.zeros_like(energies)
