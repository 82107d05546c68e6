"""The compression methods: tensors, modules and numbers in, new ones out. A method is one file and one line here."""

from methods.alds import ALDS
from methods.chain import AnyMethod, Chain
from methods.itpruner import ITPruner
from methods.manidp import ManiDP
from methods.practise import PRACTISE
from methods.protocol import Method
from methods.uniform import Uniform

METHODS: dict[str, Method] = {method.name: method for method in (ITPruner(), ManiDP(), PRACTISE(), ALDS(), Uniform())}


def named(name: str) -> AnyMethod:
    """Return the method of that name, or the chain of the methods that `first+second` names.

    Raises:
        ValueError: there is no such method, or the chain cannot be made.
    """
    unknown = [part for part in name.split("+") if part not in METHODS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not a method; known: {', '.join(METHODS)}; join them by + for a chain")
    links = tuple(METHODS[part] for part in name.split("+"))
    return links[0] if len(links) == 1 else Chain(links)


__all__ = ["METHODS", "named"]
