"""Shared weights in small networks, judged by hand."""

from __future__ import annotations

from torch import nn

from methods.network.graph import shares_weights


def test_a_parameter_that_two_modules_hold_is_shared() -> None:
    one, two, three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    two.weight, three.bias = one.weight, one.bias
    network = nn.Sequential(one, two, three, nn.Linear(4, 4))
    for by_name in (False, True):
        assert [shares_weights(network, module, by_name=by_name) for module in network] == [True, True, True, False]


def test_a_module_of_two_names_is_shared_by_name_only() -> None:
    one = nn.Linear(4, 4)
    network = nn.Sequential(one, nn.Sequential(one))
    assert shares_weights(network, one, by_name=True)
    assert not shares_weights(network, one, by_name=False)


def test_what_a_module_shares_within_itself_is_its_own() -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inner[1].weight = inner[0].weight
    network = nn.Sequential(inner, nn.Linear(4, 4))
    assert shares_weights(network, inner[0], by_name=True)
    assert not shares_weights(network, inner, by_name=True)
