"""The spec: every accepted form of its keys, and a report of all its mistakes at once."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from search.base import SpecError
from search.record.changes import SpecChanged, changes, check_unchanged
from search.spec import load
from search.spec.amounts import Amount, drop, latency
from search.trials import Teacher
from search.units import Scale
from tests.search.spec.specs import GOOD, mistakes, spec


def teacher(macs: int) -> Teacher:
    times = {"min": 4.0, "p50": 5.0, "p95": 6.0}
    return Teacher(0.9, None, macs, 50_000, 200_000, {"edge": times, "server": times})


def test_a_good_spec_in_absolute_units() -> None:
    half, tiny = (target.budget for target in spec().targets(teacher(1001)))
    assert (half.macs, half.params, half.channels) == (500, None, 4)
    assert (tiny.macs, tiny.params, tiny.channels) == (250, 20_000, 16)
    assert spec().search.timeout == 120
    assert spec().candidates == ("itpruner", "alds", "uniform")


@given(st.integers(1, 10**12), st.integers(1, 1000))
def test_a_share_never_exceeds_the_teachers_part(teacher: int, permille: int) -> None:
    limit = Amount("", share=Fraction(permille, 1000)).of(teacher)
    assert limit == teacher * permille // 1000


def test_all_mistakes_at_once_with_the_nearest_key() -> None:
    told = mistakes("""
name: digits
model: {source: zoo, name: resnet8, wights: x}
data: {source: digits, validation: 2}
method: [alds]
budgets:
  - {name: half, macs: 50 ms}
  - {name: more, macs: 150%}
  - {name: latest, params: 10%, devic: cpu}
  - {name: none}
  - {name: zero, macs: 0, device: phone}
