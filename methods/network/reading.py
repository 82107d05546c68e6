"""The layers whose parameters a network reads past them: neither a cut nor another layer can take their place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from methods.hooks import hooked
from methods.network.counting import fastpath_off


def read_elsewhere(model: nn.Module, example: Tensor) -> dict[str, str]:
    """Return, by name, why convolutions and linear layers of `model` must keep their parameters as they are.

    A pass on `example[:1]` tells whose forward uses each parameter: a module may hand its child's weight to a function
    of its own, or ask for its type.

    >>> class Tied(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.code = nn.Linear(4, 2)
    ...     def forward(self, x):
    ...         return self.code(x) @ self.code.weight
    >>> read_elsewhere(Tied(), torch.ones(1, 4))
    {'code': 'its weight is also read outside the layer'}
    """
    model = copy.deepcopy(model).eval()
    layers: dict[str, nn.Module] = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
    }
    watch = _Watch(layers)
    hooks = [hook for name, layer in layers.items() for hook in watch.hooks(name, layer)]
    with hooked(hooks), fastpath_off(), torch.no_grad(), watch:
        model(example[:1].clone())
    return watch.found


class _Watch(TorchFunctionMode):
    """Notes the parameters that reach a function while their layer is not running."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self._running: list[str] = []
        self._owners = {
            id(parameter): (name, kind)
            for name, layer in layers.items()
            for kind, parameter in layer.named_parameters(recurse=False)
        }

    def hooks(self, name: str, layer: nn.Module) -> Iterable[Any]:
        """Register the hooks that tell when a layer runs."""
        yield layer.register_forward_pre_hook(lambda *_: self._running.append(name))
        yield layer.register_forward_hook(lambda *_: self._running.pop() and None)

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            name, kind = self._owners.get(id(value), ("", ""))
            if name and name not in self._running:
                self.found.setdefault(name, f"its {kind} is also read outside the layer")
        return func(*args, **(kwargs or {}))
