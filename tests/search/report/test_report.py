"""The report as a browser gets it: whole, closed to the network, with every number and no unescaped text."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from methods.network import ChannelGroup
from methods.network.groups import Member
from methods.network.widths import to_choices
from search.frontier import winner
from search.limits import Limits
from search.report.html import headline, html
from search.report.plans import Bar, plan_view
from search.results import BudgetResult, Cost, SearchResult
from search.trials import Candidate, Teacher
from search.units import Scale
from tests.support import results

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
EVIL = "<script>alert(1)</script>\"'&<img src=http://evil.example/x>"
TEACHER = Teacher(top1_validation=0.972, top1_test=0.966, macs=12_500_000, params=272_000, size_bytes=1_113_000)
LIMITS = {"half": {"macs": 6_250_000}, "tiny": {"macs": 3_125_000, "params": 108_800}, "none": {"macs": 1000}}


class Page(HTMLParser):
    """The tags, links and texts of a document; no tag of it may close nothing or stay open."""

    VOID = frozenset({"meta", "link", "br", "img", "input"})

    def __init__(self, document: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.chunks: dict[str, list[str]] = {"text": [], "script": [], "style": []}
        self.feed(document)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        kind = self.open[-1] if self.open and self.open[-1] in self.chunks else "text"
        self.chunks[kind].append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.chunks["text"]).split())

    @property
    def figures(self) -> dict[str, Any]:
        figures: dict[str, Any] = json.loads(self.chunks["script"][0])
        return figures


def candidate(run_id: str, method: str, **values: Any) -> Candidate:
    known: dict[str, Any] = {
        "trial": 0,
        "budget": "half",
        "knobs": {},
        "state": "complete",
        "plan": {"method": method, "choices": {"dropped": ["stage1.2"]}, "notes": []},
        "macs": 6_100_000,
        "params": 150_000,
        "size_bytes": 620_000,
        "top1_surgery": 0.411,
        "top1_bn": 0.822,
        "top1_validation": 0.953,
        "seconds": 12.34,
    }
    return Candidate(run_id, method=method, **results.nested(known | values))


def search_result(candidates: list[Candidate], **values: Any) -> SearchResult:
    budgets = []
    for name, limit in LIMITS.items():
        limits = Limits(limit)
        best = winner(candidates, limits)
        registered: dict[str, Any] = (
            {"model_uri": f"models:/digits@{name}", "alias": name, "top1_test": 0.944} if best else {}
        )
        budgets.append(BudgetResult(name, limits, best, **registered))
    cost = Cost(wall_s=754, device_s=8000, trials=len(candidates), stopped=1)
    return replace(SearchResult("digits", TEACHER, budgets, candidates, cost, "2026-03-04", "name: digits\n"), **values)


def times(p50: float) -> dict[str, dict[str, float]]:
    return {"cpu-1": {"min": 0.9 * p50, "p50": p50, "p95": 2 * p50}}


FOUND = [
    candidate("a", "itpruner", knobs={"beta_rel": 1.23456}, latency_ms=times(1.2), teacher_latency_ms=times(2.0)),
    candidate("b", "practise+alds", budget="tiny", macs=3_000_000, params=100_000, top1_validation=0.921, trial=1),
    candidate("c", "alds", top1_validation=0.9, trial=2),
    Candidate("d", 3, "none", "manidp", {}, "infeasible", error="budget 'none' allows 1000 MACs; ManiDP needs 0.9M"),
    Candidate("e", 4, "tiny", "alds", {}, "failed", error="ScoreError: group 'conv1' has a NaN"),
]


def test_page_is_whole_and_asks_nothing_of_the_network() -> None:
    page = Page(html(search_result(FOUND)))
    assert page.tags.count("html") == 1
    assert [link for link in page.links if link != "data:,"] == []
    assert page.tags.count("script") == 3
    assert "Plotly" in page.chunks["script"][1]
    assert not re.search(r"@import|url\(|https?:", page.chunks["style"][0])
    assert "http" not in page.chunks["script"][2]


def test_page_holds_every_winner_with_limits_and_values() -> None:
    text = Page(html(search_result(FOUND))).text
    for piece in (
        "half: 48.8 % MACs at \u22121.9 points",
        "tiny: 24.0 % MACs and 36.8 % params at \u22125.1 points",
        "none: no model fits",
        "6.10M · 48.8 %✓ ≤ 6.25M · 50.0 %",
        "0.15M · 55.1 %620.0 kB · 55.7 %1.20 ms · 60.0 %",
        "3.00M · 24.0 %✓ ≤ 3.12M · 25.0 %",
        "0.10M · 36.8 %✓ ≤ 0.11M · 40.0 %",
        'mlflow.pytorch.load_model("models:/digits@half")',
        'mlflow.pytorch.load_model("models:/digits@tiny")',
        "beta_rel = 1.235",
        "41.1 %82.2 %95.3 %",
        "wins half",
        "FLOPs = 2 \u00d7 MACs",
        "ScoreError: group 'conv1' has a NaN",
        "12 min 34 swall time",
        "2 h 13 mindevice time",
        "name: digits",
    ):
        assert piece in text, piece
    assert text.count("budget 'none' allows 1000 MACs; ManiDP needs 0.9M") == 2


def test_a_metric_of_the_users_own_is_shown_by_its_name_and_values() -> None:
    loss = search_result(FOUND, metric=Scale("loss", worst=2.0, best=0.0))
    page = Page(html(loss))
    assert "half: 48.8 % MACs at +0.038" in page.text
    assert "1.1780.3560.094" in page.text  # the cells of after surgery, untrained and after recovery
    assert "from loss 2 to 0" in page.text
    assert "top-1" not in page.text.lower()
    axis = page.figures["frontier-0"]["layout"]["yaxis"]
    assert (axis["autorange"], axis["ticksuffix"]) == ("reversed", "")
    heights = [y for trace in page.figures["frontier-0"]["data"] for y in trace["y"]]
    assert min(heights) == pytest.approx(2 - 2 * TEACHER.top1_validation)
    assert loss.to_json()["metric"] == {"name": "loss", "worst": 2.0, "best": 0.0}
    assert loss.to_json() | {"metric": 0} == search_result(FOUND).to_json() | {"metric": 0}


def test_page_holds_every_limit_of_a_budget_with_several() -> None:
    text = Page(html(results.search())).text
    for piece in (
        "edge: 49.0 % MACs and 54.2 % latency on cpu-1 at \u22121.5 points",
        "nano: 33.1 % size and 37.4 % predicted latency on nano at \u22123.1 points",
        "95.7 %\u22121.5 points✓ ≥ \u22122.0 points95.1 %",
        "0.223 ms · 54.2 %✓ ≤ 0.247 ms · 60.0 %0.214 to 0.243 ms noisy",
        "0.412 ms0.396 to 0.449 ms3.10 ms",
        "105.1 kB · 33.1 %✓ ≤ 200.0 kB · 63.0 %",
        "1.16 ms · 37.4 %✓ ≤ 1.24 ms · 40.0 %",
        "no model fits— ≥ \u22120.5 points",
        "allowed: 1,000 MACs (0.0 %), 0.5 points top-1 lost",
        "validation top-1, \u22121.5 points ≥ \u22122.0 points ✓",
    ):
        assert piece in text, piece
    assert "✗" not in text


def test_page_says_what_the_search_took_and_what_became_of_each_trial() -> None:
    text = Page(html(results.search())).text
    for piece in (
        "1 min 44 swall time",
        "17trials, 13 complete",
        "2stopped early, after 6.8 s of devices",
        "1reused another's training",
        "2without a model, 1 failed",
        "6 trials, 1 stopped 1 min 9 s of training",
        "stoppedat step 120, top-1 68.8 %",
        "completesame plan as half 2",
        "recovery.learning_rate27.0 %",
        "cpu-1measuredonnxruntime11bench-3x86_64, 16 cores0.396 ms0.412 ms0.449 ms",
        "nanopredictedprofile11—3.10 ms",
        "hypervolume 0.641",
    ):
        assert piece in text, piece
    assert "alds.measure" not in text


def test_predicted_latency_is_called_so_wherever_it_is_shown() -> None:
    page = Page(html(results.search()))
    assert len(re.findall(r"latency on nano", page.text)) == len(re.findall(r"[Pp]redicted latency on nano", page.text))
    drawn = json.dumps(page.figures, ensure_ascii=False)
    assert len(re.findall(r"nano p50", drawn)) == len(re.findall(r"nano p50 [\d.]+ ms, [^<\"]*predicted", drawn)) > 0
    titles = [one["layout"]["xaxis"]["title"]["text"] for one in page.figures.values()]
    assert "share of the teacher's 3.10 ms (predicted)" in titles
    assert sum("predicted" in title for title in titles) == 1


def test_a_limit_that_is_missed_is_marked() -> None:
    over = candidate("over", "alds", macs=6_300_000)
    page = Page(html(search_result([over], budgets=[BudgetResult("half", Limits({"macs": 6_250_000}), over)])))
    assert "6.30M · 50.4 %✗ ≤ 6.25M · 50.0 %" in page.text
    assert "✓ ≤" not in page.text


def test_texts_of_users_stay_texts() -> None:
    evil = candidate(
        EVIL,
        EVIL,
        budget=EVIL,
        knobs={EVIL: EVIL},
        latency_ms={EVIL: {"min": 1.0, "p50": 1.0, "p95": 1.0}},
        same_as=EVIL,
        plan={"method": EVIL, "choices": {EVIL: EVIL, "groups": [[EVIL, 1, 2]]}, "notes": [EVIL]},
    )
    failed = Candidate("f", 0, EVIL, EVIL, {}, "failed", error=EVIL)
    budget = BudgetResult(EVIL, Limits({"macs": 7_000_000}), evil, EVIL, EVIL, 0.9)
    told: dict[str, Any] = {"devices": {EVIL: {"host": EVIL, "runtime": EVIL}}, "importance": {EVIL: {EVIL: 1.0}}}
    teacher = replace(TEACHER, latency_ms={EVIL: {"min": 1.0, "p50": 1.0, "p95": 1.0}})
    found = search_result([evil, failed], name=EVIL, budgets=[budget], spec=EVIL, started=EVIL, teacher=teacher, **told)
    page = Page(html(found))
    assert page.tags.count("script") == 3
    assert "img" not in page.tags
    assert page.links == ["data:,"]
    assert page.text.count(EVIL) >= 18
    drawn = json.dumps(page.figures)
    assert "&lt;img" in drawn
    assert "<img" not in drawn
    assert "<" not in page.chunks["script"][0]


def test_expected_macs_have_a_column_only_where_a_candidate_has_them() -> None:
    assert "Expected" not in Page(html(search_result(FOUND))).text
    gated = candidate("g", "manidp", macs=12_600_000, macs_expected=6_000_000, budget="half")
    text = Page(html(search_result([*FOUND, gated]))).text
    assert "100.8 %48.0 %" in text
    assert "A masked channel is not a saved one" in text


@pytest.mark.parametrize("found", [[], FOUND[3:], FOUND[3:4]], ids=["empty", "failed", "infeasible"])
def test_search_without_a_winner_still_reports(found: list[Candidate]) -> None:
    page = Page(html(search_result(found)))
    assert page.text.count("no model fits") == 2 * len(LIMITS)
    assert "Devices" not in page.text
    assert "load_model" not in page.text
    assert "What each winner keeps" not in page.text
    assert ("No trial was run." in page.text) == (not found)


def test_headline_names_only_the_limited_costs() -> None:
    budget = BudgetResult("small", Limits({"params": 200_000}), candidate("a", "alds", top1_validation=0.972))
    assert headline(search_result([]), budget) == "small: 55.1 % params at ±0.0 points"


def test_plan_of_a_channel_method_becomes_bars() -> None:
    groups = [ChannelGroup("stem", 16, ()), ChannelGroup("conv1", 32, (Member("conv1", "out", 0, 1, 18),))]
    view = plan_view(
        {"method": "itpruner", "choices": to_choices(groups, {"stem": 16, "conv1": 20}, "l1"), "notes": []}, TEACHER
    )
    assert view.bars == [Bar("stem", 16, 16), Bar("conv1", 20, 32)]
    assert view.facts == [("criterion", "l1")]


def test_plans_become_tables_links_and_facts_by_their_shapes() -> None:
    layers = [{"name": "conv1", "slices": 2, "rank": 5}, {"name": "conv2", "slices": 1, "rank": 7, "scheme": 0}]
    alds = {
        "method": "alds",
        "macs": 6_250_000,
        "params": 68_000,
        "choices": {"measure": "rss", "layers": layers},
        "notes": ["one layer left whole"],
    }
    view = plan_view(
        {"method": "practise+alds", "choices": {"links": [alds], "thresholds": {"a": 0.25}, "sizes": [1, 2]}}, TEACHER
    )
    assert view.title == "PRACTISE + ALDS"
    assert view.facts == [("thresholds", "a: 0.25"), ("sizes", "1, 2")]
    (link,) = view.links
    assert link.cost == "leaves 50.0 % MACs and 25.0 % params"
    assert link.tables == [
        (["name", "slices", "rank", "scheme"], [["conv1", "2", "5", ""], ["conv2", "1", "7", "0"]]),
    ]
    assert link.facts == [("measure", "rss"), ("note", "one layer left whole")]
    named = plan_view({"method": "x", "choices": {"layers": {"conv1": {"rank": 3}}}}, TEACHER)
    assert named.tables == [(["layers", "rank"], [["conv1", "3"]])]
    columns = plan_view({"choices": {"sites": {"conv": ["a", "b"], "gate": [0, 1]}}}, TEACHER)
    assert columns.tables == [(["conv", "gate"], [["a", "0"], ["b", "1"]])]
    assert plan_view({}, TEACHER).facts == []


FRAMES = """<body><script>
let waiting = 0;
for (const width of [1280, 390]) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 900px; border: 0`;
  frame.src = "report.html";
  waiting += 1;
  frame.onload = () => {
    const page = frame.contentDocument;
    const told = document.createElement("p");
    const charts = [...page.querySelectorAll(".chart")];
    const drawn = charts.filter((chart) => chart.querySelector(".main-svg path, .main-svg .point")).length;
    told.textContent = [width, page.documentElement.scrollWidth, charts.length, drawn].join(" ");
    document.body.append(told);
  };
  document.body.append(frame);
}
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_browser_draws_every_chart_without_a_word_and_nothing_is_wider_than_the_page(tmp_path: Path) -> None:
    result = results.search()
    (tmp_path / "report.html").write_text(html(result))
    (tmp_path / "frames.html").write_text(FRAMES)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
    command += ["--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files"]
    command += ["--enable-logging=stderr", "--v=0", "--window-size=1400,1900", f"--user-data-dir={tmp_path / 'user'}"]
    command += ["--virtual-time-budget=8000", "--dump-dom", (tmp_path / "frames.html").as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    assert "CONSOLE" not in ended.stderr
    count = len(result.axes) + 2
    seen = sorted(re.findall(r"<p>(\d+) (\d+) (\d+) (\d+)</p>", ended.stdout))
    assert seen == [("1280", "1280", f"{count}", f"{count}"), ("390", "390", f"{count}", f"{count}")]