""")
    assert told.startswith("10 mistakes in the spec")
    for part in (
        "model.wights: unknown key; did you mean 'weights'?",
        "data.validation: Input should be less than 1, but it is 2",
        "method: unknown key; did you mean 'methods'?",
        "budgets.0.macs: '50 ms' is not an amount",
        "budgets.1.macs: '150%' is more than the teacher itself",
        "budgets.2.name: 'latest' is reserved",
        "budgets.2.devic: unknown key; did you mean 'device'?",
        "budgets.3: limits no cost",
        "budgets.4.macs: '0' is not positive",
        "budgets.4.device: no device 'phone'",
    ):
        assert part in told


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("methods: [uniform]", "baseline of every search"),
        ("methods: [itprune]", "is not a method; did you mean 'itpruner'?"),
        ("methods: [alds, alds]", "method alds given twice"),
        ("methods: alds", "expected a list"),
        ("methods: [itprune, uniform, 3]", "'itprune' is not a method"),
        ("methods: [itprune, uniform, 3]", "'uniform' is the baseline"),
        ("methods: [itprune, uniform, 3]", "'3' is not a method"),
        ("budgets: [{name: a, macs: 0.5}]", "budgets.0.macs: '0.5' is less than one unit; write 50% for a share"),
        ("budgets: [{name: a, params: 0.0004k}]", "'0.0004k' is less than one unit"),
        (
            "budgets: [{name: a, macs: null}]",
            "budgets.0: limits no cost; give one or several of macs, macs_ex",
        ),
        ("budgets: [{name: a, top1_drop: 0.1}]", "budgets.0: limits no cost"),
        ("budgets: [{name: a, macs: 50%, top1_drop: 1}]", "budgets.0.top1_drop: '1' is no share of top-1"),
        ("budgets: [{name: a, latency: 12 MB}]", "budgets.0.latency: '12 MB' is not a latency; write 60%"),
        ("budgets: [{name: a, latency: 120%}]", "budgets.0.latency: '120%' is more than the teacher itself"),
        ("budgets: [{name: a, latency: 0 ms}]", "budgets.0.latency: '0 ms' is not positive"),
        (
            "devices: {edge: {runtime: profile}}",
            "devices.edge: runtime 'profile' and file, its roofline, belong together",
        ),
        ("devices: {edge: {file: pi.yaml}}", "devices.edge: runtime 'profile' and file, its roofline, belong together"),
        ("devices: {edge: {resources: {CPU: 1}}}", "devices.edge.resources: 'CPU' is what workers take"),
        ("devices: {edge: {resources: {jetson: 0}}}", "devices.edge.resources.jetson: Input should be greater than 0"),
        ("data: {source: factory, name: null}", "data.name: missing; source 'factory' needs it"),
        ("data: {source: digits, seed: -1}", "data.seed: Input should be greater than or equal to 0, but it is -1"),
        ("search: {seed: -1}", "search.seed: Input should be greater than or equal to 0, but it is -1"),
        ("cluster: {gpus_per_trial: 1.5}", "cluster.gpus_per_trial: 1.5 GPUs cannot be had; write 0, a share up to 1,"),
        ("cluster: {gpus_per_trial: -1}", "cluster.gpus_per_trial: Input should be greater than or equal to 0"),
        ("cluster: {max_parallel: 0}", "cluster.max_parallel: 0 is no number of workers; write auto, or 1 to 100,000"),
        ("cluster: {max_parallel: lots}", "cluster.max_parallel: 'lots' is no number of workers"),
        ("cluster: {max_parallel: true}", "cluster.max_parallel: True is no number of workers"),
        ("cluster: {gpus_per_trial: .inf}", "cluster.gpus_per_trial: inf GPUs cannot be had"),
        ("tracking: {registered_model: a/b}", "tracking.registered_model: 'a/b' is no name for MLflow; write one"),
        ("tracking: {registered_model: 'a:b'}", "'a:b' is no name for MLflow"),
        ("tracking: {registered_model: ''}", "'' is no name for MLflow"),
        ("devices: {edge: {resources: {'node:10.0.0.5': 1}}}", "devices.edge.resources: 'node:10.0.0.5' is Ray's own"),
        ("devices: {edge: {resources: {'a b ': 1}}}", "'a b ' is empty, or has white space around it"),
        (
            "devices: {edge: {runtime: profile, file: a, threads: 2}}",
            "devices.edge.threads: runtime 'profile' measures",
        ),
        ("model: {source: zoo, name: resnet8, args: {a: 1}}", "model.args: source 'zoo' does not use it, only torchv"),
        (
            "model: {source: mlflow, name: 'models:/a/1', weights: a.pt}",
            "model.weights: source 'mlflow' does not use it",
        ),
        ("model: {source: torchvision, name: resnet18, weights: train}", "only source 'zoo' trains its networks"),
        (
            "model: {source: torchvision, name: resnet18, args: {num_classes: 1000000000}}",
            "model.args: num_classes is 1000000000, of 1,000,000 at most",
        ),
        (
            "model: {source: factory, name: 'a:b', args: {a: [!!binary /w==]}}",
            "model.args: b'\\xff' is a bytes; expect",
        ),
        ("data: {source: digits, root: here}", "data.root: source 'digits' does not use it, only imagefolder and fash"),
        (
            "data: {source: imagefolder, root: a, name: 'a:b'}",
            "data.name: source 'imagefolder' does not use it, only f",
        ),
        ("data: {source: digits, size: 32}", "data.size: only source 'imagefolder' prepares its pictures; leave it"),
        (
            "data: {source: digits, calibration: 1000001}",
            "data.calibration: Input should be less than or equal to 1000",
        ),
        (
            "recovery: {labels: false, data: {source: digits, validation: 0.2}}",
            "recovery.data.validation: images to mimic on are not split; leave it out",
        ),
        (
            f"search: {{trials: {'9' * 90}}}",
            "search.trials: Input should be less than or equal to 100000, but it is 999",
        ),
        (f"recovery: {{workers: {'9' * 90}}}", "recovery.workers: Input should be less than or equal to 1024, but it"),
        (f"data: {{source: digits, seed: {'9' * 90}}}", "data.seed: Input should be less than 9223372036854775808"),
        ("search: {timeout: 1e300}", "search.timeout: '1e300' is longer than ten years; write at most 87600h"),
        ("budgets: [{name: a, macs: 1e19}]", "budgets.0.macs: '1e19' is more than any network has; write at most 1e18"),
        ("budgets: [{name: a, macs: .inf}]", "budgets.0.macs: 'inf' is not an amount"),
        ("budgets: [{name: a, latency: 86401s}]", "budgets.0.latency: '86401s' is longer than any call takes"),
        ("budgets: [{name: a, macs: 0.3m}]", "budgets.0.macs: '0.3m' is not an amount; write 0.3M or a plain number"),
        ("budgets: [{name: a, macs: '300,000'}]", "'300,000' is not an amount; write 300000 or a plain number"),
        ("budgets: [{name: a, macs: 40kB}]", "'40kB' is not an amount; write 40k or a plain number"),
        ("budgets: [{name: a, size_bytes: 40K}]", "'40K' is not an amount; write 40k or a plain number"),
        ("budgets: [{name: a, macs: 60 percent}]", "'60 percent' is not an amount; write 60% or a plain number"),
        ("cluster: {address: 'head 1:6379'}", "cluster.address: 'head 1:6379' is no address; write auto, or HOST:PO"),
        ("metric: accuracy", "metric: 'accuracy' is no function; write pkg.mod:fn or ./file.py:fn"),
        ("model: {source: factory, name: net.py}", "model.name: 'net.py' is no function; write pkg.mod:fn or"),
        ("data: {source: factory, name: 'a:1'}", "data.name: 'a:1' is no function; write pkg.mod:fn or ./file.py:fn"),
        ("tracking: {uri: 'http://['}", "tracking.uri: 'http://[' is no address: Invalid IPv6 URL; write http://HOST:"),
        (
            "tracking: {studies: 'postgresql://db:port/x'}",
            "tracking.studies: 'postgresql://db:port/x' is no address; wr",
        ),
        ("tracking: {studies: 'mysql://db:99999/x'}", "is no address; write DIALECT://USER@HOST:PORT/NAME"),
        ("tracking: {uri: 'postgresql://['}", "tracking.uri: 'postgresql://[' is no address"),
        ("tracking: {uri: '://x'}", "tracking.uri: '://x' is no address"),
        ("tracking: {studies: ' studies'}", "tracking.studies: ' studies' is empty, or has white space around it"),
        ("metric: 'a\tb'", "holds U+0009, which cannot be seen; write it without"),
        ("search: {trials: 2, explore: 1}", "too few for 2 methods and the baseline"),
        ("search: {timeout: soon}", "is not a duration"),
        ("recovery: {data: {source: digits}}", "recovery.data: its labels mean nothing to the teacher"),
        ("recovery: {labels: false, data: {source: imagefolder}}", "recovery.data.root: missing"),
        ("recovery: {labels: false, data: {sauce: digits}}", "sauce: unknown key; did you mean 'source'?"),
        ("recovery: {images: 2}", "recovery.images: Input should be greater than or equal to 8"),
        ("data: {source: imagefolder}", "data.root: missing"),
        ("model: {source: zoo, name: resnet8, keep: head}", "model.keep: 'head' is no list of layers; write one, such"),
        ("model: {source: zoo, name: resnet8, keep: [a, a]}", "model.keep: layer a given twice; name each once"),
        ("model: {source: factory, name: 'a:b', output: -1}", "model.output: -1 is no output; write a name, such as"),
        ("model: {source: zoo, name: resnet8, output: a}", "model.output: source 'zoo' does not use it, only torchvis"),
        (
            "model: {source: timm, name: a, weights: train}",
            "model.weights: only source 'zoo' trains its networks; give",
        ),
        ("model: {source: zoo, name: a, weights: pretrained}", "model.weights: only source 'timm' has pretrained ones"),
        ("devices: {}", "devices: empty"),
        ("budgets: [{name: a, macs: 1M}, {name: a, macs: 2M}]", "budget a given twice"),
    ],
)
def test_single_mistakes(change: str, told: str) -> None:
    document = yaml.safe_load(GOOD) | yaml.safe_load(change)
    assert told in mistakes(yaml.safe_dump(document))


@pytest.mark.parametrize(
    ("text", "limit"),
    [("3e5", "300000"), ("3.0e+5", "300000"), ("300_000", "300000"), ("'300_000'", "300000"), (".5G", ".5G")],
)
def test_forms_of_one_amount(text: str, limit: str) -> None:
    assert str(spec(GOOD.replace("macs: 50%", f"macs: {text}")).budgets[0].macs) == limit
    assert drop(float("0.00002")) == drop("2e-5") == drop("0.002%") == 2e-5


@pytest.mark.parametrize(("text", "size"), [("40kB", 40_000), ("40 B", 40), ("0.04MB", 40_000), ("40k", 40_000)])
def test_bytes_may_be_called_so(text: str, size: int) -> None:
    limit = spec(GOOD.replace("macs: 50%", f"size_bytes: {text}")).budgets[0].size_bytes
    assert limit is not None
    assert limit.of(1) == size


def test_a_spec_that_names_no_methods_has_them_all_and_a_chain() -> None:
    every = ("itpruner", "channels", "manidp", "practise", "alds", "channels+alds")
    assert spec(GOOD.replace("methods: [itpruner, alds]", "").replace("trials: 4", "trials: 7")).methods == every
    few = GOOD.replace("methods: [itpruner, alds]", "").replace("trials: 4", "trials: 2")
    assert "search.trials: 2 is too few for 6 methods" in mistakes(few)
    assert "give at least 3, or more search.explore" in mistakes(few)
    assert spec(few.replace("trials: 2", "trials: 2, explore: 4")).search.explore == 4
    assert "give at least 7\n" in mistakes(few.replace("trials: 2", "trials: 2, asynchronous: true")) + "\n"


def test_a_metric_has_a_direction_and_a_range() -> None:
    loss = spec(GOOD + "metric: {function: './a.py:loss', direction: minimize, range: [0, 2.5]}")
    assert loss.metric.scale == Scale("loss", worst=2.5, best=0)
    renamed = spec(GOOD + "metric: {function: './a.py:loss', name: CE, direction: minimize, range: [0, 2.5]}")
    assert renamed.metric.scale.name == "CE"
    assert loss.decisive() == renamed.decisive()
    assert spec(GOOD + "metric: 'a:b'").decisive()["metric"] == "a:b"
    assert spec(GOOD + "metric: {function: 'a:b'}").decisive()["metric"] == "a:b"
    assert spec().decisive()["metric"] == "top1"
    assert spec().metric.scale == Scale()
    for metric, told in {
        "{function: top1, direction: minimize}": "metric: top1 has a name, a direction and a range of its own",
        "{function: loss, range: [0, 1]}": "metric: 'loss' is no function",
        "{function: 'a:b', range: [1, 0]}": "metric.range: expected its lowest and its highest value, two numbers",
        "{function: 'a:b', range: [0, .inf]}": "metric.range: expected its lowest and its highest value",
        "{function: 'a:b', direction: min}": "metric.direction: Input should be 'maximize' or 'minimize', but it is",
        "{functions: 'a:b'}": "metric.functions: unknown key; did you mean 'function'?",
    }.items():
        assert told in mistakes(f"{GOOD}metric: {metric}")


@pytest.mark.parametrize("gpus", [0, 0.25, 1, 1.0, 2, 3.0])
def test_shares_of_a_gpu_and_whole_ones(gpus: float) -> None:
    assert spec(GOOD + f"cluster: {{gpus_per_trial: {gpus}}}").cluster.gpus_per_trial == gpus


def test_too_few_trials_are_counted_over_the_methods_that_exist() -> None:
    told = mistakes(GOOD.replace("[itpruner, alds]", "[itpruner, itpruner, magic]").replace("trials: 4", "trials: 2"))
    assert "'magic' is not a method" in told
    assert "too few" not in told
    told = mistakes(
        GOOD.replace("[itpruner, alds]", "[itpruner, alds, magic]").replace("trials: 4", "trials: 2, explore: 1")
    )
    assert "search.trials: 2 is too few for 2 methods and the baseline" in told
    assert told.startswith("2 mistakes")


def test_a_list_among_the_methods_is_a_chain() -> None:
    found = spec(GOOD.replace("[itpruner, alds]", "[alds, [itpruner, alds]]"))
    assert found.methods == ("alds", "itpruner+alds")
    assert found.candidates == ("alds", "itpruner+alds", "uniform")
    assert spec(GOOD.replace("[itpruner, alds]", "[alds, itpruner+alds]")).methods == found.methods
    for chain, told in {
        "[alds]": "the chain ['alds'] is too short",
        "[alds, alds]": "expected at least two different methods",
        "[alds, uniform]": "'uniform' is the baseline",
        "[alds, itprune]": "did you mean 'itpruner'?",
        "[alds, [alds, itpruner]]": "is not a method",
    }.items():
        assert told in mistakes(GOOD.replace("[itpruner, alds]", f"[itpruner, {chain}]"))


def test_a_budget_may_limit_expected_macs() -> None:
    target, _ = spec(GOOD.replace("macs: 50%", "macs_expected: 50%, params: 10k")).targets(teacher(1000))
    budget = target.budget
    assert budget.declared() == {"macs_expected": 500, "params": 10_000}
    assert budget.limits() == {"macs": 500, "params": 10_000}


def test_several_limits_at_once() -> None:
    text = GOOD.replace("params: 20k, device: server", "device: server, latency: 60 %, size_bytes: 50%, top1_drop: 2 %")
    half, tiny = spec(text).targets(teacher(1000))
    assert half.limits == {"macs": 500}
    assert half.device == "edge"
    assert tiny.limits == {"macs": 250, "size_bytes": 100_000, "latency_ms/server": 3.0, "top1_drop": 0.02}
    assert spec(text).needs_latency()
    assert not spec().needs_latency()


@pytest.mark.parametrize(("text", "limit"), [("60%", 3.0), ("2ms", 2.0), ("800 us", 0.8), (7, 7.0), ("0.001 s", 1.0)])
def test_latency_is_a_share_or_a_time(text: object, limit: float) -> None:
    assert latency(text).of(5.0) == pytest.approx(limit)


def test_a_drop_is_a_fraction_or_in_percent() -> None:
    assert drop("2%") == drop(0.02) == drop(".02") == 0.02
    assert drop(0) == 0


def test_what_changed_between_two_sittings() -> None:
    old = spec().decisive()
    more = spec(GOOD.replace("search:", "  - {name: more, params: 30%}\nsearch:").replace("trials: 4", "trials: 9"))
    check_unchanged("digits", old, more.decisive())
    other = GOOD.replace("macs: 50%", "macs: 40%").replace("- {name: tiny", "- {name: teeny") + "recovery: {steps: 3}\n"
    found = changes(old, spec(other).decisive())
    assert found[:2] == ["recovery.steps: 400, now 3", 'budgets.half.macs: "50%", now "40%"']
    assert found[2].startswith("budgets.tiny: {")
    assert found[2].endswith("now gone")
    with pytest.raises(SpecChanged, match=r"(?s)recovery.steps: 400, now 3.*--fork"):
        check_unchanged("digits", old, spec(other).decisive())
    assert spec(GOOD.replace("50%", "50.0 %")).decisive() == old
    assert changes(old, spec(GOOD.replace("{edge:", "{more: {channels: 2}, edge:")).decisive()) == [
        'budgets.half.device: "edge", now "more"'
    ]
    assert not changes(old, spec(GOOD.replace("16}}", "16}, more: {channels: 2}}")).decisive())


def test_keys_given_twice_are_told_with_their_lines_and_the_other_mistakes() -> None:
    told = mistakes(GOOD + "name: other\ndevices: {edge: {}, server: {channels: 4, channels: 8}}\nmodle: 1\n")
    assert told.startswith("4 mistakes")
    for part in (
        "line 11: key 'name' given twice; keep one of them",
        "line 12: key 'devices' given twice",
        "line 12: key 'channels' given twice",
        "modle: unknown key; did you mean 'model'?",
    ):
        assert part in told
    merged = GOOD.replace("{edge: {channels: 4}, server: {channels: 16}}", "{edge: &e {channels: 4}, server: {<<: *e}}")
    assert spec(merged).devices["server"].channels == 4


def test_students_are_timed_where_a_spec_asks_for_latency() -> None:
    half = {"name": "half", "macs": "50%"}
    plain = {key: value for key, value in yaml.safe_load(GOOD).items() if key != "devices"} | {"budgets": [half]}
    assert not spec(yaml.safe_dump(plain)).times_all()
    for more in (
        {"devices": {"cpu-1": {}}},
        {"budgets": [half | {"device": "cpu-1"}]},
        {"budgets": [half | {"latency": "50%"}]},
        {"search": {"timing": "all"}},
    ):
        assert spec(yaml.safe_dump(plain | more)).times_all()
    assert spec(GOOD.replace("trials: 4", "trials: 4, timing: all")).decisive() == spec().decisive()


def test_a_search_goes_on_with_more_trials_or_time() -> None:
    assert spec(GOOD.replace("trials: 4, timeout: 2m", "trials: 9, timeout: 3h")).decisive() == spec().decisive()
    assert spec(GOOD.replace("trials: 4", "trials: 4, seed: 1")).decisive() != spec().decisive()


def test_what_is_not_a_spec() -> None:
    assert "not valid YAML" in mistakes("name: [")
    assert "expected keys such as" in mistakes("- a list")
    with pytest.raises(SpecError, match="check the path"):
        load(Path("nowhere.yaml"))
    with pytest.raises(SpecError, match="has over 1,000,000 characters"):
        load(Path("/dev/zero"))


def test_what_decides_is_what_not_where() -> None:
    elsewhere = spec(GOOD + "cluster: {address: 'ray://head:10001'}\ntracking: {uri: 'sqlite:///other.db'}\n")
    assert elsewhere.decisive() == spec().decisive()
    assert spec(GOOD.replace("50%", "51%")).decisive() != spec().decisive()
    assert set(spec().decisive()["model"]) == {"source", "name", "weights", "args"}  # as before it had more keys
