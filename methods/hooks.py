"""Watch a network's modules for as long as a block lasts: below all rooms, since most of them look into a network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor
from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Keep hooks, in the order in which `handles` registers them, until the block ends, also where it raises.

    >>> import torch
    >>> layer, calls = torch.nn.ReLU(), []
    >>> with hooked([layer.register_forward_hook(lambda *_: calls.append("inside"))]):
    ...     _ = layer(torch.ones(1))
    >>> _ = layer(torch.ones(1))
    >>> calls
    ['inside']
    """
    with ExitStack() as kept:
        for handle in handles:
            kept.enter_context(handle)
        yield


def only_input(inputs: tuple[object, ...], named: Mapping[str, object]) -> Tensor | None:
    """Return the one tensor that a module was called with, by position or by keyword; None for any other call."""
    given = (*inputs, *named.values())
    return given[0] if len(given) == 1 and isinstance(given[0], Tensor) else None
