"""The driver's threads follow the work of a layer: what is gained by more of them is little, and lost beside others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from search.workload import threads, zoo


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("name", "side", "most", "expected"),
    [("resnet14", 8, 4, 1), ("resnet20", 28, 2, 2), ("resnet20", 28, 16, 3), ("resnet20", 28, 1, 1)],
)
def test_a_network_gets_the_threads_that_its_layers_keep_busy(
    monkeypatch: pytest.MonkeyPatch, name: str, side: int, most: int, expected: int
) -> None:
    monkeypatch.setattr(threads, "MOST", most)
    threads.set_threads(zoo.build(name, 1, 10, 0), torch.zeros(2, 1, side, side))
    assert torch.get_num_threads() == expected
