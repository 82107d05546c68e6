"""The executor: it has the outputs of the masked network, and runs no more than it says."""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from methods.base import Unsupported
from methods.hooks import hooked
from methods.manidp.executor.buckets import best_rows, latency_table, round_up, unions
from methods.manidp.executor.build import Executor, executor
from methods.manidp.executor.parts import ALL, GATHERED, Choice
from methods.manidp.gates import Gated, active, gated, saliencies
from methods.manidp.losses import quantile_threshold
from methods.manidp.sites import find_sites, gate_macs, gated_macs, trace, widths
from methods.network import count_macs
from tests.support.networks import NETWORKS

networks = pytest.mark.parametrize("name", NETWORKS)


def images(count: int, seed: int) -> Tensor:
    """Images that differ in colour, so that gates tell them apart."""
    generator = torch.Generator().manual_seed(seed)
    colour = 2 * torch.randn(count, 3, 1, 1, generator=generator)
    return colour + torch.randn(count, 3, 16, 16, generator=generator)


IMAGES, OTHERS = images(12, 1), images(8, 2)


def with_gates(model: nn.Module, rates: list[float]) -> Gated:
    """Gates on every possible convolution; each keeps a share of its channels, the first the first of `rates`."""
    sites, _ = find_sites(trace(model), IMAGES[:2], squeeze=2)
    student = gated(model, sites, count_macs(model, IMAGES) - int(gated_macs(sites, widths(sites))), seed=0)
    for gate, mask in enumerate(student.masks):
        mask.threshold.copy_(quantile_threshold(saliencies(student, IMAGES)[gate], rates[gate % len(rates)]))
    return student


@cache
def case(name: str, seed: int) -> Gated:
    return with_gates(NETWORKS[name](), (0.1 + 0.8 * torch.rand(4, generator=generator(seed))).tolist())


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_same(built: Executor, student: Gated, x: Tensor) -> None:
    """Equal outputs, to 1e-5 of the largest."""
    with torch.no_grad():
        wanted = student(x)
    torch.testing.assert_close(built(x), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def choices(built: Executor, image: Tensor) -> list[Choice]:
    """The choice of each gate for one image."""
    found: list[Choice] = []
    hooks = (chooser.register_forward_hook(lambda _m, _x, choice: found.append(choice)) for chooser in built.choosers)
    with hooked(hooks):
        built(image)
    return found


def macs_of(built: Executor, image: Tensor) -> int:
    """The MACs that torch sees run, weights in oneDNN's layout included."""

    def packed(_x: Any, weight: Any, *_rest: Any, out_shape: Any = None, **_more: Any) -> int:
        return int(2 * math.prod(out_shape) * math.prod(weight[1:]))

    mapping = {torch.ops.mkldnn._convolution_pointwise: packed}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        built(image)
    return int(counter.get_total_flops()) // 2


# Masked = executed


@networks
@pytest.mark.parametrize(("buckets", "multiple"), [(0, 1), (0, 16), (4, 4)])
def test_an_executor_gives_what_the_masked_network_gives(name: str, buckets: int, multiple: int) -> None:
    student = case(name, multiple)
    built = executor(student, IMAGES, buckets=buckets, multiple=multiple, is_measured=False, remove_unused=True)
    assert_same(built, student, IMAGES)
    exact = executor(student, IMAGES, buckets=buckets, multiple=multiple, is_measured=False)
    assert_same(exact, student, torch.cat([IMAGES, OTHERS]))


@networks
def test_what_is_measured_changes_no_output(name: str) -> None:
    student = case(name, 0)
    built = executor(student, IMAGES, multiple=4)
    assert set(built.table) == set(range(len(student.gates)))
    assert_same(built, student, IMAGES)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([1, 3, 7]),
    st.sampled_from([1, 2]),
    st.booleans(),
    st.booleans(),
    st.lists(st.sampled_from([0.0, 0.3, 0.7, 1.0]), min_size=3, max_size=3),
    st.integers(0, 10**6),
)
def test_kernels_strides_biases_and_rates(
    kernel: int, stride: int, bias: bool, has_norm: bool, rates: list[float], seed: int
) -> None:
    layers: list[nn.Module] = [nn.Conv2d(3, 12, 3)]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for inputs, outputs, groups in ((12, 20, 1), (20, 20, 20), (20, 9, 1)):
            layers.append(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias))
            if has_norm:
                norm = nn.BatchNorm2d(outputs)
                nn.init.normal_(norm.bias)  # a channel of zeros leaves the norm as a constant
                layers.append(norm)
            layers.append(nn.SiLU())
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 5)).eval()
    student = with_gates(model, rates)
    built = executor(student, IMAGES, multiple=4, is_measured=False)
    assert_same(built, student, torch.cat([IMAGES, OTHERS]))


