"""A gated network that really skips the work its masks leave out, one image at a time.

`Gated` computes every channel and multiplies most with 0. An executor decides first: a mask is looked up among a few
sets of channels whose weights lie ready, or the weights are cut for this very image, or, where neither was measured to
be faster, all are used. Inside a chain features stay compact; they are spread out where something else reads them.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils.fusion import fuse_conv_bn_eval

from methods.base import Unsupported
from methods.hooks import hooked
from methods.manidp.executor.buckets import Entry, latency_table, limits, round_up, unions
from methods.manidp.executor.parts import ALL, GATHERED, Choice, Chooser, Cut, accumulate, narrow, scaled, spread
from methods.manidp.gates import Gate, Gated, Mask, active, saliencies
from methods.manidp.sites import Site


class Executor(nn.Module):
    """The result of `executor`: the measured `table` and the `choosers` are by gate, the `cuts` by site."""

    def __init__(
        self, network: nn.Module, choosers: Sequence[Chooser], cuts: Sequence[Cut], table: Mapping[int, list[Entry]]
    ) -> None:
        super().__init__()
        self.network = network
        self.choosers, self.cuts, self.table = tuple(choosers), tuple(cuts), dict(table)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return torch.cat([self.network(image) for image in torch.tensor_split(x, len(x))])


@dataclass(frozen=True)
class _Usage:
    """One gate on calibration images: the channels that are left, and masks and saliencies `(n, left)`."""

    left: Tensor
    saliency: Tensor
    on: Tensor


@torch.no_grad()
def executor(
    student: Gated,
    calibration: Tensor,
    *,
    buckets: int = 4,
    multiple: int = 16,
    is_measured: bool = True,
    remove_unused: bool = False,
    cache_bytes: int = 256 << 20,
) -> Executor:
    """A network with the outputs of `student` in eval mode, `(n, classes)`, that computes only what its masks leave.

    It is exact up to rounding, on every image, unless `remove_unused` says otherwise. Norms are folded into
    convolutions, maps are channels-last, and weights that lie ready are in oneDNN's own layout. A batch runs image by
    image. Make it anew on each machine: it is not meant to be stored or moved.

    Args:
        student: a trained, calibrated network on the CPU; left untouched.
        calibration: images `(n, c, h, w)`.
        buckets: the number of channel sets looked for per gate; 0 to cut the weights for every image anew.
        multiple: channel counts are rounded up to it with the next best channels, whose mask stays 0: the fewer
            different shapes there are, the more of them the convolution library has prepared.
        is_measured: whether to time every gated convolution, here and now, and to compute all channels wherever a
            bucket or a gathered set is not faster; otherwise fewer channels count as faster. The outputs do not depend
            on it.
        remove_unused: whether to remove the channels that no calibration image uses. An image that would use one does
            without it, as though its gate gave it the saliency 0: give many images, or check the top-1.
        cache_bytes: most memory for weights that lie ready; those that most calibration images use come first.

    Raises:
        Unsupported: a gated convolution pads with something else than zeros, or its norm cannot be folded.

    Source: none; the authors of ManiDP publish no executor.
    """
    network = copy.deepcopy(student.network).eval()
    ShapeProp(network).propagate(calibration[:1])
    folded = _fold(network)
    found = [
        _usage(saliency, active(saliency, mask.threshold), remove_unused)
        for saliency, mask in zip(saliencies(student, calibration), student.masks, strict=True)
    ]
    cuts = [_cut(network, site, found, {str(norm.target) for norm in folded}) for site in student.sites]
    inputs = {node.target: node.all_input_nodes[0] for node in network.graph.nodes if node.op == "call_module"}
    own = [(site, cut) for site, cut in zip(student.sites, cuts, strict=True) if not site.is_depthwise]
    table = {site.gate: _table(inputs[site.conv], site, cut, found, multiple) for site, cut in own if is_measured}
    choosers = [
        _chooser(student, gate, usage, table.get(gate), (buckets, multiple)) for gate, usage in enumerate(found)
    ]
    network.add_module("choosers", nn.ModuleList(choosers))
    network.add_module("cuts", nn.ModuleList(cuts))
    finished = Executor(_Rewriter(network, student.sites, folded).rewritten(), choosers, cuts, table)
    _prepare(finished, calibration, cache_bytes)
    return finished


def _usage(saliency: Tensor, on: Tensor, remove_unused: bool) -> _Usage:
    left = on.any(0).nonzero()[:, 0] if remove_unused else torch.arange(on.shape[1])
    return _Usage(left, saliency[:, left], on[:, left])


def _cut(network: fx.GraphModule, site: Site, found: Sequence[_Usage], norms: Collection[str]) -> Cut:
    if site.norm and site.norm not in norms:
        raise Unsupported(f"{site.norm} cannot be folded, expected stored statistics; run the gated network itself")
    conv = cast(nn.Conv2d, network.get_submodule(site.conv))
    if conv.padding_mode != "zeros":
        raise Unsupported(f"{site.conv} pads with {conv.padding_mode!r}, expected zeros; run the gated network itself")
    has_fewer_inputs = site.source >= 0 and not site.is_depthwise
    return Cut(conv, found[site.gate].left, found[site.source].left if has_fewer_inputs else None)


def _table(x: fx.Node, site: Site, cut: Cut, found: Sequence[_Usage], multiple: int) -> list[Entry]:
    """Time a convolution on an input of the height and width of `x` and of its usual number of channels."""
    width = cut.weight.shape[1]
    if site.source >= 0:
        width = min(width, round_up(int(found[site.source].on.sum(1).double().mean()), multiple))
    example = torch.randn(1, width, *_shape(x)[2:]).contiguous(memory_format=torch.channels_last)
    weight = cut.weight[:, :width].clone()
    return latency_table(weight, multiple, lambda weight: cut.conv(example, weight), lambda w: cut.packed(w, example))


def _chooser(
    student: Gated, gate: int, usage: _Usage, table: Sequence[Entry] | None, sizes: tuple[int, int]
) -> Chooser:
    """A gate with its buckets; `sizes` are the number looked for and the multiple, see `executor`."""
    buckets, multiple = sizes
    most = len(usage.left) - 1
    most_ready, most_gathered = (most, most) if table is None else limits(table)
    sets = [rows for rows in unions(usage.saliency, usage.on, buckets, multiple) if len(rows) <= most_ready]
    threshold = student.masks[gate].threshold
    return Chooser(student.gates[gate], threshold, usage.left, sets, multiple=multiple, limit=most_gathered)


def _prepare(network: Executor, calibration: Tensor, room: int) -> None:
    """Lay weights ready for the sets that calibration images share, the most frequent first, as far as they fit."""
    wanted: Counter[tuple[int, int, int]] = Counter()
    examples = {}

    def recorder(number: int) -> Callable[[nn.Module, tuple[Tensor, Choice | None, Choice]], None]:
        def record(_: nn.Module, given: tuple[Tensor, Choice | None, Choice]) -> None:
            inputs, outputs = None if given[1] is None else given[1].subset, given[2].subset
            key = number, ALL if inputs is None else inputs.number, outputs.number
            wanted[key] += 1
            examples[key] = given[0], inputs, outputs

        return record

    with hooked(cut.register_forward_pre_hook(recorder(number)) for number, cut in enumerate(network.cuts)):
        network(calibration.clone())
    for key in (key for key, _ in wanted.most_common() if GATHERED not in key):
        cut, (x, inputs, outputs) = network.cuts[key[0]], examples[key]
        weight, bias = cut.piece(inputs, outputs)
        if weight.nbytes <= room:
            room -= weight.nbytes
            cut.pieces[key[1:]] = cut.packed(weight, x), bias


def _fold(network: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """Fold every norm that alone reads a convolution into it, in place; return the convolution's node by the norm's."""
    calls = Counter(node.target for node in network.graph.nodes if node.op == "call_module")
    modules = dict(network.named_modules())
    folded = {}
    for node in network.graph.nodes:
        before = node.all_input_nodes[0] if node.op == "call_module" else None
        if before is None or before.op != "call_module" or len(before.users) > 1:
            continue
        conv, norm = modules[str(before.target)], modules[str(node.target)]
        if not (isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)) or norm.running_mean is None:
            continue
        if calls[node.target] == calls[before.target] == 1:
            network.set_submodule(str(before.target), fuse_conv_bn_eval(conv, norm))
            folded[node] = before
    return folded


_SUMS = (operator.add, operator.iadd, torch.add)


class _Rewriter:
    """One walk through the graph of a gated network, in which compact values are known by the gate that chose them."""

    def __init__(self, network: fx.GraphModule, sites: Sequence[Site], folded: Mapping[fx.Node, fx.Node]) -> None:
        self.network, self.folded = network, folded
        self.modules = dict(network.named_modules())
        self.sites = {site.conv: (number, site) for number, site in enumerate(sites)}
        self.activations = {site.activation for site in sites}
        self.graph = fx.Graph()
        self.values: dict[fx.Node, fx.Node] = {}
        self.choices: dict[int, fx.Node] = {}
        self.compact: dict[fx.Node, int] = {}
        self.wide: dict[fx.Node, fx.Node] = {}

    def rewritten(self) -> fx.GraphModule:
        for node in self.network.graph.nodes:
            self.values[node] = self._visit(node)
        self.graph.lint()
        return fx.GraphModule(self.network, self.graph)

    def _visit(self, node: fx.Node) -> fx.Node:
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        first = node.all_input_nodes[0] if node.all_input_nodes else None
        if first is None:
            return self.graph.node_copy(node)
        if isinstance(module, Gate):
            return self._choose(int(str(node.target).rpartition(".")[2]), first)
        if isinstance(module, Mask):
            gate = int(str(node.target).rpartition(".")[2])
            arguments = (self.values[first], self.choices[gate], *node.args[2:])
            return self._mark(node, gate, self.graph.call_function(scaled, arguments))
        if module is not None and node.target in self.sites:
            return self._cut(node, first)
        if node in self.folded:
            return self._mark(node, self.compact.get(first), self.values[first])
        if node.name in self.activations:
            return self._mark(node, self.compact[first], self.graph.node_copy(node, self.values.__getitem__))
        if node.target in _SUMS and not node.kwargs:
            return self._sum(node)
        return self.graph.node_copy(node, self._spread)

    def _choose(self, gate: int, x: fx.Node) -> fx.Node:
        source = self.choices[self.compact[x]] if x in self.compact else None
        self.choices[gate] = self.graph.call_module(f"choosers.{gate}", (self.values[x], source))
        return self.choices[gate]

    def _cut(self, node: fx.Node, x: fx.Node) -> fx.Node:
        number, site = self.sites[str(node.target)]
        source = self.choices.get(site.source)
        value = self.values[x]
        if source is not None and x not in self.compact:
            value = self.graph.call_function(narrow, (value, source))
        arguments = (value, None if site.is_depthwise else source, self.choices[site.gate])
        return self._mark(node, site.gate, self.graph.call_module(f"cuts.{number}", arguments))

    def _sum(self, node: fx.Node) -> fx.Node:
        """Rewrite a sum of two maps of one shape, one of them compact, which needs no zeros; copy any other sum."""
        operands = node.all_input_nodes
        for compact, other in (operands, operands[::-1]) if len(operands) == 2 else ():
            if compact in self.compact and _shape(compact) == _shape(other):
                arguments = (self._spread(other), self.values[compact], self.choices[self.compact[compact]])
                return self.graph.call_function(accumulate, arguments)
        return self.graph.node_copy(node, self._spread)

    def _mark(self, node: fx.Node, gate: int | None, value: fx.Node) -> fx.Node:
        """Remember that the value of `node` holds only the channels that this gate chose."""
        if gate is not None:
            self.compact[node] = gate
        return value

    def _spread(self, node: fx.Node) -> fx.Node:
        """The value of `node` at its full width."""
        if node not in self.compact:
            return self.values[node]
        if node not in self.wide:
            arguments = (self.values[node], self.choices[self.compact[node]], _shape(node)[1])
            self.wide[node] = self.graph.call_function(spread, arguments)
        return self.wide[node]


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(getattr(node.meta.get("tensor_meta"), "shape", ()))
