"""YAML as a person writes it: a key given twice is a mistake, and the last one does not win silently."""

from __future__ import annotations

import difflib
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML that remembers the keys which a mapping gives twice."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.twice: list[str] = []

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose the mapping, and note each key that it repeats."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else key
            if name in seen:
                self.twice.append(f"line {key.start_mark.line + 1}: key {name!r} given twice; keep one of them")
            seen.add(name)
        return node


def read(text: str) -> tuple[object, list[str]]:
    """Read the YAML document in `text`, and find the mistakes that only its text shows.

    Raises:
        yaml.YAMLError: it is not valid YAML.
    """
    loader = _Loader(text)
    try:
        return loader.get_single_data(), loader.twice
    except ValueError as error:  # of a scalar that looks like a date or a number and is none, such as 2026-13-01
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()


def suggestion(key: str, known: list[str]) -> str:
    """The end of a sentence about an unknown name: the nearest known name, or all of them.

    >>> suggestion("mac", ["macs", "params"]), suggestion("cores", ["macs", "params"])
    ("; did you mean 'macs'?", '; expected one of macs, params')
    """
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; expected one of {', '.join(known)}"
