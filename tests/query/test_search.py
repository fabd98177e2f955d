"""Searches for runs against a second evaluation in Python, on runs whose every fact is known."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from runstream.entities import Run, ViewType
from runstream_query import InvalidPageToken, InvalidQuery, Reader
from runstream_query.search.parse import parse_filter, parse_order
from tests.query.evaluator import matches, ordered
from tests.query.logged import Logged

VALUES = ["a", "A", "ab", "a_b", "a%b", "a\\b", "", "ß", "two\nlines", "it's", "0.1", "{p0:String}"]
NUMBERS = [0.0, -0.0, 1.0, 0.1, -5.5, 1e300, math.inf, -math.inf, math.nan]
KEYS = ["x", "y z", "k.v"]


@pytest.fixture(scope="module")
def experiments(logged: Logged) -> list[str]:
    """Two experiments with forty runs of all kinds, the second one smaller."""
    chance = random.Random(5)
    found = [logged.experiment("first"), logged.experiment("second")]
    for number in range(40):

        def some(values: list[str]) -> dict[str, str]:
            return {key: chance.choice(values) for key in KEYS if chance.random() < 0.7}

        logged.run(
            f"run{number:02}",
            found[number % 4 == 0],
            name=chance.choice(["alpha", "Alpha", "beta", "a%"]),
            user=chance.choice(["ann", "bob"]),
            started_at=chance.choice([1_000, 2_000, 3_000 + number]),
            status=chance.choice(["", "FINISHED", "FAILED", "KILLED", "RUNNING"]),
            ended_at=chance.choice([5_000, 6_000]),
            params=some(VALUES),
            tags=some(VALUES),
            metrics={key: chance.choice(NUMBERS) for key in KEYS if chance.random() < 0.7},
            parent=chance.choice(["", "run00"]),
        )
        if chance.random() < 0.4:
            logged.points(f"run{number:02}", "x", [(step, 5, chance.choice(NUMBERS)) for step in (3, 1, 2)])
        if chance.random() < 0.3:
            logged.event("run_updated", f"run{number:02}", run_id=f"run{number:02}", name="renamed")
        for name in chance.sample(["mnist", "cifar"], chance.randrange(3)):
            logged.event(
                "input_logged",
                f"run{number:02}",
                run_id=f"run{number:02}",
                name=name,
                digest=chance.choice(["d1", "d2"]),
                source_type="local",
                source="here",
                context=chance.choice(["train", ""]),
            )
    logged.send()
    return found


@pytest.fixture(scope="module")
def runs(reader: Reader, experiments: list[str]) -> list[Run]:
    """All forty runs, as reading gives them one by one."""
    return [reader.get_run(f"run{number:02}") for number in range(40)]


def _name(key: str) -> str:
    return f"`{key}`"


_literals = st.sampled_from(VALUES).map(lambda text: "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'")
_numbers = st.sampled_from(["0", "1", "0.1", "-5.5", "1e300", "-1e400", "1e400", "3", "99999999999999999999"])
_lists = st.lists(_literals, min_size=1, max_size=3).map(lambda items: f"({', '.join(items)})")
_text_tests = st.one_of(
    st.tuples(st.sampled_from(["=", "!=", "LIKE", "ILIKE"]), _literals).map(" ".join),
    st.sampled_from(
        ["LIKE 'a%'", "ILIKE '%B'", "LIKE '_'", "LIKE '%\\%'", "LIKE 'a\\_b'", "LIKE '%\\\\%'", "ILIKE 'A_B'"]
    ),
    st.tuples(st.sampled_from(["IN", "NOT IN"]), _lists).map(" ".join),
    st.sampled_from(["IS NULL", "IS NOT NULL"]),
)
_number_tests = st.one_of(
    st.tuples(st.sampled_from(["=", "!=", "<", "<=", ">", ">="]), _numbers).map(" ".join),
    st.sampled_from(["IS NULL", "IS NOT NULL"]),
)
_text_fields = [f"{entity}.{_name(key)}" for entity in ("params", "tags") for key in [*KEYS, "none"]]
_times = st.sampled_from(["start_time", "end_time"])
_comparisons = st.one_of(
    st.tuples(st.sampled_from([f"metrics.{_name(key)}" for key in [*KEYS, "none"]]), _number_tests).map(" ".join),
    st.tuples(st.sampled_from(_text_fields), _text_tests).map(" ".join),
    st.tuples(_times, _number_tests).map(" ".join),
    st.tuples(_times, st.sampled_from(["> 1500", "<= 5000", "= 2000"])).map(" ".join),
    st.tuples(
        st.sampled_from(["run_name", "user_id", "run_id", "artifact_uri", "parent_run_id", "source_name"]), _text_tests
    ).map(" ".join),
    st.sampled_from(["run_name LIKE 'al%'", "run_name ILIKE 'AL%'", "run_id IN ('run01', 'run02')", "user_id = 'ann'"]),
    st.tuples(st.just("status"), st.sampled_from(["= 'RUNNING'", "!= 'FAILED'", "IN ('KILLED', 'FAILED')"])).map(
        " ".join
    ),
    st.tuples(st.sampled_from(["datasets.name", "datasets.digest", "datasets.context"]), _text_tests).map(" ".join),
    st.sampled_from(["datasets.name = 'mnist'", "datasets.digest != 'd1'", "datasets.context = 'train'"]),
)
_filters = st.recursive(
    _comparisons,
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map(" AND ".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"({' OR '.join(parts)})"),
        inner.map(lambda part: f"NOT ({part})"),
    ),
    max_leaves=5,
)
_fields = [f"{entity}.{_name(key)}" for entity in ("metrics", "params", "tags") for key in [*KEYS, "none"]]
_attributes = ["start_time", "end_time", "run_name", "status", "user_id", "run_id", "parent_run_id"]
_orders = st.lists(
    st.tuples(
        st.sampled_from(
            [*_fields, "start_time", "end_time", "run_name", "status", "user_id", "run_id", "parent_run_id"]
        ),
        st.sampled_from(["", " ASC", " DESC"]),
    ),
    max_size=3,
    unique_by=lambda pair: pair[0],
).map(lambda pairs: ["".join(pair) for pair in pairs])


@settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(text=_filters, entries=_orders, both=st.booleans())
@example(
    text="metrics.x != 0 AND NOT (params.`y z` IS NULL OR tags.x LIKE '%\\_%')", entries=["metrics.x DESC"], both=True
)
@example(text="metrics.x > 0 AND metrics.x < 1", entries=["metrics.x", "params.x DESC"], both=True)
def test_sql_agrees_with_python(
    reader: Reader, runs: list[Run], experiments: list[str], text: str, entries: list[str], both: bool
) -> None:
    """The compiled SQL finds the same runs in the same order as an evaluation in Python."""
    chosen = experiments if both else experiments[:1]
    tree, orders = parse_filter(text), parse_order(entries)
    expected = [run for run in runs if run.info.experiment_id in chosen and matches(tree, run)]
    found, token = reader.search_run_ids(chosen, text, max_results=100, order_by=entries)
    assert found == [run.info.run_id for run in ordered(expected, orders)]
    assert token is None


@pytest.mark.parametrize(
    "entries",
    [
        [],
        ["metrics.x"],
        ["metrics.x DESC", "params.`k.v`"],
        ["tags.x DESC", "end_time DESC"],
        ["params.none", "run_id DESC"],
        ["parent_run_id", "status DESC", "run_name"],
    ],
)
@pytest.mark.parametrize("size", [1, 7])
def test_pages_join_to_the_whole(
    reader: Reader, runs: list[Run], experiments: list[str], entries: list[str], size: int
) -> None:
    """Page by page gives every run once, in the order of one large page; NaN and NULL included."""
    whole, _ = reader.search_run_ids(experiments, order_by=entries, max_results=100)
    assert len(whole) == len(runs)
    pages: list[str] = []
    token = None
    for _ in range(100):
        page, token = reader.search_run_ids(experiments, order_by=entries, max_results=size, page_token=token)
        assert len(page) == size or token is None
        pages += page
        if token is None:
            break
    assert pages == whole


@pytest.mark.parametrize("entries", [[], ["start_time"], ["metrics.x"], ["metrics.x DESC", "params.`k.v`"]])
@pytest.mark.parametrize("text", ["", "metrics.x > -1", "params.x != 'a' AND metrics.x IS NOT NULL"])
@pytest.mark.parametrize("count", [3, 9, 1_000])
def test_candidates_change_no_page(
    reader: Reader,
    runs: list[Run],
    experiments: list[str],
    entries: list[str],
    text: str,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A page that is first looked for among few candidates is the same page, whether they suffice or not."""
    expected = [
        run.info.run_id for run in ordered([r for r in runs if matches(parse_filter(text), r)], parse_order(entries))
    ]
    monkeypatch.setattr("runstream_query.search.candidates.MIN_RUN_ROWS", 0)
    monkeypatch.setattr("runstream_query.search.candidates._COUNT", count)
    monkeypatch.setattr("runstream_query.search.candidates._PER_ROW", 1)
    pages: list[str] = []
    token = None
    for _ in range(100):
        page, token = reader.search_run_ids(experiments, text, order_by=entries, max_results=5, page_token=token)
        pages += page
        if token is None:
            break
    assert pages == expected