@networks
def test_gates_that_give_nothing_leave_channels_of_zeros(name: str) -> None:
    student = copy.deepcopy(case(name, 0))
    for gate in student.gates:
        nn.init.zeros_(gate.expand.weight)
        nn.init.zeros_(gate.expand.bias)
    built = executor(student, IMAGES, multiple=1, is_measured=False, remove_unused=True)
    assert all(len(choice.subset.rows) == 1 and not choice.scale.any() for choice in choices(built, IMAGES[:1]))
    assert_same(built, student, torch.cat([IMAGES, OTHERS]))


@networks
def test_a_removed_channel_is_never_active(name: str) -> None:
    student = copy.deepcopy(case(name, 5))
    built = executor(student, IMAGES[:3], multiple=1, is_measured=False, remove_unused=True)
    unused = [
        ~active(found, mask.threshold).any(0)
        for found, mask in zip(saliencies(student, IMAGES[:3]), student.masks, strict=True)
    ]
    assert [len(chooser.left) for chooser in built.choosers] == [int((~mask).sum()) for mask in unused]
    assert sum(int(mask.sum()) for mask in unused) > 0
    for gate, mask in zip(student.gates, unused, strict=True):
        gate.expand.weight.data[mask], gate.expand.bias.data[mask] = 0, 0
    assert_same(built, student, torch.cat([IMAGES, OTHERS]))


def test_the_student_is_left_alone() -> None:
    student = case("residual", 0)
    before, code = copy.deepcopy(student.state_dict()), student.network.code
    executor(student, IMAGES)
    assert student.network.code == code
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


# What runs


