"""The teacher: from the zoo, torchvision, a factory or the registry, and checked before anything is spent on it."""

from __future__ import annotations

import copy
import pickle
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from methods.training import Recipe, evaluate, top1, train
from search import cache
from search.base import Report, WorkloadError, first_line, one_line
from search.export import exported
from search.spec import SearchSpec
from search.spec.schema import ModelSpec
from search.workload import zoo
from search.workload.splits import Splits
from search.workload.usercode import call_factory, importable


def load_teacher(spec: SearchSpec, splits: Splits, report: Report, *, fit: bool) -> nn.Module:
    """Load the teacher of `spec`; a zoo network without weights is trained, or left untrained unless `fit`."""
    model = spec.model
    if model.source == "zoo":
        return _zoo_teacher(spec, splits, report, fit=fit)
    if model.source == "torchvision":
        return _torchvision_teacher(model, spec.folder)
    if model.source == "mlflow":
        return _mlflow_teacher(model, spec)
    teacher = call_factory(model.name, model.args, spec.folder)
    if not isinstance(teacher, nn.Module):
        raise WorkloadError(
            f"the model factory {model.name} returned {type(teacher).__name__}; expected a torch.nn.Module; return one"
        )
    return _load_weights(teacher, model.weights, spec.folder)


def _zoo_teacher(spec: SearchSpec, splits: Splits, report: Report, *, fit: bool) -> nn.Module:
    model = spec.model
    if model.name not in zoo.ZOO:
        raise WorkloadError(
            f"no network {model.name!r} in the zoo; expected one of {', '.join(zoo.ZOO)}; correct model.name"
        )
    teacher = zoo.build(model.name, splits.calibration.shape[1], splits.classes, spec.data.seed)
    if model.weights not in (None, "train"):
        return _load_weights(teacher, model.weights, spec.folder)
    recipe = teacher_recipe(len(splits.train), spec.recovery.precision)
    key = cache.digest(f"{model.name} {splits.fingerprint} {asdict(recipe)}")
    path = cache.folder() / "teachers" / f"{key}.safetensors"
    if not path.is_file():
        if not fit:
            return teacher
        trained = copy.deepcopy(teacher)
        fit_teacher(trained, splits, recipe, report)
        cache.keep(path, lambda place: save_weights(trained, place))
    # equal weights in the memory layout that training leaves give other sums: every search reads the file
    return _load_weights(teacher, str(path), spec.folder)


