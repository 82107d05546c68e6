"""The part of the teacher's last feature map that is lost for good without some blocks: the error after a light repair.

The map is the one that pooling reads, and the error its mean square as a share of the map's variance: 0 is no loss, 1
the loss of the constant mean.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor, fx, nn

from methods.base import ScoreError
from methods.hooks import hooked
from methods.network.graph import UNTRACEABLE, graph_of, has_weights, passes_on, replace, replaced
from methods.practise.blocks import closings, drop
from methods.training.layout import training_layout
from methods.training.objective import classifier_name, last_map, tapped

Repair: TypeAlias = Literal["sequential_ls", "adaptor_sgd", "drop"]

RIDGE, FEW_IMAGES, RIDGE_OF_FEW = 1e-3, 100, 0.1
"""A fit's pull towards the identity, as a share of the channels' mean variance; more of it below `FEW_IMAGES`."""

MOST_BYTES = 1 << 30
"""Memory for the teacher's maps: 512 images of 32 x 32 through a ResNet-56, 50 of 224 x 224 through a ResNet-50."""

BATCH = 64
"""Images in a step of `adaptor_sgd`, and those whose maps a fit holds in float64 at a time."""


@dataclass(frozen=True)
class Reference:
    """The teacher's maps of the calibration images `(n, c, h, w)`, and the place where students are compared with it.

    `teacher` is a copy in eval mode and `blocks` are its removable blocks, as in `Blocks.removable`. `maps` holds, in
    the order they are computed, the output of every block up to `features`, the map to reproduce; blocks that change
    their input's shape are among them, parts that read more than one map are not. `tap` names the module that puts out
    `features` (None: the `classifier` reads them).
    """

    teacher: nn.Module
    images: Tensor
    blocks: Mapping[str, str]
    maps: Mapping[str, Tensor]
    tap: str | None
    classifier: str
    features: Tensor

    def without(self, dropped: Sequence[str]) -> nn.Module:
        """A copy of the teacher, in eval mode, that has lost these blocks."""
        student = copy.deepcopy(self.teacher)
        drop(student, {name: self.blocks[name] for name in dropped})
        return student


