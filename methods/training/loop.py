"""The one training loop: it trains zoo teachers and recovers students, with labels, with a teacher, or with both."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress
from operator import not_
from typing import Literal, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.training import distributed

Metric: TypeAlias = Callable[[Tensor, Tensor], float]
"""Logits `(n, classes)` and labels `(n,)` to a scalar to maximise."""


Objective: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Images `(m, c, h, w)` and labels `(n,)` of a batch to the loss of one step; it is called once per step, in order.

The images are this process's part of the batch, the labels those of all of it, as the loss is: see
`methods.training.distributed`.
"""


Chance: TypeAlias = np.random.Generator | None
"""What augmentation is drawn from, where there is any."""

WHOLE = slice(None)


class Samples(Protocol):
    """Labelled images that can be indexed in batches."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray, augment: Chance = None, part: slice = WHOLE) -> tuple[Tensor, Tensor]:
        """Inputs `(n, c, h, w)` float32 and labels `(n,)` int64; randomly augmented where a generator is given.

        Of these only a `part` may be asked for: it is what it would be among all of them.
        """
        ...


@dataclass(frozen=True)
class Recipe:
    """How to train: SGD with Nesterov momentum on a one-cycle schedule.

    `distill` is the weight of the teacher's softened outputs beside the labels, 0 to 1. Without `labels` the student
    mimics the teacher alone: its last feature map where the cut left that and the classifier whole, its outputs
    otherwise. `images` is how many training images recovery may see, drawn by the seed (None: all of them).
    `report_every` is the number of steps between two evaluations; the last step is always one.
    """

    steps: int
    batch_size: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.1
    distill: float = 0.5
    temperature: float = 4.0
    labels: bool = True
    images: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    report_every: int = 100


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
    """Trains `model` in place on its own device; yields the steps done, with the model in eval mode.

    Batches, augmentation and dropout follow `seed` alone; without labels nothing is dropped, since the teacher's
    features are to be met as they are. Zero steps train nothing and yield nothing. `objective` replaces the recipe's
    loss; the `undecayed` parameters are kept from weight decay, as norms and biases are.

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
    model.to(memory_format=torch.channels_last)
    distributed.align(model)
    optimizer, schedule = _optimizer(model, recipe, undecayed)
    objective = objective or _objective(model, teacher, recipe)
    torch.manual_seed(distributed.own_seed(seed))
    _train_mode(model, recipe)
    for step, (images, labels) in enumerate(_batches(data, recipe, seed, size), start=1):
        images = images.to(device, memory_format=torch.channels_last)
        labels = distributed.joined(labels.to(device), size)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16")
        with distributed.joint_norms(), autocast:
            loss = objective(images, labels)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the training loss became {loss.item()} at step {step} of {recipe.steps}; "
                f"expected a finite number; lower the learning rate ({recipe.learning_rate}) or check the data"
            )
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
    """Puts `model` in train mode; what drops at random stays as in eval mode where there are no labels."""
    model.train()
    for module in () if recipe.labels else model.modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if kinds & {"_DropoutNd", "StochasticDepth", "DropPath"}:  # of torch, torchvision and timm
            module.eval()


def recover(student: nn.Module, teacher: nn.Module, data: Samples, recipe: Recipe, seed: int) -> Iterator[int]:
    """Trains `student` in place towards the labels and its teacher; the recovery every method shares."""
    return train(student, data, recipe, seed, teacher)


