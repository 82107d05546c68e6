"""The compression methods: tensors, modules and numbers in, new ones out.

`METHODS` and `named` are those of `known`, imported when first asked for: that takes seconds, and who only checks a
spec has the `names`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from methods.known import METHODS, named


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from methods import known

    return getattr(known, name)


__all__ = ["METHODS", "named"]
