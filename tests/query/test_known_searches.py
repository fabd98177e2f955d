"""Pages of searches that are remembered: never older than the log, and only what the log decides."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from runstream.entities import ViewType
from runstream_query import Reader
from runstream_query.known_runs import MAX_AGE_SECONDS
from runstream_query.known_searches import KnownSearches, Page
from runstream_query.visibility import Mark
from tests.query.logged import Logged

PAGE = Page(["a"], None)


@pytest.mark.parametrize("by_metrics", [True, False])
def test_a_page_lasts_as_long_as_what_it_depends_on(by_metrics: bool) -> None:
    """Metrics matter only where the search looks at them."""
    searches = KnownSearches()
    searches.remember("s", Mark(1, 1), PAGE, by_metrics=by_metrics, began=time.monotonic())
    assert searches.at("s", Mark(1, 1)) == PAGE
    assert searches.at("other", Mark(1, 1)) is None
    assert searches.at("s", Mark(1, 2)) == (None if by_metrics else PAGE)
    assert searches.at("s", Mark(2, 1)) is None


def test_a_page_is_looked_up_anew_after_a_while() -> None:
    """Insurance, see `known_runs`."""
    searches = KnownSearches()
    searches.remember("s", Mark(1, 1), PAGE, by_metrics=True, began=time.monotonic() - MAX_AGE_SECONDS)
    assert searches.at("s", Mark(1, 1)) is None


def test_memory_is_bounded() -> None:
    """Pages that were asked for longest ago are forgotten."""
    searches = KnownSearches(max_bytes=100_000)
    for number in range(1_000):
        page = Page([f"{number}"] * 10, None)
        searches.remember(str(number), Mark(1, 1), page, by_metrics=True, began=time.monotonic())
    known = [number for number in range(1_000) if searches.at(str(number), Mark(1, 1))]
    assert 10 < len(known) < 100
    assert known[-1] == 999


@pytest.fixture
def searched(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The search statements that the reader sends."""
    statements: list[str] = []
    original = reader._store.rows

    def rows(sql: str, *rest: Any) -> list[tuple[Any, ...]]:
        if "sort0" in sql:
            statements.append(sql)
        return original(sql, *rest)

    monkeypatch.setattr(reader._store, "rows", rows)
    yield statements


Find = Callable[..., Sequence[str]]


@pytest.fixture
def find(reader: Reader, logged: Logged) -> Find:
    """Searches the runs of one experiment."""
    experiment = logged.experiment("remembered")

    def search(where: str = "", order: Sequence[str] = (), page: int = 10) -> Sequence[str]:
        return reader.search_run_ids([experiment], where, ViewType.ACTIVE_ONLY, page, order)[0]

    return search


def test_what_any_process_logs_shows_at_once(logged: Logged, find: Find, searched: list[str]) -> None:
    """A metric ends what is known of searches by metrics; a param, a status or a deletion ends all of it."""
    experiment = logged.experiment("remembered")
    for name, value in (("low", 1.0), ("high", 2.0)):
        logged.run(name, experiment, metrics={"m": value}, params={"p": name})
    logged.send()
    by_metric, by_param = ("metrics.m > 0", ["metrics.m"]), ("params.p != 'x'", ["params.p"])
    for _ in range(3):
        assert find(*by_metric) == ["low", "high"]
        assert find(*by_param) == ["high", "low"]
    assert len(searched) == 2
    assert find(*by_metric, page=1) == ["low"]
    assert find("metrics.m > 1", ["metrics.m"]) == ["high"]
    assert find("metrics.m > 0", ["metrics.m DESC"]) == ["high", "low"]
    assert len(searched) == 5

    logged.points("low", "m", [(1, 2_000, 3.0)])
    logged.send()
    assert find(*by_metric) == ["high", "low"]
    assert find(*by_param) == ["high", "low"]
    assert len(searched) == 6

    logged.event("run_updated", "high", run_id="high", lifecycle_stage="deleted")
    logged.send()
    assert find(*by_metric) == find(*by_param) == ["low"]


def test_pages_are_remembered_each(reader: Reader, logged: Logged, searched: list[str]) -> None:
    """A walk over all pages is as quick the second time."""
    experiment = logged.experiment("walked")
    names = [logged.run(f"walked {number}", experiment, started_at=number) for number in range(7)]
    logged.send()

    def walk() -> list[str]:
        found: list[str] = []
        token = None
        while True:
            ids, token = reader.search_run_ids([experiment], max_results=3, page_token=token)
            found += ids
            if token is None:
                return found

    assert walk() == walk() == names[::-1]
    assert len(searched) == 3


def test_what_the_clock_decides_is_not_remembered(reader: Reader, logged: Logged, searched: list[str]) -> None:
    """A run becomes LOST although nothing is logged."""
    experiment = logged.experiment("silent")
    logged.run("silent", experiment)
    logged.send()
    for expected in (1, 2):
        reader.search_run_ids([experiment], "attributes.status = 'LOST'")
        assert len(searched) == expected


def test_a_caller_may_change_its_list(reader: Reader, logged: Logged) -> None:
    """What is remembered stays."""
    experiment = logged.experiment("kept")
    logged.run("kept", experiment)
    logged.send()
    reader.search_run_ids([experiment])[0].clear()
    assert reader.search_run_ids([experiment])[0] == ["kept"]
