"""ITPruner on tiny networks: scores, their exact merge, importance, plans, and the students they make."""

from __future__ import annotations

import json
import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from methods.base import Budget, Infeasible, KnobValue, Plan, ScoreError, Scores
from methods.itpruner import ITPruner, importance, redundancy
from methods.itpruner.hsic import nhsic
from methods.network import Profile, count_macs, count_params, profile
from methods.protocol import defaults
from methods.refit.removal import KIND
from tests.support.networks import NETWORKS, fits

METHOD = ITPruner(batch=16)
IMAGES = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(7))
TINY = ("residual", "flatten", "squeeze")


def scored(network: nn.Module, images: Tensor = IMAGES) -> tuple[Profile, Scores]:
    rows = profile(network, images)
    partials = [METHOD.score(shard, network, images, 0) for shard in METHOD.shards(rows, images)]
    return rows, METHOD.merge(partials, rows)


@pytest.fixture(scope="module")
def known() -> dict[str, tuple[nn.Module, Profile, Scores]]:
    built = {name: NETWORKS[name]() for name in TINY}
    return {name: (network, *scored(network)) for name, network in built.items()}


def knobs(**changed: KnobValue) -> dict[str, KnobValue]:
    return defaults(METHOD) | changed


def kept(plan: Plan) -> dict[str, int]:
    return {row[0]: row[1] for row in plan.choices["groups"]}


def prunable(rows: Profile) -> list[str]:
    return [group.name for group in rows.groups if group.fixed is None]


