"""Files of weights, read without unpickling code, or told by what they are.

Beside tensors only plain values are built: numbers, text, lists and dictionaries, numpy's numbers and arrays, and the
arguments of a script.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from search.base import WorkloadError, one_line

SIGNS = {
    b"version https://git-lfs": "it is a pointer of Git LFS in place of the file, which `git lfs pull` brings",
    b"\x89HDF": "it is an HDF5 file, as Keras writes them",
    b"\x93NUMPY": "it is an array of numpy",
    b"<!DOCTYPE": "it is a web page",
    b"<!doctype": "it is a web page",
    b"<html": "it is a web page",
}
"""The first bytes of files that are taken for weights by mistake."""


READING_FAILS = (ValueError, RuntimeError, TypeError, LookupError, EOFError, OSError, pickle.UnpicklingError)
"""Errors of reading the names of a pickle that is damaged, or none."""


def read_weights(path: Path) -> Any:
    """Read the content of a file of weights: a mapping of names to tensors, or the dictionary around it.

    Raises:
        WorkloadError: there is no such file, or it cannot be read without unpickling code.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError("no regular file; a device or a pipe may have no end")
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(_plain_types()), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise WorkloadError(
            f"no weights at {path}; expected a .safetensors or .pt file; correct model.weights"
        ) from error
    except Exception as error:
        # torch's own message advises to unpickle the file without protection
        raise WorkloadError(
            f"cannot read the weights {path}: {_kind(path, error)}; expected a .safetensors file or a .pt file that "
            "loads with weights_only=True; save the model's state_dict()"
        ) from error


def _plain_types() -> list[Any]:
    """Numpy's numbers and arrays by the names of its old and new releases, and the arguments of a script."""
    multiarray: Any = np._core.multiarray  # type: ignore[attr-defined]
    kinds = {type(np.dtype(code)) for code in "?bhilqBHILQefd"}
    named = [
        (getattr(multiarray, name), f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    ]
    return [argparse.Namespace, np.dtype, np.ndarray, *kinds, *named]


def _kind(path: Path, error: Exception) -> str:
    """Say what a file is that cannot be read."""
    if not path.is_file():
        return "it is a folder" if path.is_dir() else "it is a device or a pipe"
    with path.open("rb") as file:
        start = file.read(100)
    if not start:
        return "the file is empty"
    sign = next((kind for first, kind in SIGNS.items() if start.lstrip().startswith(first)), None)
    return sign or _kind_of_archive(path) or _kind_of_pickle(path, error)


def _kind_of_archive(path: Path) -> str | None:
    """Say what a zip archive holds, if it is one and no file of torch.save."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        members = archive.namelist()
    if any("/code/" in name for name in members):
        return "it is a TorchScript archive"
    if any(name.endswith(("models/model.json", "serialized_exported_program.json")) for name in members):
        return "it is an exported program"
    if any(name.endswith(".npy") for name in members):
        return "it is an archive of numpy arrays"
    return None if any(name.endswith("data.pkl") for name in members) else "it is a zip archive of other files"


def _kind_of_pickle(path: Path, error: Exception) -> str:
    """Name the classes that a pickle asks for, none of which is imported."""
    try:
        asked = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except READING_FAILS:  # an old file, which is no archive: torch's message alone names a class
        text = str(error)
        if not re.search(r"[Uu]nsupported (global|GLOBAL|class)", text):
            return "it is no file of weights, or a damaged one"
        return _told([name for name in ("torch.nn.modules",) if name in text])
    plain = {
        entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__name__}" for entry in _plain_types()
    }
    asked = [name for name in asked if name not in plain]
    return _told(asked) if asked else one_line(error)


def _told(classes: list[str]) -> str:
    named = f" ({', '.join(classes[:3])})" if classes else ""
    if any(name.startswith("torch.nn.modules") for name in classes):
        return f"it is a whole pickled module{named}, which is code"
    return f"it holds more than tensors{named}"
