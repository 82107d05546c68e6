"""Both clusters keep one promise: every item ends once, in steps and a result or an error."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster import Cluster, ClusterError, Done, Event, Failed, InlineCluster, Step, Stopped, always
from tests.cluster.cluster_items import CONTEXT, WORKERS, agreeing, careful, counted, refusing, results, total


def test_values_come_back_by_item(cluster: Cluster) -> None:
    events = list(cluster.run(total, [(1,), (2,), (3,)]))
    assert results(events) == {0: 6, 1: 12, 2: 18}
    assert len(events) == 3


def test_generators_yield_steps_then_their_result(cluster: Cluster) -> None:
    events = [event for event in cluster.run(counted, [(3,), (0,)]) if event.index == 0]
    assert events[:3] == [Step(0, 0), Step(0, 1), Step(0, 2)]
    assert isinstance(events[3], Done)
    assert events[3].value == "3 steps beside 4 numbers"
    assert len(events) == 4


def test_an_error_is_one_items_result(cluster: Cluster) -> None:
    events = {event.index: event for event in cluster.run(refusing, [(0,), (1,), (2,), (3,), (0,)])}
    assert isinstance(events[1], Failed)
    assert events[1].error == "ValueError: no 1"
    assert "refusing" in events[1].trace
    assert isinstance(events[3], Failed)
    assert events[3].error == "SystemExit: 3"  # which is not that of the process
    assert results(events.values()) == {0: 0, 2: 2, 4: 0}
    assert all(event.seconds >= 0 for event in events.values() if not isinstance(event, Step))


def test_no_items_no_events(cluster: Cluster) -> None:
    assert list(cluster.run(total, [])) == []


def test_items_are_taken_only_when_a_worker_is_free(cluster: Cluster) -> None:
    taken: list[int] = []

    def items() -> Iterator[tuple[int]]:
        for number in range(6):
            taken.append(number)
            yield (number,)

    seen = [len(taken) for _ in cluster.run(total, items())]
    assert len(seen) == len(taken) == 6
    assert all(count <= ended + WORKERS for ended, count in enumerate(seen))


def test_taking_an_item_may_run_others(cluster: Cluster) -> None:
    def items() -> Iterator[tuple[float]]:
        for number in range(4):
            yield from ((float(value),) for value in results(cluster.run(total, [(number,)])).values())

    assert results(cluster.run(total, items())) == {number: 36 * number for number in range(4)}


def test_an_error_while_taking_leaves_the_cluster_usable(cluster: Cluster) -> None:
    def items() -> Iterator[tuple[int]]:
        yield (3,)
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        list(cluster.run(counted, items(), agreeing))
    assert results(cluster.run(total, [(1,), (2,), (3,)])) == {0: 6, 1: 12, 2: 18}


def test_an_item_waits_for_its_answer_and_ends_where_that_is_no(cluster: Cluster, tmp_path: Path) -> None:
    folders = [tmp_path / "stopped", tmp_path / "done"]
    asked: list[tuple[int, str]] = []
    for folder in folders:
        folder.mkdir()

    def go_on(index: int, step: str) -> bool:
        asked.append((index, step))
        assert not (folders[index] / step).exists()
        return (index, step) != (0, "b")

    events: dict[int, list[Event]] = {0: [], 1: []}
    for event in cluster.run(careful, [(str(folder),) for folder in folders], go_on):
        events[event.index].append(event)
        if isinstance(event, Stopped):
            assert {path.name for path in folders[0].iterdir()} == {"a", "end"}
    assert events[0][:2] == [Step(0, "a"), Step(0, "b")]
    assert [type(event) for event in events[0][2:]] == [Stopped]
    assert [type(event) for event in events[1]] == [Step, Step, Step, Done]
    assert sorted(asked) == [(0, "a"), (0, "b"), (1, "a"), (1, "b"), (1, "c")]


def test_an_error_of_the_answer_is_the_callers(cluster: Cluster) -> None:
    def go_on(index: int, step: int) -> bool:
        raise KeyError(step)

    with pytest.raises(KeyError):
        list(cluster.run(counted, [(3,)], go_on))
    assert results(cluster.run(total, [(1,)])) == {0: 6}


@pytest.mark.parametrize("go_on", [always, agreeing])
def test_a_run_that_is_stopped_early_leaves_the_cluster_usable(
    cluster: Cluster, go_on: Callable[[int, object], bool]
) -> None:
    run = cluster.run(counted, [(3,), (3,), (3,)], go_on)
    assert isinstance(next(run), Step)
    del run
    assert results(cluster.run(total, [(1,), (2,), (3,)])) == {0: 6, 1: 12, 2: 18}


def test_alone_is_one_process_without_the_context(cluster: Cluster) -> None:
    both = results(cluster.alone(os.getpid, [(), ()]))
    assert list(both) == [0, 1]
    assert {*both.values()} == {*results(cluster.alone(os.getpid, [()])).values()}
    (failed,) = cluster.alone(results, [()])
    assert isinstance(failed, Failed)
    assert failed.error.startswith("TypeError: results() missing 1")


def test_this_process_has_no_resources() -> None:
    assert results(InlineCluster(CONTEXT).alone(os.getpid, [()])) == {0: os.getpid()}
    with pytest.raises(ClusterError, match="this process has no 1 phone; expected a Ray cluster"):
        list(InlineCluster(CONTEXT).alone(os.getpid, [()], {"phone": 1}))