@torch.no_grad()
def recalibrate(model: nn.Module, images: Tensor, batch_size: int = 256) -> None:
    """Re-estimates every batch norm's running statistics of `model`, in place, as plain averages over `images`.

    They are averages over equal batches, none of which is a single image: that has no variance.
    """
    if len(images) < 2:
        return
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    device = next(model.parameters()).device
    for batch in torch.tensor_split(images, -(-len(images) // batch_size)):
        model(batch.to(device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


@torch.no_grad()
def evaluate(model: nn.Module, data: Samples, metric: Metric, batch_size: int = 512) -> float:
    """`metric` of `model` in eval mode over all of `data`; several processes that do the same share the images.

    Raises:
        FloatingPointError: a logit is NaN, which an argmax would take for the first class.
    """
    model.eval()
    device = next(model.parameters()).device
    logits, labels = [], []
    for indices in np.array_split(np.arange(len(data)), max(1, -(-len(data) // batch_size))):
        images, truth = data.batch(indices, part=distributed.part(len(indices)))
        logits.append(distributed.joined(model(images.to(device)), len(indices)).float().cpu())
        labels.append(distributed.joined(truth.to(device), len(indices)).cpu())
    if any(bool(part.isnan().any()) for part in logits):
        raise FloatingPointError("the network returned NaN logits; expected numbers; lower the learning rate")
    return float(metric(torch.cat(logits), torch.cat(labels)))


def top1(logits: Tensor, labels: Tensor) -> float:
    """The share of rows of `logits` `(n, classes)` whose largest entry is at `labels` `(n,)`.

    >>> top1(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 1]))
    0.5
    """
    return float((logits.argmax(1) == labels).double().mean())


def _batch_size(data: Samples, recipe: Recipe) -> int:
    """How many images each step sees: fewer than asked for where there are no more."""
    size = min(recipe.batch_size, len(data), recipe.images or len(data))
    if size < distributed.processes():
        raise ValueError(
            f"a batch has {size} images for {distributed.processes()} processes, expected one for each at least; "
            "raise recovery.batch_size or recovery.images, or lower recovery.workers"
        )
    return size


def _batches(data: Samples, recipe: Recipe, seed: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's part of `recipe.steps` shuffled, augmented batches of `size` images.

    A small set is gone through as often as it takes.
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
    """Weight decay for matrices and filters only: norms, biases and the `undecayed` (by id) are left free."""
    trained = [p for p in model.parameters() if p.requires_grad]
    is_decayed = [p.ndim > 1 and id(p) not in undecayed for p in trained]
    return [
        {"params": list(compress(trained, is_decayed)), "weight_decay": weight_decay},
        {"params": list(compress(trained, map(not_, is_decayed))), "weight_decay": 0.0},
    ]


def instance_losses(output: Tensor, labels: Tensor, target: Tensor | None, recipe: Recipe) -> Tensor:
    """The loss `(n,)` of each image, as the recipe weighs its label `(n,)` and the teacher's outputs `target`.

    `output` and `target` are logits `(n, classes)`; without `target` only the labels count.
    """
    share = recipe.distill if recipe.labels else 1.0
    if target is None or share == 0:
        return F.cross_entropy(output, labels, reduction="none")
    softened = _softened_divergence(output, target, recipe.temperature)
    if not recipe.labels:
        return softened
    return (1 - share) * F.cross_entropy(output, labels, reduction="none") + share * softened


def classifier_name(model: nn.Module) -> str:
    """The dotted name of the last linear layer, or of the last convolution where there is none."""
    for kind in (nn.Linear, nn.Conv2d):
        names = [name for name, module in model.named_modules() if isinstance(module, kind)]
        if names:
            return str(names[-1])
    raise ValueError("the network has neither a Linear nor a Conv2d layer, so it has no classifier to mimic")


def last_map(model: nn.Module, images: Tensor) -> str | None:
    """The module that puts out the last feature map, if nothing with weights but the classifier follows it.

    That is what pooling reads: a tensor `(n, ...)` of more than two axes and more than one position.
    """
    calls: list[tuple[str, bool, bool]] = []

    def recorder(name: str) -> Callable[[nn.Module, object, object], None]:
        def record(module: nn.Module, _: object, output: object) -> None:
            is_map = isinstance(output, Tensor) and output.ndim > 2 and output[0].numel() > max(output.shape[1:])
            calls.append((name, is_map, any(True for _ in module.parameters(recurse=False))))

        return record

    handles = [module.register_forward_hook(recorder(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    classifier = classifier_name(model)
    for name, is_map, has_weights in reversed(calls):
        if is_map:
            return name
        if has_weights and name != classifier:
            return None
    return None


@contextmanager
def tapped(model: nn.Module, tap: str | None, classifier: str) -> Iterator[list[Tensor]]:
    """Collects what the module `tap` puts out or, where there is none, what the classifier is given.

    Of a module that runs several times, such as an activation shared by all layers, the last is the one that counts.
    """
    seen: list[Tensor] = []
    if tap is None:
        module = model.get_submodule(classifier)
        handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    else:
        handle = model.get_submodule(tap).register_forward_hook(lambda _, __, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


def _objective(model: nn.Module, teacher: nn.Module | None, recipe: Recipe) -> Objective:
    """The loss of one batch as the recipe says."""
    taps: list[str | None] = []

    def from_outputs(images: Tensor, labels: Tensor) -> Tensor:
        target = None
        if teacher is not None and (recipe.distill > 0 or not recipe.labels):
            with torch.no_grad():
                target = distributed.joined(teacher(images), len(labels))
        return instance_losses(distributed.joined(model(images), len(labels)), labels, target, recipe).mean()

    def from_features(images: Tensor, labels: Tensor) -> Tensor:
        assert teacher is not None
        if not taps:
            taps.append(last_map(teacher, images[:1]))
        classifier = classifier_name(teacher)
        with torch.no_grad(), tapped(teacher, taps[0], classifier) as wanted:
            target = teacher(images)
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


def _softened_divergence(output: Tensor, target: Tensor, temperature: float) -> Tensor:
    """KL divergence `(n,)` of softened distributions times the squared temperature (Hinton et al. 2015, 2.1)."""
    student = F.log_softmax(output.float() / temperature, dim=1)
    teacher = F.log_softmax(target.float() / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1) * temperature**2
