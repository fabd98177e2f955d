"""Runs that are remembered: never older than the log, read together where several callers ask, and bounded."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from runstream_query import Reader
from runstream_query.errors import SqlError
from runstream_query.facts import Facts
from runstream_query.known_runs import KnownRuns
from runstream_query.visibility import Mark
from runstream_schemas.names import CONTROL
from tests.query.logged import Logged

DEADLINE = 20.0


class FakeStore:
    """Answers for every id but those in `missing`: one start, and a metric whose value counts the statements."""

    def __init__(self) -> None:
        self.statements: list[tuple[str, list[str]]] = []
        self.missing: set[str] = set()
        self.bad: set[str] = set()
        self.hold: threading.Event | None = None
        self.entered = threading.Semaphore(0)

    def rows(self, sql: str, parameters: Mapping[str, Any]) -> list[tuple[int, str, str, str]]:
        ids: Sequence[str] = parameters["ids"]
        self.statements.append(("all" if "run_facts" in sql else "metrics", list(ids)))
        number = len(self.statements)
        self.entered.release()
        if self.hold is not None:
            assert self.hold.wait(DEADLINE)
        if self.bad & set(ids):
            raise SqlError("no", 1)
        start = [5, "e", "name", "ann", "", "", "", "e/r/artifacts", "", 1]
        info = json.dumps([start, [0, "", 0], [0, ""], [0, ""], 0, 0])
        rows = []
        for each in ids:
            if each in self.missing:
                continue
            if "run_facts" in sql:
                rows.append((0, each, "", info))
                rows.append((1, each, "p", '[1,2,"text"]'))
            rows.append((3, each, "m", f'[0,1,"{number}",0]'))
        return rows


def value(found: Sequence[Any]) -> float:
    return float(found[0].metrics["m"].value)


def test_the_same_state_of_the_log_is_read_once() -> None:
    """A run is read again only once something was logged: its metrics after metrics, all of it after the rest."""
    store = FakeStore()
    runs = KnownRuns(store)  # type: ignore[arg-type]
    assert value(runs.at(["a"], Facts(), Mark(1, 1))) == 1.0
    assert value(runs.at(["a"], Facts(), Mark(1, 1))) == 1.0
    assert value(runs.at(["a"], Facts(), Mark(1, 2))) == 2.0
    assert value(runs.at(["a", "b"], Facts(), Mark(1, 2))) == 2.0
    assert value(runs.at(["a"], Facts(), Mark(2, 2))) == 4.0
    assert store.statements == [("all", ["a"]), ("metrics", ["a"]), ("all", ["b"]), ("all", ["a"])]


def test_without_metrics_only_control_events_matter() -> None:
    """What writes are checked against is remembered as long as no control event was logged."""
    store = FakeStore()
    runs = KnownRuns(store)  # type: ignore[arg-type]
    runs.at(["a"], Facts(), Mark(1, 1))
    assert runs.without_metrics(["a"], Facts(), Mark(1, None))[0].params == {"p": "text"}
    assert len(store.statements) == 1
    runs.without_metrics(["a"], Facts(), Mark(2, None))
    assert len(store.statements) == 2


def test_a_run_that_is_not_there_is_asked_for_again() -> None:
    """Absence is not remembered."""
    store = FakeStore()
    store.missing = {"a"}
    runs = KnownRuns(store)  # type: ignore[arg-type]
    assert runs.at(["a"], Facts(), Mark(1, 1)) == []
    store.missing = set()
    assert len(runs.at(["a"], Facts(), Mark(1, 1))) == 1


def test_memory_is_bounded() -> None:
    """The runs that were asked for longest ago are forgotten."""
    store = FakeStore()
    runs = KnownRuns(store, max_bytes=30_000)  # type: ignore[arg-type]
    for number in range(100):
        runs.at([f"run {number}"], Facts(), Mark(1, 1))
    for number in (99, 98):
        runs.at([f"run {number}"], Facts(), Mark(1, 1))
    assert len(store.statements) == 100
    runs.at(["run 80"], Facts(), Mark(1, 1))
    assert len(store.statements) == 101


@pytest.mark.parametrize("bad", [False, True])
def test_callers_that_ask_at_once_share_a_statement(bad: bool) -> None:
    """What is asked for while statements run goes together in the next one; an id that fails fails for its caller."""
    store = FakeStore()
    store.hold = threading.Event()
    store.bad = {"run 5"} if bad else set()
    runs = KnownRuns(store)  # type: ignore[arg-type]
    found: dict[str, Any] = {}

    def ask(run_id: str) -> None:
        try:
            found[run_id] = runs.at([run_id], Facts(), Mark(1, 1))[0].info.run_id
        except SqlError:
            found[run_id] = "failed"

    def start(number: int) -> threading.Thread:
        thread = threading.Thread(target=ask, args=(f"run {number}",))
        thread.start()
        return thread

    threads = [start(0), start(1)]
    for _ in threads:
        assert store.entered.acquire(timeout=DEADLINE)
    threads += [start(number) for number in range(2, 9)]
    waiting = runs._records
    while not any(each.callers == 7 for each in list(waiting._gathering.values())):
        threading.Event().wait(0.001)
    store.hold.set()
    for thread in threads:
        thread.join(DEADLINE)
    expected = {f"run {number}": f"run {number}" for number in range(9)}
    if bad:
        expected["run 5"] = "failed"
    assert found == expected
    assert [sorted(ids) for _, ids in store.statements][2] == [f"run {number}" for number in range(2, 9)]
    assert len(store.statements) == (3 if not bad else 10)


def test_a_reader_sees_what_any_process_logs(logged: Logged, reader: Reader) -> None:
    """Between two reads another process logs a metric, a param, a tag and a deletion: each shows at once."""
    run = logged.run("known", logged.experiment("known"), metrics={"m": 1.0})
    logged.send()

    def read() -> Any:
        return reader.records([run], reader.facts())[0]

    first = read()
    assert read() is first
    logged.points(run, "m", [(1, 2_000, 7.0)])
    logged.send()
    assert read().metrics["m"].value == 7.0
    logged.event("run_tags", run, run_id=run, keys=["t"], values=["new"], deleted_keys=[])
    logged.event("params", run, run_id=run, keys=["p"], values=["1"])
    logged.send()
    assert (read().tags, read().params) == ({"t": "new"}, {"p": "1"})
    logged.event("run_updated", run, run_id=run, lifecycle_stage="deleted")
    logged.send()
    assert read().info.lifecycle_stage == "deleted"
    assert reader.records([run], reader.facts((CONTROL,)), metrics=False)[0].tags == {"t": "new"}
