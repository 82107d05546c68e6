"""The command line refuses wrong input: each ends in one paragraph and its own exit code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from search.cli import main
from search.limits import Limits
from search.results import BudgetResult, Cost, SearchResult
from search.trials import Candidate, Teacher
from tests.support.commands import Ended, Run, compress, source, write

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"modle": {}}, "modle: unknown key; did you mean 'model'?"),
        ({"budgets": [{"name": "half", "macs": "50 ms"}]}, "budgets.0.macs: '50 ms' is not an amount; write 50%"),
        ({"budgets": [{"name": "half", "macs": "150%"}]}, "'150%' is more than the teacher itself; write at most 100%"),
        ({"model": source("Net") | {"weights": "gone.pt"}}, "gone.pt; expected a .safetensors or .pt file; correct"),
        ({"model": source("Net", channels=3)}, "the network does not take inputs of shape (2, 1, 8, 8)"),
        ({"model": source("broken")}, "the factory ./things.py:broken raised ValueError: out of luck; expected it"),
        ({"data": source("broken")}, "the factory ./things.py:broken raised ValueError: out of luck; expected it"),
        ({"data": source("images", bad=2)}, "2 pixels from the data factory are NaN or infinite; expected finite"),
        ({"data": source("lazy", bad=1)}, "image 0 of the data set holds NaN or infinity; expected finite pixels"),
        ({"data": source("images", count=2)}, "the train split is empty: 2 images with data.validation = 0.1"),
        ({"data": source("images", count=0)}, "the train split is empty: 0 images"),
        ({"metric": "./things.py:broken"}, "the metric ./things.py:broken raised TypeError"),
    ],
)
@pytest.mark.parametrize("command", ["check", "compress"])
def test_wrong_input_ends_in_one_paragraph(
    run: Run, tmp_path: Path, changes: dict[str, Any], told: str, command: str
) -> None:
    spec = write(tmp_path, **changes)
    assert told in run(*(["check", spec] if command == "check" else compress(spec))).reason(2)


@pytest.mark.parametrize("command", ["check", "search", "compress --method alds --budget half --out o", "submit"])
def test_a_mistake_in_a_spec_is_told_before_anything_heavy_is_imported(tmp_path: Path, command: str) -> None:
    spec = write(tmp_path, methods=["alsd"])
    run = f"import sys; sys.argv[1:] = {[*command.split(), str(spec)]}; from search.cli.main import main\n"
    then = "try: main()\nfinally: print(*{'torch', 'ray', 'mlflow', 'rich.table'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", run + then], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (ended.returncode, ended.stdout) == (2, "\n")
    assert "methods: 'alsd' is not a method; did you mean 'alds'?" in ended.stderr


@pytest.mark.parametrize(
    "command",
    ["check {} --address", "search {} --address", "compress {} --method alds --budget half --out o --address",
     "measure {} --device cpu-1 --address", "serve --address"],
)  # fmt: skip
def test_an_address_that_nobody_answers_is_told_before_any_work(run: Run, tmp_path: Path, command: str) -> None:
    spec = write(tmp_path, data=source("broken"))
    reason = run(*command.format(spec).split(), "127.0.0.1:1").reason(2)
    assert reason.startswith("no Ray cluster at '127.0.0.1:1': nobody answered within 3 s; expected a running head")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["spec.yaml", "things.py"]


def test_the_address_of_a_spec_is_tried_too(run: Run, tmp_path: Path) -> None:
    spec = write(tmp_path, data=source("broken"), cluster={"address": "127.0.0.1:1"})
    assert "nobody answered" in run("search", spec).reason(2)
    assert "no Ray cluster at 'http://127.0.0.1:1'" in run("submit", spec, "--address", "http://127.0.0.1:1").reason(2)


def test_the_address_of_jobs_is_told_without_its_password(run: Run) -> None:
    for address in ("postgresql://ada:S3cret/x@127.0.0.1:1/db", "http://ada:S3cret/x@127.0.0.1:1"):
        assert "no http://HOST:PORT; expected" in (reason := run("list", "--address", address).reason(2))
        assert "S3cret" not in reason


def test_a_budget_below_reach_names_the_least_cost(run: Run, tmp_path: Path) -> None:
    spec = write(tmp_path, budgets=[{"name": "half", "macs": "50%"}, {"name": "dust", "macs": 100}])
    ended = run("check", spec, "--json")
    assert ended.reason(3) == "no method reaches dust; raise the limits to what is reachable"
    found = json.loads(ended.out)
    half, dust = found["budgets"]
    assert (half["is_reachable"], dust["is_reachable"]) == (True, False)
    for one in found["methods"]:
        least = one["least"]["macs"]
        assert least > 100
        told = re.search(r"(?:at least|no less than) ([\d.,]+)(k?)", dust["reasons"][one["method"]])
        assert told
        assert float(told[1].replace(",", "")) * (1000 if told[2] else 1) == pytest.approx(least, rel=0.005)
    shown = run("check", spec)
    assert shown.reason(3)
    for reason in dust["reasons"].values():
        assert "".join(reason.split()) in "".join(shown.out.split())
    for method, reason in dust["reasons"].items():
        assert " ".join(reason.split()) == run(*compress(spec, method, "dust")).reason(3)
    assert run(*compress(spec, "alds", "half")).code == 0


def test_what_was_there_survives_a_failure(run: Run, tmp_path: Path) -> None:
    spec = write(tmp_path)
    assert run(*compress(spec)).code == 0
    kept = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert kept.keys() == {"student.safetensors", "student.pt2", "plan.json", "figures.json"}
    write(tmp_path, budgets=[{"name": "half", "macs": 1}])
    run(*compress(spec)).reason(3)
    write(tmp_path, data=source("broken"))
    run(*compress(spec)).reason(2)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == kept


def read_only_places(folder: Path) -> list[Path]:
    """Folders that nobody can write to, root included."""
    (folder / "file").write_text("a file")
    return [folder / "file", folder / "file" / "below", Path("/proc/new"), Path("/proc")]


def test_a_folder_that_cannot_be_written_is_found_before_any_work(run: Run, tmp_path: Path) -> None:
    spec = write(tmp_path, data=source("broken"))
    for place in read_only_places(tmp_path):
        reason = run(*compress(spec, out=place)).reason(2)
        assert reason.startswith(f"cannot use {place}")
        assert "expected a place this process may write; choose another" in reason


@pytest.mark.filterwarnings("ignore")
def test_a_store_that_cannot_be_written_is_found_before_any_work(run: Run, tmp_path: Path) -> None:
    for place in read_only_places(tmp_path)[:3]:
        spec = write(tmp_path, data=source("broken"), tracking={"uri": f"sqlite:///{place / 'store.db'}"})
        assert str(place) in run("search", spec).reason(2)


@pytest.mark.parametrize(
    ("knob", "told"),
    [
        ("measure", "--knob is 'measure'; expected NAME=VALUE, such as measure=rss"),
        ("measur=rss", "alds has no knob 'measur'; expected one of measure, schemes,"),
        ("measure=rs", "knob 'measure' is 'rs'; expected one of"),
        ("recovery.learning_rate=9", "knob 'recovery.learning_rate' is '9'; expected a number from"),
        ("recovery.learning_rate=0.0.1", "knob 'recovery.learning_rate' is '0.0.1'; expected a number from"),
    ],
)
def test_a_wrong_knob_is_told_before_any_work(run: Run, tmp_path: Path, knob: str, told: str) -> None:
    spec = write(tmp_path, data=source("broken"))
    assert told in run(*compress(spec, "alds"), "--knob", knob).reason(2)


def test_names_that_are_not_known(run: Run, tmp_path: Path) -> None:
    spec = write(tmp_path)
    reason = run(*compress(spec, method="magic")).reason(2)
    assert reason.startswith("'magic' is not a method; known: itpruner, channels,")
    reason = run(*compress(spec, budget="huge")).reason(2)
    assert reason == "no budget 'huge' in the spec; expected one of half, small; correct --budget"
    reason = run("check", tmp_path / "gone.yaml").reason(2)
    assert reason.startswith("cannot read the spec")
    reason = run("frontier", "tiny").reason(2)
    assert "run a search first or give --uri" in reason


@pytest.mark.parametrize("arguments", [["chek"], ["check"], ["compress", "spec.yaml"], ["check", "a.yaml", "--jsn"]])
def test_arguments_that_are_not_known(run: Run, arguments: list[str]) -> None:
    ended = run(*arguments)
    assert ended.code == 2
    assert "Traceback" not in ended.err
    assert "Usage: paredown" in ended.err


def test_a_trial_that_raises_leaves_its_trace_in_a_file(run: Run, tmp_path: Path) -> None:
    reason = run(*compress(write(tmp_path, model=source("Stubborn")))).reason(1)
    assert (
        "uniform failed: RuntimeError: it will not learn; expected a compressed network; see out/failure.txt" in reason
    )
    assert "Traceback" in (tmp_path / "out" / "failure.txt").read_text()


def test_a_fault_of_ours_keeps_its_traceback(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.driver.preflight.TIMED_STEPS", 0)
    with pytest.raises(ZeroDivisionError):
        run("check", write(tmp_path))


def result(*states: str) -> SearchResult:
    """A search of one budget that nothing won."""
    candidates = [
        Candidate(str(number), number, "half", "alds", {}, state, error=f"ValueError: number {number}\nTraceback")
        for number, state in enumerate(states)
    ]
    return SearchResult(
        "tiny",
        Teacher(top1_validation=0.9, top1_test=None, macs=100, params=10, size_bytes=40),
        [BudgetResult("half", Limits(macs=50))],
        candidates,
        Cost(1.0, 1.0, len(states), 0),
        "2026-01-01T00:00:00+00:00",
        "",
    )


def test_a_search_of_which_every_trial_failed_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main._fail_without_winners(result("failed", "failed"))
    told = Ended(caught.value.code, *capsys.readouterr()).reason(1)
    assert told.startswith(
        "all 2 trials failed, the first with ValueError: number 0; expected compressed networks; see"
    )


@pytest.mark.parametrize("states", [(), ("failed", "infeasible"), ("infeasible",)])
def test_a_budget_without_a_winner_is_named(capsys: pytest.CaptureFixture[str], states: tuple[str, ...]) -> None:
    with pytest.raises(typer.Exit) as caught:
        main._fail_without_winners(result(*states))
    assert caught.value.exit_code == 3
    assert "no feasible model for half; paredown check says" in capsys.readouterr().err
