"""The time that skipping masked channels saves at batch 1: gated networks, run in several ways, beside dense engines.

    python benchmarks/gated_latency.py

One thread. Every engine gets the same images in turn, none of which the executors were made with. Wall time is charged
for interruptions, the CPU time of the process is not; both are printed. Images differ in their cost to a gated engine,
so its least is that of its cheapest image, and the medians decide. ResNet-18 has random weights and gates, so only its
times mean anything: `MASKS` makes its masks alike to trained ones.
"""

from __future__ import annotations

import copy
import itertools
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeAlias

import numpy as np
import onnxruntime
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional as F

from cluster.devices.meter import interleaved
from methods.hooks import hooked
from methods.manidp.executor.build import Executor, executor
from methods.manidp.executor.parts import Choice
from methods.manidp.gates import Gated, active, gated, saliencies
from methods.manidp.sites import find_sites, gated_macs, trace, widths
from methods.manidp.thresholds import calibrate
from methods.network import count_macs
from methods.training import recalibrate
from search.workload import zoo
from search.workload.data.sources import fashion_mnist

TRAINED = Path(__file__).parents[1] / "examples" / "fashion_mnist_resnet20.safetensors"
MASKS = 0.3
"""Deviation of the gates' output biases: some channels are then always on, some always off, as after training."""

ROUNDS, WARMUP = 30, 8
HEADS = (
    "engine",
    "threads",
    "k",
    "MACs run",
    "wall min, ms",
    "wall median",
    "CPU min",
    "CPU median",
    "best dense / this: wall median, CPU median, CPU min",
    "largest error",
)
DENSE = ("dense, eager", "dense, eager, folded, channels-last", "dense, onnxruntime")

Call: TypeAlias = Callable[[Tensor], object]


def main() -> None:
    """Measure both networks and print a table for each."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, {ROUNDS} calls each, batch 1")
    torch.set_grad_enabled(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        large = torchvision.models.resnet18(weights=None).eval()
    noise = pictures(32, 0)
    recalibrate(large, noise)
    report("ResNet-18, 224 x 224, random weights", large, noise, pictures(24, 1), (1.0, 0.7, 0.5, 0.35))
    small = zoo.build("resnet20", channels=1, classes=10, seed=0).eval()
    small.load_state_dict(safetensors.torch.load_file(TRAINED))
    train, test = fashion_mnist(None)
    seen, fresh = (data.batch(np.arange(count))[0] for data, count in ((train, 128), (test, 24)))
    report("ResNet-20, 28 x 28, Fashion-MNIST", small, seen, fresh, (0.7, 0.35))


def pictures(count: int, seed: int) -> Tensor:
    """Noise `(count, 3, 224, 224)` at four scales, each of random strength per image."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(count, 3, 224, 224)
    for side in (2, 7, 28, 224):
        fine = F.interpolate(torch.randn(count, 3, side, side, generator=generator), (224, 224), mode="bilinear")
        total += 2 * torch.rand(count, 1, 1, 1, generator=generator) * fine
    return total


def report(title: str, teacher: nn.Module, seen: Tensor, fresh: Tensor, shares: Sequence[float]) -> None:
    """Print the table of one network: thresholds and executors are made from `seen`, times taken on `fresh`."""
    dense = dense_engines(teacher, fresh[:1])
    student = with_gates(teacher, seen)
    macs = count_macs(teacher, seen)
    print(f"\n### {title}\n\n| {' | '.join(HEADS)} |\n|---|---|---|" + "---:|" * (len(HEADS) - 3))
    for share in shares:
        calibrate(student, seen, int(share * macs))
        expected = float(student.instance_macs(fresh).double().mean()) / macs
        print(f"| **gates at {share:.0%}: {expected:.0%}; {masks_of(student, seen)}** |" + " |" * (len(HEADS) - 1))
        naive = partial(executor, student, seen, buckets=0, is_measured=False)
        gathered = {
            "gathered, naive": naive(multiple=1),
            "gathered, naive, rounded": naive(),
            "executor": executor(student, seen),
            "executor, unused removed": executor(student, seen, remove_unused=True),
        }
        rounding = {"gathered, naive": "exact", **dict.fromkeys(list(gathered)[1:], "to 16")}
        counted = {name: macs_run(student, one, fresh) / macs for name, one in gathered.items()}
        errors = {name: error(student, one, fresh) for name, one in gathered.items()}
        masked = {"gated, masked only": student}
        times = measured({**dense, **masked, **gathered}, fresh)
        best = tuple(min(times[name][column] for name in DENSE) for column in range(4))
        for name, taken in times.items():
            ratio = ", ".join(f"{best[column] / taken[column]:.2f}" for column in (1, 3, 2))
            cells = [
                "1",
                rounding.get(name, "all"),
                f"{counted.get(name, 1.0):.0%}",
                *(f"{ms:.2f}" for ms in taken),
                ratio,
            ]
            print(f"| {' | '.join([name, *cells])} | {errors.get(name, '')} |")


