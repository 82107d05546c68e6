"""Import the user's own factories and metrics, and remember the modules they bring in for the workers."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from torch import Tensor

from search.base import WorkloadError, one_line
from search.units import TOP1, Scale

T = TypeVar("T")

ROUNDING = 1e-6
"""How far a share may lie outside [0, 1] and still be meant to be in it."""


@dataclass(frozen=True)
class UserMetric:
    """The user's own metric, as a share of its scale; its exceptions become a `WorkloadError` that names it.

    One that `is_clipped` may be worse than the worst of its scale, as a loss may, and counts as that.
    """

    name: str
    function: Callable[[Tensor, Tensor], float]
    scale: Scale = TOP1
    is_clipped: bool = False

    def __call__(self, logits: Tensor, labels: Tensor) -> float:
        """The share in [0, 1] that the metric gives for logits `(n, classes)` and labels `(n,)`; larger is better."""
        value = self.value(logits, labels)
        if not self.is_in_range(value):
            low, high = sorted((self.scale.worst, self.scale.best))
            raise WorkloadError(
                f"the metric {self.name} gave {value:.4g}; expected a result from {low:g} to {high:g}; mend it, or "
                "give the range of its values as metric.range"
            )
        return min(max(self.scale.share(value), 0.0), 1.0)

    def is_in_range(self, value: float) -> bool:
        """Whether a value lies on the scale, but for rounding."""
        share = self.scale.share(value)
        return share <= 1 + ROUNDING and (self.is_clipped or share >= -ROUNDING)

    def value(self, logits: Tensor, labels: Tensor) -> float:
        """The metric's own finite value."""
        try:
            value = float(self.function(logits, labels))
        except Exception as error:
            raise WorkloadError(
                f"the metric {self.name} raised {type(error).__name__}: {one_line(error)}; expected a number "
                "for logits (n, classes) and labels (n,); run it by itself to mend it"
            ) from error
        if not math.isfinite(value):
            raise WorkloadError(f"the metric {self.name} gave {value}; expected a finite number; mend it")
        return value


def call_factory(name: str, args: dict[str, Any], folder: str) -> object:
    """Return what the user's factory returns."""
    factory = load_function(name, folder)
    try:
        with importable(folder):
            return factory(**args)
    except (Exception, SystemExit) as error:
        raise WorkloadError(
            f"the factory {name} raised {type(error).__name__}: {one_line(error)}; expected it to return; "
            "run it by itself to mend it"
        ) from error


def load_function(name: str, folder: str) -> Callable[..., Any]:
    """Load the function `pkg.mod:fn` or `./file.py:fn`, looked for in the spec's folder first.

    A file is loaded under a name of its own, so a user's `search.py` never takes the place of ours.
    """
    source, _, attribute = name.rpartition(":")
    with importable(folder):
        module = _load_file(Path(folder, source)) if source.endswith(".py") else _load_package(source)
    _user_module_names.add(module.__name__)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise WorkloadError(f"{source} has no function {attribute!r}; expected one; check the name")
    return function  # type: ignore[no-any-return]


_user_module_names: set[str] = set()
"""The names of the modules of the user's code, and of those it imported."""


@contextmanager
def importable(folder: str) -> Iterator[None]:
    """Let modules in `folder` be imported while the context is open, and remember all that are imported then."""
    before = set(sys.modules)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        _user_module_names.update(sys.modules.keys() - before)


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise WorkloadError(f"no file {path}; expected a Python file beside the spec; correct the path")
    name = f"paredown_user_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    loader = found.loader
    _run_import(lambda: loader.exec_module(module), str(path))
    return module


def _load_package(source: str) -> ModuleType:
    return _run_import(lambda: importlib.import_module(source), source)


def _run_import(load: Callable[[], T], source: str) -> T:
    try:
        return load()
    except (Exception, SystemExit) as error:
        raise WorkloadError(
            f"importing {source} raised {type(error).__name__}: {one_line(error)}; expected it to import; "
            "run it by itself from the spec's folder to mend it"
        ) from error


def user_modules() -> list[ModuleType]:
    """The modules that the user's factories and metric brought in, which workers elsewhere cannot import by themselves.

    Modules of Python, installed ones and ours are left out: workers have them.
    """
    modules = (sys.modules.get(name) for name in sorted(_user_module_names))
    return [module for module in modules if module is not None and _is_user_code(module)]


def _is_user_code(module: ModuleType) -> bool:
    name, file = module.__name__, Path(getattr(module, "__file__", None) or "")
    if not file.is_absolute():  # torch.ops says "_ops.py"
        return False
    is_ours = name.partition(".")[0] in ("cluster", "search", "methods", "paredown", "__main__")
    is_installed = not {"site-packages", "dist-packages"}.isdisjoint(file.parts)
    standard = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))
    return not (is_ours or is_installed or any(file.is_relative_to(place) for place in standard))
