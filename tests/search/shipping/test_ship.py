"""`paredown export`: what is in the folder, that it runs elsewhere, what it keeps to itself, and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from search.base import SearchError, SpecError, TrackingError
from search.driver.winners import promote, student
from search.record.store import connect
from search.shipping.card import preprocessing
from search.shipping.ship import ship
from tests.search.driver.test_winners import Search
from tests.support.commands import Run

FILES = ["README.md", "card.json", "model.onnx", "model.pt2"]
ALONE = """
import sys
sys.modules.update(dict.fromkeys(["cluster", "methods", "search", "mlflow", *{absent}]))
import json, numpy
images = numpy.load("images.npy")
{code}
numpy.save("{name}.npy", numpy.asarray(logits))
"""


def shipped(won: Search, name: str = "tiny@slim", **more: Any) -> dict[str, Any]:
    return ship(won.spec.tracking.uri, name, Path("out"), **more)


def test_a_folder_runs_in_a_python_with_torch_alone_and_in_one_with_onnxruntime_alone(won: Search) -> None:
    found = shipped(won)
    assert sorted(path.name for path in Path("out").iterdir()) == FILES
    assert found == json.loads(Path("out/card.json").read_text())
    assert found["parity"]["deviation"] <= found["parity"]["tolerance"] == 1e-4
    images = won.workload.splits.calibration
    np.save("out/images.npy", images)
    (winner,) = {one.winner.run_id for one in won.record.read.result().budgets if one.winner}
    with torch.no_grad():
        expected = student(won.workload, won.record, winner)(torch.from_numpy(images)).numpy()
    for runtime, absent in (("torch", ["onnxruntime", "onnx"]), ("onnxruntime", ["torch", "onnx"])):
        code = re.sub(r"torch\.zeros\(.*?\)|numpy\.zeros\(.*\), ?numpy\.float32\)", "IMAGES", found["load"][runtime])
        code = code.replace("IMAGES", "torch.from_numpy(images)" if runtime == "torch" else "images")
        code += ".detach()" if runtime == "torch" else ""
        program = ALONE.format(absent=absent, code=code, name=runtime)
        done = subprocess.run([sys.executable, "-c", program], cwd="out", capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        np.testing.assert_allclose(np.load(f"out/{runtime}.npy"), expected, atol=1e-4)


def test_the_card_says_what_the_model_is(won: Search) -> None:
    found, result = shipped(won), won.record.read.result()
    slim = result.budgets[1]
    assert slim.winner is not None
    assert (found["model"], found["version"], found["budget"], found["method"]) == ("tiny@slim", 2, "slim", "uniform")
    assert found["plan"] == slim.winner.plan
    costs = {one["cost"]: one for one in found["costs"]}
    assert (costs["macs"]["value"], costs["macs"]["limit"]) == (slim.winner.macs, slim.limits["macs"])
    assert all(one["is_inside"] for one in costs.values())
    assert costs["latency_ms/cpu-1"]["teacher"] == 2.0
    assert found["metric"]["validation"] == 0.8
    assert found["metric"]["test"] == slim.top1_test
    assert found["latency_ms"]["cpu-1"] == {"min": 0.9, "p50": 1.0, "p95": 1.5}
    assert found["input"]["shape"] == ["batch", 1, 8, 8]
    assert found["output"]["shape"] == ["batch", 3]
    assert found["data"]["source"] == "factory"
    page = Path("out/README.md").read_text()
    for part in (
        "# tiny@slim", "for the budget `slim`", "| MACs |", "≤ 1.80 ms", "| cpu-1 | 0.900 ms | 1.00 ms (noisy",
        "| nano, predicted |", "torch.export.load", "onnxruntime.InferenceSession", "mlflow.pytorch.load_model",
        "(batch, 1, 8, 8)", "things.py:images", "0.0001 is allowed",
    ):  # fmt: skip
        assert part in page


def test_no_file_holds_a_secret_or_an_absolute_path(won: Search, tmp_path: Path) -> None:
    given = {"source": "factory", "name": f"{tmp_path}/things.py:images", "args": {"api_key": "hunter2", "width": 3}}
    client, run_id = connect(won.spec.tracking.uri), won.record.search.run_id
    decisive = won.record.search.decisive() | {"data": given}
    client.log_dict(run_id, decisive, f"decisive-{won.record.search.spec_digest}.json")
    shipped(won)
    told = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    for name, content in told.items():
        for part in (str(tmp_path), str(Path(__file__).parents[3]), sys.prefix, str(Path.home()) + "/", "hunter2"):
            assert part.encode() not in content, (name, part)
    for name in ("README.md", "card.json"):
        assert b"things.py:images" in told[name]
    assert not [node for node in onnx.load_from_string(told["model.onnx"]).graph.node if node.metadata_props]


@pytest.mark.parametrize("name", ["tiny@slim", "models:/tiny@slim", "tiny/2", "tiny@production"])
def test_every_name_of_a_version_will_do(won: Search, name: str) -> None:
    promote(won.spec.tracking.uri, "tiny", "slim", "production")
    assert shipped(won, name)["version"] == 2


def test_a_version_without_onnx_is_shipped_without_it(won: Search) -> None:
    client = connect(won.spec.tracking.uri)
    client.delete_model_version_tag("tiny", "2", "onnx_uri")
    client.set_tag(won.record.read.result().candidates[0].run_id, "paredown.onnx_refused", "no such operator")
    Path("out").mkdir()
    Path("out", "model.onnx").write_text("of an earlier export")
    assert shipped(won, overwrite=True)["parity"] is None
    assert sorted(path.name for path in Path("out").iterdir()) == ["README.md", "card.json", "model.pt2"]
    page = Path("out/README.md").read_text()
    assert "There is no ONNX file: no such operator" in page
    assert "onnxruntime.InferenceSession" not in page


def test_files_that_differ_are_not_shipped(won: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.shipping.ship.TOLERANCE", -1.0)
    with pytest.raises(SearchError, match=r"the ONNX file of models:/tiny@slim differs from its program by"):
        shipped(won)
    assert not Path("out").exists()


def test_a_folder_that_holds_something_is_left_alone(won: Search) -> None:
    shipped(won)
    before = Path("out/card.json").stat().st_mtime_ns
    with pytest.raises(SpecError, match=r"--out out is not empty; expected a new or an empty folder; .* --overwrite"):
        shipped(won)
    assert Path("out/card.json").stat().st_mtime_ns == before
    assert shipped(won, "tiny@half", overwrite=True)["budget"] == "half"
    Path("file").touch()
    with pytest.raises(SpecError, match="--out file is a file"):
        ship(won.spec.tracking.uri, "tiny@half", Path("file"))


def test_a_version_registered_by_hand_is_refused(won: Search) -> None:
    client = connect(won.spec.tracking.uri)
    client.create_registered_model("mine")
    client.create_model_version("mine", source=won.version("half")["onnx_uri"])
    with pytest.raises(TrackingError, match=r"models:/mine/1 was registered by hand; expected a version that a search"):
        shipped(won, "mine/1")


def test_the_command_says_what_it_wrote(won: Search, run: Run) -> None:
    uri = won.spec.tracking.uri
    ended = run("export", "tiny@slim", "--out", "out", "--uri", uri)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("tiny@slim, version 2, is in out: model.pt2, model.onnx; outputs differ by ")
    ended = run("export", "tiny@slim", "--out", "other", "--uri", uri, "--json")
    assert json.loads(ended.out) == json.loads(Path("other/card.json").read_text())
    assert "no models:/tiny@gone in the MLflow store" in run("export", "tiny@gone", "--out", "o", "--uri", uri).reason(
        2
    )
    assert "'models:/tiny' names no registered" in run("export", "tiny", "--out", "o", "--uri", uri).reason(2)
    assert "no MLflow store at" in run("export", "tiny@slim", "--out", "o", "--uri", "sqlite:///gone.db").reason(2)
    assert "--out out is not empty" in run("export", "tiny@slim", "--out", "out", "--uri", uri).reason(2)
    assert not Path("o").exists()


def test_pictures_are_prepared_as_the_spec_says() -> None:
    told = preprocessing({"source": "imagefolder", "size": 64, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]})
    assert "resized to 73 (bilinear, antialiased), its middle 64 x 64 is cut out" in told
    assert "the mean (0.5, 0.5, 0.5) is taken off and the rest divided by (0.2, 0.2, 0.2)" in told
