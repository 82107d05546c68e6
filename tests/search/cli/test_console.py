"""The terminal shows every limit beside its value, and no line wider than 100 columns."""

from __future__ import annotations

import io
import logging
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from search.cli import console, output
from search.limits import Limits
from search.results import BudgetReach, LayerReach, MethodReach, Preflight
from search.trials import Timing
from search.units import Scale
from tests.support import results


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """The printed text, as a terminal of 100 columns shows it."""
    screen = io.StringIO()
    monkeypatch.setattr(console, "out", Console(file=screen, width=100))
    return screen


def rows(screen: io.StringIO) -> dict[str, list[list[str]]]:
    """A table's rows by their first cell, each as its lines, each line as its cells that are not empty."""
    blocks = re.split(r"\n *\n", screen.getvalue())
    tables = [[re.split(r" {2,}", line.strip()) for line in block.splitlines()] for block in blocks]
    return {cells[0][0]: cells for cells in tables if cells}


def test_a_terminal_of_ascii_shows_the_same_in_its_own_signs(
    monkeypatch: pytest.MonkeyPatch, terminal: io.StringIO
) -> None:
    console.show_result(results.search(), Path("größe.html"))
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    output.degrade_output()
    monkeypatch.setattr(console, "out", Console(file=screen, width=100))
    console.show_result(results.search(), Path("größe.html"))
    screen.seek(0)
    shown, usual = screen.read(), terminal.getvalue()
    assert "<=50.0 %" in shown
    assert "Report: gr\\xf6\\xdfe.html" in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert shown.splitlines()[7:20] == usual.replace("≤ ", "<=").replace("≥ ", ">=").splitlines()[7:20]


def test_no_sign_of_a_file_or_of_an_error_is_obeyed_by_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    record = logging.LogRecord("a", logging.WARNING, "a.py", 1, "no picture in %s", ("\x1b[31mred",), None)
    assert output.log_handler().format(record) == "WARNING a: no picture in \\x1b[31mred"
    with console.bars(hidden=False) as report:
        report("trials", 1, 1, "failed: \x1b[31mred")
    with pytest.raises(SystemExit):
        output.fail("no \u202ename", 2)
    told = capsys.readouterr().err
    assert "failed: \\x1b[31mred\n" in told
    assert "paredown: no \\u202ename\n" in told


@pytest.mark.parametrize("is_gone", [True, False])
def test_output_that_nobody_takes_ends_the_command_without_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_gone: bool
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w") if is_gone else open("/dev/full", "w")  # noqa: SIM115 - closed below
    monkeypatch.setattr(sys, "stdout", stream)
    print("a result")
    with pytest.raises(SystemExit) as ended:
        output.settle_output()
    assert ended.value.code == 1
    stream.close()
    told = capsys.readouterr().err
    assert told == "" if is_gone else told.startswith("paredown: cannot write the output: No space left on device;")


def test_closed_streams_are_opened_so_that_no_file_takes_their_place() -> None:
    script = (
        "import os, sys; from search.cli.output import open_closed_streams; open_closed_streams(); "
        "print('lost'); print('lost', file=sys.stderr); sys.exit(os.open(os.devnull, os.O_RDONLY))"
    )
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(script)} <&- >&- 2>&-"
    ended = subprocess.run(["sh", "-c", command], cwd=Path(output.__file__).parents[2], capture_output=True)
    assert ended.returncode > 2
    assert ended.stdout + ended.stderr == b""


def test_result_shows_every_limit_beside_its_value(terminal: io.StringIO) -> None:
    console.show_result(results.search(), Path("paredown.reports/digits.html"))
    text = terminal.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    found = rows(terminal)
    assert found["half"][0][1:] == ["practise", "95.7 %", "95.1 %", "49.0 %", "44.1 %", "45.1 %", "54.2 %", "49.1 %"]
    assert found["half"][1:] == [
        ["+ alds", "≤ 50.0 %", "143.1 kB", "0.223 ms", "1.52 ms"],
        ["0.214 to"],
        ["0.243 ms"],
        ["noisy"],
    ]
    assert found["tiny"][1] == ["≤ 25.0 %", "≤ 40.0 %", "72.7 kB", "0.144 ms", "0.850 ms"]
    assert found["edge"][1] == ["+ alds", "≥ 95.2 %", "≤ 50.0 %", "143.1 kB", "≤ 60.0 %", "1.52 ms"]
    assert found["nano"][1:] == [
        ["≤ 63.0 %", "0.180 ms", "≤ 40.0 %"],
        ["105.1 kB", "0.173 to", "1.16 ms"],
        ["0.197 ms"],
    ]
    assert "0.396 to" in text  # the teacher's
    assert found["dust"][1] == ["≥ 96.7 %", "≤ 1,000"]
    assert "predicted" in text
    assert 'mlflow.pytorch.load_model("models:/digits@edge")' in text
    assert "Report: paredown.reports/digits.html" in text


