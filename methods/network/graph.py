"""Read a network's modules and traced graph: which nodes add or pass on, who shares weights; and replace a module."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

UNTRACEABLE = (TypeError, ValueError, RuntimeError, AttributeError, AssertionError)
"""Errors of torch.fx where a forward depends on its input's values, or does more than a proxy can."""


@contextmanager
def replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put `modules` where their names are in `model` until the block ends: quicker than a copy of the model.

    Raises:
        ValueError: the model has no module of some name.
    """
    before: dict[str, nn.Module] = {}
    try:
        for name, module in modules.items():
            before[name] = replace(model, name, module)
        yield
    finally:
        for name, module in reversed(before.items()):
            replace(model, name, module)


def graph_of(model: nn.Module, tracer: fx.Tracer | None = None) -> fx.Graph:
    """Trace `model` called with its images alone; all other arguments of its forward have their defaults.

    So `targets=None` takes the branch that a network takes in use, and the graph has one input.

    Raises:
        UNTRACEABLE: torch.fx cannot trace the model.

    >>> class Choosing(nn.Module):
    ...     def forward(self, x, targets=None, scale=2.0):
    ...         return x * scale if targets is None else targets
    >>> [node.name for node in graph_of(Choosing()).nodes]
    ['x', 'mul', 'output']
    """
    parameters = list(inspect.signature(model.forward).parameters.values())
    defaults = {one.name: one.default for one in parameters[1:] if one.default is not inspect.Parameter.empty}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of defaults that the graph could not check
        graph = (tracer or fx.Tracer()).trace(model, concrete_args=defaults or None)
    if defaults:
        _forget_defaults(graph)
    return graph


def graph_of_most(model: nn.Module) -> fx.Graph:
    """Trace `model` as `graph_of` does; modules inside it whose own forward cannot be traced are called as a whole.

    Raises:
        UNTRACEABLE: torch.fx cannot trace the forward of the model itself.

    >>> class Branching(nn.Module):
    ...     def forward(self, x):
    ...         return x if x.sum() > 0 else -x
    >>> [node.op for node in graph_of_most(nn.Sequential(nn.Sequential(nn.ReLU(), Branching()), nn.ReLU())).nodes]
    ['placeholder', 'call_module', 'call_module', 'call_module', 'output']
    """
    whole: set[str] = set()
    while True:
        tracer = _Skipping(whole)
        try:
            return graph_of(model, tracer)
        except UNTRACEABLE:
            if not tracer.failed:
                raise
            whole.add(tracer.failed)


class _Skipping(fx.Tracer):
    """A tracer that does not enter the modules named in `whole`; `failed` is the innermost that it failed in."""

    def __init__(self, whole: Set[str]) -> None:
        super().__init__()
        self.whole = whole
        self.failed = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.whole or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except UNTRACEABLE:
            self.failed = self.failed or self.path_of_module(m)
            raise


def _forget_defaults(graph: fx.Graph) -> None:
    """Take the inputs for defaults out of a graph, with the checks that they are what they were."""
    _, *rest = [node for node in graph.nodes if node.op == "placeholder"]
    checks = {user: None for node in rest for user in node.users}
    for check in [*checks]:
        checks.update(dict.fromkeys(check.users))
    for node in [*reversed(checks), *rest]:
        graph.erase_node(node)
    graph.set_codegen(fx.graph.CodeGen())


_ADDITIONS = {"add", "add_", "iadd"}
_ACTIVATIONS = {"relu", "relu_", "relu6", "dropout", "stochastic_depth"}


def replace(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put `module` where `name` is in `model`, and return what was there.

    Raises:
        ValueError: the model has no module of that name.
    """
    parent, _, attribute = name.rpartition(".")
    try:
        before = model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"there is no module {name!r} in the network, expected one of its own; take names from removable_blocks"
        ) from None
    setattr(model.get_submodule(parent), attribute, module)
    return before


def passes_on(node: fx.Node) -> bool:
    """Whether a function or tensor method of a graph adds, activates or drops out."""
    return is_addition(node) or _operation(node) in _ACTIVATIONS


def is_addition(node: fx.Node) -> bool:
    """Whether a node of a graph adds two values."""
    return _operation(node) in _ADDITIONS


def _operation(node: fx.Node) -> str:
    """Return the bare name of a function or a tensor method; of anything else, nothing."""
    if node.op == "call_function":
        return str(getattr(node.target, "__name__", ""))
    return str(node.target) if node.op == "call_method" else ""


def has_weights(module: nn.Module) -> bool:
    """Whether any parameter lies in `module`."""
    return any(True for _ in module.parameters())


def shares_weights(model: nn.Module, module: nn.Module, *, by_name: bool) -> bool:
    """Whether `model` holds a parameter of `module` outside it, too.

    `by_name` takes a second name of one module, as where it is registered twice, for a second module.
    """
    own = {id(parameter) for parameter in module.parameters()}

    def count(root: nn.Module) -> int:
        holders = [holder for _, holder in root.named_modules(remove_duplicate=not by_name)]
        return sum(id(parameter) in own for holder in holders for parameter in holder._parameters.values())

    return count(model) > count(module)
