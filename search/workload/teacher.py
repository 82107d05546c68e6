"""The teacher: of the zoo, torchvision, timm, a factory or the registry, and checked before anything is spent on it."""

from __future__ import annotations

import copy
import difflib
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from methods.training import Recipe, evaluate, top1, train
from search import cache
from search.archive import ArchiveError
from search.base import Report, WorkloadError, first_line, masked, one_line
from search.export import exported
from search.spec import SearchSpec
from search.spec.schema import WEIGHT_FILES, ModelSpec, TaskSpec
from search.workload import zoo
from search.workload.checkpoints import load_weights, outputs_of
from search.workload.data.labels import OUTPUT_AXES, OUTPUTS, Form
from search.workload.data.splits import Splits
from search.workload.forms import unwrapped
from search.workload.outputs import outputs_of as parts_of
from search.workload.outputs import told
from search.workload.threads import set_threads
from search.workload.usercode import blaming, call_factory, importable


def load_teacher(spec: SearchSpec, splits: Splits, report: Report, *, fit: bool) -> nn.Module:
    """Load the teacher of `spec`; a zoo network without weights is trained, or left untrained unless `fit`."""
    model = spec.model
    if model.source == "zoo":
        return _zoo_teacher(spec, splits, report, fit=fit)
    if model.source == "mlflow":
        return unwrapped(_mlflow_teacher(model, spec), report)
    teacher = built(model, spec.folder)
    teacher = unwrapped(teacher, report) if model.source == "factory" else teacher
    has_its_own = model.weights == "pretrained" if model.source == "timm" else _is_enum(model)
    return teacher if has_its_own else _load_weights(teacher, spec, report)


def _is_enum(model: ModelSpec) -> bool:
    """Whether `weights` are torchvision's own, which come with the network."""
    return model.source == "torchvision" and Path(model.weights or "").suffix not in WEIGHT_FILES


def built(model: ModelSpec, folder: str) -> nn.Module:
    """Build the network of torchvision, of timm or of a factory, with the weights that it comes with by itself."""
    if model.source == "torchvision":
        return _torchvision_network(model)
    if model.source == "timm":
        return _timm_network(model)
    network = call_factory(model.name, model.args, folder)
    if not isinstance(network, nn.Module):
        raise WorkloadError(
            f"the model factory {model.name} returned {type(network).__name__}; expected a torch.nn.Module; return one"
        )
    return network


def _zoo_teacher(spec: SearchSpec, splits: Splits, report: Report, *, fit: bool) -> nn.Module:
    model = spec.model
    if model.name not in zoo.ZOO:
        raise WorkloadError(
            f"no network {model.name!r} in the zoo; expected one of {', '.join(zoo.ZOO)}; correct model.name"
        )
    channels, seed = splits.calibration.shape[1], spec.data.seed
    teacher = zoo.build(model.name, channels, splits.classes, seed)
    if model.weights not in (None, "train"):
        if not spec.data.labels:  # the weights know how many classes there are
            teacher = zoo.build(model.name, channels, outputs_of(teacher, _weights_file(spec)), seed)
        return _load_weights(teacher, spec, report)
    recipe = teacher_recipe(len(splits.train), spec.recovery.precision)
    key = cache.digest(f"{model.name} {splits.fingerprint} {recipe.identity()}")
    path = cache.folder() / "teachers" / f"{key}.safetensors"
    if fit and not _is_kept(teacher, path):
        trained = copy.deepcopy(teacher)
        fit_teacher(trained, splits, recipe, report)
        cache.keep(path, lambda place: save_weights(trained, place))
    # equal weights in the memory layout that training leaves give other sums: every search reads the file
    _is_kept(teacher, path)
    return teacher


def _is_kept(teacher: nn.Module, path: Path) -> bool:
    """Load a teacher from its file in the cache, unless that is missing or damaged."""
    try:
        load_weights(teacher, path)
    except WorkloadError:
        return False
    return True


