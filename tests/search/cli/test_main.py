"""The command line: every command gives its result, in this process and in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from search.spec import reading
from search.workload import loading
from tests.support.commands import Ended, Run, compress, write
from tests.test_architecture import ROOT


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
        "top1_surgery", "top1_bn", "top1_validation", "top1_test", "top1_drop", "top1_error",
        "devices", "noise", "exceeded",
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


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv[1:] = ['--help']; from search.cli.main import main\n"
        "try: main()\nfinally: print(*{'torch', 'ray', 'mlflow', 'numpy', 'pydantic', 'yaml'} & set(sys.modules))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert ended.stdout.splitlines()[-1] == ""


def test_compress_takes_a_chain_as_a_spec_writes_it(run: Run, tmp_path: Path) -> None:
    spec = write(tmp_path)
    figures = json.loads(run(*compress(spec, "[itpruner, alds]", "small"), "--json").out)
    assert figures["method"] == "itpruner+alds"
    assert figures["macs"] <= figures["limits"]["macs"]
    links = json.loads((tmp_path / "out" / "plan.json").read_text())["choices"]["links"]
    assert [link["method"] for link in links] == ["itpruner", "alds"]


def test_what_a_solver_prints_is_no_result(tmp_path: Path) -> None:
    code = (
        "import ctypes, os; from search.cli import console\n"
        "with console.bars(hidden=True): ctypes.CDLL(None).puts(b'chatter'); os.system('echo more')\n"
        "print('result')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "result\n"
    assert set(ended.stderr.split()) == {"chatter", "more"}


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