def test_scores_are_the_similarity_of_what_the_next_layers_read() -> None:
    network = NETWORKS["plain"]()
    rows, scores = scored(network)
    assert prunable(rows) == ["0", "3", "6"]
    batches = []
    for start in (0, 16):
        x, read = IMAGES[start : start + 16], []
        for position, layer in enumerate(network):
            x = layer(x)
            if position in (2, 5, 10):
                read.append(x.detach())
        batches.append(read)
    by_hand = [nhsic(batch) for batch in batches]
    _, one_batch = scored(network, IMAGES[:16])
    torch.testing.assert_close(torch.from_numpy(one_batch["nhsic"]), by_hand[0], atol=1e-6, rtol=0)
    low, high = torch.stack(by_hand).amin(0) - 1e-6, torch.stack(by_hand).amax(0) + 1e-6
    assert np.all((low.numpy() <= scores["nhsic"]) & (scores["nhsic"] <= high.numpy()))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_wiring_is_scored_cut_and_counted_as_planned(name: str) -> None:
    network = NETWORKS[name]()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    rows, scores = scored(network)
    assert METHOD.accepts(rows) is None
    assert scores["nhsic"].shape == (len(prunable(rows)),) * 2
    assert np.isfinite(scores["nhsic"]).all()
    budget = Budget("part", macs=rows.macs // 2, params=rows.params * 6 // 10, channels=2)
    plan = METHOD.allocate(scores, rows, budget, knobs())
    student = METHOD.apply(network, Plan.from_json(json.loads(json.dumps(plan.to_json()))))
    assert (count_macs(student, IMAGES), count_params(student)) == (plan.macs, plan.params)
    assert fits(budget, plan.macs, plan.params)
    assert student(IMAGES[:2]).isfinite().all()
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert plan.loss > 0
    assert plan.bound is not None
    assert 0 <= plan.bound <= plan.loss
    assert 0 <= plan.choices["gap"] <= 0.02


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_students_meet_every_limit_they_were_planned_for(
    known: dict[str, tuple[nn.Module, Profile, Scores]], data: st.DataObject
) -> None:
    network, rows, scores = known[data.draw(st.sampled_from(TINY))]
    shares = [data.draw(st.none() | st.floats(0.02, 1.2)) for _ in range(2)]
    macs, params = (part and int(part * whole) for part, whole in zip(shares, (rows.macs, rows.params), strict=True))
    budget = Budget("drawn", macs, params, channels=data.draw(st.sampled_from([1, 4])))
    chosen = knobs(
        objective=data.draw(st.sampled_from(["quadratic", "linear", "log"])),
        criterion=data.draw(st.sampled_from(["l1", "l2", "bn_gamma", "fpgm"])),
    )
    least = METHOD.allocate(scores, rows, cheapest(rows, scores, budget.channels), chosen)
    if fits(budget, least.macs, least.params):
        plan = METHOD.allocate(scores, rows, budget, chosen)
        student = METHOD.apply(network, plan)
        assert fits(budget, count_macs(student, IMAGES), count_params(student))
    else:
        with pytest.raises(Infeasible, match="drawn") as caught:
            METHOD.allocate(scores, rows, budget, chosen)
        assert caught.value.least == {name: getattr(least, name) for name in budget.limits()}


def cheapest(rows: Profile, scores: Scores, channels: int) -> Budget:
    """A budget that only the smallest widths meet, as the error for an impossible one tells."""
    with pytest.raises(Infeasible) as caught:
        METHOD.allocate(scores, rows, Budget("none", 0, 0, channels), knobs())
    return Budget("least", **caught.value.least, channels=channels)


@pytest.mark.parametrize("objective", ["quadratic", "linear", "log"])
def test_the_teachers_own_cost_gives_the_teacher(
    known: dict[str, tuple[nn.Module, Profile, Scores]], objective: str
) -> None:
    network, rows, scores = known["residual"]
    for budget in (Budget("own", rows.macs, rows.params), Budget("unlimited"), Budget("ample", macs=2 * rows.macs)):
        plan = METHOD.allocate(scores, rows, budget, knobs(objective=objective))
        assert (plan.loss, plan.bound, plan.macs, plan.params) == (0.0, 0.0, rows.macs, rows.params)
        assert torch.equal(METHOD.apply(network, plan)(IMAGES), network(IMAGES))


@pytest.mark.parametrize("objective", ["quadratic", "linear", "log"])
def test_the_loss_falls_as_either_limit_grows(
    known: dict[str, tuple[nn.Module, Profile, Scores]], objective: str
) -> None:
    _, rows, scores = known["squeeze"]

    def losses(**fixed: int) -> list[float]:
        limits = [int(part * rows.macs) for part in np.linspace(0.25, 1, 8)]
        budgets = [Budget("one", macs=limit, **fixed) for limit in limits]
        return [METHOD.allocate(scores, rows, budget, knobs(objective=objective)).loss for budget in budgets]

    free, tight = losses(), losses(params=rows.params // 2)
    assert free == sorted(free, reverse=True)
    assert tight == sorted(tight, reverse=True)
    assert all(more <= less for more, less in zip(free, tight, strict=True))


def test_an_infeasible_budget_is_told_the_least_cost(known: dict[str, tuple[nn.Module, Profile, Scores]]) -> None:
    _, rows, scores = known["flatten"]
    with pytest.raises(Infeasible, match="tiny") as caught:
        METHOD.allocate(scores, rows, Budget("tiny", macs=10), knobs())
    least = caught.value.least["macs"]
    plan = METHOD.allocate(scores, rows, Budget("least", macs=least), knobs())
    assert plan.macs == least
    with pytest.raises(Infeasible):
        METHOD.allocate(scores, rows, Budget("less", macs=least - 1), knobs())


def test_merging_is_the_same_for_any_order_and_refuses_a_gap() -> None:
    network = NETWORKS["residual"]()
    method, rows = ITPruner(batch=4), profile(network, IMAGES)
    partials = [method.score(shard, network, IMAGES, 0) for shard in method.shards(rows, IMAGES)]
    assert sum("hsic" in partial for partial in partials) == 10
    merged = method.merge(partials, rows)["nhsic"]
    for order in (partials[::-1], partials[3:] + partials[:3], partials[1::2] + partials[::2]):
        assert method.merge(order, rows)["nhsic"].tobytes() == merged.tobytes()
    with pytest.raises(ScoreError, match="batches"):
        method.merge(partials[1:], rows)


@pytest.mark.parametrize(("samples", "batches"), [(4, [(0, 4)]), (17, [(0, 16)]), (40, [(0, 16), (16, 32)])])
def test_the_tail_is_dropped_unless_it_is_all_there_is(samples: int, batches: list[tuple[int, int]]) -> None:
    rows = profile(NETWORKS["plain"](), IMAGES)
    shards = [shard for shard in METHOD.shards(rows, IMAGES[:samples]) if shard[0] != KIND]
    assert [(shard[2], shard[3]) for shard in shards] == batches
    with pytest.raises(ScoreError, match="at least 4"):
        METHOD.shards(rows, IMAGES[:3])


def test_similarity_does_not_depend_on_the_scale_of_a_layer() -> None:
    network = NETWORKS["plain"]()
    _, before = scored(network)
    with torch.no_grad():
        network[1].weight.mul_(1024)
        network[1].bias.mul_(1024)
        network[3].weight.div_(1024)
    _, after = scored(network)
    np.testing.assert_allclose(after["nhsic"], before["nhsic"], atol=1e-6)


def test_an_activation_that_is_not_finite_names_its_group() -> None:
    network = NETWORKS["plain"]()
    rows = profile(network, IMAGES)
    with torch.no_grad():
        network[4].bias.fill_(math.nan)
    with pytest.raises(ScoreError, match="'3' is not finite in batch 0"):
        METHOD.score(METHOD.shards(rows, IMAGES)[0], network, IMAGES, 0)


def test_a_layer_that_never_varies_is_the_most_redundant(caplog: pytest.LogCaptureFixture) -> None:
    network = NETWORKS["plain"]()
    with torch.no_grad():
        network[4].weight.zero_()
        network[4].bias.fill_(-1)
    with caplog.at_level(logging.WARNING):
        rows, scores = scored(network)
    assert "'3' does not vary" in caplog.text
    share = redundancy(torch.from_numpy(scores["nhsic"]))
    assert share[1] == share.max()
    plan = METHOD.allocate(scores, rows, Budget("half", macs=rows.macs // 2), knobs())
    assert plan.notes == ("channel group '3' does not vary", "channel group '6' does not vary")


def test_a_network_of_one_group_needs_no_comparison() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 14 * 14, 10)).eval()
    rows, scores = scored(network)
    assert scores["nhsic"].tolist() == [[1.0]]
    assert importance(torch.from_numpy(scores["nhsic"]), beta_rel=4.0).tolist() == [1.0]
    plan = METHOD.allocate(scores, rows, Budget("half", macs=rows.macs // 2), knobs())
    assert kept(plan) == {"0": 8}


matrices = st.integers(2, 8).flatmap(lambda n: st.lists(st.floats(-0.1, 1), min_size=n * n, max_size=n * n))


def similarity(values: list[float]) -> Tensor:
    square = torch.tensor(values, dtype=torch.float64).reshape(math.isqrt(len(values)), -1)
    square = (square + square.T) / 2
    return square - torch.diag(square.diagonal()) + torch.eye(len(square), dtype=torch.float64)


@given(matrices, st.floats(0, 4))
def test_importance_falls_with_redundancy(values: list[float], beta: float) -> None:
    nhsic = similarity(values)
    share, weights = redundancy(nhsic), importance(nhsic, beta_rel=beta)
    assert share.sum().item() == pytest.approx(1)
    assert weights.mean().item() == pytest.approx(1)
    in_order = weights[share.argsort()]
    assert (in_order.diff() <= 1e-9 * in_order[1:] + 1e-12).all()
    assert importance(nhsic, beta_rel=0.0).tolist() == [1.0] * len(nhsic)
    flipped = importance(nhsic.flip(0).flip(1), beta_rel=beta)
    torch.testing.assert_close(flipped, weights.flip(0), rtol=1e-7, atol=0)


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ScoreError, match="group 1 is not finite"):
        importance(torch.tensor([[1.0, 0.5], [math.nan, 1.0]]), beta_rel=1.0)


def test_plans_follow_the_data_unless_told_to_ignore_it() -> None:
    rows = profile(NETWORKS["bottleneck"](), IMAGES)
    budget = Budget("half", macs=rows.macs // 2)
    shared = np.linspace(0.05, 0.9, len(prunable(rows)))
    one = np.sqrt(np.outer(shared, shared))
    np.fill_diagonal(one, 1)
    other = np.ascontiguousarray(one[::-1, ::-1])

    def widths(nhsic: np.ndarray, **changed: KnobValue) -> dict[str, int]:
        return kept(METHOD.allocate({"nhsic": nhsic}, rows, budget, knobs(criterion="l1", **changed)))

    assert widths(one, beta_rel=2.0) != widths(other, beta_rel=2.0)
    assert widths(one, beta_rel=0.0) == widths(other, beta_rel=0.0) != widths(one, beta_rel=2.0)


class Windows(nn.Module):
    """Two layers read two windows of each image, one after the other or all first windows before all second ones."""

    def __init__(self, *, by_image: bool) -> None:
        super().__init__()
        self.by_image = by_image
        self.first, self.last, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 10, 1), nn.Linear(10, 4)
        self.inner = nn.Sequential(nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        halves = self.first(x).unflatten(2, (2, 7)).movedim(2, 1 if self.by_image else 0)
        mixed = self.inner(halves.flatten(0, 1)).unflatten(0, halves.shape[:2]).movedim(1 if self.by_image else 0, 2)
        return self.head(self.last(mixed.flatten(2, 3)).mean((2, 3)))  # type: ignore[no-any-return]


def test_the_maps_of_an_image_are_compared_as_one() -> None:
    torch.manual_seed(0)
    network = Windows(by_image=True).eval()
    rows, scores = scored(network, IMAGES[:16])
    assert {"inner.0", "last"} <= set(prunable(rows))
    with torch.no_grad():
        halves = network.first(IMAGES[:16]).unflatten(2, (2, 7)).transpose(1, 2)
        hidden = network.inner[:2](halves.flatten(0, 1)).reshape(16, -1)
        last = network.last(network.inner(halves.flatten(0, 1)).unflatten(0, (16, 2)).transpose(1, 2).flatten(2, 3))
    places = [prunable(rows).index(name) for name in ("inner.0", "last")]
    expected = float(nhsic([hidden, last.mean((2, 3))])[0, 1])
    assert scores["nhsic"][places[0], places[1]] == pytest.approx(expected, rel=1e-4)
    plan = METHOD.allocate(scores, rows, Budget("60 %", macs=rows.macs * 6 // 10), knobs())
    student = METHOD.apply(network, plan, IMAGES[:16])
    assert (count_macs(student, IMAGES), count_params(student)) == (plan.macs, plan.params)


def test_maps_in_no_order_of_the_images_are_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(ScoreError, match=r"'(first|inner.0)' is read for other maps than the 16 images"):
        scored(Windows(by_image=False).eval(), IMAGES[:16])
