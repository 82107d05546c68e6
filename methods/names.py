"""The methods by name alone, so that a spec is checked in milliseconds: `known` has them whole, and imports torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence

NAMES: dict[str, bool] = {
    "itpruner": False,
    "channels": False,
    "manidp": True,
    "practise": False,
    "alds": False,
    "uniform": False,
}
"""Every method of `METHODS`, in its order, and its `is_last`: whether no link of a chain may follow it."""


def links_of(name: str) -> list[str]:
    """Return the methods that `first+second` names, or the one that `first` does.

    Raises:
        ValueError: there is no such method, or the chain cannot be made.
    """
    links = name.split("+")
    if unknown := [link for link in links if link not in NAMES]:
        raise ValueError(f"{unknown[0]!r} is not a method; known: {', '.join(NAMES)}; join them by + for a chain")
    if len(links) > 1:
        check_chain(links, [link for link in links if NAMES[link]])
    return links


def check_chain(links: Sequence[str], last: Collection[str]) -> None:
    """Refuse a chain of these methods, of which those in `last` can only stand at its end.

    Raises:
        ValueError: fewer than two links, one of them twice, or one in `last` before the end.
    """
    if len(links) < 2 or len(set(links)) < len(links):
        raise ValueError(f"a chain is {list(links)}, expected at least two different methods; name each once")
    if early := [link for link in links[:-1] if link in last]:
        raise ValueError(
            f"a chain is {list(links)}, expected {early[0]!r} at its end: what it saves depends on the input"
        )