def test_result_says_what_the_search_took(terminal: io.StringIO) -> None:
    console.show_result(results.search(), None)
    text = " ".join(terminal.getvalue().split())
    assert (
        "17 trials (13 complete, 2 stopped early after 7 device-seconds, 1 reused another's training, 1 infeasible, "
        "1 failed) in 104 s, 164 device-seconds (scoring 0, measuring 0)." in text
    )
    assert "latency on cpu-1 0.641, predicted latency on nano 0.716." in text


def test_result_of_a_search_without_latency(terminal: io.StringIO) -> None:
    full = results.search()
    found = [replace(one, timings={}) for one in full.candidates[:6]]
    teacher = replace(full.teacher, latency_ms={})
    budgets = [replace(full.budgets[0], winner=found[0])]
    console.show_result(replace(full, candidates=found, teacher=teacher, budgets=budgets, devices={}), None)
    assert "latency" not in terminal.getvalue()
    assert rows(terminal)["half"] == [
        ["half", "itpruner", "95.1 %", "95.1 %", "49.8 %", "44.8 %", "45.8 %"],
        ["≤ 50.0 %", "145.4 kB"],
    ]


def test_a_latency_within_the_spread_is_not_called_another(terminal: io.StringIO) -> None:
    full = results.search()
    close = replace(full.candidates[0], timings={"cpu-1": Timing(results.times(0.4, 3.0)["cpu-1"], {})})
    apart = replace(full.candidates[5], timings={"cpu-1": Timing(results.times(0.35, 3.0)["cpu-1"], {})})
    budgets = [replace(full.budgets[0], winner=close), replace(full.budgets[1], winner=apart)]
    console.show_result(replace(full, budgets=budgets, candidates=[close, apart]), None)
    assert terminal.getvalue().count("as the teacher") == 1
    assert "medians that lie in each other's spans are not told apart" in " ".join(terminal.getvalue().split())
    console.show_figures(FIGURES | {"latency_ms": results.times(0.4, 1.5)})
    assert "0.400 ms, 0.384 to 0.436 ms (as the teacher, 0.412 ms)" in terminal.getvalue()


def test_only_the_first_device_is_shown_where_no_budget_limits_latency(terminal: io.StringIO) -> None:
    full = results.search()
    console.show_result(replace(full, budgets=full.budgets[:2]), None)
    table = terminal.getvalue().split("17 trials")[0]
    assert "cpu-1" in table
    assert "nano" not in table


def test_a_loss_is_shown_as_one(terminal: io.StringIO) -> None:
    loss = Scale("loss", worst=2.0, best=0.0)
    console.show_result(replace(results.search(), metric=loss), None)
    found = rows(terminal)
    assert found["half"][0][2:4] == ["0.086", "0.098"]
    assert found["edge"][1][1] == "≤ 0.096"
    assert "val. and test are loss." in " ".join(terminal.getvalue().split())
    console.show_figures(FIGURES | loss.described)
    reach = BudgetReach("a", Limits(top1_drop=0.02), {})
    console.show_preflight(Preflight("digits", 1000, 78, 9, (), (reach,), 1, metric=loss))
    text = terminal.getvalue()
    assert "0.09 (teacher 0.056)" in text
    assert "0.034, limit 0.04" in text
    assert "a: loss lost ≤ 0.04" in text
    assert "top-1" not in text


FIGURES: dict[str, Any] = {
    "method": "alds",
    "budget": "edge",
    "limits": {"macs": 6_250_000, "latency_ms/cpu-1": 0.25, "top1_drop": 0.02},
    "macs": 6_000_000,
    "macs_expected": None,
    "macs_expected_validation": None,
    "macs_worst": None,
    "params": 40_000,
    "size_bytes": 161_000,
    "top1_surgery": 0.5,
    "top1_bn": 0.8,
    "top1_validation": 0.955,
    "top1_test": 0.95,
    "top1_drop": 0.017,
    "seconds": 12.0,
    "teacher": vars(results.TEACHER),
    "latency_ms": results.times(0.206, 1.5),
    "teacher_latency_ms": results.times(0.43, 3.1),
    "devices": results.DEVICES,
    "noise": {},
}


def test_figures_of_a_compression_stand_beside_their_limits(terminal: io.StringIO) -> None:
    console.show_figures(FIGURES)
    text = terminal.getvalue()
    for piece in (
        "6.00M (48.0 %), limit 6.25M",
        "1.7 points, limit 2.0 points",
        "0.206 ms, 0.198 to 0.225 ms (50.0 % of 0.412 ms)",
        "predicted latency on nano",
        "95.5 % (teacher 97.2 %)",
    ):
        assert piece in text, piece
    assert "expected MACs" not in text


def test_figures_of_a_gated_model_hold_expected_macs_to_their_own_limit(terminal: io.StringIO) -> None:
    gated = {"macs_expected": 5_000_000, "macs_expected_validation": 5_100_000, "macs_worst": 6_000_000}
    console.show_figures(FIGURES | gated | {"limits": {"macs_expected": 5_500_000}})
    assert "5.00M (40.0 %), limit 5.50M" in terminal.getvalue()
    assert "6.00M (48.0 %) " in terminal.getvalue()