@networks
def test_the_macs_that_run_are_those_of_the_rounded_counts(name: str) -> None:
    student, multiple = case(name, 7), 4
    built = executor(student, IMAGES, buckets=0, multiple=multiple, is_measured=False)
    on = [active(found, mask.threshold) for found, mask in zip(saliencies(student, IMAGES), student.masks, strict=True)]
    kept = [(-(-mask.sum(1) // multiple) * multiple).clamp(max=mask.shape[1]) for mask in on]
    expected = student.fixed_macs + gated_macs(student.sites, torch.stack(kept, 1))
    assert len(set(expected.tolist())) > 1
    assert [macs_of(built, image) for image in IMAGES.unsqueeze(1)] == expected.tolist()


@networks
def test_the_macs_that_run_are_those_of_the_chosen_sets(name: str) -> None:
    student = case(name, 8)
    built = executor(student, IMAGES, multiple=2, is_measured=False)
    removed = [gate.expand.out_features - len(c.left) for gate, c in zip(student.gates, built.choosers, strict=True)]
    own = [site for site in student.sites if not site.is_depthwise]
    saved = sum(gate_macs(s) - s.hidden * (s.inputs + s.outputs - gone) for s, gone in zip(own, removed, strict=True))
    for image in OTHERS[:4].unsqueeze(1):
        kept = torch.tensor([[len(choice.subset.rows) for choice in choices(built, image)]])
        assert macs_of(built, image) == student.fixed_macs - saved + int(gated_macs(student.sites, kept))


def test_buckets_gathered_sets_and_all_channels_are_all_met() -> None:
    student = case("residual", 3)
    built = executor(student, IMAGES[:6], multiple=1, is_measured=False)
    built.choosers[0].limit = 0
    numbers = [[choice.subset.number for choice in choices(built, image)] for image in images(40, 9).unsqueeze(1)]
    assert {GATHERED, ALL} < {number for row in numbers for number in row}
    assert GATHERED not in {row[0] for row in numbers}


@pytest.mark.parametrize("room", [0, 20_000, 1 << 20])
def test_weights_that_lie_ready_keep_to_their_memory(room: int) -> None:
    student = case("residual", 1)
    built = executor(student, IMAGES, multiple=4, is_measured=False, cache_bytes=room)
    kept = [weight for cut in built.cuts for weight, _ in cut.pieces.values()]
    assert sum(weight.numel() * weight.element_size() for weight in kept) <= room
    assert bool(kept) == (room > 0)
    assert_same(built, student, IMAGES)


def test_networks_that_cannot_be_cut_are_refused() -> None:
    model = NETWORKS["plain"]()
    padded = copy.deepcopy(model)
    padded[3] = nn.Conv2d(16, 24, 3, padding=1, padding_mode="reflect", bias=False)  # type: ignore[operator]
    with pytest.raises(Unsupported, match="pads with 'reflect', expected zeros"):
        executor(with_gates(padded.eval(), [0.5]), IMAGES)
    model[4] = nn.BatchNorm2d(24, track_running_stats=False)  # type: ignore[operator]
    with pytest.raises(Unsupported, match="4 cannot be folded, expected stored statistics"):
        executor(with_gates(model.eval(), [0.5]), IMAGES)


# What is decided beforehand


@given(st.integers(2, 20), st.integers(1, 40), st.integers(1, 5), st.sampled_from([1, 4]), st.integers(0, 10**6))
def test_every_mask_lies_in_a_bucket_unless_that_holds_all(
    n: int, c: int, count: int, multiple: int, seed: int
) -> None:
    saliency = torch.rand(n, c, generator=generator(seed)) * torch.rand(c, generator=generator(seed + 1))
    on = active(saliency, torch.tensor(0.4))
    sets = unions(saliency, on, count, multiple)
    assert len(sets) <= count + 1
    assert [len(rows) for rows in sets] == sorted(len(rows) for rows in sets)
    assert all(len(rows) % multiple == 0 and len(rows) < c and len(set(rows.tolist())) == len(rows) for rows in sets)
    if round_up(int(on.any(0).sum()), multiple) < c:
        assert all(any(set(mask.nonzero()[:, 0].tolist()) <= set(rows.tolist()) for rows in sets) for mask in on)


def test_two_kinds_of_images_make_two_buckets() -> None:
    on = torch.tensor([[1, 1, 0, 0, 0, 0]] * 3 + [[0, 0, 1, 1, 0, 0]] * 2, dtype=torch.bool)
    sets = unions(on.float(), on, 2, 2)
    assert [rows.tolist() for rows in sets] == [[0, 1], [2, 3], [0, 1, 2, 3]]


@given(st.integers(1, 30), st.integers(0, 10**6))
def test_the_best_rows_hold_all_that_is_on(c: int, seed: int) -> None:
    saliency = torch.randn(c, generator=generator(seed)).clamp(min=0)
    on = active(saliency[None], torch.tensor(0.5))[0]
    for count in range(int(on.sum()), c + 1):
        chosen = torch.zeros(c, dtype=torch.bool)
        chosen[best_rows(saliency, on, count)] = True
        assert int(chosen.sum()) == count
        assert (chosen >= on).all()
        assert set(saliency[chosen & ~on].tolist()) == set(
            saliency[~on].sort(descending=True).values[: count - int(on.sum())].tolist()
        )


def test_the_latency_table_has_entries_where_something_can_be_skipped() -> None:
    x = torch.randn(1, 8, 6, 6)

    def rows(outputs: int) -> list[int]:
        weight = torch.randn(outputs, 8, 3, 3)
        table = latency_table(weight, 16, lambda w: nn.functional.conv2d(x, w), lambda w: w)
        assert all(min(entry.dense_ms, entry.ready_ms, entry.gathered_ms) > 0 for entry in table)
        return [entry.channels for entry in table]

    assert rows(16) == []
    assert rows(64) == [16, 32, 48]
    assert rows(70) == [32, 48, 64]
