"""The command line: what a user gets, and that every wrong input ends in one paragraph and its own exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
import yaml

from search.cli import main
from search.results import BudgetResult, Cost, SearchResult
from search.spec import reading
from search.trials import Candidate, Teacher
from search.workload import loading

THINGS = """
import numpy as np
import torch
from torch import nn

BATCH = []


def images(count=200, bad=0):
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, count)
    pixels = random.normal(0, 0.3, (count, 1, 8, 8)).astype(np.float32)
    pixels[np.arange(count), 0, 2 * labels] += 1
    pixels[:bad, 0, 3, 3] = np.nan
    return {"images": pixels, "labels": labels}


def lazy(**args):
    made = images(**args)
    return [(torch.from_numpy(image), int(label)) for image, label in zip(made["images"], made["labels"])]


class Net(nn.Sequential):
    def __init__(self, channels=1, width=16):
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(channels, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 24, 3, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 3),
        )


class Stubborn(Net):
    def forward(self, x):
        if self.training and len(x) > 2:
            raise RuntimeError("it will not learn")
        return super().forward(x)


def broken():
    raise ValueError("out of luck")


def watched(logits, labels):
    with open("threads", "w") as file:
        print(torch.get_num_threads(), file=file)
    return float((logits.argmax(1) == labels).float().mean())
"""

GOOD: dict[str, Any] = {
    "name": "tiny",
    "model": {"source": "factory", "name": "./things.py:Net"},
    "data": {"source": "factory", "name": "./things.py:images"},
    "methods": ["itpruner", "alds"],
    "budgets": [{"name": "half", "macs": "50%"}, {"name": "small", "macs": "70%", "params": "60%"}],
    "recovery": {"steps": 8, "batch_size": 32},
}


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: object
    out: str
    err: str

    def reason(self, code: int) -> str:
        """The one paragraph on standard error that the command ended with, on one line."""
        assert self.code == code, self.err
        assert "Traceback" not in self.out + self.err
        _, found, paragraph = self.err.partition("paredown: ")
        assert found, self.err
        assert "paredown: " not in paragraph
        assert "\n\n" not in paragraph.strip()
        return " ".join(paragraph.split())


Run = Callable[..., Ended]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process; what it would leave behind is put back."""

    def ended(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["paredown", *map(str, arguments)])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        with pytest.raises(SystemExit) as caught:
            main.main()
        told = capsys.readouterr()
        return Ended(caught.value.code, told.out, told.err)

    return ended


def write(folder: Path, **changes: Any) -> Path:
    """A spec file with the user's code beside it."""
    (folder / "things.py").write_text(THINGS)
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(GOOD | changes))
    return path


def compress(spec: Path, method: str = "uniform", budget: str = "half", out: str | Path = "out") -> list[object]:
    return ["compress", spec, "--method", method, "--budget", budget, "--out", out]


def source(name: str, **args: Any) -> dict[str, Any]:
    return {"source": "factory", "name": f"./things.py:{name}", "args": args}


# What works


def test_check_says_what_every_method_reaches(run: Run, tmp_path: Path) -> None:
    ended = run("check", write(tmp_path))
    assert ended.code == 0
    for part in ("itpruner", "alds", "uniform", "half", "small", "yes", "min on this machine"):
        assert part in ended.out
    assert not list(tmp_path.glob("*.db"))


