"""Weights in the forms that training scripts leave them: found in their file, renamed and loaded.

The state may lie under a key, and its names may begin with those of wrappers; it is taken if its names are then the
network's, one for one. `weight_files` reads the file itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from search.base import WorkloadError, one_line
from search.workload.weight_files import read_weights

KEYS = ("state_dict", "model", "model_state_dict", "net", "ema", "model_ema", "state_dict_ema")
"""The keys under which a state is looked for first, the plain one before its moving average."""
WRAPPERS = ("module", "_orig_mod")
"""Parts of names that come from `DataParallel`, `AveragedModel` and `torch.compile`."""
PREFIXES = ("", "model.", "backbone.", "net.", "network.")
"""Prefixes that are taken before others if several fit."""
COUNTERS = ("num_batches_tracked", "n_averaged")
"""The last parts of names that old files lack, or that a moving average adds."""


@dataclass(frozen=True)
class _Match:
    """A state of a file whose names are the network's, behind `prefix` in the file and `strip` in the network."""

    place: tuple[str, ...]
    state: Mapping[str, Any]
    prefix: str
    strip: str


def load_weights(model: nn.Module, path: Path) -> str:
    """Load the weights of a file into `model`, in place; return a note of what was taken.

    Raises:
        WorkloadError: there is no such file, it holds no weights, or those of another network.
    """
    content = read_weights(path)
    own = model.state_dict()
    with _fitting(path):
        match = _chosen([(place, state) for place, state in _states(content)], own, content)
        state = _renamed(match, own)
        notes = [*_words(match, state, content), *_casts(state, own)]
        model.load_state_dict(state)
    return "; ".join([f"{len(state):,} tensors of {path.name}", *notes])


def outputs_of(model: nn.Module, path: Path) -> int:
    """Return the number of outputs of the network like `model` whose weights a file holds: the rows of its last matrix.

    Raises as `load_weights` does.
    """
    content = read_weights(path)
    own = model.state_dict()
    with _fitting(path):
        state = _renamed(_chosen(list(_states(content)), own, content), own)
    return next(len(value) for value in reversed(state.values()) if isinstance(value, Tensor) and value.ndim == 2)


@contextmanager
def _fitting(path: Path) -> Iterator[None]:
    """Blame the weights of a file for every error of the block."""
    try:
        yield
    except Exception as error:
        raise WorkloadError(
            f"the weights {path} do not fit the network: {one_line(error)}; expected its state_dict(); "
            "check model.name, the number of classes and the input channels"
        ) from error


def _states(content: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Yield every mapping of names to tensors in a file, at most three keys deep, with its keys; usual keys first."""
    if not isinstance(content, Mapping) or {"state", "param_groups"} <= content.keys():
        return
    if any(_is_values(value) for key, value in content.items() if isinstance(key, str)):
        yield place, content
    if len(place) < 3:
        usual = [key for key in KEYS if key in content]
        for key in [*usual, *(key for key in content if key not in usual)]:
            yield from _states(content[key], (*place, str(key)))


def _is_values(value: object) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "biuf")


def _chosen(states: list[tuple[tuple[str, ...], Mapping[str, Any]]], own: Mapping[str, Any], content: object) -> _Match:
    """Choose the state whose names are the network's; raises `ValueError` if none has them, or several do."""
    if not states:
        raise ValueError(f"the file holds {_kind(content)}")
    matches = [match for place, state in states for match in _matches(place, state, own)]
    if not matches:
        raise ValueError(_difference(max((state for _, state in states), key=len), own))
    usual = [match for match in matches if not match.place or match.place[0] in KEYS]
    found = [match for match in usual if match.place == usual[0].place] or matches
    known = sorted((one for one in found if one.prefix in PREFIXES), key=lambda one: PREFIXES.index(one.prefix))
    if len(found) > 1 and not (usual and known):
        names = " and ".join(repr(".".join((*one.place, one.prefix))) for one in found)
        raise ValueError(f"it holds several states of this network, under {names}, and not which one is meant")
    return (known or found)[0]


def _kind(content: object) -> str:
    """Say what a file holds that has no state."""
    if isinstance(content, Tensor):
        return f"one tensor of shape {tuple(content.shape)}"
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}, which has no names"
    if {"state", "param_groups"} <= content.keys():
        return "an optimizer's state"
    return f"a dictionary without tensors ({', '.join(map(str, list(content)[:5])) or 'empty'})"


def _matches(place: tuple[str, ...], state: Mapping[str, Any], own: Mapping[str, Any]) -> list[_Match]:
    """Find the prefixes with which a state has every name of the network.

    Behind a prefix other names may stand beside those of the network, such as a loss's; without one none may.
    """
    names = {_plain(name) for name, value in state.items() if _is_values(value)}
    targets = [_plain(name) for name, value in own.items() if isinstance(value, Tensor)]
    for strip in _common_prefixes(targets):
        needed = [[name.removeprefix(strip) for name in group] for group in _tied(own)]
        ends = tuple(f".{name}" for name in (needed or [[]])[0])
        starts = {name[: -len(end) + 1] for end in ends for name in names if f".{name}".endswith(end)}
        found = []
        for prefix in sorted(starts):
            strange = names - {prefix + name.removeprefix(strip) for name in targets}
            has_all = all(any(prefix + name in names for name in group) for group in needed)
            is_new = not (strip and prefix.endswith(strip))
            if has_all and is_new and (prefix or all(name.endswith(COUNTERS) for name in strange)):
                found.append(_Match(place, state, prefix, strip))
        if found:
            return found
    return []


