"""One training step shared by several processes: each works on its part of a batch, and all see the whole result.

All that couples the images of a batch is computed for the whole of it. Batch norms use its mean and variance; outputs,
and all else that a loss reads, are joined, so every process forms the same loss, the one a single process would. A step
is therefore that of one process, up to the order of sums, for any number of processes and however unequal their parts.
Networks, losses and methods need not know. (In float32 the order of sums now and then moves an activation across a
kink, a ReLU's or a gate's threshold; then two runs part by about 1e-4 a step, as those of two machines do.)

The processes are those of torch.distributed's default group: gloo on CPUs, nccl on GPUs, where this was not run.
Without a group every function here leaves things as they are.

Differs from one process: random drops, since each process draws for its own images; and running statistics other than
a batch norm's, such as an instance norm's, which are those of the first process's part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def processes() -> int:
    """Return the number of processes that share a step."""
    return distributed.get_world_size() if _is_distributed() else 1


def part(count: int) -> slice:
    """Return this process's images among `count`: parts differ by one at most.

    Of fewer images than processes, every process takes all.
    """
    shares = processes()
    if count < shares:
        return slice(0, count)
    rank = distributed.get_rank() if shares > 1 else 0
    return slice(count * rank // shares, count * (rank + 1) // shares)


def joined(mine: Tensor, count: int) -> Tensor:
    """Join the rows `(count, ...)` of all processes, of which `mine` are this one's `part(count)`; gradients flow back.

    Each process gets the gradients of its rows from every process's loss. The losses are the same, so the gradients
    add up to as many times those of one process: see `average_gradients`.
    """
    if len(mine) == count:
        return mine
    whole: Tensor = _Joined.apply(mine, count)
    return whole


def average_gradients(model: nn.Module) -> None:
    """Give every process the mean over processes of the gradients of `model`, in place, in one message."""
    if not _is_distributed():
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= processes()
    means = torch.split(flat, [gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))


@torch.no_grad()
def align(model: nn.Module) -> None:
    """Give every process the first one's weights and statistics, in place: another processor may round otherwise."""
    for value in model.state_dict().values() if _is_distributed() else ():
        if not isinstance(value, Tensor):
            continue
        sent = value.contiguous()
        distributed.broadcast(sent, 0)
        value.copy_(sent)


def own_seed(seed: int) -> int:
    """Return the seed of this process's own draws; the first one's is `seed`, and a CPU's generator takes 32 bits."""
    rank = distributed.get_rank() if _is_distributed() else 0
    return int(np.random.SeedSequence((seed, rank)).generate_state(1)[0]) if rank else seed


def joint_norms() -> AbstractContextManager[Any]:
    """Let batch norms in train mode, within the block, take their statistics from the parts of all processes."""
    return _JointNorms() if _is_distributed() else nullcontext()


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


class _Joined(torch.autograd.Function):
    """A gather of unequal parts as a sum of rows that are zero elsewhere, which every backend offers."""

    @staticmethod
    def forward(context: Any, mine: Tensor, count: int) -> Tensor:
        context.rows = part(count)
        whole = mine.new_zeros((count, *mine.shape[1:]))
        whole[context.rows] = mine
        distributed.all_reduce(whole)
        return whole

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total[context.rows], None


class _JointNorms(TorchFunctionMode):
    """Replaces torch's batch norm, whichever module calls it: torch's own, timm's, a traced graph's."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        return (_batch_norm if function is F.batch_norm else function)(*args, **(kwargs or {}))


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm` of `(n, c, ...)` over the images of all processes; its arguments are torch's."""
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    mean, variance, count = _moments(values)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * count / (count - 1)).to(running_var.dtype), momentum)
    scale = torch.rsqrt(variance + eps) if weight is None else torch.rsqrt(variance + eps) * weight
    shape = [1, -1, *[1] * (x.ndim - 2)]
    scaled = (values - mean.view(shape)) * scale.view(shape)
    return (scaled if bias is None else scaled + bias.view(shape)).to(x.dtype)


def _moments(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and biased variance `(c,)` of all processes' `values` `(n, c, ...)`, and their number per channel."""
    axes = [0, *range(2, values.ndim)]
    mean = values.mean(axes)
    count = torch.full_like(mean, values.numel() // len(mean))
    own = torch.stack([mean, values.var(axes, correction=0), count])
    means, variances, counts = joined(own[None], processes()).unbind(1)
    shares = counts / counts.sum(0)
    mean = (shares * means).sum(0)
    return mean, (shares * (variances + (means - mean).square())).sum(0), counts.sum(0)