@torch.no_grad()
def observe(teacher: nn.Module, images: Tensor, blocks: Mapping[str, str]) -> Reference:
    """The reference for `blocks` on as many of `images` as `MOST_BYTES` of maps allow; the teacher is left untouched.

    Raises:
        ScoreError: the last feature map holds NaN or infinity, or does not vary.
    """
    teacher = copy.deepcopy(teacher).eval()
    tap = last_map(teacher, images[:1])
    names = list(_boundaries(teacher, blocks))
    one, _ = _maps(teacher, images[:1], names, tap)
    images = images[: max(BATCH, MOST_BYTES // max(1, sum(output.nbytes for output in one.values())))]
    maps, features = _maps(teacher, images, names, tap)
    if not bool(torch.isfinite(features).all()) or _variance(features) == 0:
        raise ScoreError(
            "the last feature map of the calibration images holds NaN or infinity, or does not vary; "
            "expected numbers that differ; retrain the teacher or check the data"
        )
    return Reference(teacher, images, blocks, maps, tap, classifier_name(teacher), features)


def _maps(
    teacher: nn.Module, images: Tensor, names: Sequence[str], tap: str | None
) -> tuple[dict[str, Tensor], Tensor]:
    """The outputs of those modules `names` that run once and read one map, before the features; and the features."""
    calls: list[tuple[str, Tensor, int]] = []

    def keep(name: str, _: nn.Module, inputs: tuple[object, ...], named: Mapping[str, object], output: object) -> None:
        if len(inputs) == 1 and not named and isinstance(output, Tensor) and len(output) == len(images):
            calls.append((name, output.clone(), len(features)))

    hooks = (teacher.get_submodule(name).register_forward_hook(partial(keep, name), with_kwargs=True) for name in names)
    with hooked(hooks), tapped(teacher, tap, classifier_name(teacher)) as features:
        teacher(images.clone())
    runs = Counter(name for name, *_ in calls)
    return {name: output for name, output, taps in calls if runs[name] == 1 and taps < len(features)}, features[-1]


def recoverability(
    reference: Reference, dropped: Sequence[str], repair: Repair = "sequential_ls", *, steps: int = 50, seed: int = 0
) -> float:
    """The error left without the blocks `dropped`, after the repair: at least 0, and low where nothing is lost.

    - "sequential_ls": see `sequential_error`, closed form and in seconds.
    - "adaptor_sgd": see `adaptor_error`, the paper's, in `steps` steps whose batches follow `seed`.
    - "drop": no repair.

    Raises:
        ScoreError: the error is not a number.
        ValueError: no such repair.

    Source: PRACTISE (arXiv 2202.07861): the recoverability of a block.
    Differs: divided by the variance of the teacher's map, so that networks compare. The paper divides by the latency
    saved instead, to rank blocks; here savings are limits, see `methods.practise.selection`.
    """
    if repair not in get_args(Repair):
        raise ValueError(
            f"repair is {repair!r}, expected one of {', '.join(get_args(Repair))}; sequential_ls is the default"
        )
    if repair == "sequential_ls":
        error = sequential_error(reference, dropped)
    else:
        error = adaptor_error(reference, dropped, steps=steps if repair == "adaptor_sgd" else 0, seed=seed)
    if not np.isfinite(error):
        raise ScoreError(
            f"without {', '.join(dropped)} the last feature map's error is {error} after {repair}, expected a number; "
            "check the teacher's weights, or score by sequential_ls"
        )
    return error


@torch.no_grad()
def sequential_error(reference: Reference, dropped: Sequence[str], *, ridge: float | None = None) -> float:
    """The error when the student's map is fitted to the teacher's at every block from the first dropped one on.

    Each fit is the affine map of channels of `fit_channels`, and the next block reads its result. If the teacher's map
    has no negative entry, as behind a ReLU, negative ones are cleared, which only lowers the error.
    `ridge` defaults to `RIDGE`, or to `RIDGE_OF_FEW` for few images.

    Source: none; it stands in for the paper's training of 1x1 convolutions, at about the cost of one of its steps.
    """
    if ridge is None:
        ridge = RIDGE if len(reference.images) >= FEW_IMAGES else RIDGE_OF_FEW
    others = closings({name: reference.blocks[name] for name in dropped})
    is_past = False
    for name, target in reference.maps.items():
        is_past = is_past or name in dropped
        if not is_past:
            others[name] = _TeacherMap(target)
            continue
        block = reference.teacher.get_submodule(name)
        fitted = _Fitted(target, _channel_axis(block, target), ridge)
        others[name] = nn.Sequential(others.get(name, block), fitted)
    with replaced(reference.teacher, others):
        return _error(reference, _features(reference, reference.teacher, reference.images))


def adaptor_error(reference: Reference, dropped: Sequence[str], *, steps: int, seed: int) -> float:
    """The error after `steps` steps of SGD on 1x1 adaptors around the dropped blocks, all else frozen.

    The student stays in eval mode, so its norms keep the teacher's statistics. Every block meets the same batches,
    drawn from the calibration images by `seed`. No step is no repair.

    Source: PRACTISE (arXiv 2202.07861) and its code: learning rate 0.02, momentum 0.9, weight decay 1e-4, a tenth of
    the rate from 40 % and a hundredth from 80 % of the steps on, 2,000 steps of 64 images, error on the same images.
    Differs: calibration images are not augmented; for the adaptors' places see `add_adaptors`.
    """
    student = reference.without(dropped).requires_grad_(False)
    adaptors = add_adaptors(student, dropped) if steps else []
    if adaptors:
        student.to(memory_format=training_layout(student, reference.images.device))
        optimizer = torch.optim.SGD([a.weight for a in adaptors], lr=0.02, momentum=0.9, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, max(1, int(0.4 * steps)))
        for batch in _batches(len(reference.images), steps, seed):
            features = _features(reference, student, reference.images[batch])
            loss = nn.functional.mse_loss(features, reference.features[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        parts = [_features(reference, student, images) for images in _chunks(reference.images)]
    return _error(reference, torch.cat(parts))


def fit_channels(source: Tensor, target: Tensor, *, ridge: float) -> tuple[Tensor, Tensor]:
    """The affine map of channels that brings `source` closest to `target`: `source @ weight + bias`.

    With G the centred Gram matrix of the source and l = `ridge` x mean(diag G), it minimises the squared error plus
    l |weight - identity|^2: `weight = (G + l I)^-1 (X'Y + l I)`.

    Args:
        source, target: `(n, ..., c)`, with the channels last.

    Returns:
        `weight` `(c, c)` and `bias` `(c,)`, float64.

    >>> x = torch.tensor([[0.0], [1.0], [2.0]])
    >>> [float(part) for part in fit_channels(x, 3 * x + 1, ridge=0.0)]
    [3.0, 1.0]
    """
    positions = tuple(range(source.ndim - 1))
    centre, aim = (tensor.mean(positions, dtype=torch.float64) for tensor in (source, target))
    channels = len(centre)
    gram, cross = torch.zeros(2, channels, channels, dtype=torch.float64, device=source.device)
    for x, y in zip(_chunks(source), _chunks(target), strict=True):
        x, y = (x.double() - centre).reshape(-1, channels), (y.double() - aim).reshape(-1, channels)
        gram += x.T @ x
        cross += x.T @ y
    pull = (ridge * gram.diagonal().mean()).clamp(min=torch.finfo(torch.float64).tiny) * torch.eye(channels).to(gram)
    weight = torch.linalg.solve(gram + pull, cross + pull)
    return weight, aim - centre @ weight


def add_adaptors(student: nn.Module, dropped: Sequence[str]) -> list[nn.Conv2d | nn.Linear]:
    """Put an identity of channels behind each layer that writes, and before each that reads, a dropped block's input.

    The writers are found by walking back from the dropped block through additions, norms, activations and dropout, the
    readers by walking on. Depthwise and grouped layers get none. They are changed in place, the adaptors returned.

    Raises:
        ScoreError: `torch.fx` cannot trace the network.

    Source: PRACTISE (arXiv 2202.07861): adaptors that could be merged into the layers beside them.
    Differs: found in the graph, while the authors' code lists them per family, and on bottlenecks takes the 3x3
    convolution for the writer.
    """
    try:
        graph = graph_of(student)
    except UNTRACEABLE as error:
        raise ScoreError(
            f"torch.fx cannot trace the network ({type(error).__name__}: {error}), expected a forward without choices "
            "that depend on values; score by sequential_ls"
        ) from error
    modules = dict(student.named_modules())
    places = [node for node in graph.nodes if node.op == "call_module" and node.target in dropped]
    writers = _nearest(places, lambda node: node.all_input_nodes, modules)
    readers = _nearest(places, lambda node: node.users, modules)
    adaptors = []
    for name in dict.fromkeys(writers + readers):
        layer = modules[name]
        before = [_identity(layer, layer.weight.shape[1])] if name in readers else []
        after = [_identity(layer, layer.weight.shape[0])] if name in writers else []
        replace(student, name, nn.Sequential(*before, layer, *after))
        adaptors += before + after
    return adaptors


_PASSING = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.modules.dropout._DropoutNd,
    nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm,
)  # fmt: skip


def _nearest(
    places: Sequence[fx.Node], neighbours: Callable[[fx.Node], Iterable[fx.Node]], modules: Mapping[str, nn.Module]
) -> list[str]:
    """The layers met first on each way from the `places` by the steps of `neighbours`."""
    found: dict[str, None] = {}
    seen, rest = set(places), list(places)
    while rest:
        for node in neighbours(rest.pop()):
            module = modules.get(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
                found[str(node.target)] = None
            elif node not in seen and (isinstance(module, _PASSING) or passes_on(node)):
                seen.add(node)
                rest.append(node)
    return list(found)


def _identity(layer: nn.Module, channels: int) -> nn.Conv2d | nn.Linear:
    """A layer of the same kind that passes `channels` channels on."""
    is_conv = isinstance(layer, nn.Conv2d)
    adaptor = nn.Conv2d(channels, channels, 1, bias=False) if is_conv else nn.Linear(channels, channels, bias=False)
    nn.init.dirac_(adaptor.weight) if is_conv else nn.init.eye_(adaptor.weight)
    return adaptor.to(next(layer.parameters()))


class _TeacherMap(nn.Module):
    """The teacher's map, for any input: it stands for everything up to a block's output."""

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, _: Tensor) -> Tensor:
        return self.kept.clone()


class _Fitted(nn.Module):
    """The input after the affine map that brings it closest to `target`; unchanged if it is the target."""

    def __init__(self, target: Tensor, axis: int, ridge: float) -> None:
        super().__init__()
        self.target, self.axis, self.ridge = target, axis, ridge

    def forward(self, x: Tensor) -> Tensor:
        if torch.equal(x, self.target):
            return x
        x, target = x.movedim(self.axis, -1), self.target.movedim(self.axis, -1)
        weight, bias = fit_channels(x, target, ridge=self.ridge)
        fitted = (x @ weight.to(x) + bias.to(x)).movedim(-1, self.axis)
        return fitted.clamp(min=0) if bool((target >= 0).all()) else fitted


def _boundaries(model: nn.Module, blocks: Mapping[str, str], prefix: str = "") -> Iterator[str]:
    """The blocks, and the modules beside them or beside their parents that have weights and children."""
    for name, child in model.named_children():
        path = f"{prefix}{name}"
        if any(block.startswith(f"{path}.") for block in blocks):
            yield from _boundaries(child, blocks, f"{path}.")
        elif path in blocks or (has_weights(child) and any(True for _ in child.children())):
            yield path


def _channel_axis(block: nn.Module, output: Tensor) -> int:
    """Axis 1 of a map that some convolution made, else the last, as of tokens `(n, t, c)` or `(n, h, w, c)`."""
    is_map = output.ndim == 4 and any(isinstance(module, nn.Conv2d) for module in block.modules())
    return 1 if is_map else output.ndim - 1


def _features(reference: Reference, student: nn.Module, images: Tensor) -> Tensor:
    """The student's features, taken where the teacher's were."""
    with tapped(student, reference.tap, reference.classifier) as seen:
        student(images.clone())
    return seen[-1]


def _error(reference: Reference, features: Tensor) -> float:
    wanted = reference.features
    return float((features.double() - wanted.double()).square().mean()) / _variance(wanted)


def _variance(features: Tensor) -> float:
    return float(features.double().var(correction=0))


def _chunks(images: Tensor) -> list[Tensor]:
    return [images[start : start + BATCH] for start in range(0, len(images), BATCH)]


def _batches(images: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """The image indices of each step: shuffled rounds through all images."""
    random = np.random.default_rng(seed)
    size = min(BATCH, images)
    starts = range(0, images - size + 1, size)
    orders = (random.permutation(images) for _ in range(-(-steps // len(starts))))
    yield from islice((order[start : start + size] for order in orders for start in starts), steps)
