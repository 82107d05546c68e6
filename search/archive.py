"""Load a program of torch (pt2) from a file of anybody's: nothing that it holds is run.

`torch.export.load` runs code from several places of an archive: it unpickles inputs, constants and weights, evaluates
expressions, looks operators up by any name of Python's, imports the modules of containers, and writes the names of
nodes into source that it compiles. So every record is checked, and torch gets a new archive of what was checked alone.
"""

from __future__ import annotations

import ast
import io
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx

from search.base import SearchError, first_line

PROGRAM, INPUTS = "models/model.json", "data/sample_inputs/model.pt"
PAYLOADS = {"data/weights/model_weights_config.json": "weight", "data/constants/model_constants_config.json": "tensor"}
"""The lists of weights and of constants, and the names that files of raw numbers begin with."""

RECORD = re.compile(
    r"archive_format|archive_version|byteorder|\.data/\w+|data/weights/weight_\d+|data/constants/tensor_\d+"
)
"""The records of an archive beside its lists, its program and its inputs, that torch gets as they are."""

NAME = re.compile(r"[\w.-]*")
OPERATOR = re.compile(r"torch\.ops\.(aten|torchvision|quantized_decomposed)\.(\w+)\.(\w+)")
FORBIDDEN = ("from_file", "_print")
"""Operators that reach files or the terminal."""

ARITHMETIC = re.compile(
    r"math\.(trunc|ceil|floor|sqrt)|torch\.sym_(not|int|float|ite|max|min|sqrt|sum)|_operator\.(eq|ne|le|ge|lt|gt|neg|pos|"
    r"mul|add|sub|floordiv|truediv|mod|pow|and_|or_|lshift|rshift|getitem)|"
    r"torch\.ops\.higher_order\.(cond|map_impl|scan|while_loop|wrap_with_set_grad_enabled|wrap_with_autocast)"
)
FUNCTION = re.compile(
    r"Symbol|Integer|Float|Rational|Add|Mul|Pow|Max|Min|Mod|Abs|floor|ceiling|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|"
    r"Equality|Unequality|StrictLessThan|LessThan|StrictGreaterThan|GreaterThan|FloorDiv|ModularIndexing|Where|"
    r"PythonMod|CleanDiv|CeilToInt|FloorToInt|CeilDiv|LShift|RShift|PowByNatural|FloatPow|FloatTrueDiv|"
    r"IntTrueDiv|RoundToInt|RoundDecimal|TruncToFloat|TruncToInt|ToFloat|Identity|"
    r"IsNonOverlappingAndDenseIndicator|size|stride|dim|storage_offset"
)
"""The functions that an expression or a guard may call."""

SYNTAX = (
    *(ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.keyword, ast.BinOp, ast.UnaryOp, ast.Compare),
    *(ast.BoolOp, ast.boolop, ast.operator, ast.unaryop, ast.cmpop, ast.Subscript, ast.Attribute),
)
LONGEST, HIGHEST_POWER = 10_000, 64
CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict")


class ArchiveError(SearchError):
    """A file is no program, or one that could run code; the message says which record."""


def load_program(path: Path, name: str) -> fx.GraphModule:
    """The program in the `.pt2` file at `path`, which nobody need trust.

    Its guards, metadata and sample inputs are left out: none of them is needed to run it.

    Args:
        path: the file.
        name: of the program, for messages.

    Raises:
        ArchiveError: the file cannot be read, or holds more than raw numbers and arithmetic.
    """
    with _telling(name):
        with _silence():
            module = torch.export.load(_checked_archive(path)).module(check_guards=False)
        assert isinstance(module, fx.GraphModule)
        return module


def bare_program(path: Path, name: str) -> bytes:
    """The program in the `.pt2` file at `path` as a file that holds no more than what was checked.

    Left out with the metadata are the lines and the folders of the code that the program was made from. Arguments and
    errors are those of `load_program`.
    """
    with _telling(name):
        return _checked_archive(path).getvalue()