def _plain(name: str) -> str:
    """Return a name without the parts that wrappers add.

    >>> _plain("features.module.0.weight")
    'features.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _common_prefixes(names: list[str]) -> list[str]:
    """Return every prefix, the empty one first, that all names share.

    >>> _common_prefixes(["net.body.0.weight", "net.body.0.bias"])
    ['', 'net.', 'net.body.', 'net.body.0.']
    """
    parts = names[0].split(".")[:-1] if names else []
    prefixes = ["".join(f"{part}." for part in parts[:depth]) for depth in range(len(parts) + 1)]
    return [prefix for prefix in prefixes if all(name.startswith(prefix) for name in names)]


def _tied(own: Mapping[str, Any]) -> list[list[str]]:
    """Group the network's names by the tensor they stand for; a file needs one name of each, and no counters."""
    groups: dict[object, list[str]] = {}
    for name, value in own.items():
        if isinstance(value, Tensor) and not name.endswith(COUNTERS):
            is_plain = not nn.parameter.is_lazy(value) and value.numel() > 0
            key = (value.data_ptr(), value.shape, value.stride()) if is_plain else name
            groups.setdefault(key, []).append(_plain(name))
    return list(groups.values())


def _renamed(match: _Match, own: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """Return a state under the network's own names, with the versions of its modules.

    Values that the file may lack are the network's own: counters, extra states, and the versions of a file without any.
    """
    values = {_plain(name): value for name, value in match.state.items()}
    twins = {name: group for group in _tied(own) for name in group}
    found: OrderedDict[str, Any] = OrderedDict()
    for name, value in own.items():
        group = [_plain(name), *twins.get(_plain(name), ())]
        there = [place for one in group if (place := match.prefix + one.removeprefix(match.strip)) in values]
        found[name] = _native(values[there[0]]) if there else value
    versions = {_plain(name): version for name, version in getattr(match.state, "_metadata", {}).items()}
    found._metadata = {  # type: ignore[attr-defined]
        name: versions.get(f"{match.prefix}{f'{_plain(name)}.'.removeprefix(match.strip)}".strip("."), version)
        for name, version in getattr(own, "_metadata", {}).items()
    }
    return found


def _native(value: Any) -> Any:
    """Return an array as a tensor, and anything else as it is."""
    if not isinstance(value, np.ndarray):
        return value
    return torch.from_numpy(np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("=")))


def _words(match: _Match, state: Mapping[str, Any], content: object) -> Iterator[str]:
    """Say where a state lay, how its names were changed, and what beside it was left alone."""
    if match.place:
        yield f"under {'.'.join(match.place)!r}"
    parts = set(chain.from_iterable(name.split(".") for name in match.state))
    own_parts = set(chain.from_iterable(name.split(".") for name in state))
    cut = [f"{part}." for part in WRAPPERS if part in parts - own_parts] + [match.prefix] * bool(match.prefix)
    if cut:
        yield f"names without {', '.join(map(repr, cut))}"
    if match.strip:
        yield f"names with {match.strip!r} before them"
    others = [key for key in content if key in KEYS and key not in match.place] if isinstance(content, Mapping) else []
    if others:
        yield f"{', '.join(map(repr, others))} left alone"
    if (left := sum(not _plain(name).startswith(match.prefix) for name in match.state)) > 0:
        yield f"{left} other values left alone"


def _casts(state: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[str]:
    """Say which floating types are converted; raises `ValueError` for values that are no weights of such a network."""
    casts = set()
    for name, value in state.items():
        wanted = own[name]
        if not (isinstance(value, Tensor) and isinstance(wanted, Tensor)) or value.dtype == wanted.dtype:
            continue
        if wanted.is_floating_point() and not value.is_floating_point():
            raise ValueError(f"{name} is stored as {value.dtype}, as quantized networks do, and not as {wanted.dtype}")
        if wanted.is_floating_point():
            casts.add(f"cast from {str(value.dtype)[6:]} to {str(wanted.dtype)[6:]}")
    yield from sorted(casts)


def _difference(state: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Say how the names of a state differ from the network's."""
    names = [_plain(name) for name, value in state.items() if _is_values(value)]
    wanted = [_plain(name) for name, value in own.items() if isinstance(value, Tensor)]
    strange = [name for name in names if name not in set(wanted)]
    missing = [name for name in wanted if name not in set(names) and not name.endswith(COUNTERS)]
    if len(strange) == len(names):
        return (
            f"it holds another network's state, whose {len(names):,} names begin with {_some(names)}, and this "
            f"network's {len(wanted):,} with {_some(wanted)}"
        )
    parts = [f"it lacks {len(missing):,} of the network's tensors ({_some(missing)})"] if missing else []
    parts += [f"it has {len(strange):,} that the network has not ({_some(strange)})"] if strange else []
    return ", and ".join(parts)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
