"""Weights as training scripts leave them: what is meant is loaded, and what a file is instead is told."""

from __future__ import annotations

import argparse
import copy
import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from methods.state import arrays_of, load_arrays, own_memory
from search.base import WorkloadError
from search.workload.checkpoints import load_weights
from search.workload.forms import unwrapped
from search.workload.teacher import save_weights
from tests.support.tiny_workloads import factory, refused


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    parts = OrderedDict(conv=nn.Conv2d(1, 4, 3), norm=nn.BatchNorm2d(4), flat=nn.Flatten(), fc=nn.Linear(4, 2))
    return nn.Sequential(OrderedDict(features=nn.Sequential(parts)))


STATE = network(7).state_dict()


def named(change: Callable[[str], str], state: dict[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {change(name): value for name, value in state.items()}


def loads(model: nn.Module, path: Path, state: dict[str, Tensor] = STATE) -> str:
    """Load a file, whose values must then be the network's, and return the note."""
    note = load_weights(model, path)
    found = model.state_dict()
    assert all(torch.equal(found[name], value.to(found[name].dtype)) for name, value in state.items())
    return note


ADDED = {"criterion.weight": torch.ones(3)}
FORMS: dict[str, tuple[Any, str]] = {
    "the state": (STATE, "9 tensors of w.pt"),
    "state_dict": ({"state_dict": STATE, "epoch": 3, "optimizer": {"state": {}, "param_groups": []}}, "'state_dict'"),
    "model": ({"model": STATE, "ema": named(str, network(1).state_dict())}, "under 'model'; 'ema' left alone"),
    "model_state_dict": ({"model_state_dict": STATE}, "under 'model_state_dict'"),
    "net": ({"net": STATE, "acc": 93.1}, "under 'net'"),
    "a moving average": ({"model_ema": named("module.{}".format) | {"n_averaged": torch.tensor(5)}}, "'model_ema'"),
    "state_dict_ema": ({"state_dict_ema": STATE}, "under 'state_dict_ema'"),
    "another key": ({"student": {"weights": STATE}}, "under 'student.weights'"),
    "a parallel network": (named("module.{}".format), "names without 'module.'"),
    "a compiled one": (named("_orig_mod.{}".format), "names without '_orig_mod.'"),
    "both": ({"state_dict": named("module._orig_mod.{}".format)}, "names without 'module.', '_orig_mod.'"),
    "a parallel part": (named(lambda name: name.replace("features.", "features.module.")), "names without 'module.'"),
    "a trainer": ({"state_dict": named("model.{}".format) | ADDED}, "'model.'; 1 other values left alone"),
    "a backbone": (named("backbone.{}".format), "names without 'backbone.'"),
    "a whole in a part": (named(lambda name: name.removeprefix("features.")), "names with 'features.' before them"),
    "halves": ({name: value.half() for name, value in STATE.items()}, "cast from float16 to float32"),
    "brain floats": ({name: value.bfloat16() for name, value in STATE.items()}, "cast from bfloat16 to float32"),
    "numbers of numpy": ({"state_dict": STATE, "best": np.float64(71.2), "n": np.int64(2)}, "under 'state_dict'"),
    "a script's arguments": ({"model": STATE, "args": argparse.Namespace(lr=0.1, name="x")}, "under 'model'"),
    "arrays": (named(str, {name: value.numpy() for name, value in STATE.items()}), "9 tensors"),
    "old norms": ({name: value for name, value in STATE.items() if "num_batches" not in name}, "9 tensors"),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_training_scripts_leave_is_read_as_meant(tmp_path: Path, form: str) -> None:
    content, told = FORMS[form]
    torch.save(content, tmp_path / "w.pt")
    state = {name: torch.as_tensor(value) for name, value in STATE.items()}
    if form in ("halves", "brain floats"):
        state = {name: value.to(content["features.conv.weight"].dtype) for name, value in STATE.items()}
    assert told in loads(network(), tmp_path / "w.pt", state)


def test_old_files_and_safetensors_are_read_alike(tmp_path: Path) -> None:
    torch.save(
        {"state_dict": STATE, "best": np.float32(1)}, tmp_path / "w.pth.tar", _use_new_zipfile_serialization=False
    )
    loads(network(), tmp_path / "w.pth.tar")
    safetensors.torch.save_file(named("module.{}".format), tmp_path / "w.safetensors")
    loads(network(), tmp_path / "w.safetensors")


def scripted() -> bytes:
    """An archive of the members that a TorchScript file has."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in ("data.pkl", "code/__torch__.py", "constants.pkl", "version"):
            archive.writestr(f"w/{name}", "3")
    return content.getvalue()


def saved(value: object) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


MOMENTUM = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}


def refused_files() -> dict[str, tuple[bytes, str]]:
    return {
        "a module": (saved(network()), "it is a whole pickled module (torch.nn"),
        "an optimizer": (saved(MOMENTUM), "the file holds an optimizer's state"),
        "a script": (scripted(), "it is a TorchScript archive"),
        "junk": (b"junk", "it is no file of weights, or a damaged one"),
        "a part": (saved(STATE)[:900], "it is no file of weights, or a damaged one"),
        "nothing": (b"", "the file is empty"),
        "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "it is a pointer of Git LFS"),
        "a page": (b"\n<!DOCTYPE html><html>", "it is a web page"),
        "a pickle": (pickle.dumps({"a": print}, protocol=2), "it holds more than tensors"),
        "a list": (saved(list(STATE.values())), "the file holds a list, which has no names"),
        "a tensor": (saved(torch.ones(3)), "the file holds one tensor of shape (3,)"),
        "no tensors": (saved({"epoch": 3}), "a dictionary without tensors (epoch)"),
        "others": (saved({"stem.weight": torch.ones(2)}), "another network's state, whose 1 names begin with stem"),
        "fewer": (saved({k: v for k, v in STATE.items() if "fc" not in k}), "lacks 2 of the network's tensors (feat"),
        "more": (saved({**STATE, "fc2.bias": torch.ones(2)}), "it has 1 that the network has not (fc2.bias)"),
        "several": (saved({"a": STATE, "b": STATE}), "several states of this network, under 'a.' and 'b.'"),
        "two halves": (saved(named("a.{}".format) | named("b.{}".format)), "under 'a.' and 'b.'"),
        "integers": (saved({k: v.to(torch.int8) for k, v in STATE.items()}), "as quantized networks do"),
        "wide": (saved({**STATE, "features.fc.bias": torch.ones(9)}), "size mismatch for features.fc.bias"),
    }


def test_what_cannot_be_used_is_told_by_what_it_is(tmp_path: Path) -> None:
    for name, (content, told) in refused_files().items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(content)
        try:
            pytest.fail(f"{name}: {load_weights(network(), path)}")
        except WorkloadError as error:
            message = str(error)
        assert told in message, name
        assert str(path) in message
        assert "expected" in message
        assert message.count(";") >= 2
        assert len(message) < 700


@pytest.mark.filterwarnings("always")
def test_a_bare_pickle_is_told_without_a_warning_of_torch(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path = tmp_path / f"{protocol}.pt"
        path.write_bytes(pickle.dumps(network(), protocol))
        with pytest.raises(WorkloadError, match="cannot read the weights"):
            load_weights(network(), path)
    assert [str(one.message) for one in recwarn] == []


def test_what_has_no_end_is_never_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path / "pipe.pt", Path("/dev/null")):
        with pytest.raises(WorkloadError, match=f"cannot read the weights {path}: it is a device or a pipe; expected"):
            load_weights(network(), path)


class Versioned(nn.Linear):
    """Refuses a state that does not say its version, as some published networks do."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: dict[str, Any], *others: Any) -> None:
        if metadata.get("version") != 2:
            raise ValueError("version should be set to 2")
        super()._load_from_state_dict(state, prefix, metadata, *others)


class Odd(nn.Module):
    """A version, a tensor under two names, state that is no tensor, and a buffer that views one number."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = Versioned(3, 2)
        self.head = self.body
        self.notes = ["a"]
        self.register_buffer("mean", torch.zeros(1).expand(3))

    def get_extra_state(self) -> dict[str, list[str]]:
        return {"notes": self.notes}

    def set_extra_state(self, state: dict[str, list[str]]) -> None:
        self.notes = state["notes"]


@pytest.mark.parametrize("form", ["pt", "wrapped", "safetensors", "once", "arrays"])
def test_versions_tied_tensors_and_extra_state_survive(tmp_path: Path, form: str) -> None:
    before, after = Odd(), Odd()
    before.notes = ["b"]
    own_memory(after)
    state = before.state_dict()
    if form == "arrays":
        load_arrays(after, arrays_of(before))
    elif form in ("safetensors", "once"):
        save_weights(before, path := tmp_path / "w.safetensors")
        if form == "once":
            kept = {name: value for name, value in safetensors.torch.load_file(path).items() if "head" not in name}
            safetensors.torch.save_file(kept, path)
        load_weights(after, path)
    else:
        torch.save(state if form == "pt" else {"model": named("module.{}".format, state)}, tmp_path / "w.pt")
        load_weights(after, tmp_path / "w.pt")
    assert torch.equal(after.head.weight, before.body.weight)
    assert after.head.weight is after.body.weight
    assert after.notes == (["b"] if form in ("pt", "wrapped") else ["a"])


class OptimizedModule(nn.Module):
    """Stands for the class of torch.compile, which takes long to import."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model


def test_wrappers_of_training_are_taken_off() -> None:
    notes: list[str] = []
    inner = network()
    wrappers = [
        nn.DataParallel(inner),
        nn.DataParallel(OptimizedModule(inner)),
        AveragedModel(inner),
        network().bfloat16(),
    ]
    for wrapped in wrappers:
        found = unwrapped(wrapped, lambda _stage, _done, _all, note: notes.append(note))
        assert type(found) is nn.Sequential
        assert found.state_dict().keys() == STATE.keys()
        assert {value.dtype for value in found.parameters()} == {torch.float32}
    assert notes == [
        "taken out of DataParallel",
        "taken out of DataParallel; taken out of OptimizedModule",
        "taken out of AveragedModel",
        "cast from bfloat16 to float32",
    ]


def test_arrays_of_another_network_are_refused() -> None:
    arrays = arrays_of(network())
    load_arrays(copy.deepcopy(network(3)), arrays)
    arrays.pop("features.fc.bias")
    with pytest.raises(RuntimeError, match=r"the state lacks features\.fc\.bias"):
        load_arrays(network(), arrays)


class Bomb:
    """Unpickled without protection, it makes a folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


def test_weights_never_run_code(folder: Path) -> None:
    torch.save({"0.weight": Bomb()}, folder / "bomb.pt")
    (folder / "bare.pt").write_bytes(pickle.dumps(Bomb(), protocol=2))
    for name in ("bomb.pt", "bare.pt"):
        message = refused(folder, factory(weights=name))
        assert "cannot read the weights" in message
        assert "it holds more than tensors" in message
        assert "weights_only` set to `False" not in message
    assert not (folder / "exploded").exists()
    with pytest.raises(FileNotFoundError):
        torch.load(folder / "gone.pt")
    torch.load(folder / "bomb.pt", weights_only=False)
    assert Path("exploded").is_dir()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("gone.pt", "no weights at"),
        ("gone.safetensors", "no weights at"),
        ("junk.pt", "cannot read the weights"),
        ("junk.safetensors", "cannot read the weights"),
        (
            "wide.pt",
            "do not fit the network: Error(s) in loading state_dict for Sequential: size mismatch for 0.weight",
        ),
        ("named.safetensors", "size mismatch for 0.weight"),
        ("whole.pt", "do not fit the network"),
        ("list.pt", "do not fit the network"),
        ("inner", "cannot read the weights"),
    ],
)
def test_weights_that_cannot_be_used(folder: Path, name: str, told: str) -> None:
    (folder / "junk.pt").write_bytes(b"junk")
    (folder / "junk.safetensors").write_bytes(b"junk")
    (folder / "inner").mkdir()
    wide = nn.Sequential(nn.Conv2d(1, 99, 3), nn.ReLU(), nn.ReLU(), nn.Flatten(), nn.Linear(99, 3)).state_dict()
    torch.save(wide, folder / "wide.pt")
    torch.save({"state_dict": wide, "epoch": 3}, folder / "whole.pt")
    torch.save(list(wide.values()), folder / "list.pt")
    safetensors.torch.save_file({f"net.{key}": value for key, value in wide.items()}, folder / "named.safetensors")
    message = refused(folder, factory(weights=name))
    assert told in message
    assert name in message
    assert len(message) < 1000
