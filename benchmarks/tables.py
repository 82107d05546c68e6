"""The page docs/benchmarks.md and its plot, made from the committed results of `quality.py` and `latency.py`.

    python benchmarks/tables.py

The words that do not depend on the results are in `page.md`.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
DOCS = FOLDER.parent / "docs"
PEERS = ("torch-pruning", "fastnas")
"""The beginnings of the names of the rows that are not ours."""

STEPS = 430
"""The steps of an epoch."""

DOUBT = 0.005
"""Two standard errors of top-1 on 10,000 images: a smaller difference of a single seed says nothing."""

RULE = textwrap.fill(
    "On the test images, beside the best row of another tool, with the difference of the means in points. "
    "A row is ahead or behind if all its seeds are, and by more than half a point where there is one seed.",
    120,
)


class Row(NamedTuple):
    """The runs of one row, budget and length of training, one for each seed."""

    name: str
    runs: Sequence[Mapping[str, Any]]

    @property
    def is_peer(self) -> bool:
        """A row of another tool."""
        return self.name.startswith(PEERS)

    @property
    def has_model(self) -> bool:
        """Some student of it fits the budget."""
        return "reason" not in self.runs[0]

    def values(self, key: str) -> np.ndarray:
        """One figure of every seed."""
        return np.array([run[key] for run in self.runs])


def main() -> None:
    """Write the page and the plot."""
    quality, latency = read("quality"), read("latency")
    assert quality is not None
    (DOCS / "benchmarks.md").write_text(page(quality, latency))
    draw(quality, DOCS / "benchmarks.svg")


def read(name: str) -> dict[str, Any] | None:
    """The committed results of a section, if there are any."""
    path = RESULTS / f"{name}.json"
    return dict(json.loads(path.read_text())) if path.is_file() else None


def page(quality: Mapping[str, Any], latency: Mapping[str, Any] | None) -> str:
    """The whole page: `page.md` with the figures."""
    settings, teacher = quality["settings"], quality["teacher"]
    top1 = {key: percent(teacher[key]) for key in ("top1_validation", "top1_test")}
    sections = [part for steps in lengths(quality) for part in section(quality, latency, steps)]
    return (FOLDER / "page.md").read_text().format(
        **settings["images"], **settings["recipe"], **(teacher | top1), spec=settings["spec"],
        channels=settings["channels"], steps_per_epoch=STEPS, made=origin(quality["made"]),
        error=error_of(teacher["top1_validation"], settings["images"]["validation"]),
        error_test=error_of(teacher["top1_test"], settings["images"]["test"]),
        sections="\n\n".join(sections), speed=speed(latency, teacher["macs"]),
    )  # fmt: skip


def origin(made: Mapping[str, Any]) -> str:
    """The day, the machine and the versions of a run."""
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    cores = f"{made['cores']} cores, one of which was used, beside other work"
    text = (
        f"These were made from {made['date']} on: {made['processor']}, {cores}; {versions}; commit `{made['commit']}`."
    )
    return textwrap.fill(text, 120, break_on_hyphens=False)


def section(quality: Mapping[str, Any], latency: Mapping[str, Any] | None, steps: int) -> list[str]:
    """The table of one length of training, and who is ahead in it."""
    lines = [
        "| budget | row | seeds | MACs | params | untrained, validation | validation | test | latency, batch 1 | 32 |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    verdicts = []
    for share in shares_of(quality, steps):
        rows = rows_of(quality, share, steps)
        lines += [table_line(row, share, quality["teacher"], latency) for row in rows]
        verdicts.append(verdict(rows, share))
    return [f"## Read the result after {steps:,} steps", "\n".join(lines), RULE, "\n".join(verdicts)]


def table_line(row: Row, share: int, teacher: Mapping[str, Any], latency: Mapping[str, Any] | None) -> str:
    """One row of a table."""
    name = f"| {share} % | `{row.name}` |"
    if not row.has_model:
        return f"{name} {len(row.runs)} | - |" + " - |" * 6
    costs = [percent(row.runs[0][key] / teacher[key]) for key in ("macs", "params")]
    top1 = [percent(row.values("top1_bn")[0]), *(spread(row.values(f"top1_{key}")) for key in ("validation", "test"))]
    cells = [str(len(row.runs)), *costs, *top1, *(middle(latency, row.name, share, batch) for batch in ("1", "32"))]
    return f"{name} {' | '.join(cells)} |"


def verdict(rows: Sequence[Row], share: int) -> str:
    """Say which of ours are ahead of, level with and behind the best row of another tool on the test images."""
    peers = [row for row in rows if row.is_peer and row.has_model]
    ours = [row for row in rows if not row.is_peer and row.has_model]
    if not peers or not ours:
        return f"- **{share} %**: not all rows have run yet."
    best = max(peers, key=lambda row: float(row.values("top1_test").mean()))
    found: dict[str, list[str]] = {"ahead": [], "level": [], "behind": []}
    for row in ours:
        gain = float(row.values("top1_test").mean() - best.values("top1_test").mean())
        found[standing(row, best)].append(f"`{row.name}` ({100 * gain:+.1f})")
    said = "; ".join(f"{word}: {', '.join(names)}" for word, names in found.items() if names)
    text = f"- **{share} %**, beside `{best.name}`: {said}."
    return textwrap.fill(text, 120, subsequent_indent="  ", break_on_hyphens=False)


def standing(ours: Row, peer: Row) -> str:
    """Return `ahead` or `behind` where the seeds of the two do not overlap, else `level`.

    A single seed has to differ by `DOUBT`.
    """
    one, other = ours.values("top1_test"), peer.values("top1_test")
    margin = DOUBT if min(len(one), len(other)) == 1 else 0.0
    if one.min() - other.max() > margin:
        return "ahead"
    return "behind" if other.min() - one.max() > margin else "level"


def speed(latency: Mapping[str, Any] | None, macs: int) -> str:
    """The table of latency, if it was measured."""
    if latency is None:
        return "Not measured yet: it needs a machine on which nothing else runs."
    made, settings = latency["made"], latency["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    taken = [values for run in latency["runs"] for values in run["batches"].values()]
    noise = max(max(values["noise"]) for values in taken)
    beside = {batch: [run["batches"][batch]["teacher_ms"] for run in latency["runs"]] for batch in ("1", "32")}
    alone = " and ".join(f"{np.median(ms):.2f} ms for {batch}" for batch, ms in beside.items())
    heads = " | ".join(f"batch {batch} | least to most" for batch in settings["batches"])
    lines = [f"| budget | row | MACs | {heads} |", "|---:|---|---:|" + "---:|" * 2 * len(settings["batches"])]
    for run in latency["runs"]:
        cells = [f"{run['share']} %", f"`{run['row']}`", percent(run["macs"] / macs)]
        for values in run["batches"].values():
            shares = values["shares"]
            cells += [f"{np.median(shares):.2f}", f"{min(shares):.2f} to {max(shares):.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    text = (
        f"Shares of the teacher's latency in {settings['runtime']}, {settings['threads']} thread. Student and teacher "
        f"take turns in one process; of {settings['repeats']} readings the median, the least and the most. The teacher "
        f"takes {alone} images. {made['date']}, {made['processor']}; {versions}. In the noisiest reading a median lay "
        f"{percent(noise)} above the fastest call."
    )
    return "\n\n".join((textwrap.fill(text, 120), "\n".join(lines)))


def lengths(quality: Mapping[str, Any]) -> list[int]:
    """The lengths of training, in steps, shortest first."""
    return sorted({run["steps"] for run in quality["runs"]})


def shares_of(quality: Mapping[str, Any], steps: int) -> list[int]:
    """The budgets of one length of training, the largest first."""
    return sorted({run["share"] for run in quality["runs"] if run["steps"] == steps}, reverse=True)


def rows_of(quality: Mapping[str, Any], share: int, steps: int) -> list[Row]:
    """The rows of one budget and length of training, in one order for all."""
    names = dict.fromkeys(run["row"] for run in quality["runs"])
    runs = [run for run in quality["runs"] if (run["share"], run["steps"]) == (share, steps)]
    rows = [Row(name, [run for run in runs if run["row"] == name]) for name in names]
    return [row for row in rows if row.runs]


def middle(latency: Mapping[str, Any] | None, row: str, share: int, batch: str) -> str:
    """The median share of the teacher's latency, or a dash where it was not measured."""
    for run in latency["runs"] if latency else ():
        if (run["row"], run["share"]) == (row, share):
            return f"{np.median(run['batches'][batch]['shares']):.2f}"
    return "-"


