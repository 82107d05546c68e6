"""Import the user's own factories and metrics, and remember the modules they bring in for the workers."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from torch import Tensor

from search.base import SearchError, WorkloadError, one_line
from search.units import TOP1, Scale

T = TypeVar("T")

ROUNDING = 1e-6
"""How far a share may lie outside [0, 1] and still be meant to be in it."""

OURS = ("cluster", "search", "methods", "paredown")
"""The names of our packages, which a user's modules may have too."""
ALIAS = "paredown_user_"
"""The beginning of the names by which a user's files are kept, so that none takes the place of ours."""


@contextmanager
def blaming(
    what: str, expected: str | Callable[[BaseException], str], kind: type[SearchError] = WorkloadError
) -> Iterator[None]:
    """Turn whatever a user's code raises, an exit of the process too, into an error of this `kind` that names it.

    Our own errors, which name what is wrong already, stay.

    Args:
        what: the code that runs in the block, at the beginning of a sentence.
        expected: the rest of the message, with what to do, or how to tell it by the error.
    """
    try:
        yield
        if closed := _reopened():
            raise kind(f"{what} closed the standard {closed}; expected code that leaves it open; take the close out")
    except (KeyboardInterrupt, SearchError):
        raise
    except BaseException as error:
        _reopened()
        rest = _own_import(error) or (expected if isinstance(expected, str) else expected(error))
        raise kind(f"{what} raised {type(error).__name__}: {one_line(error)}; expected {rest}") from error


def _reopened() -> str | None:
    """Open standard output or error again where a user's code closed it, in the place of the other; return which."""
    for number, name in ((1, "output"), (2, "error")):
        stream = "stdout" if number == 1 else "stderr"
        if getattr(getattr(sys, stream), "closed", False):
            with suppress(OSError):
                os.dup2(3 - number, number)
            setattr(sys, stream, open(number, "w", errors="backslashreplace", closefd=False))  # noqa: SIM115
            return name
    return None


def _own_import(error: BaseException) -> str | None:
    """The rest of the message about a call that imported a module of the user's and got ours of that name."""
    missed = error.obj if isinstance(error, AttributeError) else None
    name = missed.__name__ if isinstance(missed, ModuleType) else getattr(error, "name", None) or ""
    if (name := name.partition(".")[0]) in OURS and isinstance(error, ImportError | AttributeError):
        return (
            f"a file to import its own {name!r} at its top, because in a function, when that is called, the name is "
            "that of Paredown's package; move the import there"
        )
    return None


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
        expected = "a number for logits (n, classes) and labels (n,); run it by itself to mend it"
        with blaming(f"the metric {self.name}", expected):
            value = float(self.function(logits, labels))
        if not math.isfinite(value):
            raise WorkloadError(f"the metric {self.name} gave {value}; expected a finite number; mend it")
        return value


def call_factory(name: str, args: dict[str, Any], folder: str) -> object:
    """Return what the user's factory returns."""
    factory = load_function(name, folder)
    with blaming(f"the factory {name}", "it to return; run it by itself to mend it"), importable(folder):
        return factory(**args)


def load_function(name: str, folder: str) -> Callable[..., Any]:
    """Load the function `pkg.mod:fn` or `./file.py:fn`, looked for in the spec's folder first.

    A file is loaded under a name of its own, and so are modules with a name of ours, which never takes its place.
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
    """Let modules in `folder` be imported while the context is open, and remember all that are imported then.

    Those with the name of a package of ours go before it in the block, and are kept by another name after it. The
    current folder, from which relative places of results start, is the same after it.
    """
    before, here = set(sys.modules), Path.cwd()
    clashing = [name for name in OURS if _is_users(Path(folder), name)]
    ours = {name: sys.modules.pop(name) for name in _below(clashing)}
    sys.modules.update({name.removeprefix(ALIAS): sys.modules[name] for name in _below(map(ALIAS.__add__, clashing))})
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        os.chdir(here)
        sys.path.remove(folder)
        for name in _below(clashing):
            _rename(sys.modules.pop(name), ALIAS + name)
        sys.modules.update(ours)
        _user_module_names.update(sys.modules.keys() - before)


def _is_users(folder: Path, name: str) -> bool:
    """Whether the folder has a module of this name that is not our own package."""
    places = [place for place in (folder / name / "__init__.py", folder / f"{name}.py") if place.is_file()]
    ours = getattr(sys.modules.get(name), "__file__", None)
    return bool(places) and not (ours and places[0].samefile(ours))


def _rename(module: ModuleType, name: str) -> None:
    """Keep a module by another name, by which it is also sent to workers."""
    module.__name__ = name
    if module.__spec__ is not None:
        module.__spec__.name = name
        module.__package__ = module.__spec__.parent
    sys.modules[name] = module


def _below(packages: Iterable[str]) -> list[str]:
    """The names of these modules and of all in them, as far as they are imported."""
    roots = tuple(packages)
    return [name for name in sys.modules if name in roots or name.startswith(tuple(f"{root}." for root in roots))]


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise WorkloadError(f"no file {path}; expected a Python file beside the spec; correct the path")
    name = ALIAS + path.stem
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
    with blaming(f"importing {source}", "it to import; run it by itself from the spec's folder to mend it"):
        return load()


def user_modules() -> list[ModuleType]:
    """The modules that the user's factories and metric brought in, which workers elsewhere cannot import by themselves.

    Modules of Python, installed ones and ours are left out: workers have them.
    """
    modules = (sys.modules.get(name) for name in sorted(_user_module_names))
    return [module for module in modules if module is not None and _is_user_code(module)]


def place_of(error: BaseException) -> str | None:
    """The place in a user's code where an error came up, or passed through; None if it is none of theirs."""
    files = {module.__file__ for module in user_modules()}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    return f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else None


def _is_user_code(module: ModuleType) -> bool:
    name, file = module.__name__, Path(getattr(module, "__file__", None) or "")
    if not file.is_absolute():  # torch.ops says "_ops.py"
        return False
    is_ours = name.partition(".")[0] in (*OURS, "__main__")
    is_installed = not {"site-packages", "dist-packages"}.isdisjoint(file.parts)
    standard = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))
    return not (is_ours or is_installed or any(file.is_relative_to(place) for place in standard))
