"""The losses of recovery: the labels', and those by which a student mimics its teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.hooks import hooked
from methods.training import distributed
from methods.training.recipe import Objective, Recipe


def instance_losses(output: Tensor, labels: Tensor, target: Tensor | None, recipe: Recipe) -> Tensor:
    """Return the loss `(n,)` of each image, as the recipe weighs its label and the teacher's outputs `target`.

    `output`, `target` and `labels` are `(n, ...)`, as the recipe's task has them; without `target` only labels count.
    """
    task, share = recipe.task, recipe.distill if recipe.labels else 1.0
    if target is None or share == 0:
        return task.losses(output, labels)
    mimicry = task.mimicry(output, target, recipe.temperature)
    return (1 - share) * task.losses(output, labels) + share * mimicry if recipe.labels else mimicry


def classifier_name(model: nn.Module) -> str:
    """Return the dotted name of the last linear layer, or of the last convolution in a network without one."""
    for kind in (nn.Linear, nn.Conv2d):
        names = [name for name, module in model.named_modules() if isinstance(module, kind)]
        if names:
            return str(names[-1])
    raise ValueError("the network has neither a Linear nor a Conv2d layer, so it has no classifier to mimic")


def last_map(model: nn.Module, images: Tensor) -> str | None:
    """Return the module that puts out the last feature map, if nothing with weights but the classifier follows it.

    Pooling reads that map: a tensor `(n, ...)` of more than two axes and more than one position.
    """
    calls: list[tuple[str, bool, bool]] = []

    def recorder(name: str) -> Callable[[nn.Module, object, object], None]:
        def record(module: nn.Module, _: object, output: object) -> None:
            is_map = isinstance(output, Tensor) and output.ndim > 2 and output[0].numel() > max(output.shape[1:])
            calls.append((name, is_map, any(True for _ in module.parameters(recurse=False))))

        return record

    hooks = (module.register_forward_hook(recorder(name)) for name, module in model.named_modules() if name)
    with hooked(hooks), torch.no_grad():
        model(images.clone())
    classifier = classifier_name(model)
    for name, is_map, has_weights in reversed(calls):
        if is_map:
            return name
        if has_weights and name != classifier:
            return None
    return None


@contextmanager
def tapped(model: nn.Module, tap: str | None, classifier: str) -> Iterator[list[Tensor]]:
    """Collect the outputs of the module `tap` or, without one, the inputs of the classifier.

    If the module runs several times, as an activation shared by all layers does, the last entry counts.
    """
    seen: list[Tensor] = []
    if tap is None:
        module = model.get_submodule(classifier)
        handle = module.register_forward_pre_hook(
            lambda _, inputs, named: seen.append((*inputs, *named.values())[0]), with_kwargs=True
        )
    else:
        handle = model.get_submodule(tap).register_forward_hook(lambda _, __, output: seen.append(output))
    with handle:
        yield seen


def objective_of(model: nn.Module, teacher: nn.Module | None, recipe: Recipe) -> Objective:
    """Build the loss of one batch as the recipe says."""
    taps: list[str | None] = []

    def from_outputs(images: Tensor, labels: Tensor) -> Tensor:
        target = None
        if teacher is not None and (recipe.distill > 0 or not recipe.labels):
            with torch.no_grad():
                target = distributed.joined(teacher(images.clone()), len(labels))
        return instance_losses(distributed.joined(model(images), len(labels)), labels, target, recipe).mean()

    def from_features(images: Tensor, labels: Tensor) -> Tensor:
        assert teacher is not None
        if not taps:
            taps.append(last_map(teacher, images[:1]))
        classifier = classifier_name(teacher)
        with torch.no_grad(), tapped(teacher, taps[0], classifier) as wanted:
            target = teacher(images.clone())
        with tapped(model, taps[0], classifier) as given:
            output = model(images)
        is_whole = type(model.get_submodule(classifier)) is type(teacher.get_submodule(classifier))
        is_mimicked = is_whole and given[-1].shape == wanted[-1].shape
        ours, theirs = (given[-1], wanted[-1]) if is_mimicked else (output, target)
        ours, theirs = distributed.joined(ours, len(labels)), distributed.joined(theirs, len(labels))
        if is_mimicked:
            return F.mse_loss(ours, theirs) / theirs.var()
        return instance_losses(ours, labels, theirs, recipe).mean()

    return from_outputs if teacher is None or recipe.labels else from_features