def test_check_as_json(run: Run, tmp_path: Path) -> None:
    ended = run("check", write(tmp_path), "--json")
    found = json.loads(ended.out)
    assert (ended.code, ended.err) == (0, "")
    assert found.keys() == {"name", "macs", "params", "layers", "methods", "budgets", "minutes"}
    macs, params = 16 * 9 * 16 + 16 * 24 * 9 * 16 + 24 * 3, 16 * 10 + 32 + 24 * (16 * 9 + 1) + 25 * 3
    assert (found["name"], found["macs"], found["params"], found["layers"]) == ("tiny", macs, params, 3)
    assert [one["method"] for one in found["methods"]] == ["itpruner", "alds", "uniform"]
    for one in found["methods"]:
        assert one["refusal"] is None
        assert 0 < one["least"]["macs"] < macs / 4
        assert 0 < one["least"]["params"] < params / 2
    half, small = found["budgets"]
    assert half["limits"] == {"macs": macs // 2}
    assert small["limits"] == {"macs": int(macs * 0.7), "params": int(params * 0.6)}
    assert half["is_reachable"]
    assert half["reasons"] == {"itpruner": None, "alds": None, "uniform": None}


def test_time_is_estimated_with_the_one_thread_of_a_worker(run: Run, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    try:
        assert run("check", write(tmp_path, metric="./things.py:watched")).code == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert Path("threads").read_text() == "1\n"


PROGRAM = """
import sys
sys.modules.update(dict.fromkeys(("cluster", "methods", "search")))
import numpy as np
import torch
stored = np.load("test.npz")
program = torch.export.load("out/student.pt2").module()
with torch.no_grad():
    logits = program(torch.from_numpy(stored["images"]))
print(float((logits.argmax(1).numpy() == stored["labels"]).mean()))
"""


def test_compress_writes_a_model_that_needs_no_project(run: Run, tmp_path: Path) -> None:
    spec = write(tmp_path)
    ended = run(*compress(spec, "itpruner", "small"), "--json")
    figures = json.loads(ended.out)
    assert (ended.code, ended.err) == (0, "")
    assert figures == json.loads((tmp_path / "out" / "figures.json").read_text())
    assert figures.keys() == {
        "method", "budget", "limits", "macs", "macs_expected", "macs_expected_validation", "macs_worst", "params",
        "size_bytes", "seconds", "teacher", "latency_ms", "teacher_latency_ms",
        "top1_surgery", "top1_bn", "top1_validation", "top1_test", "top1_drop", "devices", "noise", "exceeded",
    }  # fmt: skip
    assert (figures["method"], figures["budget"]) == ("itpruner", "small")
    assert figures["macs"] <= figures["limits"]["macs"] == int(0.7 * figures["teacher"]["macs"])
    assert figures["params"] <= figures["limits"]["params"] == int(0.6 * figures["teacher"]["params"])
    assert 0 < figures["latency_ms"]["cpu-1"]["min"] <= figures["latency_ms"]["cpu-1"]["p50"]
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert (plan["method"], plan["macs"], plan["params"]) == ("itpruner", figures["macs"], figures["params"])
    assert (tmp_path / "out" / "student.safetensors").stat().st_size > figures["size_bytes"]

    test = loading.load(reading.load(spec), lambda *_: None).splits.test
    images, labels = test.batch(np.arange(len(test)))
    np.savez(tmp_path / "test.npz", images=images.numpy(), labels=labels.numpy())
    alone = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert alone.returncode == 0, alone.stderr
    assert abs(float(alone.stdout) - figures["top1_test"]) < 1e-6


def test_compress_shows_its_figures_beside_the_teachers(run: Run, tmp_path: Path) -> None:
    ended = run(*compress(write(tmp_path)))
    assert ended.code == 0
    for part in (
        "uniform for half",
        "MACs",
        "validation top-1 after recovery",
        "test top-1",
        "(teacher ",
        "latency on cpu-1",
    ):
        assert part in ended.out
    assert "8/8" in ended.err


def test_help_needs_nothing(run: Run) -> None:
    ended = run("--help")
    assert ended.code == 0
    for command in ("check", "search", "frontier", "compress"):
        assert command in ended.out


# What does not


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


def test_compress_takes_a_chain_as_a_spec_writes_it(run: Run, tmp_path: Path) -> None:
    spec = write(tmp_path)
    figures = json.loads(run(*compress(spec, "[itpruner, alds]", "small"), "--json").out)
    assert figures["method"] == "itpruner+alds"
    assert figures["macs"] <= figures["limits"]["macs"]
    links = json.loads((tmp_path / "out" / "plan.json").read_text())["choices"]["links"]
    assert [link["method"] for link in links] == ["itpruner", "alds"]


def test_what_a_solver_prints_is_no_result(tmp_path: Path) -> None:
    code = (
        "import ctypes, os; from search import console\n"
        "with console.bars(hidden=True): ctypes.CDLL(None).puts(b'chatter'); os.system('echo more')\n"
        "print('result')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "result\n"
    assert set(ended.stderr.split()) == {"chatter", "more"}


def test_names_that_are_not_known(run: Run, tmp_path: Path) -> None:
    spec = write(tmp_path)
    reason = run(*compress(spec, method="magic")).reason(2)
    assert reason.startswith("'magic' is not a method; known: itpruner, manidp,")
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
        [BudgetResult("half", {"macs": 50})],
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


# In processes of their own


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    command = [Path(sys.executable).with_name("paredown"), *map(str, arguments)]
    return subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def end(process: subprocess.Popen[str]) -> Ended:
    out, err = process.communicate(timeout=120)
    return Ended(process.returncode, out, err)


def test_the_real_command_ends_as_the_tested_one(tmp_path: Path) -> None:
    spec = write(tmp_path, budgets=[{"name": "dust", "macs": 100}])
    ended = end(start("check", spec, "--json"))
    assert "no method reaches dust" in ended.reason(3)
    assert json.loads(ended.out)["budgets"][0]["is_reachable"] is False


@pytest.mark.parametrize("name", ["methods", "cluster", "search"])
def test_a_foreign_module_of_our_name_stops_before_it_runs(tmp_path: Path, name: str) -> None:
    foreign = tmp_path / "elsewhere"
    foreign.mkdir()
    (foreign / f"{name}.py").write_text("from pathlib import Path; Path('ran').touch()")
    reason = end(start("check", write(tmp_path), PYTHONPATH=str(foreign))).reason(2)
    assert reason.startswith(f"the module {name!r} is {foreign / name}.py, not Paredown's own")
    assert "rename that file, or take its folder off PYTHONPATH" in reason
    assert not Path("ran").exists()


def test_the_command_runs_as_a_module_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "search.cli", "--help"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "compress" in ended.stdout
