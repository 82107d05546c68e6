"""Programs of strangers: ours and MLflow's load, and code that is planted anywhere in one never runs."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from search.archive import INPUTS, PROGRAM, ArchiveError, load_program
from search.export import exported, onnx_program, parity
from tests.support.networks import NETWORKS

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
WEIGHTS, CONSTANTS = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"

Records = dict[str, bytes]


class Bomb:
    """An object whose reading makes the file `planted`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("open('planted', 'w')",)


class Odd(nn.Module):
    """Sizes that depend on the batch, a constant, a condition, and a module's name that is no word."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"a-b": nn.Conv2d(3, 4, 3)})
        self.scale = torch.tensor([2.0])

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            mean = torch.cat([images, images]).mean((1, 2, 3)).reshape(2, images.shape[0]).t()
        found: Tensor = self.parts["a-b"](images * self.scale).mean((2, 3))
        return torch.cat([found, mean, torch.einsum("bchw->bc", images)], 1)


def saved(model: nn.Module, path: Path) -> Path:
    torch.export.save(exported(model.eval(), IMAGES), path)
    return path


def replaced(path: Path, change: Callable[[Records], Any]) -> Path:
    """The archive with other records."""
    with zipfile.ZipFile(path) as archive:
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    change(records)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(f"model/{name}", content)
    return path


def edited(record: str, change: Callable[[Any], Any]) -> Callable[[Records], None]:
    """A change of one JSON record."""

    def apply(records: Records) -> None:
        value = json.loads(records[record])
        change(value)
        records[record] = json.dumps(value).encode()

    return apply


def torch_saved(value: object) -> bytes:
    made = io.BytesIO()
    torch.save(value, made)
    return made.getvalue()


CODE = "__import__('pathlib').Path('planted').touch()"


def as_object(records: Records, path: str, content: bytes, record: str) -> None:
    entry = {"path_name": path, "is_param": False, "use_pickle": True, "tensor_meta": None}
    edited(record, lambda listed: listed["config"].update(evil=entry))(records)
    records[f"{record.rpartition('/')[0]}/{path}"] = content


def of_graph(change: Callable[[Any], Any]) -> Callable[[Records], None]:
    return edited(PROGRAM, lambda program: change(program["graph_module"]["graph"]))


def with_container(kind: str, context: object) -> Callable[[Records], None]:
    spec = json.dumps([1, {"type": kind, "context": json.dumps(context), "children_spec": []}])
    return edited(
        PROGRAM, lambda program: program["graph_module"]["module_call_graph"][0]["signature"].update(out_spec=spec)
    )


def in_first_size(expression: str) -> Callable[[Records], None]:
    def change(graph: Any) -> None:
        next(iter(graph["tensor_values"].values()))["sizes"][0] = {"as_expr": {"expr_str": expression, "hint": None}}

    return of_graph(change)


PLANTS: dict[str, tuple[Callable[[Records], Any], str]] = {
    "inputs": (lambda records: records.update({INPUTS: torch_saved(((Bomb(),), {}))}), "sample inputs"),
    "bare pickle": (lambda records: records.update({INPUTS: pickle.dumps(Bomb())}), "sample inputs"),
    "weight": (lambda records: as_object(records, "weight_0", torch_saved(Bomb()), WEIGHTS), "'evil' in data/weights"),
    "constant": (lambda records: as_object(records, "tensor_0", torch_saved(Bomb()), CONSTANTS), "is pickled"),
    "opaque": (lambda records: as_object(records, "opaque_obj_0", pickle.dumps(Bomb()), CONSTANTS), "or an object"),
    "custom": (lambda records: as_object(records, "custom_obj_0", pickle.dumps(Bomb()), CONSTANTS), "or an object"),
    "old weights": (lambda records: records.update({"data/weights/model.pt": torch_saved(Bomb())}), "neither raw"),
    "old constants": (lambda records: records.update({"data/constants/model.pt": torch_saved(Bomb())}), "neither"),
    "library": (lambda records: records.update({"data/aotinductor/model/a.so": b"\x7fELF"}), "neither raw numbers"),
    "another": (lambda records: records.update({"models/other.json": records[PROGRAM]}), "neither raw numbers"),
    "size": (in_first_size(CODE), "no plain arithmetic"),
    "attribute": (in_first_size("Symbol('s0').__class__"), "no plain arithmetic"),
    "quoted": (in_first_size(f"Symbol(\"{CODE}\")"), "no plain arithmetic"),
    "power": (in_first_size("Pow(Integer(10), Pow(Integer(10), Integer(9)))"), "no plain arithmetic"),
    "guard": (edited(PROGRAM, lambda program: program["guards_code"].append(f"({CODE}, True)[1]")), "no plain"),
    "function": (
        of_graph(lambda graph: graph["nodes"][0].update(target="torch.serialization.os.system")), "is no operator",
    ),
    "file": (of_graph(lambda graph: graph["nodes"][0].update(target="torch.ops.aten.from_file.default")), "operator"),
    "script": (of_graph(lambda graph: graph["nodes"][0].update(target="torch.ops.aten.save.default")), "no operator"),
    "name": (of_graph(lambda graph: graph["nodes"][0].update(name=f"x = {CODE}; y")), "is no name"),
    "input's name": (of_graph(lambda graph: graph["inputs"][0]["as_tensor"].update(name=f"x={CODE}")), "is no name"),
    "import": (with_container("collections.defaultdict", {"default_factory_module": "planted"}), "defaultdict"),
    "enum": (with_container("builtins.dict", [{"__enum__": True, "fqn": "planted:X"}]), "inputs or outputs"),
    "depth": (lambda records: records.update({PROGRAM: b"[" * 100_000}), "no JSON"),
}  # fmt: skip


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return saved(NETWORKS["plain"](), tmp_path_factory.mktemp("ours") / "ours.pt2").read_bytes()


@pytest.mark.parametrize("name", PLANTS)
def test_planted_code_is_refused_and_never_runs(
    name: str, ours: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "planted.py").write_text("open('planted', 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    plant, reason = PLANTS[name]
    Path("evil.pt2").write_bytes(ours)
    path = replaced(Path("evil.pt2"), plant)
    with pytest.raises(ArchiveError, match=reason) as caught:
        load_program(path, "evil.pt2")
    message = str(caught.value)
    assert message.startswith("cannot read evil.pt2: ")
    assert "; expected a program" in message
    assert "\n" not in message
    assert not Path("planted").exists()
    assert not caplog.records


@pytest.mark.filterwarnings("always")
def test_a_pickle_of_a_newer_protocol_is_refused_without_a_warning_of_torch(
    ours: bytes, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(ours)
    replaced(path, lambda records: records.update({INPUTS: pickle.dumps(Bomb(), 4)}))
    with pytest.raises(ArchiveError, match="sample inputs"):
        load_program(path, "it")
    assert [str(one.message) for one in recwarn] == []


@pytest.mark.parametrize("name", ["empty", "random", "truncated", "half a record", "twice", "packed", "text"])
def test_a_file_that_is_no_program_is_told_by_our_message_alone(
    name: str, ours: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.pt2"
    content = {"empty": b"", "random": bytes(range(256)) * 8, "truncated": ours[: len(ours) // 2], "text": b"no zip"}
    path.write_bytes(content.get(name, ours))
    if name == "half a record":
        replaced(path, lambda records: records.update({"data/weights/weight_0": b"123"}))
    if name == "twice":
        with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr(archive.namelist()[0], b"other")
    if name == "packed":
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("ours/data/weights/weight_99", bytes(1000))
    with pytest.raises(ArchiveError, match=r"cannot read it: .*; expected a program .*; make it anew"):
        load_program(path, "it")
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["odd", *NETWORKS])
def test_our_own_programs_load_and_run_for_any_batch(name: str, tmp_path: Path) -> None:
    model = (Odd() if name == "odd" else NETWORKS[name]()).eval()
    program = load_program(saved(model, tmp_path / "model.pt2"), name)
    for count in (1, 3):
        assert torch.equal(program(IMAGES[:count]), model(IMAGES[:count]))


def test_a_loaded_program_can_still_be_written_as_onnx(tmp_path: Path) -> None:
    model = NETWORKS["residual"]().eval()
    program = load_program(saved(model, tmp_path / "model.pt2"), "it")
    whole = torch.fx.GraphModule(program, program.graph).eval()
    assert parity(model, onnx_program(whole, IMAGES), IMAGES) < 1e-4


def test_a_guard_on_sizes_is_arithmetic(ours: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(ours)
    guard = "L['x'].size()[0] >= 2 and L['x'].stride()[1] == 256"
    replaced(path, edited(PROGRAM, lambda program: program["guards_code"].append(guard)))
    assert load_program(path, "it")(IMAGES).shape == (4, 10)
