"""The page of the benchmarks says what their committed results say."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import tables
from benchmarks.tables import Row
from tests.test_architecture import ROOT


def row(name: str, *tops: float) -> Row:
    """A row with one run of each top-1 on the test images."""
    runs: list[dict[str, Any]] = [
        {"row": name, "macs": 1, "params": 1, "top1_bn": top, "top1_validation": top, "top1_test": top} for top in tops
    ]
    return Row(name, runs)


def test_the_page_is_made_of_the_committed_results() -> None:
    """Run `python benchmarks/tables.py` where this fails."""
    quality = tables.read("quality")
    assert quality is not None
    assert (ROOT / "docs" / "benchmarks.md").read_text() == tables.page(quality, tables.read("latency"))


def test_every_student_is_within_its_budget() -> None:
    quality = tables.read("quality")
    assert quality is not None
    for run in quality["runs"]:
        assert "reason" in run or run["macs"] <= run["share"] * quality["teacher"]["macs"] // 100, run


@pytest.mark.parametrize(
    ("ours", "peer", "wanted"),
    [
        ((0.93, 0.94), (0.91, 0.92), "ahead"),
        ((0.92, 0.94), (0.91, 0.93), "level"),
        ((0.90, 0.91), (0.92, 0.93), "behind"),
        ((0.934,), (0.93,), "level"),
        ((0.936,), (0.93,), "ahead"),
        ((0.92,), (0.93, 0.94), "behind"),
    ],
)
def test_a_row_is_ahead_only_beyond_the_spread_of_seeds(
    ours: tuple[float, ...], peer: tuple[float, ...], wanted: str
) -> None:
    assert tables.standing(row("channels", *ours), row("torch-pruning global", *peer)) == wanted


def test_the_better_of_the_peers_is_the_one_to_beat() -> None:
    rows = [row("channels", 0.93), row("torch-pruning global", 0.90), row("torch-pruning uniform", 0.94)]
    assert tables.verdict(rows, 50) == "- **50 %**, beside `torch-pruning uniform`: behind: `channels` (-1.0)."


def test_a_row_without_a_student_is_a_dash() -> None:
    none = Row("practise", [{"row": "practise", "reason": "no plan fits"}])
    assert set(tables.table_line(none, 25, {}, None).split("|")[4:-1]) == {" - "}
    peer = row("torch-pruning global", 0.90)
    assert "practise" not in tables.verdict([none, row("alds", 0.9), peer], 25)