def teacher_recipe(images: int, precision: str = "fp32") -> Recipe:
    """The recipe of zoo teachers: 16 epochs of one-cycle SGD, but at least 600 steps."""
    steps = max(600, 16 * images // 128)
    return Recipe(
        steps, learning_rate=0.1, warmup=0.25, precision="bf16" if precision == "bf16" else "fp32",
        report_every=max(1, steps // 16),
    )  # fmt: skip


def fit_teacher(teacher: nn.Module, splits: Splits, recipe: Recipe, report: Report) -> None:
    """Train a teacher in place from scratch, with seed 0; torch's own generator is left as it was."""
    set_threads(teacher.eval(), torch.from_numpy(splits.calibration[:1]))
    report("training the teacher", 0, recipe.steps, "")
    with torch.random.fork_rng(devices=[]):
        for step in train(teacher, splits.train, recipe, seed=0):
            report(
                "training the teacher", step, recipe.steps,
                f"validation top-1 {evaluate(teacher, splits.validation, top1):.4f}",
            )  # fmt: skip


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the tensors of a state as a .safetensors file; one that has two names is written under both."""
    tensors = {name: value.detach() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    safetensors.torch.save_file({name: value.cpu().contiguous().clone() for name, value in tensors.items()}, path)


def _torchvision_network(model: ModelSpec) -> nn.Module:
    import torchvision

    if model.name not in torchvision.models.list_models(module=torchvision.models):
        raise WorkloadError(
            f"torchvision has no classifier {model.name!r}; expected a name from torchvision.models.list_models(); "
            "correct model.name"
        )
    try:
        weights = model.weights if _is_enum(model) else None
        network: nn.Module = torchvision.models.get_model(model.name, weights=weights, **model.args)
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise WorkloadError(
            f"torchvision could not make {model.name} with weights {model.weights!r}: {reason}; expected arguments "
            "that it takes, and a weights enum of that model or a file; correct model.weights or model.args"
        ) from error
    return network


def _timm_network(model: ModelSpec) -> nn.Module:
    timm = zoo.imported_timm()
    if not timm.is_model(model.name):
        near = difflib.get_close_matches(model.name, timm.list_models(), n=3, cutoff=0)
        raise WorkloadError(
            f"timm has no network {model.name!r}; expected a name from timm.list_models(), such as {', '.join(near)}; "
            "correct model.name"
        )
    is_pretrained = model.weights == "pretrained"
    try:
        network: nn.Module = timm.create_model(model.name, pretrained=is_pretrained, **model.args)
    except Exception as error:
        advice = "model.args" + (", or give a file of weights: timm loads its own from the network" * is_pretrained)
        raise WorkloadError(
            f"timm could not make {model.name}: {type(error).__name__}: {one_line(error)}; expected arguments that it "
            f"takes, such as num_classes and in_chans; correct {advice}"
        ) from error
    return network


def _mlflow_teacher(model: ModelSpec, spec: SearchSpec) -> nn.Module:
    from search.record.logged_models import load_pickled  # takes seconds to import, and few teachers come from there

    try:
        with importable(spec.folder):
            teacher = load_pickled(spec.tracking.uri, model.name)
    except ArchiveError as error:
        raise WorkloadError(str(error)) from error
    except Exception as error:
        raise WorkloadError(
            f"MLflow cannot load {model.name!r}: {type(error).__name__}: {one_line(error)}; expected a model URI such "
            f"as models:/name/1 in the store {masked(spec.tracking.uri)}; check tracking.uri and the version"
        ) from error
    if not isinstance(teacher, nn.Module) or isinstance(teacher, torch.fx.GraphModule):
        raise WorkloadError(
            f"{model.name} is a {type(teacher).__name__}, which cannot be cut or trained; expected a torch.nn.Module, "
            "logged with its modules (serialization_format='pickle'); log it so, or use model.source factory with a "
            "weights file"
        )
    return teacher


def _load_weights(model: nn.Module, spec: SearchSpec, report: Report) -> nn.Module:
    """Load the weights of the spec's file, if one is given, into `model`, without unpickling code."""
    if spec.model.weights is not None:
        report("teacher", 1, 1, load_weights(model, _weights_file(spec)))
    return model


def _weights_file(spec: SearchSpec) -> Path:
    assert spec.model.weights is not None
    return Path(spec.folder, spec.model.weights).expanduser()


def check_teacher(teacher: nn.Module, images: Tensor, classes: int, form: Form = "class") -> None:
    """Refuse a network that does not give finite outputs of its task, cannot be trained or cannot be exported."""
    outputs = _outputs(teacher, images, form)
    if form != "numbers" and outputs.shape[1] < classes:
        raise WorkloadError(
            f"the network has {outputs.shape[1]} outputs, but the labels go up to {classes - 1}; "
            "expected one output per class, and labels that begin at 0; check the number of classes, or renumber"
        )
    if not torch.isfinite(outputs).all():
        raise WorkloadError(
            "the network's outputs hold NaN or infinity on the calibration images; expected finite numbers; "
            "check model.weights"
        )
    with blaming("copying the network", "one that copy.deepcopy takes; open locks and files where they are used"):
        copied = copy.deepcopy(teacher)
    with torch.random.fork_rng(devices=[]):
        _outputs(copied.train(), images, form)
    try:
        exported(teacher, images)
    except Exception as error:
        raise WorkloadError(
            f"torch.export cannot export the network: {type(error).__name__}: {first_line(error)}; expected a network "
            "that it takes with any batch size, because winners are stored as exported programs; rewrite its forward"
        ) from error


def check_labels_fit(teacher: nn.Module, splits: Splits, task: TaskSpec) -> None:
    """Refuse outputs of another shape than the labels', of maps and numbers."""
    images, labels = splits.train.batch(np.arange(1))
    with torch.no_grad():
        found = tuple(teacher(images).shape[1:])
    wanted = tuple(labels.shape[1:])
    if (found[1:] if task.name == "segmentation" else found) != wanted:
        what = "(n, classes, h, w) beside labels (n, h, w)" if task.name == "segmentation" else "as large as the labels"
        raise WorkloadError(
            f"for an image, the network returns {found}, and its label is {wanted}; expected outputs {what}; let the "
            "network scale its outputs to the labels, or the data its labels to the outputs"
        )


def _outputs(model: nn.Module, images: Tensor, form: Form) -> Tensor:
    """The outputs `(n, ...)` of `model` in its present mode, train or eval."""
    mode = "in training" if model.training else "in evaluation"
    refused = f"{mode}, the network does not take inputs of shape {tuple(images.shape)}: it"
    with blaming(refused, lambda error: f"it to accept the data's images; {_advice(model, error)}"), torch.no_grad():
        found = model(images.clone())
    if isinstance(found, Tensor) and found.ndim in OUTPUT_AXES[form] and len(found) == len(images):
        return found
    advice = "name them as model.output, or return them alone" if parts_of(found) else "return them"
    other = ", or name what it returns as task" if isinstance(found, Tensor) and form == "class" else ""
    raise WorkloadError(
        f"{mode}, the network returned {told(found)} for inputs of shape {tuple(images.shape)}; expected "
        f"{OUTPUTS[form]}; {advice}{other}"
    )


def _advice(model: nn.Module, error: BaseException) -> str:
    """Say what to look at where a network does not take the images: its types of numbers, or their sizes."""
    types = sorted({str(one.dtype)[6:] for one in model.parameters() if one.is_floating_point()})
    if "type" in str(error).lower() and types != ["float32"]:
        return (
            f"its parameters are {' and '.join(types)}, the images float32: let its forward cast between them, or "
            "return it as float32, by .float()"
        )
    return "check the input channels and the image size"
