"""Gates, masks and the gated network, whose cost depends on the image.

A gate reads a convolution's input and predicts a saliency for every output channel. Behind the convolution, its norm
and its activation, a mask scales the channels of high saliency and zeroes the rest, so their work can be skipped.
`methods.manidp.sites` finds the convolutions; `methods.manidp.method` trains the gates and sets their thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TypeAlias, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from methods.base import Plan
from methods.hooks import hooked
from methods.manidp.sites import Site, gate_macs, gated_macs, trace

CLAMP = 1000.0
"""Upper limit of a saliency, as in the authors' code."""

SPREAD = 0.2
"""Deviation of a fresh gate's output weights, times the root of its inner width: saliencies start near 1, untied."""

MaskInputs: TypeAlias = dict[int, tuple[Tensor, Tensor]]
"""By gate, the inputs of its mask: features `(n, c, h, w)` and saliencies `(n, c)`."""


class Gate(nn.Module):
    """The saliency `(n, outputs)`, at least 0, of every output channel of a convolution, from its input's means.

    It is computed in float32, under autocast too.

    Source: ManiDP (Tang et al., CVPR 2021), the authors' code. Differs: fresh output weights are small, 0.05 for 16
    inner channels and less for more, since the code's own initialisation destroys a trained network.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        self.reduce = nn.utils.skip_init(nn.Linear, inputs, hidden, bias=False)  # type: ignore[no-untyped-call]
        self.expand = nn.utils.skip_init(nn.Linear, hidden, outputs)  # type: ignore[no-untyped-call]
        nn.init.kaiming_normal_(self.reduce.weight, generator=generator)
        nn.init.normal_(self.expand.weight, std=SPREAD / math.sqrt(hidden), generator=generator)
        nn.init.ones_(self.expand.bias)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            hidden = F.relu(self.reduce(x.type_as(self.reduce.weight).mean((2, 3))))
            return F.relu(self.expand(hidden)).clamp(max=CLAMP)


class Mask(nn.Module):
    """Features times the saliency of the active channels; the others become 0. See `active`.

    Without `rescale` active channels pass unchanged: so a depthwise convolution inherits a mask that its input already
    carries, because its norm would turn zeros into constants. The `threshold` starts at 0, which keeps every channel.
    """

    threshold: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("threshold", torch.zeros(()))

    def forward(self, features: Tensor, saliency: Tensor, rescale: bool = True) -> Tensor:
        kept = active(saliency, self.threshold) & (saliency > 0)
        mask = saliency * kept if rescale else kept
        return features * mask.to(features.dtype)[:, :, None, None]


def active(saliency: Tensor, threshold: Tensor) -> Tensor:
    """The channels `(n, c)` that are computed for each image: the one rule that masks, counters and executors share.

    They are those of a saliency above 0 that reaches the threshold, and always the first of the largest, so that no
    convolution is left without a channel. Where that saliency is 0, the channel is computed and then scaled to 0.

    Differs: the authors' torch code also counts channels of saliency 0 as kept where the threshold is 0.

    >>> active(torch.tensor([[0.0, 0.5, 2.0], [0.0, 0.0, 0.0]]), torch.tensor(0.5)).int().tolist()
    [[0, 1, 1], [1, 0, 0]]
    """
    best = saliency.argmax(1, keepdim=True) == torch.arange(saliency.shape[1], device=saliency.device)
    return ((saliency >= threshold) & (saliency > 0)) | best


class Gated(nn.Module):
    """A network with gates: the traced `network`, the rows of its masked convolutions, and the MACs no mask changes.

    `gates` and `masks` are by gate number, as `Site.gate` and `Site.source` count. In `network`'s graph the modules
    are called `manidp.gates.N` and `manidp.masks.N`. `plan` is the plan that the network follows, if any: recovery
    reads its target and its knobs.
    """

    def __init__(
        self, network: fx.GraphModule, sites: Sequence[Site], ungated_macs: int, plan: Plan | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.plan = plan
        self.sites = tuple(sites)
        self.fixed_macs = ungated_macs + sum(gate_macs(site) for site in sites)

    @property
    def gates(self) -> list[Gate]:
        return cast(list[Gate], list(self._parts()["gates"].children()))

    @property
    def masks(self) -> list[Mask]:
        return cast(list[Mask], list(self._parts()["masks"].children()))

    def _parts(self) -> nn.ModuleDict:
        return cast(nn.ModuleDict, self.network.get_submodule("manidp"))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.network(x))

    def instance_macs(self, images: Tensor) -> Tensor:
        """The MACs `(n,)` that each of `images` `(n, c, h, w)` needs if only active channels are computed, gates
        included.

        The products of active inputs and outputs are formed per image: their mean is not the product of the means. Only
        channels whose zeros are certain are saved at a convolution's input.

        Source: ManiDP's FLOPs are MACs. Differs: the authors publish no counter; this one counts the gates too.
        """
        return macs_of(self, saliencies(self, images))


def gated(model: nn.Module, sites: Sequence[Site], ungated_macs: int, *, seed: int, plan: Plan | None = None) -> Gated:
    """A copy of `model` with a fresh gate at every one of `sites` that has its own, drawn from `seed` alone.

    `ungated_macs` are those of one forward pass of `model` without the rows of `sites`.

    Raises:
        Unsupported: the model cannot be traced.
    """
    network = trace(model)
    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    own = [site for site in sites if site.hidden]
    gates = nn.ModuleList(Gate(site.inputs, site.hidden, site.outputs, generator) for site in own)
    network.add_module("manidp", nn.ModuleDict({"gates": gates, "masks": nn.ModuleList(Mask() for _ in own)}))
    nodes = {node.name: node for node in network.graph.nodes}
    convolutions = {str(node.target): node for node in network.graph.nodes if node.op == "call_module"}
    saliencies: dict[int, fx.Node] = {}
    for site in sites:
        if site.hidden:
            convolution = convolutions[site.conv]
            with network.graph.inserting_before(convolution):
                source = convolution.all_input_nodes[0]
                saliencies[site.gate] = network.graph.call_module(f"manidp.gates.{site.gate}", (source,))
        _mask(network.graph, nodes[site.end], saliencies[site.gate], site)
    network.graph.lint()
    network.recompile()
    return Gated(network, sites, ungated_macs, plan).to(device)


def _mask(graph: fx.Graph, end: fx.Node, saliency: fx.Node, site: Site) -> None:
    """Let everything that reads `end` read it masked."""
    rescale = () if site.hidden else (False,)
    with graph.inserting_after(end):
        masked = graph.call_module(f"manidp.masks.{site.gate}", (end, saliency, *rescale))
    end.replace_all_uses_with(masked, delete_user_cb=lambda user: user is not masked)


@contextmanager
def mask_inputs(student: Gated) -> Iterator[MaskInputs]:
    """Collect the inputs of every mask in the last forward pass inside the block, with their gradients."""
    found: MaskInputs = {}

    def recorder(gate: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if len(inputs) == 2:  # not where a depthwise convolution inherits the mask
                found[gate] = (inputs[0], inputs[1])

        return record

    with hooked(mask.register_forward_pre_hook(recorder(gate)) for gate, mask in enumerate(student.masks)):
        yield found


@torch.no_grad()
def saliencies(student: Gated, images: Tensor, batch_size: int = 128) -> list[Tensor]:
    """Every gate's saliencies `(n, c)` on `images` `(n, c, h, w)`, in eval mode at the present thresholds."""
    student.eval()
    device = next(student.parameters()).device
    batches: list[list[Tensor]] = []
    with mask_inputs(student) as found:
        for batch in torch.tensor_split(images, -(-len(images) // batch_size)):
            student(batch.to(device, copy=True))
            batches.append([found[gate][1] for gate in range(len(student.masks))])
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def macs_of(student: Gated, found: Sequence[Tensor]) -> Tensor:
    """The MACs `(n,)` of images with these saliencies, one `(n, c)` per gate, at the student's thresholds."""
    kept = [active(saliency, mask.threshold).sum(1) for saliency, mask in zip(found, student.masks, strict=True)]
    return student.fixed_macs + gated_macs(student.sites, torch.stack(kept, 1))
