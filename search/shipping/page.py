"""The card of a shipped model as a Markdown page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from search.report import costs
from search.report.figures import method_label
from search.units import Scale, knobs, milliseconds, percent, plain, size

FILES = {
    "model.pt2": "the program for torch, as `torch.export` writes it",
    "model.onnx": "the same as ONNX",
}
RUNTIMES = {"torch": "torch", "onnxruntime": "onnxruntime", "mlflow": "MLflow, from the store of the search"}


def page(card: Mapping[str, Any]) -> str:
    """The page of what `search.shipping.card.card` gives."""
    has_onnx = "model.onnx" in card["files"]
    loads = [f"### {title}\n\n```python\n{card['load'][key]}\n```" for key, title in RUNTIMES.items()]
    parts = [
        f"# {card['model']}\n\n{_origin(card)}",
        "## What it costs, and what it can do\n\n" + _figures(card),
        *(["## Latency\n\n" + _latency(card)] if card["latency_ms"] else []),
        "## Load it\n\n" + "\n\n".join(load for load in loads if has_onnx or "onnxruntime" not in load),
        "## Give it images\n\n" + _inputs(card),
        "## How it was made\n\n" + _making(card),
        "## What lies here\n\n" + _files(card),
    ]
    return "\n\n".join(parts) + "\n"


def _origin(card: Mapping[str, Any]) -> str:
    return (
        f"Made by {method_label(card['method'])} from a trained network for the budget `{card['budget']}`: version "
        f"{card['version']} of the model, found by the search `{card['search']}` of {card['started']}."
    )


def _figures(card: Mapping[str, Any]) -> str:
    """A row for every cost and for the metric on both sets, beside the limit and the teacher."""
    metric = card["metric"]
    scale = Scale(metric["name"], metric["worst"], metric["best"])
    rows = []
    for one in card["costs"]:
        share = "" if one["share"] is None else f" ({percent(one['share'])})"
        limit = "" if one["limit"] is None else f"≤ {costs.shown(one['cost'], one['limit'], scale)}"
        teacher = "" if one["teacher"] is None else costs.shown(one["cost"], one["teacher"], scale)
        rows.append((one["name"], costs.shown(one["cost"], one["value"], scale) + share, limit, teacher))
    rows += [
        (f"{scale.name}, {images}", scale.shown(metric[images]), "", scale.shown(metric[f"teacher_{images}"]))
        for images in ("validation", "test")
    ]
    return (
        f"{_table(('', 'this model', 'limit', 'its teacher'), rows)}\n\n"
        f"{scale.name} is best at {scale.best:g} and worst at {scale.worst:g}. The search chose by the validation set "
        "and never saw the test set. MACs are multiply-accumulates for one input."
    )


def _latency(card: Mapping[str, Any]) -> str:
    rows = []
    for device, times in card["latency_ms"].items():
        facts, teacher = card["devices"].get(device, {}), card["teacher_latency_ms"].get(device, {})
        noise = card["noise"][device]
        noisy = f" (noisy: the median lay {percent(noise)} above the fastest call)" if noise is not None else ""
        named = f"{device}, predicted" if facts.get("is_predicted") else device
        keys = ("runtime", "threads", "batch", "host", "processor")
        about = ", ".join(f"{key} {facts[key]}" for key in keys if facts.get(key) is not None)
        shown = [milliseconds(times[key]) for key in ("min", "p50", "p95")]
        rows.append((named, *shown[:1], shown[1] + noisy, shown[2], _median(teacher), about))
    return _table(("device", "fastest", "median", "95 %", "its teacher's median", ""), rows)


def _median(times: Mapping[str, float]) -> str:
    return milliseconds(times["p50"]) if "p50" in times else ""


def _inputs(card: Mapping[str, Any]) -> str:
    given, made = card["input"], card["output"]
    return (
        f"`{given['name']}`: {given['dtype']} `{_shape(given)}`, for any batch. {card['preprocessing']} Out come "
        f"`{made['name']}` `{_shape(made)}`."
    )


def _shape(one: Mapping[str, Any]) -> str:
    return f"({', '.join(map(str, one['shape']))})"


def _making(card: Mapping[str, Any]) -> str:
    lines = {
        "method": f"{method_label(card['method'])} (`{card['method']}`)",
        "knobs": knobs(card["knobs"]),
        "plan": "`plan` in `card.json`",
        "teacher": plain(_given(card["teacher"])),
        "data": plain(_given(card["data"])),
        "recovery": plain(_given(card["recovery"])),
        "spec, teacher and commit": ", ".join(
            f"`{value}`" for key in ("spec_hash", "teacher_hash", "git_commit") if (value := card[key]) is not None
        ),
    }
    return "\n".join(f"- {name}: {text}" for name, text in lines.items())


def _given(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if value not in (None, {})}


def _files(card: Mapping[str, Any]) -> str:
    rows = [
        (f"`{name}`", FILES[name], size(facts["size_bytes"]), f"`{facts['sha256']}`")
        for name, facts in card["files"].items()
    ]
    parity = card["parity"]
    if parity is None:
        told = f"There is no ONNX file: {card['onnx_refused'] or 'none was stored'}"
    else:
        told = (
            f"The outputs of the two models differ by {parity['deviation']:.1e} of the largest one, on "
            f"{parity['images']} images; {parity['tolerance']:g} is allowed."
        )
    versions = ", ".join(f"{name} {version}" for name, version in card["versions"].items())
    table = _table(("file", "", "size", "SHA-256"), rows)
    return f"{table}\n\n{told} Written with {versions}. `card.json` is this page as data."


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
