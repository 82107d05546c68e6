"""The modules that no method may change: marked on the network itself, so its copies, cuts and workers know them."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from methods.network.graph import has_weights

KEPT = "kept, as model.keep asks"
"""The reason why a marked module is left as it is."""

_MARK = "is_kept_by_paredown"


def keep(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Mark every module whose name, or that of a module around it, matches one of `patterns`; earlier marks go.

    Returns:
        The patterns that match no module with weights.

    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()))
    >>> keep(network, ["1", "2.*"]), list(kept(network))
    (['2.*'], ['1', '1.0', '1.1'])
    """
    for module in model.modules():
        module.__dict__.pop(_MARK, None)
    named = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if name]
    missed = []
    for pattern in patterns:
        found = [module for name, module in named if fnmatchcase(name, pattern)]
        for module in found:
            for part in module.modules():
                part.__dict__[_MARK] = True
        if not any(map(has_weights, found)):
            missed.append(pattern)
    return missed


def is_kept(module: nn.Module) -> bool:
    """Whether a module is marked."""
    return _MARK in module.__dict__


def kept(model: nn.Module) -> dict[str, str]:
    """Return the reason by the name of every marked module."""
    return {name: KEPT for name, module in model.named_modules() if is_kept(module)}