def teacher_recipe(images: int, precision: str = "fp32") -> Recipe:
    """The recipe of zoo teachers: 16 epochs of one-cycle SGD, but at least 600 steps."""
    steps = max(600, 16 * images // 128)
    return Recipe(
        steps, learning_rate=0.1, warmup=0.25, precision="bf16" if precision == "bf16" else "fp32",
        report_every=max(1, steps // 16),
    )  # fmt: skip


def fit_teacher(teacher: nn.Module, splits: Splits, recipe: Recipe, report: Report) -> None:
    """Train a teacher in place from scratch, with seed 0; torch's own generator is left as it was."""
    report("training the teacher", 0, recipe.steps, "")
    with torch.random.fork_rng(devices=[]):
        for step in train(teacher, splits.train, recipe, seed=0):
            report(
                "training the teacher", step, recipe.steps,
                f"validation top-1 {evaluate(teacher, splits.validation, top1):.4f}",
            )  # fmt: skip


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the state of `model` as a .safetensors file."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    safetensors.torch.save_file(state, path)


def _torchvision_teacher(model: ModelSpec, folder: str) -> nn.Module:
    import torchvision

    if model.name not in torchvision.models.list_models(module=torchvision.models):
        raise WorkloadError(
            f"torchvision has no classifier {model.name!r}; expected a name from torchvision.models.list_models(); "
            "correct model.name"
        )
    is_file = model.weights is not None and Path(model.weights).suffix in (".safetensors", ".pt", ".pth")
    try:
        teacher = torchvision.models.get_model(model.name, weights=None if is_file else model.weights, **model.args)
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise WorkloadError(
            f"torchvision could not make {model.name} with weights {model.weights!r}: {one_line(error)}; "
            "expected a weights enum of that model, or a .safetensors or .pt file; correct model.weights or model.args"
        ) from error
    return _load_weights(teacher, model.weights if is_file else None, folder)


def _mlflow_teacher(model: ModelSpec, spec: SearchSpec) -> nn.Module:
    from search.record.logged_models import load_model  # takes seconds to import, and few teachers come from there

    try:
        with importable(spec.folder):
            teacher = load_model(spec.tracking.uri, model.name)
    except Exception as error:
        raise WorkloadError(
            f"MLflow cannot load {model.name!r}: {type(error).__name__}: {one_line(error)}; expected a model URI such "
            f"as models:/name/1 in the store {spec.tracking.uri}; check tracking.uri and the version"
        ) from error
    if not isinstance(teacher, nn.Module) or isinstance(teacher, torch.fx.GraphModule):
        raise WorkloadError(
            f"{model.name} was logged as an exported graph, which cannot be cut or trained; expected one logged with "
            "its modules (serialization_format='pickle'); log it so, or use model.source factory with a weights file"
        )
    return teacher


def _load_weights(model: nn.Module, weights: str | None, folder: str) -> nn.Module:
    """Load the weights of the file, if one is given, into `model`, without unpickling code."""
    if weights is None:
        return model
    path = Path(folder, weights).expanduser()
    try:
        if path.suffix == ".safetensors":
            state: dict[str, Tensor] = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise WorkloadError(
            f"no weights at {path}; expected a .safetensors or .pt file; correct model.weights"
        ) from error
    except Exception as error:
        # torch's own message advises to unpickle the file without protection
        reason = "it holds more than tensors" if isinstance(error, pickle.UnpicklingError) else one_line(error)
        raise WorkloadError(
            f"cannot read the weights {path}: {reason}; expected a .safetensors file or a .pt file that loads with "
            "weights_only=True; save the model's state_dict()"
        ) from error
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise WorkloadError(
            f"the weights {path} do not fit the network: {one_line(error)}; expected its state_dict(); "
            "check model.name, the number of classes and the input channels"
        ) from error
    return model


def check_teacher(teacher: nn.Module, images: Tensor, classes: int) -> None:
    """Refuse a network that does not give finite logits, cannot be trained or cannot be exported."""
    logits = _logits(teacher, images)
    if logits.shape[1] < classes:
        raise WorkloadError(
            f"the network has {logits.shape[1]} outputs, but the labels go up to {classes - 1}; "
            "expected one output per class; check the number of classes"
        )
    if not torch.isfinite(logits).all():
        raise WorkloadError(
            "the network's outputs hold NaN or infinity on the calibration images; expected finite logits; "
            "check model.weights"
        )
    with torch.random.fork_rng(devices=[]):
        _logits(copy.deepcopy(teacher).train(), images)
    try:
        exported(teacher, images)
    except Exception as error:
        raise WorkloadError(
            f"torch.export cannot export the network: {type(error).__name__}: {first_line(error)}; expected a network "
            "that it takes with any batch size, because winners are stored as exported programs; rewrite its forward"
        ) from error


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    """The outputs `(n, classes)` of `model` in its present mode, train or eval."""
    mode = "in training" if model.training else "in evaluation"
    try:
        with torch.no_grad():
            logits = model(images)
    except Exception as error:
        raise WorkloadError(
            f"{mode}, the network does not take inputs of shape {tuple(images.shape)}: {one_line(error)}; expected it "
            "to accept the data's images; check the input channels and the image size"
        ) from error
    if isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == len(images):
        return logits
    what = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
    raise WorkloadError(
        f"{mode}, the network returned {what} for inputs of shape {tuple(images.shape)}; expected logits (n, classes); "
        "return them alone, or wrap the network in a module that does"
    )
