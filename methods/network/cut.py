"""The cut itself: the choice of channels that stay, and the smaller network that holds only those."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from methods.base import ScoreError
from methods.network.groups import Axis, ChannelGroup, Member

CRITERIA = ("l1", "l2", "bn_gamma", "fpgm")
"""Ways to score a filter: its L1 or L2 norm, the scale of the norm behind it, its distance to the others (FPGM)."""

PER_CHANNEL = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.PReLU)
"""Modules that treat each channel alone, so that dropping one leaves the others as they were."""


def cut(
    model: nn.Module, groups: Sequence[ChannelGroup], widths: Mapping[str, int], criterion: str = "l1"
) -> nn.Module:
    """Cut every group of `groups` to its width in `widths`, in a copy of `model`; a group not named keeps all.

    Each group keeps the channels (runs of `multiple` channels) of the highest `channel_scores`, in their old order,
    ties to the lower index; where every width is full the copy holds the same values. The model is untouched.

    Raises:
        ValueError: a width is of an unknown or fixed group, out of range, or off the group's multiple.
    """
    return cut_to(model, groups, kept_channels(model, groups, widths, criterion))


def cut_to(
    model: nn.Module, groups: Sequence[ChannelGroup], kept: Mapping[str, np.ndarray], *, shares: bool = False
) -> nn.Module:
    """Copy `model` so that each group holds only its `kept` channels, given as rising indices by group name.

    A copy that `shares` has the model's own parameters where nothing was cut from them: quick to make, to be read only.
    """
    student = copy.deepcopy(model, {id(one): one for one in model.parameters()} if shares else None)
    for name, sides in _stays(model, groups, kept).items():
        for side, index in sides.items():
            if isinstance(side, int):
                _keep(*_held(student, name), side, torch.from_numpy(index))
            elif side == "count":
                setattr(*_held(student, name), len(index))
            else:
                _slice(student.get_submodule(name), side, torch.from_numpy(index))
    return student


def outputs_kept(
    model: nn.Module, groups: Sequence[ChannelGroup], kept: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return, by module, the rising indices of what it still puts out, for those that lose some outputs to `cut_to`."""
    return {name: sides["out"] for name, sides in _stays(model, groups, kept).items() if "out" in sides}


def _stays(
    model: nn.Module, groups: Sequence[ChannelGroup], kept: Mapping[str, np.ndarray]
) -> dict[str, dict[Axis, np.ndarray]]:
    """Return, by module and side, the rising indices of the entries that stay, where some do not."""
    masks: dict[str, dict[Axis, np.ndarray]] = {}
    for group in groups:
        if group.name not in kept or len(kept[group.name]) == group.width:
            continue
        for member in group.members:
            side = "out" if member.axis == "norm" else member.axis
            whole = np.ones(_length(model, member.module, side), dtype=bool)
            mask = masks.setdefault(member.module, {}).setdefault(side, whole)
            mask[entries(member, np.setdiff1d(np.arange(group.width), kept[group.name]))] = False
    return {name: {side: np.flatnonzero(mask) for side, mask in sides.items()} for name, sides in masks.items()}


