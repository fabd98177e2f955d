"""Read-your-writes: when a read waits, for how long, and what it says when it gives up."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from runstream.transport import Positions
from runstream_query import Patience, QueryTimeout
from runstream_query.visibility import Mark, Visibility
from runstream_schemas.names import Stream


class FakeStore:
    """A store whose positions follow a script; the last one stays."""

    def __init__(self, *script: list[tuple[str, int, int]]) -> None:
        self.connections = 1
        self.asked = 0
        self._script: Iterator[list[tuple[str, int, int]]] = itertools.chain(script, itertools.repeat(script[-1]))

    def rows(self, sql: str, *_: Any) -> list[tuple[str, int, int]]:
        assert "ingest_positions" in sql
        self.asked += 1
        return next(self._script)


class FakeLog:
    """A log that ends where it is told."""

    def __init__(self, ends: dict[tuple[Stream, int], int]) -> None:
        self.ends = ends

    def positions(self, streams: Sequence[Stream], timeout_seconds: float) -> Positions:
        return {place: end for place, end in self.ends.items() if place[0] in streams}


def visibility(store: FakeStore, log: FakeLog, **options: Any) -> Visibility:
    return Visibility(store, log, patience=Patience(0.2, 1.0), **options)  # type: ignore[arg-type]


def test_an_empty_log_needs_no_store() -> None:
    """Where nothing was ever logged, nobody is asked."""
    store = FakeStore([])
    visibility(store, FakeLog({("control", 0): 0, ("metrics", 0): 0})).wait()
    assert store.asked == 0


def test_waits_until_all_partitions_are_reached() -> None:
    """Every partition must have reached its end."""
    store = FakeStore(
        [], [("control", 0, 5)], [("control", 0, 5), ("control", 1, 2)], [("control", 0, 6), ("control", 1, 3)]
    )
    visibility(store, FakeLog({("control", 0): 5, ("control", 1): 3})).wait()
    assert store.asked == 4


def test_no_second_look_while_the_log_stands_still() -> None:
    """A satisfied position is remembered: the next read asks nothing, until the log grows or the store is another."""
    store = FakeStore([("control", 0, 5), ("metrics", 0, 9)])
    log = FakeLog({("control", 0): 5, ("metrics", 0): 4})
    tested = visibility(store, log)
    mark = tested.wait()
    assert tested.wait() == mark
    assert store.asked == 1
    log.ends["metrics", 0] = 9  # known to be reached already
    assert tested.wait().control == mark.control
    assert store.asked == 1
    store.connections = 2
    assert tested.wait() != mark
    assert store.asked == 2


def test_the_mark_changes_with_control_alone() -> None:
    """Metrics leave its control part as it is; anything else changes it."""
    store = FakeStore([("control", 0, 50), ("metrics", 0, 50)])
    log = FakeLog({("control", 0): 5, ("metrics", 0): 5})
    tested = visibility(store, log)
    mark = tested.wait()
    log.ends["metrics", 0] = 7
    assert tested.wait() == Mark(mark.control, frozenset(log.ends.items()))
    log.ends["control", 0] = 6
    assert tested.wait().control != mark.control


def test_only_the_streams_asked_for() -> None:
    """A read of state does not wait for a flood of metrics."""
    store = FakeStore([("control", 0, 5)])
    tested = visibility(store, FakeLog({("control", 0): 5, ("metrics", 0): 10**9}))
    tested.wait(("control",))
    with pytest.raises(QueryTimeout):
        tested.wait()


@pytest.mark.parametrize(
    ("reached", "trouble", "expected"),
    [
        ([], None, "is `runstream ingest` running"),
        ([("metrics", 0, 1_234)], None, "metrics 1,234 of 5,678; ingest is behind"),
        ([("metrics", 0, 1_234)], "the disk is full", "ingest is in trouble: the disk is full"),
    ],
)
def test_giving_up_says_how_far_ingest_is(
    reached: list[tuple[str, int, int]], trouble: str | None, expected: str
) -> None:
    """After too long without progress the error names positions, cause and remedy."""
    tested = visibility(FakeStore(reached), FakeLog({("metrics", 0): 5_678}), trouble=lambda: trouble)
    with pytest.raises(QueryTimeout, match="not visible after") as caught:
        tested.wait()
    assert expected in str(caught.value)
    assert isinstance(caught.value, TimeoutError)


def test_progress_earns_patience() -> None:
    """While ingest moves, a read waits longer than it would for a standstill."""
    store = FakeStore(*[[("metrics", 0, number)] for number in range(1, 21)])
    visibility(store, FakeLog({("metrics", 0): 20})).wait()
    assert store.asked == 20


def test_several_threads_wait_at_once() -> None:
    """Threads share what they learn and do not disturb each other."""
    store = FakeStore(*[[("metrics", 0, number)] for number in range(1, 30)])
    tested = visibility(store, FakeLog({("metrics", 0): 29}))
    threads = [threading.Thread(target=tested.wait) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    asked = store.asked
    tested.wait()
    assert store.asked == asked
