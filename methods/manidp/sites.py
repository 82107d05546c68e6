"""The places for gates in a traced network: one row per convolution whose outputs are masked, as plain data.

A row costs `unit` MACs per pair of active input and output channels. Zeros that a mask makes stay zeros through some
operations and not through others; only where they certainly arrive does a convolution save at its input too.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

from methods.base import Unsupported
from methods.network.graph import UNTRACEABLE, graph_of_most
from methods.network.keeping import KEPT, is_kept

NARROWEST = 8
"""Fewest channels a gate reads or decides about."""

DEAREST = 0.25
"""Most MACs a gate may need, as a share of its convolution's."""


@dataclass(frozen=True)
class Site:
    """A convolution whose output channels are masked, in the order in which they run.

    `conv` and `norm` are module names, `activation` and `end` nodes of the traced graph; norm and activation may be
    empty. The output of `end`, the last of the chain, is masked. `unit` is the MACs for one input image per active pair
    of channels, or per active channel where `is_depthwise`. `gate` is the number of the gate whose mask the outputs
    carry, `source` of the gate whose mask the inputs carry for certain, -1 for none. `hidden` is the inner width of the
    gate; 0 where a depthwise convolution inherits the mask of its input and has no gate of its own.
    """

    conv: str
    norm: str
    activation: str
    end: str
    unit: int
    inputs: int
    outputs: int
    hidden: int
    gate: int
    source: int

    @property
    def is_depthwise(self) -> bool:
        return self.hidden == 0


def gate_macs(site: Site) -> int:
    """The MACs of the gate's two linear layers for one image."""
    return site.hidden * (site.inputs + site.outputs)


def gate_params(site: Site) -> int:
    """The parameters of the gate's two linear layers, the second of which has a bias."""
    return gate_macs(site) + (site.outputs if site.hidden else 0)


def gated_macs(sites: Sequence[Site], kept: Tensor) -> Tensor:
    """The MACs `(n,)` of the masked convolutions, gates aside, where each image keeps `kept` `(n, gates)` channels.

    >>> pair = [Site("a", "", "", "a", 9, 8, 16, 8, 0, -1), Site("b", "", "", "b", 1, 16, 32, 16, 1, 0)]
    >>> gated_macs(pair, torch.tensor([[16, 32], [4, 8]])).tolist()
    [1664, 320]
    """
    total = torch.zeros(len(kept), dtype=kept.dtype, device=kept.device)
    for site in sites:
        inputs = 1 if site.is_depthwise else site.inputs if site.source < 0 else kept[:, site.source]
        total = total + site.unit * inputs * kept[:, site.gate]
    return total


def widths(sites: Sequence[Site]) -> Tensor:
    """The number of channels `(1, gates)` that each gate decides about."""
    return torch.tensor([[site.outputs for site in sites if not site.is_depthwise]])


def to_columns(sites: Sequence[Site]) -> dict[str, np.ndarray]:
    """The rows as one array per field; `from_columns` restores them."""
    return {
        field.name: np.array([getattr(site, field.name) for site in sites], dtype=None if sites else np.int64)
        for field in fields(Site)
    }


def from_columns(columns: Mapping[str, Any]) -> tuple[Site, ...]:
    """The rows that `to_columns` wrote, from arrays or lists."""
    rows = zip(*(np.asarray(columns[field.name]).tolist() for field in fields(Site)), strict=True)
    return tuple(Site(*row) for row in rows)


def trace(model: nn.Module) -> fx.GraphModule:
    """A traced copy of `model`, in eval mode; all that depends on the mode outside its modules stays in it for good.

    Modules inside it that torch.fx cannot trace are called as a whole, so no convolution in them gets a gate.

    Raises:
        Unsupported: torch.fx cannot trace the model; the message says why.
    """
    try:
        model = copy.deepcopy(model).eval()
        return fx.GraphModule(model, graph_of_most(model), type(model).__name__)
    except UNTRACEABLE as error:
        reason = (str(error).splitlines() or [""])[0]
        raise Unsupported(
            f"torch.fx cannot trace the network: {type(error).__name__}: {reason}; expected a forward whose steps do "
            "not depend on values; rewrite it, or use a method that does not gate"
        ) from error


