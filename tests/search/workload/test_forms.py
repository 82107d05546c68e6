"""The forms in which networks are brought: programs and lazy layers are refused, frozen parameters kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from search.base import WorkloadError
from search.workload.forms import freed, protect, unwrapped


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()


def program() -> nn.Module:
    return torch.export.export(network(), (torch.rand(2, 3, 8, 8),)).module()


def lazy() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(2))


@pytest.mark.filterwarnings("ignore:`torch.jit.*:FutureWarning")
@pytest.mark.parametrize(
    ("build", "told"),
    [
        (program, "the network is a program of torch.export: its layers are gone"),
        (lambda: nn.Sequential(program(), nn.ReLU()), "its module '0' is a program of torch.export"),
        (lambda: torch.jit.script(network()), "the network is a TorchScript program: its layers are gone"),
        (lazy, "the weight of 2, a LazyLinear, has no shape yet; expected weights"),
    ],
)
def test_forms_that_cannot_be_cut_are_refused(build: Callable[[], nn.Module], told: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        unwrapped(build(), lambda *_: None)
    assert told in str(caught.value)
    assert "; return " in str(caught.value) or "call the network once" in str(caught.value)


def test_a_lazy_network_that_has_run_is_one_like_others() -> None:
    model = lazy()
    model(torch.rand(2, 3, 8, 8))
    assert unwrapped(model, lambda *_: None) is model


def test_what_is_frozen_in_part_stays_frozen_and_the_whole_does_not() -> None:
    notes: list[str] = []
    model = network()
    for part in (model[0], model):
        part.requires_grad_(False)
        freed(model, lambda _stage, _done, _all, note: notes.append(note))
        assert [one.requires_grad for one in model.parameters()] == [part is model] * 2 + [True] * 2
    assert notes == ["all of its parameters were frozen; recovery trains them"]


def test_what_matches_no_layer_cannot_be_kept() -> None:
    model = nn.Sequential(nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3), "head": nn.Linear(4, 2)}), nn.ReLU())
    protect(model, ["0.head", "*stem"])
    with pytest.raises(WorkloadError) as caught:
        protect(model, ["0.haed", "1", "0.*"])
    assert "model.keep: '0.haed' matches no layer; nearest are 0.head, " in str(caught.value)
    assert "; '1' matches no layer" in str(caught.value)
    assert "'0.*'" not in str(caught.value)
