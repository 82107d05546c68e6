"""One tensor of a network that returns several: by its key, its name or its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from search.base import WorkloadError

REGISTERS = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")
"""The attributes in which a module holds its parts."""


class OneOutput(nn.Module):
    """A network that returns `output` of what `network` returns, a tensor alone being that output.

    Both share their parts, so that every layer and every weight has the name that it has in `network`.
    """

    _network: nn.Module

    def __init__(self, network: nn.Module, output: str | int) -> None:
        super().__init__()
        self.__dict__ |= {register: network.__dict__[register] for register in REGISTERS}
        self.__dict__["_network"] = network  # past `_modules`, or all names would begin with it
        self.output = output
        self.train(network.training)

    def forward(self, images: Tensor) -> Any:
        """Return the output for images `(n, c, h, w)`.

        Raises:
            WorkloadError: the network returns several, and none of that name.
        """
        found = self._network.forward(images)  # its call would be a module that no tracer can name
        parts = outputs_of(found)
        if not parts:
            return found
        if self.output not in parts:
            raise WorkloadError(
                f"model.output is {self.output!r}, but the network returned {told(found)}; expected one of these; "
                "correct it"
            )
        return parts[self.output]

    def extra_repr(self) -> str:
        """Tell apart the outputs of one network."""
        return f"{type(self._network).__name__}, output={self.output!r}"

    def train(self, mode: bool = True) -> OneOutput:
        """Set the mode of both."""
        self._network.training = mode
        super().train(mode)
        return self


def outputs_of(found: object) -> dict[str | int, object]:
    """Return what a network returned by key, by name if it is a named tuple, and by place.

    >>> outputs_of({"out": 1, "aux": 2}), outputs_of((3, 4))
    ({'out': 1, 'aux': 2}, {0: 3, 1: 4})
    """
    if isinstance(found, Mapping):
        return dict(found)
    if isinstance(found, tuple | list):
        places: dict[str | int, object] = dict(enumerate(found))
        return places | dict(zip(getattr(found, "_fields", ()), found, strict=False))
    return {}


def told(found: object) -> str:
    """Say what a network returned.

    >>> told({"out": 1, "aux": 2}), told((1, 2)), told(None)
    ("a dict of 'out' and 'aux'", 'a tuple of 0 and 1', 'a NoneType')
    """
    if isinstance(found, Tensor):
        return f"a tensor of shape {tuple(found.shape)}"
    names = list(getattr(found, "_fields", ())) or list(outputs_of(found))
    return f"a {type(found).__name__}" + (f" of {' and '.join(map(repr, names))}" if names else "")