MEASURED: dict[str, Any] = {
    "model": "models:/digits@edge",
    "device": "cpu-1",
    **results.DEVICES["cpu-1"],
    "latency_ms": {"min": 0.2, "p50": 0.215, "p95": 0.31},
    "noise": 0.12,
    "teacher_latency_ms": {"min": 0.38, "p50": 0.4, "p95": 0.42},
    "searched": {"latency_ms": {"min": 0.19, "p50": 0.206, "p95": 0.22}, "noise": None, "host": "bench-3"}
    | {"ratio": 0.215 / 0.206},
}


def test_measured_latency_stands_beside_what_the_search_wrote_down(terminal: io.StringIO) -> None:
    console.show_measured(MEASURED)
    text = terminal.getvalue()
    assert "models:/digits@edge: latency on cpu-1 (onnxruntime, threads: 1, batch: 1 on bench-3)" in text
    lines = [re.split(r" {2,}", line.strip()) for line in text.splitlines()]
    assert ["now", "0.200 ms", "0.215 ms", "0.310 ms"] in lines
    assert ["in the search", "0.190 ms", "0.206 ms", "0.220 ms"] in lines
    told = "The median now is 104.4 % of the search's, at the speed the teacher had then, which is within the spread of"
    assert told in " ".join(text.split())
    assert ["its teacher now", "0.380 ms", "0.400 ms", "0.420 ms"] in lines
    assert text.count("Noisy") == 1
    assert "Noisy now: after all repeats the median lay 12.0 % above the fastest call." in text


def test_predicted_latency_of_a_file_is_called_so(terminal: io.StringIO) -> None:
    console.show_measured(
        MEASURED
        | results.DEVICES["nano"]
        | {"model": "student.pt2", "noise": None, "searched": None, "teacher_latency_ms": None}
    )
    text = terminal.getvalue()
    assert "student.pt2: predicted latency on cpu-1 (profile, threads: 1, batch: 1)" in text
    assert "search" not in text


def test_preflight_shows_what_first_plans_keep_where_nothing_is_trained(terminal: io.StringIO) -> None:
    methods = tuple(MethodReach(name, None, {"macs": 1, "params": 1}) for name in ("alds", "uniform"))
    reasons = {"alds": None, "uniform": "uniform failed: ValueError: odd"}
    budgets = (BudgetReach("half", {"macs": 500}, reasons, {"alds": 0.931}),)
    found = Preflight("digits", 1000, 78, 9, methods, budgets, 1, None, 0.9454, Scale("agreement"))
    console.show_preflight(found)
    lines = [re.split(r" {2,}", line.strip()) for line in terminal.getvalue().splitlines()]
    assert [line[3] for line in lines if line[0] in ("alds", "uniform")] == ["yes, 93.1 %", "no"]
    assert "validation agreement of the method's first plan" in " ".join(terminal.getvalue().split())
    assert "the teacher's is 94.5 %" in " ".join(terminal.getvalue().split())
    told = found.to_json()
    assert (told["teacher_top1"], told["metric"]["name"]) == (0.9454, "agreement")
    assert told["budgets"][0]["kept"] == {"alds": 0.931}


def test_preflight_shows_least_costs_and_why_a_budget_is_out_of_reach(terminal: io.StringIO) -> None:
    methods = (
        MethodReach("itpruner", None, {"macs": 911_362, "params": 5_100, "latency_ms/cpu-1": 0.081}),
        MethodReach("practise+alds", None, {"macs": 800_000, "params": 4_000}),
        MethodReach("manidp", "manidp needs batch norms, but this network has none; leave it out", {}),
    )
    reason = "budget 'edge' allows 0.0500 ms on cpu-1, but itpruner needs 0.0810 ms; raise it"
    limits = {"macs": 6_250_000.0, "latency_ms/cpu-1": 0.05, "top1_drop": 0.02}
    budgets = (
        BudgetReach("half", {"macs": 6_250_000}, {"itpruner": None, "practise+alds": None}),
        BudgetReach("edge", limits, {"itpruner": reason, "practise+alds": None}),
    )
    why: dict[str, str | None] = dict.fromkeys(("alds", "uniform")) | dict.fromkeys(
        ("manidp", "itpruner"), "it is [odd]"
    )
    layers = (LayerReach("features.0", (64, 3, 7, 7), 1_180_000, why),)
    console.show_preflight(Preflight("digits", 12_500_000, 78_042, 9, methods, budgets, 3.2, layers))
    text = terminal.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    lines = [re.split(r" {2,}", line.strip()) for line in text.splitlines()]
    assert ["itpruner", "0.91M (7.3 %)", "5,100 (6.5 %)", "0.0810 ms", "yes", "no"] in lines
    assert ["practise+alds", "0.80M (6.4 %)", "4,000 (5.1 %)", "—", "yes", "yes"] in lines
    assert ["manidp", "cannot"] in lines
    assert "edge: MACs ≤ 6.25M, latency on cpu-1 ≤ 0.0500 ms, top-1 lost ≤ 2.0 points" in text
    assert reason in text
    assert "manidp: manidp needs batch norms" in text
    assert "about 3 min" in text
    row = ["features.0", "alds, uniform", "manidp, itpruner: it is [odd]"]
    assert row in lines