def percent(value: float) -> str:
    """A share as percent, with the tenth of a point."""
    return f"{100 * value:.1f} %"


def error_of(top1: float, images: int) -> str:
    """The standard error of a top-1, in points."""
    return f"{100 * (top1 * (1 - top1) / images) ** 0.5:.2f}"


def spread(values: np.ndarray) -> str:
    """The mean of the seeds and half the distance from the worst to the best."""
    half = f" ± {50 * (values.max() - values.min()):.1f}" if len(values) > 1 else ""
    return f"{100 * values.mean():.1f}{half} %"


def draw(quality: Mapping[str, Any], path: Path) -> None:
    """Plot test top-1 against the share of the MACs, a plane for each length of training."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = path.stem  # the same file from the same results
    from matplotlib import pyplot as plt

    teacher, shown = quality["teacher"], lengths(quality)
    size = (2 + 4.5 * len(shown), 5.5)
    figure, planes = plt.subplots(1, len(shown), figsize=size, layout="constrained", squeeze=False)
    for plane, steps in zip(planes[0], shown, strict=True):
        for index, (name, rows) in enumerate(by_name(quality, steps).items()):
            tops = [100 * row.values("top1_test") for row in rows]
            spreads = [[top.mean() - top.min() for top in tops], [top.max() - top.mean() for top in tops]]
            plane.errorbar(
                [100 * row.runs[0]["macs"] / teacher["macs"] for row in rows], [top.mean() for top in tops],
                yerr=spreads, color=f"C{index}", marker="o", markersize=4, capsize=3, label=name,
                linestyle="--" if name.startswith(PEERS) else "-",
            )  # fmt: skip
        plane.axhline(100 * teacher["top1_test"], color="black", linewidth=1, label="teacher")
        plane.set(xlabel="MACs, % of the teacher's", ylabel="test top-1, %", title=f"{steps:,} steps")
        plane.grid(alpha=0.3)
    figure.legend(*planes[0][0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, metadata={"Date": None})


def by_name(quality: Mapping[str, Any], steps: int) -> dict[str, list[Row]]:
    """The rows of a length of training that have a student, by name; every length has the same names in one order."""
    rows = [row for share in shares_of(quality, steps) for row in rows_of(quality, share, steps)]
    names = dict.fromkeys(run["row"] for run in quality["runs"])
    return {name: [row for row in rows if row.name == name and row.has_model] for name in names}


if __name__ == "__main__":
    main()
