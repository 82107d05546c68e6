"""YAML as a person writes it: a key given twice is a mistake, as is a sign that cannot be seen; a bomb is not read."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterator
from typing import Any

import yaml

from search.base import masked

DEEPEST, MOST_PARTS, MOST_DIGITS = 32, 20_000, 100
"""The levels of a document, its keys and values with every alias written out, and the characters of a number."""

LONGEST_ADDRESS = 10_000
"""The characters of a text in which a secret is looked for."""

JOINERS = "\u200c\u200d"
"""Signs without a look of their own that Persian and emoji are written with."""


class _Loader(yaml.SafeLoader):
    """YAML that remembers the keys which a mapping gives twice, and counts what its aliases come to."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.mistakes: list[str] = []
        self._depth = self._parts = 0
        self._size_of: dict[yaml.Node, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node, or find the one that an alias means, unless the document gets too deep or too large.

        Raises:
            yaml.YAMLError: it does.
        """
        is_alias, line, before = self.check_event(yaml.AliasEvent), self.line + 1, self._parts
        self._depth += 1
        if self._depth > DEEPEST:
            raise yaml.YAMLError(f"line {line} is more than {DEEPEST} levels deep; flatten it")
        node: yaml.Node | None = super().compose_node(parent, index)
        assert node is not None
        self._depth -= 1
        if is_alias and node not in self._size_of:
            raise yaml.YAMLError(f"line {line} has an alias of what it is in; write it out")
        self._parts += self._size_of[node] if is_alias else 1
        self._size_of.setdefault(node, self._parts - before)
        if self._parts > MOST_PARTS:
            raise yaml.YAMLError(f"at line {line} it has more than {MOST_PARTS:,} parts; leave some out")
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose the mapping, and note each key that it repeats."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else key
            if name in seen:
                self.mistakes.append(f"line {key.start_mark.line + 1}: key {name!r} given twice; keep one of them")
            seen.add(name)
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        """Compose the scalar, and note a sign in it that cannot be seen, which escapes such as `\\e` make."""
        node: yaml.ScalarNode = super().compose_scalar_node(anchor)
        self.mistakes += _odd_signs(node.value, node.start_mark.line + 1)
        if len(node.value) > MOST_DIGITS and node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"line {line} has a number of {len(node.value):,} digits, of {MOST_DIGITS} at most")
        return node


def _odd_signs(text: str, line: int) -> Iterator[str]:
    """A mistake for the first sign in the text that cannot be seen, such as NUL or one that turns the text round."""
    if odd := next(filter(is_odd, text), None):
        name = unicodedata.name(odd, "a control character")
        yield f"line {line}: U+{ord(odd):04X} ({name}) cannot be seen; expected text that can; take it out"


def is_odd(sign: str) -> bool:
    """Whether a character is one that a terminal obeys or nobody sees; ends of lines and tabs are not."""
    return unicodedata.category(sign) in ("Cc", "Cf", "Cs", "Zl", "Zp") and sign not in "\t\n" + JOINERS


def read(text: str) -> tuple[object, list[str]]:
    """Read the YAML document in `text`, and find the mistakes that only its text shows.

    Raises:
        yaml.YAMLError: it is not valid YAML, or it is far larger, when read, than it looks.
    """
    loader = _Loader(text)
    try:
        found = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        _hide_secrets(error, text.splitlines())
        raise
    except (ValueError, RecursionError) as error:  # of a scalar that looks like a date and is none, such as 2026-13-01
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()
    plain = text.removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
    in_comments = [one for number, line in enumerate(plain, 1) for one in _odd_signs(line, number)]
    return found, list(dict.fromkeys(in_comments + loader.mistakes))


def suggestion(key: str, known: list[str]) -> str:
    """The end of a sentence about an unknown name: the nearest known name, or all of them.

    >>> suggestion("mac", ["macs", "params"]), suggestion("cores", ["macs", "params"])
    ("; did you mean 'macs'?", '; expected one of macs, params')
    """
    close = difflib.get_close_matches(key[:100], known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; expected one of {', '.join(known)}"


def _hide_secrets(error: yaml.MarkedYAMLError, lines: list[str]) -> None:
    """Have an error about the document not show the lines, cut as it shows them, that hold a secret."""
    for mark in filter(None, (error.context_mark, error.problem_mark)):
        line = lines[mark.line][:LONGEST_ADDRESS] if mark.line < len(lines) else ""
        if masked(line) != line:
            mark.buffer = None


def quoted(value: object) -> str:
    """A value of a document as it stands in a message: what is secret is hidden, then what is long is cut.

    >>> quoted("a\\0b"), quoted(10**90)
    ("'a\\\\x00b'", '1000000000000000000000000000000000000000 ...')
    """
    text = repr(masked(value[:LONGEST_ADDRESS])) if isinstance(value, str) else masked(repr(value)[:LONGEST_ADDRESS])
    return text if len(text) <= 80 else f"{text[:40]} ..."