def kept_channels(
    model: nn.Module, groups: Sequence[ChannelGroup], widths: Mapping[str, int], criterion: str
) -> dict[str, np.ndarray]:
    """Choose the channels that stay, as rising indices by group name, for every group that loses some."""
    _check(groups, widths, criterion)
    kept = {}
    for group in groups:
        width = widths.get(group.name, group.width)
        if width < group.width:
            runs = channel_scores(model, group, criterion).reshape(-1, group.multiple)
            best = np.argsort(-runs.sum(1), kind="stable")[: width // group.multiple]
            kept[group.name] = entries(Member("", "out", 0, group.multiple), np.sort(best))
    return kept


def channel_scores(model: nn.Module, group: ChannelGroup, criterion: str) -> np.ndarray:
    """Score each channel of `group`, `(width,)`: the higher, the more it is worth keeping.

    It is the sum over the layers that produce the group of each filter's score divided by that layer's mean, so that no
    layer of a residual trunk outvotes the rest. "bn_gamma" sums over the group's norms instead, and falls back to "l1"
    where no norm has a scale.

    Raises:
        ScoreError: a score is not finite.

    Source: ITPruner (arXiv 2108.08532), released code: L1 norm. FPGM: He et al., CVPR 2019, equation 4.
    Differs: the released code lets every layer of a group choose its own channels; here the group chooses once.
    """
    chosen: list[tuple[Member, Tensor]] = []
    if criterion == "bn_gamma":
        norms = [(m, model.get_submodule(m.module)) for m in group.members if m.axis == "norm" and m.columns == 1]
        chosen = [(m, _weight(norm).abs()) for m, norm in norms if m.params and not isinstance(norm, nn.PReLU)]
    if not chosen:
        rule = "l1" if criterion == "bn_gamma" else criterion
        chosen = [(m, _filters(model.get_submodule(m.module), rule)) for m in group.members if m.axis == "out"]
    total = np.zeros(group.width)
    for member, values in chosen:
        part = values.double().cpu().numpy()[entries(member, np.arange(group.width))]
        part = part.reshape(group.width, member.columns).sum(1)
        total += part / (part.mean() or 1.0)
    if not np.isfinite(total).all():
        raise ScoreError(
            f"criterion {criterion!r} gives a value that is not finite in channel group {group.name!r}, but needs "
            "finite weights; check the network for NaN or infinity"
        )
    return total


def entries(member: Member, channels: np.ndarray) -> np.ndarray:
    """Return the entries of the member's axis that `channels` own, in the order of `channels`."""
    return np.asarray(member.start + channels[:, None] * member.columns + np.arange(member.columns)).ravel()


def _filters(layer: nn.Module, criterion: str) -> Tensor:
    """Score each filter of a conv or linear, `(out,)`."""
    weight = _weight(layer).flatten(1)
    if criterion == "fpgm":
        return torch.cdist(weight, weight).sum(1)
    return weight.abs().sum(1) if criterion == "l1" else weight.square().sum(1).sqrt()


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module.weight, Tensor)
    return module.weight.detach()


def _length(model: nn.Module, name: str, side: Axis) -> int:
    """Count the entries on one side of what `name` is in `model`; a count has as many as it says."""
    if side == "in" or side == "out":
        return axis_length(model.get_submodule(name), side)
    held = getattr(*_held(model, name))
    return int(held if side == "count" else held.shape[side])


def _held(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds what has this dotted name, and the last part of the name."""
    owner, _, attribute = name.rpartition(".")
    return model.get_submodule(owner), attribute


def axis_length(module: nn.Module, side: str) -> int:
    """Count the channels on one side of a module that can be cut: "in" or "out", which are the same for a norm."""
    match module:
        case nn.Conv2d():
            return module.in_channels if side == "in" else module.out_channels
        case nn.Linear():
            return module.in_features if side == "in" else module.out_features
        case nn.PReLU():
            return module.num_parameters
    assert isinstance(module, nn.modules.batchnorm._NormBase)
    return module.num_features


def _slice(module: nn.Module, side: str, index: Tensor) -> None:
    """Keep only the entries `index` (rising) of one side of `module`, in place."""
    size = len(index)
    match module:
        case nn.Conv2d() if side == "in":
            module.in_channels = size
        case nn.Conv2d() if module.groups > 1:
            module.groups = size * module.groups // module.out_channels
            module.in_channels = module.out_channels = size
        case nn.Conv2d():
            module.out_channels = size
        case nn.Linear() if side == "in":
            module.in_features = size
        case nn.Linear():
            module.out_features = size
        case nn.PReLU():
            module.num_parameters = size
        case nn.modules.batchnorm._NormBase():
            module.num_features = size
    if side == "in":
        _keep(module, "weight", 1, index)
        return
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(getattr(module, name, None), Tensor):
            _keep(module, name, 0, index)


def _keep(module: nn.Module, name: str, axis: int, index: Tensor) -> None:
    old = getattr(module, name)
    new = old.detach().index_select(axis, index.to(old.device))
    setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)


def _check(groups: Sequence[ChannelGroup], widths: Mapping[str, int], criterion: str) -> None:
    if criterion not in CRITERIA:
        raise ValueError(f"criterion {criterion!r} is unknown; expected one of {', '.join(CRITERIA)}; choose one")
    known = {group.name: group for group in groups}
    for name, width in widths.items():
        group = known.get(name)
        if group is None:
            raise ValueError(f"there is no channel group {name!r} among the {len(known)} given; take names from them")
        if width != group.width and group.fixed is not None:
            raise ValueError(f"channel group {name!r} must keep {group.width} channels, not {width}: {group.fixed}")
        if not 0 < width <= group.width or width % group.multiple:
            raise ValueError(
                f"channel group {name!r} cannot have {width} channels; expected a multiple of {group.multiple} from "
                f"{group.multiple} to {group.width}; take a width from `levels`"
            )
