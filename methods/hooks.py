"""Watch a network's modules for as long as a block lasts: below all rooms, since most of them look into a network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

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