def dense_engines(teacher: nn.Module, example: Tensor) -> dict[str, Call]:
    """The teacher as it is, with folded norms and channels-last maps, and in onnxruntime, each on one thread."""
    folded = fuse(copy.deepcopy(teacher)).to(memory_format=torch.channels_last)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(teacher, (example,), dynamo=True, verbose=False)
    assert program is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    model = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    calls = (
        teacher,
        lambda x: folded(x.contiguous(memory_format=torch.channels_last)),
        lambda x: session.run(None, {name: x.numpy()}),
    )
    return dict(zip(DENSE, calls, strict=True))


def with_gates(teacher: nn.Module, images: Tensor) -> Gated:
    """The teacher with random gates; see `MASKS`."""
    sites, _ = find_sites(trace(teacher), images[:2], squeeze=2)
    student = gated(teacher, sites, count_macs(teacher, images) - int(gated_macs(sites, widths(sites))), seed=0)
    generator = torch.Generator().manual_seed(1)
    for gate in student.gates:
        gate.expand.bias.add_(MASKS * torch.randn(len(gate.expand.bias), generator=generator))
    return student


def masks_of(student: Gated, images: Tensor) -> str:
    """The shares of gated channels that every image uses, and that none uses."""
    on = [active(found, mask.threshold) for found, mask in zip(saliencies(student, images), student.masks, strict=True)]
    always = sum(int(mask.all(0).sum()) for mask in on)
    never = sum(int((~mask.any(0)).sum()) for mask in on)
    total = sum(mask.shape[1] for mask in on)
    return f"{always / total:.0%} of channels always on, {never / total:.0%} never"


def macs_run(student: Gated, built: Executor, images: Tensor) -> float:
    """The mean MACs of the channels that are really computed, gates included."""
    kept: list[list[int]] = [[] for _ in built.choosers]

    def recorder(gate: int) -> Callable[[nn.Module, tuple[object, ...], Choice], None]:
        return lambda _module, _given, choice: kept[gate].append(len(choice.subset.rows))

    with hooked(chooser.register_forward_hook(recorder(gate)) for gate, chooser in enumerate(built.choosers)):
        built(images)
    return student.fixed_macs + float(gated_macs(student.sites, torch.tensor(kept).T).double().mean())


def error(student: Gated, built: Executor, images: Tensor) -> str:
    """The largest difference from the masked network's outputs, relative to the largest of these."""
    wanted = student(images)
    return f"{float((built(images) - wanted).abs().max() / wanted.abs().max()):.0e}"


def measured(calls: Mapping[str, Call], images: Tensor) -> dict[str, tuple[float, float, float, float]]:
    """Milliseconds of each call: the least and the median, of wall and of CPU time."""
    spent: dict[str, list[float]] = {name: [] for name in calls}

    def timed(name: str) -> Callable[[], None]:
        turns = itertools.cycle(torch.tensor_split(images, len(images)))

        def call() -> None:
            image = next(turns)
            started = time.process_time_ns()
            calls[name](image)
            spent[name].append((time.process_time_ns() - started) / 1e6)

        return call

    wall = interleaved({name: timed(name) for name in calls}, rounds=ROUNDS, warmup=WARMUP)
    return {
        name: (wall[name].min, wall[name].p50, min(cpu[WARMUP:]), median(cpu[WARMUP:])) for name, cpu in spent.items()
    }


if __name__ == "__main__":
    main()
