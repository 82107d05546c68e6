"""YAML as a person writes it: a key given twice is a mistake, not a silent choice of the last."""

from __future__ import annotations

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML that remembers the keys which a mapping gives twice."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.twice: list[str] = []

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """The mapping; the last of two equal keys would win without a word."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                self.twice.append(f"line {key.start_mark.line + 1}: key {key.value!r} given twice; keep one of them")
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else key)
        return node


def read(text: str) -> tuple[object, list[str]]:
    """The YAML document in `text`, and the mistakes that only its text shows.

    Raises:
        yaml.YAMLError: it is not valid YAML.
    """
    loader = _Loader(text)
    try:
        return loader.get_single_data(), loader.twice
    finally:
        loader.dispose()