def test_pages_stay_when_runs_come(reader: Reader, logged: Logged) -> None:
    """A run that starts between two pages shifts nothing: no run comes twice and none is left out."""
    experiment = logged.experiment("growing")
    for number in range(6):
        logged.run(f"grow{number}", experiment, started_at=1_000 + number)
    logged.send()
    first, token = reader.search_run_ids([experiment], max_results=3)
    logged.run("grow-new", experiment, started_at=9_000)
    logged.send()
    second, token = reader.search_run_ids([experiment], max_results=3, page_token=token)
    assert first + second == [f"grow{number}" for number in (5, 4, 3, 2, 1, 0)]
    assert token is None


def test_tokens_are_checked(reader: Reader, runs: list[Run], experiments: list[str]) -> None:
    """A token that was altered, shortened or taken from another search is refused by name."""
    _, token = reader.search_run_ids(experiments, order_by=["metrics.x"], max_results=5)
    assert token is not None
    for position, letter in itertools.product(range(0, len(token), 7), "Az"):
        altered = token[:position] + letter + token[position + 1 :]
        if altered != token:
            with pytest.raises(InvalidPageToken):
                reader.search_run_ids(experiments, order_by=["metrics.x"], max_results=5, page_token=altered)
    for other in ("x", token[:-4], "é", "{}", token + "AAAA"):
        with pytest.raises(InvalidPageToken):
            reader.search_run_ids(experiments, order_by=["metrics.x"], max_results=5, page_token=other)
    with pytest.raises(InvalidPageToken, match="another search"):
        reader.search_run_ids(experiments, order_by=["metrics.x DESC"], max_results=5, page_token=token)
    with pytest.raises(InvalidPageToken, match="another search"):
        reader.search_run_ids(experiments, "metrics.x > 0", order_by=["metrics.x"], page_token=token)
    # Another page size is no other search.
    reader.search_run_ids(experiments, order_by=["metrics.x"], max_results=9, page_token=token)


