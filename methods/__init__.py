"""The compression methods: tensors, modules and numbers in, new ones out. A method is one file and one line here."""

from methods.alds import ALDS
from methods.base import Method
from methods.itpruner import ITPruner
from methods.uniform import Uniform

METHODS: dict[str, Method] = {method.name: method for method in (ITPruner(), ALDS(), Uniform())}

__all__ = ["METHODS"]
