"""Every method, by name: a method is one file or folder, one line here, and its name in `names`."""

from methods.alds import ALDS
from methods.chain import AnyMethod, Chain
from methods.channels import Channels
from methods.itpruner import ITPruner
from methods.manidp import ManiDP
from methods.names import links_of
from methods.practise import PRACTISE
from methods.protocol import Method
from methods.uniform import Uniform

METHODS: dict[str, Method] = {
    method.name: method for method in (ITPruner(), Channels(), ManiDP(), PRACTISE(), ALDS(), Uniform())
}


def named(name: str) -> AnyMethod:
    """Return the method of that name, or the chain of the methods that `first+second` names.

    Raises:
        ValueError: there is no such method, or the chain cannot be made.
    """
    links = tuple(METHODS[link] for link in links_of(name))
    return links[0] if len(links) == 1 else Chain(links)