def _checked_archive(path: Path) -> io.BytesIO:
    return _packed({key: _checked(key, content) for key, content in _records(path).items()})


@contextmanager
def _telling(name: str) -> Iterator[None]:
    """Raise whatever is wrong with a file as an `ArchiveError` about the program of that name."""
    try:
        yield
    except ArchiveError as error:
        raise ArchiveError(_message(name, str(error))) from error
    except Exception as error:  # torch's errors about a program that is not whole share no class
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ArchiveError(_message(name, reason)) from error


def _message(name: str, reason: str) -> str:
    return (
        f"cannot read {name}: {reason}; expected a program that torch.export.save wrote, of raw weights, tensors and "
        "plain arithmetic, because anything else in such a file can run code; make it anew with torch.export.save"
    )


def _records(path: Path) -> dict[str, bytes]:
    """The content of each record by its name below the archive's one folder."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ArchiveError("it is no archive, or not a whole one") from error
    with archive:
        infos = archive.infolist()
        names = [info.filename for info in infos]
        if len({name.lower() for name in names}) < len(names):
            raise ArchiveError("it holds two records of one name")
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
            raise ArchiveError("it is compressed")
        if len({name.partition("/")[0] for name in names}) != 1:
            raise ArchiveError("it is no archive of torch")
        records = {info.filename.partition("/")[2]: archive.read(info) for info in infos}
    if missing := [name for name in (PROGRAM, INPUTS, *PAYLOADS, "archive_version") if name not in records]:
        raise ArchiveError(f"it lacks the record {missing[0]}")
    return {key: content for key, content in records.items() if not key.startswith("extra/")}


def _checked(key: str, content: bytes) -> bytes:
    """The content of a record for torch, without what is not needed."""
    if key == PROGRAM:
        return _json(key, content, lambda program: _plain(program, ""))
    if key in PAYLOADS:
        return _json(key, content, lambda listed: _payloads(key, listed))
    if key == INPUTS:
        _check_inputs(content)
        return b""
    if not RECORD.fullmatch(key):
        raise ArchiveError(f"the record {key!r} is neither raw numbers nor the program")
    return content


def _json(key: str, content: bytes, checked: Callable[[Any], Any]) -> bytes:
    try:
        return json.dumps(checked(json.loads(content))).encode()
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ArchiveError(f"the record {key} is no JSON that can be read") from error


def _check_inputs(content: bytes) -> None:
    """Refuse sample inputs that need more than torch's own unpickler, which makes tensors and plain containers."""
    if not content:
        return
    try:
        with warnings.catch_warnings(action="ignore"):  # of a pickle that torch has not written
            torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise ArchiveError("its sample inputs are more than tensors") from error


def _payloads(key: str, listed: Any) -> Any:
    """The list of weights or of constants, each of them raw numbers in a file of its own."""
    for name, entry in listed["config"].items():
        if entry["use_pickle"] is not False or not re.fullmatch(rf"{PAYLOADS[key]}_\d+", entry["path_name"]):
            raise ArchiveError(f"{name!r} in {key} is pickled, or an object")
    return _plain(listed, "")


def _plain(value: Any, key: str) -> Any:
    """A part of the program that lies under `key`, once all its words are names, operators and arithmetic."""
    if isinstance(value, dict):
        if found := [name for name in value if not NAME.fullmatch(name)]:
            raise ArchiveError(f"{_short(found[0])} is no name")
        return {name: {} if name == "metadata" else _plain(part, name) for name, part in value.items()}
    if isinstance(value, list):
        plain = [_plain(part, key) for part in value]
        return [] if key == "guards_code" else plain
    if isinstance(value, str):
        _check_text(key, value)
    return value


