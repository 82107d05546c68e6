"""The form in which a network is brought: wrappers of training are taken off, forms without layers are refused."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch import fx, nn
from torch.optim.swa_utils import AveragedModel

from methods.network.keeping import keep
from methods.state import own_memory
from search.base import Report, WorkloadError


def unwrapped(model: nn.Module, report: Report) -> nn.Module:
    """Take wrappers of training off a network, and its halves of a float to whole ones; a word says so.

    Raises:
        WorkloadError: it has no layers that could be cut, or some without weights.
    """
    check_form(model)
    notes = []
    own_memory(model)
    while (inner := _inside(model)) is not None:
        notes.append(f"taken out of {type(model).__name__}")
        model = inner
    types = {value.dtype for value in model.parameters() if value.is_floating_point()}
    if types and torch.float32 not in types:
        notes.append(f"cast from {' and '.join(sorted(str(one)[6:] for one in types))} to float32")
        model = model.float()
    if notes:
        report("teacher", 1, 1, "; ".join(notes))
    return model


def check_form(model: nn.Module) -> None:
    """Refuse a network that is a program in place of layers, or whose layers have no weights yet.

    Raises:
        WorkloadError: it is one; the message says which, and what to return instead.
    """
    for name, module in model.named_modules():
        place = f"its module {name!r}" if name else "the network"
        if isinstance(module, torch.jit.ScriptModule):
            raise _without_layers(f"{place} is a TorchScript program")
        graph = getattr(module, "graph", None)
        if isinstance(graph, fx.Graph) and any(isinstance(node.target, torch._ops.OpOverload) for node in graph.nodes):
            raise _without_layers(f"{place} is a program of torch.export")
        for kind, values in module.named_parameters(recurse=False):
            if nn.parameter.is_lazy(values):
                raise WorkloadError(
                    f"the {kind} of {name or 'the network'}, a {type(module).__name__}, has no shape yet; expected "
                    "weights: a lazy layer gets them from the first images that it reads; call the network once on "
                    "images of the data's size before the factory returns it"
                )


def _without_layers(found: str) -> WorkloadError:
    return WorkloadError(
        f"{found}: its layers are gone, so that it can be run but neither cut nor trained; expected the "
        "torch.nn.Module that it was made of; return that, and give its weights as a file"
    )


def freed(model: nn.Module, report: Report) -> None:
    """Let all of a network be trained that was frozen as a whole, as for inference; a word says so.

    Where only some parameters are frozen they stay so, through every method and in recovery.
    """
    trainable = [one for one in model.parameters() if one.is_floating_point()]
    if not trainable or any(one.requires_grad for one in trainable):
        return
    for parameter in trainable:
        parameter.requires_grad_(True)
    report("teacher", 1, 1, "all of its parameters were frozen; recovery trains them")


def protect(model: nn.Module, patterns: Sequence[str]) -> None:
    """Mark the modules that no method may change.

    Raises:
        WorkloadError: a pattern matches no layer; the message has the nearest names.
    """
    missed = keep(model, patterns)
    if missed:
        names = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters())]
        near = {one: difflib.get_close_matches(one.rstrip(".*"), names, n=3, cutoff=0) for one in missed}
        told = "; ".join(
            f"{pattern!r} matches no layer; nearest are {', '.join(found)}" for pattern, found in near.items()
        )
        raise WorkloadError(
            f"model.keep: {told}; expected names of the network's modules, or patterns such as layer1.*; correct them"
        )


def _inside(model: nn.Module) -> nn.Module | None:
    """The network that a wrapper holds, if `model` is one."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel):
        return model.module
    is_compiled = type(model).__name__ == "OptimizedModule"  # its class takes a second to import
    return getattr(model, "_orig_mod", None) if is_compiled else None