def find_sites(network: fx.GraphModule, example: Tensor, squeeze: int) -> tuple[tuple[Site, ...], dict[str, str]]:
    """The rows of a traced network in eval mode, and by name the reason why each other convolution has none.

    A gate is `outputs // squeeze` wide inside, and twice that where the convolution has fewer than 80 outputs.

    Source: ManiDP, the authors' code: gates on both convolutions of a basic block, not on stem or shortcut.
    Differs: any convolution of any traced network may have one; the rules for those that may not are in `_obstacle`.
    """
    with torch.no_grad():
        ShapeProp(network).propagate(example.clone())
    modules = dict(network.named_modules())
    finder = _Finder(network.graph, modules, squeeze)
    for node in network.graph.nodes:
        finder.visit(node)
    return tuple(finder.sites), finder.skipped


class _Finder:
    """One walk through the graph; `masked` holds for a node the gate whose zeros it certainly carries."""

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module], squeeze: int) -> None:
        self.modules, self.squeeze = modules, squeeze
        self.sites: list[Site] = []
        self.skipped: dict[str, str] = {}
        self.masked: dict[fx.Node, int] = {}
        self.gates = 0
        self.images = next((_shape(node)[:1] for node in graph.nodes if node.op == "placeholder"), ())
        self.convs = [node for node in graph.nodes if self._conv(node)]
        self.before_weights = _reaching(node for node in graph.nodes if self._has_weights(node))

    def visit(self, node: fx.Node) -> None:
        conv = self._conv(node)
        if conv is None:
            gate = self._inherited(node)
            if gate is not None:
                self.masked.setdefault(node, gate)
            return
        source = self.masked.get(node.all_input_nodes[0], -1)
        chain = self._chain(node)
        depthwise = 1 < conv.groups == conv.in_channels == conv.out_channels
        obstacle = self._obstacle(node, conv, chain)
        if any(part.op == "call_module" and is_kept(self.modules[str(part.target)]) for part in chain):
            self.skipped[str(node.target)] = KEPT
        elif depthwise and source >= 0 and not self._is_repeated(node):
            self._add(node, conv, chain, hidden=0, gate=source, source=source)
        elif obstacle:
            self.skipped[str(node.target)] = obstacle
        else:
            self._add(node, conv, chain, hidden=self._hidden(conv), gate=self.gates, source=source)
            self.gates += 1

    def _add(
        self, node: fx.Node, conv: nn.Conv2d, chain: list[fx.Node], *, hidden: int, gate: int, source: int
    ) -> None:
        norms = [str(part.target) for part in chain if self._calls(part, _NORMS)]
        activations = [part.name for part in chain if self._calls(part, _ACTIVATIONS)]
        self.sites.append(
            Site(
                conv=str(node.target),
                norm=norms[0] if norms else "",
                activation=activations[0] if activations else "",
                end=chain[-1].name,
                unit=_unit(node, conv),
                inputs=conv.in_channels,
                outputs=conv.out_channels,
                hidden=hidden,
                gate=gate,
                source=source,
            )
        )
        self.masked[chain[-1]] = gate

    def _obstacle(self, node: fx.Node, conv: nn.Conv2d, chain: list[fx.Node]) -> str | None:
        """Say why a convolution has no gate of its own."""
        macs = _unit(node, conv) * conv.in_channels * conv.out_channels
        gate = self._hidden(conv) * (conv.in_channels + conv.out_channels)
        reasons = {
            "it is called more than once": self._is_repeated(node),
            "it runs on several maps of an image": _shape(node)[:1] != self.images,
            "it is the stem": node is self.convs[0],
            "it is depthwise and its input has no mask": 1 < conv.groups == conv.in_channels,
            "its channels only leave in whole groups": 1 < conv.groups < conv.in_channels,
            f"it has fewer than {NARROWEST} channels": min(conv.in_channels, conv.out_channels) < NARROWEST,
            "it is the projection of a shortcut": self._is_shortcut(node, conv, chain[-1]),
            "its output is concatenated": any(_called(user) in _CONCATENATIONS for user in chain[-1].users),
            "it gives the outputs of the network": node not in self.before_weights,
            f"a gate would need over {DEAREST:.0%} of its MACs": gate > DEAREST * macs,
        }
        return next((reason for reason, applies in reasons.items() if applies), None)

    def _hidden(self, conv: nn.Conv2d) -> int:
        divisor = self.squeeze if conv.out_channels >= 80 else max(1, self.squeeze // 2)
        return max(1, conv.out_channels // divisor)

    def _chain(self, node: fx.Node) -> list[fx.Node]:
        """The convolution, its batch norm and its activation, as far as nothing else reads between them."""
        chain = [node]
        for kinds in (_NORMS, _ACTIVATIONS):
            users = list(chain[-1].users)
            if len(users) == 1 and users[0].all_input_nodes == [chain[-1]] and self._calls(users[0], kinds):
                chain.append(users[0])
        return chain

    def _inherited(self, node: fx.Node) -> int | None:
        """The gate whose zeros this node hands on."""
        sources = [self.masked[source] for source in node.all_input_nodes if source in self.masked]
        if not sources:
            return None
        if _called(node) in _PRODUCTS:
            same = [s for s in node.all_input_nodes if s in self.masked and _shape(s)[1:2] == _shape(node)[1:2]]
            return next((self.masked[s] for s in same if len(_shape(s)) == len(_shape(node))), None)
        keeps = self._calls(node, _ACTIVATIONS) or self._calls(node, _ZERO_KEEPING)
        return sources[0] if keeps and len(_shape(node)) == 4 else None

    def _is_shortcut(self, node: fx.Node, conv: nn.Conv2d, end: fx.Node) -> bool:
        """Whether it is a 1x1 convolution, read by a sum alone, beside a longer path from the same origin."""
        if conv.kernel_size != (1, 1) or len(end.users) != 1:
            return False
        origin = node.all_input_nodes[0]
        while self._calls(origin, _ZERO_KEEPING) and len(origin.all_input_nodes) == 1:
            origin = origin.all_input_nodes[0]
        reader = next(iter(end.users))
        others = [other for other in reader.all_input_nodes if other is not end and _called(reader) in _SUMS]
        return any(origin in _ancestors(other) for other in others)

    def _is_repeated(self, node: fx.Node) -> bool:
        return [other.target for other in self.convs].count(node.target) > 1

    def _conv(self, node: fx.Node) -> nn.Conv2d | None:
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        return module if type(module) is nn.Conv2d else None

    def _is(self, node: fx.Node, kinds: Any) -> bool:
        return node.op == "call_module" and isinstance(self.modules[str(node.target)], kinds)

    def _has_weights(self, node: fx.Node) -> bool:
        """Whether the node calls a convolution or linear layer, or a module with one."""
        modules = self.modules[str(node.target)].modules() if node.op == "call_module" else ()
        return any(isinstance(module, nn.Conv2d | nn.Linear) for module in modules)

    def _calls(self, node: fx.Node, kinds: _Kinds) -> bool:
        """Whether the node calls one of these modules, functions or tensor methods."""
        return self._is(node, kinds[0]) or _called(node) in kinds[1]


_Kinds: TypeAlias = tuple[tuple[type[nn.Module], ...], frozenset[Any]]

_NORMS: _Kinds = ((nn.BatchNorm2d,), frozenset())

_ACTIVATIONS: _Kinds = (
    (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU, nn.LeakyReLU, nn.ELU, nn.Tanh),
    frozenset({F.relu, torch.relu, "relu", "relu_", F.relu6, F.hardswish, F.silu, F.gelu, F.leaky_relu, torch.tanh}),
)
"""Modules, functions and methods that act on each value alone and map 0 to 0."""

_ZERO_KEEPING: _Kinds = (
    (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout, nn.Dropout2d, nn.Identity),
    frozenset({F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.dropout, "contiguous"}),
)
"""Modules, functions and methods that are no activation and map a channel of zeros to one."""

_PRODUCTS = frozenset({operator.mul, operator.imul, torch.mul, "mul", "mul_"})
_SUMS = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})
_CONCATENATIONS = frozenset({torch.cat, torch.concat, torch.concatenate})


def _called(node: fx.Node) -> Any:
    return node.target if node.op in ("call_function", "call_method") else None


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(getattr(node.meta.get("tensor_meta"), "shape", ()))


def _unit(node: fx.Node, conv: nn.Conv2d) -> int:
    rows, columns = _shape(node)[2:]
    return rows * columns * conv.kernel_size[0] * conv.kernel_size[1]


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        fresh = set(waiting.pop().all_input_nodes) - found
        found |= fresh
        waiting.extend(fresh)
    return found


def _reaching(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Every node whose value reaches one of `nodes`."""
    return {before for node in nodes for before in _ancestors(node)}