def test_lost_is_asked_for_like_a_status(reader: Reader, logged: Logged) -> None:
    """Runs logged just now are alive: none is LOST, and RUNNING ones stay RUNNING."""
    alive = [logged.experiment("alive")]
    for number, status in enumerate(("", "FAILED", "FINISHED", "")):
        logged.run(f"alive{number}", alive[0], status=status)
    logged.send()
    found = {
        text: set(reader.search_run_ids(alive, text)[0])
        for text in ("attributes.status = 'LOST'", "status != 'LOST'", "status IN ('LOST', 'FAILED')")
    }
    assert list(found.values()) == [set(), {f"alive{n}" for n in range(4)}, {"alive1"}]
    assert set(reader.search_run_ids(alive, "status NOT IN ('LOST', 'FAILED')")[0]) == {"alive0", "alive2", "alive3"}


def test_large_values_reach_the_store(reader: Reader, logged: Logged) -> None:
    """A value or a list too long for a URL still works, and what is too long for SQL is a clear error."""
    experiment = logged.experiment("large")
    text = "it's {p0:String} ' \\ \n" * 1_000
    logged.run("large1", experiment, params={"long": text})
    logged.send()
    literal = text.replace("\\", "\\\\").replace("'", "\\'")
    assert reader.search_run_ids([experiment], f"params.long = '{literal}'")[0] == ["large1"]
    ids = ", ".join(f"'other{number}'" for number in range(1_500))
    assert reader.search_run_ids([experiment], f"run_id IN ({ids}, 'large1')")[0] == ["large1"]
    assert reader.search_run_ids([experiment], f"run_id NOT IN ({ids})")[0] == ["large1"]
    with pytest.raises(InvalidQuery, match="bytes"):
        reader.search_run_ids([experiment], f"params.long = '{'x' * 150_000}'")


@pytest.mark.parametrize(
    "arguments",
    [
        {"experiment_ids": "0"},
        {"experiment_ids": [5]},
        {"experiment_ids": None},
        {"max_results": 0},
        {"max_results": 10**9},
        {"max_results": "5"},
        {"max_results": True},
        {"run_view_type": 7},
        {"order_by": "metrics.x"},
        {"filter_string": 5},
        {"page_token": 5},
        {"experiment_ids": ["\ud800"]},
    ],
)
def test_wrong_arguments(reader: Reader, arguments: dict[str, object]) -> None:
    """Arguments of a wrong type or size are refused before anything is asked of the store."""
    with pytest.raises(InvalidQuery):
        reader.search_runs(**({"experiment_ids": ["0"]} | arguments))  # type: ignore[arg-type]


def test_no_experiments_no_runs(reader: Reader) -> None:
    """A search in no experiment, or in unknown ones, finds nothing."""
    assert reader.search_runs([]) == []
    assert reader.search_runs(["no such"], run_view_type=ViewType.ALL) == []
