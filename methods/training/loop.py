"""The one training loop: it trains zoo teachers and recovers students, with labels, with a teacher, or with both."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from itertools import compress
from operator import not_

import numpy as np
import torch
from torch import Tensor, nn

from methods.training import distributed
from methods.training.layout import training_layout
from methods.training.objective import objective_of
from methods.training.recipe import Objective, Recipe, Samples


def train(
    model: nn.Module,
    data: Samples,
    recipe: Recipe,
    seed: int,
    teacher: nn.Module | None = None,
    *,
    objective: Objective | None = None,
    undecayed: Iterable[nn.Parameter] = (),
) -> Iterator[int]:
    """Train `model` in place on its own device; yields the steps done, with the model in eval mode.

    Batches, augmentation and dropout follow `seed` alone; without labels nothing is dropped, since the student is to
    meet the teacher's features as they are. Zero steps train nothing and yield nothing. `objective` replaces the
    recipe's loss; the `undecayed` parameters are kept from weight decay, as norms and biases are. Frozen parameters
    stay as they are; where the loss depends on no other, the training ends at once.

    Several processes that do the same share every batch, and all end up with the network that one would have: see
    `methods.training.distributed`.

    Raises:
        FloatingPointError: the loss became NaN or infinite; the message names step and learning rate.
        ValueError: a batch has fewer images than there are processes.
    """
    if recipe.steps == 0:
        return
    size = _batch_size(data, recipe)
    device = next(model.parameters()).device
    layout = training_layout(model, device)
    model.to(memory_format=layout)
    distributed.align(model)
    optimizer, schedule = _optimizer(model, recipe, undecayed)
    objective = objective or objective_of(model, teacher, recipe)
    torch.manual_seed(distributed.own_seed(seed))
    _train_mode(model, recipe)
    for step, (images, labels) in enumerate(_batches(data, recipe, seed, size), start=1):
        images = images.to(device, memory_format=layout)
        labels = distributed.joined(labels.to(device), size)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16")
        with distributed.joint_norms(), autocast:
            loss = objective(images, labels)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the training loss became {loss.item()} at step {step} of {recipe.steps}; "
                f"expected a finite number; lower the learning rate ({recipe.learning_rate}) or check the data"
            )
        if not loss.requires_grad:
            model.eval()
            yield recipe.steps
            return
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        distributed.average_gradients(model)
        optimizer.step()
        schedule.step()
        if step % recipe.report_every == 0 or step == recipe.steps:
            model.eval()
            yield step
            _train_mode(model, recipe)
    model.eval()


def _train_mode(model: nn.Module, recipe: Recipe) -> None:
    """Put `model` in train mode; without labels, modules that drop at random stay in eval mode."""
    model.train()
    for module in () if recipe.labels else model.modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if kinds & {"_DropoutNd", "StochasticDepth", "DropPath"}:  # of torch, torchvision and timm
            module.eval()


def recover(student: nn.Module, teacher: nn.Module, data: Samples, recipe: Recipe, seed: int) -> Iterator[int]:
    """Train `student` in place towards the labels and its teacher; the recovery every method shares."""
    return train(student, data, recipe, seed, teacher)


def _batch_size(data: Samples, recipe: Recipe) -> int:
    """Return the number of images in each step: fewer than asked for if there are no more."""
    size = min(recipe.batch_size, len(data), recipe.images or len(data))
    if size < distributed.processes():
        raise ValueError(
            f"a batch has {size} images for {distributed.processes()} processes, expected one for each at least; "
            "raise recovery.batch_size or recovery.images, or lower recovery.workers"
        )
    return size


def _batches(data: Samples, recipe: Recipe, seed: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this process's part of `recipe.steps` shuffled, augmented batches of `size` images.

    A small set serves several times.
    """
    order_stream, augment_stream, image_stream = np.random.SeedSequence(seed).spawn(3)
    order, augment = np.random.default_rng(order_stream), np.random.default_rng(augment_stream)
    images = np.arange(len(data))
    if recipe.images is not None and recipe.images < len(data):
        images = np.random.default_rng(image_stream).choice(images, recipe.images, replace=False)
    step = 0
    while True:
        permutation = order.permutation(images)
        for start in range(0, len(images) - size + 1, size):
            if step == recipe.steps:
                return
            step += 1
            yield data.batch(permutation[start : start + size], augment, distributed.part(size))


def _optimizer(
    model: nn.Module, recipe: Recipe, undecayed: Iterable[nn.Parameter]
) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.OneCycleLR]:
    optimizer = torch.optim.SGD(
        _parameter_groups(model, recipe.weight_decay, {id(parameter) for parameter in undecayed}),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.momentum > 0,
    )
    warmup = recipe.warmup if recipe.warmup * recipe.steps > 1 else 0.0  # one step of it: torch would divide by zero
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, recipe.steps, pct_start=warmup, cycle_momentum=False
    )


def _parameter_groups(model: nn.Module, weight_decay: float, undecayed: Collection[int]) -> list[dict[str, object]]:
    """Group the parameters by weight decay: only matrices and filters decay, but for the `undecayed` (by id)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    is_decayed = [p.ndim > 1 and id(p) not in undecayed for p in trained]
    return [
        {"params": list(compress(trained, is_decayed)), "weight_decay": weight_decay},
        {"params": list(compress(trained, map(not_, is_decayed))), "weight_decay": 0.0},
    ]