def _check_text(key: str, text: str) -> None:
    if key in ("expr_str", "guards_code"):
        _check_expression(text, is_guard=key == "guards_code")
    elif key in ("target", "as_operator"):
        _check_operator(text)
    elif key in ("in_spec", "out_spec"):
        _check_containers(json.loads(text)[1])
    elif key in ("custom_obj_name", "class_fqn"):
        raise ArchiveError(f"it holds an object of a class, {_short(text)}")
    elif key not in ("as_string", "as_strings", "torch_version") and not NAME.fullmatch(text):
        raise ArchiveError(f"{_short(text)} is no name")


def _check_expression(text: str, *, is_guard: bool) -> None:
    """Refuse an expression that is more than arithmetic on symbols; a guard may ask for the sizes of inputs too."""
    try:
        tree = ast.parse(text[: LONGEST + 1], mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        tree = None
    if tree is None or len(text) > LONGEST or not all(_is_arithmetic(node, is_guard) for node in ast.walk(tree)):
        raise ArchiveError(f"the expression {_short(text)} is no plain arithmetic")


def _is_arithmetic(node: ast.AST, is_guard: bool) -> bool:
    if isinstance(node, ast.Attribute):
        return is_guard and FUNCTION.fullmatch(node.attr) is not None
    if isinstance(node, ast.Call):
        return _is_plain_call(node, is_guard)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return NAME.fullmatch(node.value) is not None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow | ast.LShift):
        return _is_small(node.right)
    return isinstance(node, SYNTAX) and (is_guard or not isinstance(node, ast.Subscript))


def _is_plain_call(node: ast.Call, is_guard: bool) -> bool:
    """Whether a call is of a function of arithmetic; one of a power must have a small one."""
    if isinstance(node.func, ast.Attribute):
        return is_guard
    if not isinstance(node.func, ast.Name) or not FUNCTION.fullmatch(node.func.id):
        return False
    has_power = node.func.id in ("Pow", "PowByNatural", "FloatPow", "LShift")
    return bool(node.args) and (not has_power or _is_small(node.args[-1]))


def _is_small(node: ast.expr) -> bool:
    """Whether this is a number, bare or as `Integer(2)`, that does not make a power endless."""
    if isinstance(node, ast.Call) and len(node.args) == 1:
        node = node.args[0]
    if isinstance(node, ast.UnaryOp):
        node = node.operand
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float) and node.value <= HIGHEST_POWER


def _check_operator(text: str) -> None:
    """Refuse what is no operator of torch's dispatcher, nor arithmetic."""
    if ARITHMETIC.fullmatch(text):
        return
    found = OPERATOR.fullmatch(text)
    if found is not None and found[2] not in FORBIDDEN:
        name = f"{found[1]}::{found[2]}" + ("" if found[3] == "default" else f".{found[3]}")
        if torch._C._dispatch_has_kernel(name):
            return
    raise ArchiveError(f"{_short(text)} is no operator of torch on tensors")


def _check_containers(tree: Mapping[str, Any]) -> None:
    """Refuse inputs or outputs in containers other than tuples, lists and dicts with plain keys."""
    keys = json.loads(tree["context"] or "null")
    is_plain = isinstance(keys, list) and all(isinstance(one, str) and NAME.fullmatch(one) for one in keys)
    if tree["type"] not in CONTAINERS or not (keys is None or is_plain):
        raise ArchiveError(f"its inputs or outputs are a {_short(str(tree['type']))}")
    for child in tree["children_spec"]:
        _check_containers(child)


def _short(text: str) -> str:
    return repr(text if len(text) <= 100 else f"{text[:100]}...")


def _packed(records: Mapping[str, bytes]) -> io.BytesIO:
    """A new archive of these records: torch's reader and Python's may see one file differently."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive:
        for key, content in records.items():
            archive.writestr(f"model/{key}", content)
    made.seek(0)
    return made


@contextmanager
def _silence() -> Iterator[None]:
    """Silence torch's log of a program that it cannot read: the error says all that matters."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch._export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
