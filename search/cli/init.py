"""The command `paredown init`: a first spec for one's own network and pictures, with a comment for each choice."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from search.base import DataError, SpecError, WorkloadError

if TYPE_CHECKING:
    from torch import nn

SHAPES = ((3, 224, 224), (3, 32, 32), (3, 64, 64), (3, 299, 299), (1, 28, 28), (1, 224, 224))
"""The images that a network is tried on, in this order."""

BUILDERS = ("torchvision", "timm")

SPEC = """\
name: {name}  # the same name resumes the same search
model:
{model}
  # weights: {stem}.safetensors  # of your training; without it, those that the network comes with
  # keep: [{last}]  # layers that no method may change, or patterns such as "stem.*"
data:
{data}
  # preset, or mean and std, resize and crop: as your training prepared its pictures
methods: [itpruner, channels, manidp, practise, alds, [channels, alds]]
budgets:  # a winner each; `paredown check` says what can be reached
  - {{name: half, macs: 50%}}
  - {{name: small, params: 50%, top1_drop: 2%}}
search: {{trials: 8, timeout: 1h}}  # trained per budget
recovery: {recovery}
"""


def add(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(init)


def init(
    model: Annotated[str, typer.Option(help="./mine.py:make, pkg.mod:make, torchvision:NAME or timm:NAME.")],
    data: Annotated[Path, typer.Option(help="The folder of pictures, a sub-folder for each class.")],
    out: Annotated[Path, typer.Option(help="The spec to write.")] = Path("paredown.yaml"),
) -> None:
    """Write a first spec for your network and your pictures, with a comment for each choice."""
    if out.exists():
        raise SpecError(f"{out} is there already; expected a new file; remove it, or name another by --out")
    text, notes = first_spec(model, data, out.absolute().parent)
    out.write_text(text, encoding="utf-8")
    for note in notes:
        typer.echo(note, err=True)
    typer.echo(f"wrote {out}; try  paredown check {out}")


def first_spec(model: str, data: Path, folder: Path) -> tuple[str, list[str]]:
    """Write the text of a spec in `folder`, and what its user should know.

    Raises:
        WorkloadError: the network cannot be built, or takes images of no common shape, or of one channel.
        DataError: the folder holds no pictures.
        SpecError: the network has no name that a spec can give.
    """
    classes, why = _classes(data)
    notes = [] if classes else [f"no labels are read: {why}"]
    section = _model(model, folder)
    if section["source"] in BUILDERS and classes:
        section["args"] = {"num_classes": classes}
    network = _network(section, folder)
    (channels, size, _), outputs, output = _answer(network)
    if channels != 3:
        raise WorkloadError(
            f"the network takes images of {channels} channel, and pictures of a folder have 3; expected 3; repeat the "
            "channel in the network, or write a factory for the images (data.source: factory)"
        )
    if outputs < classes:
        raise WorkloadError(
            f"the network has {outputs} outputs, but {data} has {classes} classes; expected one output per class; "
            "check the network's arguments, or the folder"
        )
    if classes and outputs > classes:
        notes.append(f"the network has {outputs} outputs, and {data} {classes} classes: check that they go together")
    section |= {} if output is None else {"output": output}
    images = {"source": "imagefolder", "root": _path(data, folder), "size": size} | (
        {} if classes else {"labels": False}
    )
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", f"{section['name']}".rpartition("/")[2].partition(".py")[0]).strip("-_")
    text = SPEC.format(
        name=stem or "first",
        stem=stem or "weights",
        model=_block(section),
        last=json.dumps(
            [name for name, one in network.named_modules() if name and any(True for _ in one.parameters())][-1]
        ),
        data=_block(images),
        recovery="{steps: 400}  # training after the cut" if classes else "{steps: 0}  # no training; refit alone",
    )
    return text, notes


def _classes(data: Path) -> tuple[int, str]:
    """Count the classes of a folder; or 0, and why it has none."""
    from search.workload.data.folders import image_folder, unlabelled_pictures
    from search.workload.data.pictures import Preparation

    try:
        pool, _ = image_folder(data, Preparation())
    except DataError as error:
        unlabelled_pictures(data, Preparation())
        return 0, str(error)
    return int(getattr(pool, "labels").max()) + 1, ""  # noqa: B009 - of pictures, which have them at hand


def _model(model: str, folder: Path) -> dict[str, Any]:
    """The section `model` of a spec, from the command's option."""
    source, _, name = model.rpartition(":")
    if source in BUILDERS:
        return {"source": source, "name": name}
    if source.endswith(".py"):
        place = os.path.relpath(source, folder)
        return {"source": "factory", "name": f"{place if place.startswith('.') else './' + place}:{name}"}
    if not source or not name:
        raise SpecError(f"--model is {model!r}; expected ./mine.py:make, torchvision:NAME or timm:NAME; correct it")
    return {"source": "factory", "name": model}


def _block(section: dict[str, Any]) -> str:
    """Write a section of a spec, a key on each line."""
    return "\n".join(f"  {key}: {json.dumps(value)}" for key, value in section.items())


def _path(path: Path, folder: Path) -> str:
    """A path as a spec in `folder` gives it: relative, unless it leads out of the folder."""
    found = path.absolute()
    return os.path.relpath(found, folder) if found.is_relative_to(folder) else str(found)


def _network(section: dict[str, Any], folder: Path) -> nn.Module:
    from search.spec.schema import ModelSpec
    from search.workload.teacher import built

    return built(ModelSpec.model_validate(section), str(folder))


def _answer(network: nn.Module) -> tuple[tuple[int, int, int], int, str | int | None]:
    """The first of `SHAPES` that a network takes, how many logits it returns, and which of its outputs they are.

    Raises:
        WorkloadError: it takes none, or returns no logits.
    """
    import torch

    from search.workload.outputs import outputs_of, told

    error: Exception | None = None
    for shape in SHAPES:
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                found = network.eval()(torch.rand(2, *shape))
                trained = network.train()(torch.rand(2, *shape))
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as raised:
            error = raised
            continue
        parts = outputs_of(trained) or outputs_of(found)
        names = [name for name, one in parts.items() if isinstance(one, torch.Tensor) and one.ndim == 2]
        output = next((name for name in names if isinstance(name, str)), names[0] if names else None)
        logits = outputs_of(found).get(output, found) if output is not None else found
        if isinstance(logits, torch.Tensor) and logits.ndim == 2:
            return shape, logits.shape[1], output
        raise WorkloadError(
            f"the network returned {told(found)} for images {shape}; expected logits (n, classes); return them"
        )
    tried = ", ".join(map(str, SHAPES))
    raise WorkloadError(
        f"the network takes images of none of the shapes {tried}: {type(error).__name__}: {error}; expected one of "
        "these; write the spec by hand (docs/spec.md)"
    )
