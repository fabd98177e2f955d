"""The public views: documented columns, pruning, the rules of identity and lifecycle, any order and any batching."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runstream_ingest.frame import frame
from runstream_ingest.migration import migrate
from runstream_ingest.store import Store
from runstream_schemas.names import EventName
from tests.services.chdb_process import ChdbProcess
from tests.services.events import NOW, created, points, record, started, version

DOCUMENT = Path(__file__).parents[2] / "deploy" / "schema.md"
Event = tuple[EventName, dict[str, Any]]
REQUIRED = {
    "experiments": "experiment_id name lifecycle_stage artifact_uri created_at updated_at tags",
    "runs": "run_id experiment_id experiment_name name status lifecycle_stage user source_name source_version "
    "started_at ended_at heartbeat_at parent_run_id artifact_uri",
    "params": "run_id key value",
    "tags": "run_id key value updated_at",
    "metrics": "run_id key step timestamp value",
    "latest_metrics": "run_id key step timestamp value min max",
    "inputs": "run_id name digest source",
    "artifacts": "run_id path size_bytes logged_at",
}


def put(store: Store, events: Iterable[Event], first_offset: int = 0, time_ms: int = NOW + 100_000) -> None:
    """One insert for each schema."""
    records = [record(event, first_offset + number, time_ms=time_ms) for number, event in enumerate(events)]
    for framed in frame(records):
        store.insert(f"landing_{framed.event}", framed.columns, framed.chunks)


def columns(store: Store, view: str) -> list[tuple[str, str]]:
    return store.rows(
        "SELECT name, type FROM system.columns WHERE database = {d:String} AND table = {t:String} ORDER BY position",
        {"d": store.database, "t": view},
    )


def views(store: Store) -> list[str]:
    rows = store.rows(
        "SELECT name FROM system.tables WHERE database = {d:String} AND engine = 'View'", {"d": store.database}
    )
    return sorted(name for (name,) in rows)


def documented() -> dict[str, list[tuple[str, str]]]:
    """View -> (column, type), from the tables of deploy/schema.md."""
    found: dict[str, list[tuple[str, str]]] = {}
    view = ""
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        heading = re.fullmatch(r"### (\w+)", line)
        if heading:
            view = heading[1]
            found[view] = []
        row = re.match(r"\| `(\w+)` \| `(.+?)` \|", line)
        if row and view:
            found[view].append((row[1], row[2]))
    return found


def test_the_document_lists_every_view_and_column_with_its_type(store: Store) -> None:
    """deploy/schema.md and the database say the same, in the same order."""
    assert {view: columns(store, view) for view in views(store)} == documented()


def test_the_promised_columns_are_there(store: Store) -> None:
    """The names that the design promises."""
    for view, names in REQUIRED.items():
        assert set(names.split()) <= {name for name, _ in columns(store, view)}, view


@pytest.mark.parametrize(
    ("view", "where", "keys"),
    [
        ("metrics", "run_id = 'run0500'", {"run_id"}),
        ("metrics", "run_id IN ('run0500', 'run0900')", {"run_id"}),
        ("metrics", "run_id = 'run0500' AND key = 'loss' AND step BETWEEN 5 AND 7", {"run_id", "key", "step"}),
        ("latest_metrics", "run_id = 'run0500' AND key = 'loss'", {"run_id", "key"}),
        ("params", "run_id = 'run0500' AND key = 'lr'", {"run_id", "key"}),
        ("tags", "run_id = 'run0500'", {"run_id"}),
        ("artifacts", "run_id = 'run0500'", {"run_id"}),
        ("inputs", "run_id = 'run0500'", {"run_id"}),
        ("runs", "run_id = 'run0500'", {"run_id"}),
    ],
)
def test_views_prune_by_key(store: Store, view: str, where: str, keys: set[str]) -> None:
    """A condition on a view's key reaches the primary index of the table behind it."""
    table = {"metrics": "points", "latest_metrics": "rollup", "runs": "run_facts"}.get(view)
    table = (
        table
        or {"params": "param_facts", "tags": "run_tag_facts", "artifacts": "artifact_facts", "inputs": "input_facts"}[
            view
        ]
    )
    events: list[Event] = []
    for number in range(0, 1_000, 10):
        name = f"run{number:04d}"
        events.append(points(name, [1.0] * 20))
        events.append(started(name))
        events.append(("params", {"run_id": name, "keys": ["lr"], "values": ["1"], **version()}))
        events.append(("run_tags", {"run_id": name, "keys": ["k"], "values": ["1"], **version()}))
        events.append(("artifact_logged", {"run_id": name, "path": "a", "size_bytes": 1, **version()}))
        source = {"name": "a", "digest": "b", "source_type": "", "source": ""}
        events.append(("input_logged", {"run_id": name, **source, **version()}))
    put(store, events)
    lines = [line for (line,) in store.rows(f"EXPLAIN indexes = 1 SELECT * FROM {view} WHERE {where}")]
    at = next(index for index, line in enumerate(lines) if f"ReadFromMergeTree ({store.database}.{table})" in line)
    used: set[str] = set()
    for line in itertools.takewhile(lambda text: "ReadFrom" not in text, lines[at + 1 :]):
        used |= {key for key in ("run_id", "key", "step") if re.fullmatch(rf"\W*{key}\s*", line)}
    assert keys <= used, "\n".join(lines)


# Order, batching, duplicates.

VALUES = [0.0, -0.0, 1.0, -1.0, 2.5, math.nan, math.inf, -math.inf, 5e-324, -5e-324, 1e308]
RUNS = ["a", "b"]


def any_event() -> st.SearchStrategy[Event]:
    """Events of few identities, so that they meet each other."""
    versions = st.builds(
        lambda t, s, w: version(NOW + t, s, w), st.integers(0, 3), st.integers(0, 2), st.sampled_from([7, 8])
    )
    run = st.sampled_from(RUNS)
    experiment = st.sampled_from(["5", "9"])

    def batch(run_id: str, first: int, values: Sequence[float], step: int, time: int, writer: int) -> Event:
        name, fields = points(run_id, values, first_seq=first, writer=writer)
        count = len(values)
        return name, {**fields, "steps": [step] * count, "times": [NOW + time] * count}

    return st.one_of(
        st.builds(
            batch,
            run,
            st.integers(0, 3),
            st.lists(st.sampled_from(VALUES), min_size=1, max_size=4),
            st.integers(-1, 2),
            st.integers(0, 1),
            st.sampled_from([7, 8]),
        ),
        st.builds(lambda r, e, v: started(r, e, **v), run, experiment, versions),
        st.builds(lambda e, v, n: created(e, n, **v), experiment, versions, st.sampled_from(["x", "y"])),
        st.builds(
            lambda r, status, v: ("run_updated", {"run_id": r, "status": status, "ended_at": NOW + v["seq"], **v}),
            run,
            st.sampled_from(["", "RUNNING", "FINISHED", "FAILED"]),
            versions,
        ),
        st.builds(
            lambda r, stage, v: ("run_updated", {"run_id": r, "lifecycle_stage": stage, **v}),
            run,
            st.sampled_from(["active", "deleted"]),
            versions,
        ),
        st.builds(
            lambda e, stage, n, v: (
                "experiment_updated",
                {"experiment_id": e, "lifecycle_stage": stage, "name": n, **v},
            ),
            experiment,
            st.sampled_from(["", "active", "deleted"]),
            st.sampled_from(["", "new"]),
            versions,
        ),
        st.builds(
            lambda r, value, v: ("params", {"run_id": r, "keys": ["lr"], "values": [value], **v}),
            run,
            st.sampled_from(["1", "2"]),
            versions,
        ),
        st.builds(
            lambda r, value, gone, v: (
                "run_tags",
                {"run_id": r, "keys": [] if gone else ["t"], "values": [] if gone else [value]}
                | {"deleted_keys": ["t"] if gone else [], **v},
            ),
            run,
            st.sampled_from(["1", "2"]),
            st.booleans(),
            versions,
        ),
        st.builds(
            lambda kind, r, e, v: ("purged", {"kind": kind, "id": r if kind == "run" else e, **v}),
            st.sampled_from(["run", "experiment"]),
            st.just("b"),
            st.just("9"),
            versions,
        ),
    )


def answers(store: Store, suffix: str) -> dict[str, list[tuple[Any, ...]]]:
    found = {}
    for view in REQUIRED:
        texts = ", ".join(f"toString({name})" for name, _ in columns(store, view) if name != "lost")
        key = "experiment_id" if view == "experiments" else "run_id"
        found[view] = store.rows(f"SELECT {texts} FROM {view} WHERE endsWith({key}, '{suffix}') ORDER BY ALL")
    return found


@pytest.fixture(scope="module")
def two_stores(chdb: ChdbProcess) -> Iterable[tuple[Store, Store]]:
    """Two databases whose merges stand still, so that views must merge."""
    pair = chdb.store(), chdb.store()
    for one in pair:
        migrate(one)
        one.execute(f"SYSTEM STOP MERGES {one.database}.points")
    yield pair
    for one in pair:
        one.close()


def renamed(event: Event, suffix: str) -> Event:
    """The event about other runs and experiments."""
    name, fields = event
    return name, {
        field: f"{value}{suffix}" if field in ("run_id", "experiment_id", "id") else value
        for field, value in fields.items()
    }


_suffixes = itertools.count()


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(events=st.lists(any_event(), min_size=1, max_size=14), seed=st.integers(0, 1 << 16))
def test_any_order_batching_and_duplication_give_the_same_answers(
    two_stores: tuple[Store, Store], events: list[Event], seed: int
) -> None:
    """The same events in one insert, and shuffled, repeated and cut up: every view answers the same."""
    one, other = two_stores
    rng = random.Random(seed)
    suffix = f"-{next(_suffixes)}"
    events = [renamed(event, suffix) for event in events]
    put(one, events)
    again = events + rng.choices(events, k=rng.randrange(0, 4))
    rng.shuffle(again)
    offset = 0
    while again:
        size = rng.randrange(1, 6)
        put(other, again[:size], offset)
        again, offset = again[size:], offset + size
    assert answers(other, suffix) == answers(one, suffix)


# Rules, one by one.


def latest(values: Iterable[tuple[int, int, float]]) -> tuple[int, int, float]:
    """The rule of the design: the largest (step, time, value without NaN, is NaN)."""
    step, time, value, is_nan = max(
        (step, time, 0.0 if math.isnan(value) else value + 0.0, math.isnan(value)) for step, time, value in values
    )
    return step, time, math.nan if is_nan else value


@pytest.mark.parametrize("seed", range(5))
def test_the_latest_value_follows_the_rule(store: Store, seed: int) -> None:
    """With NaN, infinities, both zeros, denormals, negative and extreme steps, in one part and in many."""
    rng = random.Random(seed)
    by_key: dict[str, list[tuple[int, int, float]]] = {}
    for number in range(120):
        key = f"k{rng.randrange(12)}"
        step = rng.choice([0, 1, -1, (1 << 63) - 1, -(1 << 63), 7])
        time = NOW + rng.randrange(2)
        value = rng.choice([*VALUES, rng.random()])
        by_key.setdefault(key, []).append((step, time, value))
        name, fields = points("r", [value], key=key, first_seq=number)
        put(store, [(name, {**fields, "steps": [step], "times": [time]})], number)
    rows = store.rows("SELECT key, step, toUnixTimestamp64Milli(timestamp), value, min, max FROM latest_metrics")
    assert len(rows) == len(by_key)
    for key, step, time, value, low, high in rows:
        expected = latest(by_key[key])
        assert (step, time) == expected[:2]
        assert (math.isnan(value) and math.isnan(expected[2])) or value == expected[2]
        assert math.copysign(1, value) == math.copysign(1, expected[2]) or math.isnan(value)
        numbers = [one for *_, one in by_key[key] if not math.isnan(one)]
        if numbers:
            assert (low, high) == (min(numbers), max(numbers))


def test_points_that_differ_never_collapse_and_the_same_point_does(store: Store) -> None:
    """Identity is (run, key, step, time, writer, seq)."""
    name, fields = points("r", [1.0, 1.0])
    same = {**fields, "steps": [0, 0], "times": [NOW, NOW]}
    put(store, [(name, same), (name, same), (name, {**same, "writer": 8}), (name, {**same, "first_seq": 10})])
    put(store, [(name, same)], 9)
    assert store.rows("SELECT count() FROM metrics") == [(6,)]


def test_the_first_param_wins_and_a_conflict_shows(store: Store) -> None:
    """The smallest (time, seq, value)."""
    for number, (value, time) in enumerate([("late", NOW + 5), ("first", NOW), ("other", NOW + 9)]):
        put(store, [("params", {"run_id": "r", "keys": ["lr"], "values": [value], **version(time)})], number)
    put(store, [("params", {"run_id": "r", "keys": ["n"], "values": ["1"], **version()})], 9)
    assert store.rows("SELECT key, value, conflict FROM params ORDER BY key") == [("lr", "first", 1), ("n", "1", 0)]


def test_the_newest_tag_wins_also_as_a_deletion(store: Store) -> None:
    """In either order of arrival."""
    set_it: Event = ("run_tags", {"run_id": "r", "keys": ["t"], "values": ["v"], **version(NOW)})
    gone: Event = ("run_tags", {"run_id": "r", "keys": [], "values": [], "deleted_keys": ["t"], **version(NOW + 1)})
    put(store, [gone], 0)
    put(store, [set_it], 1)
    assert store.rows("SELECT * FROM tags") == []
    put(store, [("run_tags", {"run_id": "r", "keys": ["t"], "values": ["back"], **version(NOW + 2)})], 2)
    assert store.rows("SELECT value FROM tags") == [("back",)]


def test_a_clock_ahead_of_the_log_is_capped(store: Store) -> None:
    """A tag from the future loses to one that was written later by the log's clock."""
    ahead: Event = ("run_tags", {"run_id": "r", "keys": ["t"], "values": ["future"], **version(NOW + 10**9)})
    put(store, [ahead], 0, time_ms=NOW)
    put(
        store, [("run_tags", {"run_id": "r", "keys": ["t"], "values": ["now"], **version(NOW + 5)})], 1, time_ms=NOW + 5
    )
    assert store.rows("SELECT value FROM tags") == [("now",)]


def test_a_run_exists_once_its_start_has_arrived(store: Store) -> None:
    """Points and state that came before it wait."""
    put(store, [points("r", [1.0]), ("run_updated", {"run_id": "r", "status": "FAILED", "ended_at": NOW, **version()})])
    assert store.rows("SELECT * FROM runs") == []
    put(store, [started("r")], 5)
    assert store.rows("SELECT status, name FROM runs") == [("FAILED", "name-r")]


def test_the_first_start_wins_and_a_later_one_changes_nothing(store: Store) -> None:
    """Attaching to a run sends its start again."""
    put(store, [started("r", "5", name="first"), started("r", "9", name="second", time_ms=NOW + 9)])
    assert store.rows("SELECT experiment_id, name FROM runs") == [("5", "first")]


def test_a_late_finish_wins_over_closing_a_lost_run(store: Store) -> None:
    """Whoever closes uses the heartbeat's version + 1."""
    put(store, [started("r"), ("run_updated", {"run_id": "r", **version(NOW + 50)})])
    assert store.rows("SELECT toUnixTimestamp64Milli(heartbeat_at), lost, status FROM runs") == [
        (NOW + 50, 1, "RUNNING")
    ]
    closed: Event = ("run_updated", {"run_id": "r", "status": "FAILED", "ended_at": NOW + 51, **version(NOW + 50, 1)})
    put(store, [closed], 5)
    assert store.rows("SELECT status FROM runs") == [("FAILED",)]
    put(store, [("run_updated", {"run_id": "r", "status": "FINISHED", "ended_at": NOW + 60, **version(NOW + 60)})], 6)
    assert store.rows("SELECT status, toUnixTimestamp64Milli(ended_at) FROM runs") == [("FINISHED", NOW + 60)]


def test_deleting_an_experiment_hides_its_runs_until_restored(store: Store) -> None:
    """The newest of run and experiment lifecycle wins."""
    put(store, [created(), started("r"), started("s")])
    put(store, [("run_updated", {"run_id": "s", "lifecycle_stage": "deleted", **version(NOW + 1)})], 5)

    def stage(value: str, time: int) -> Event:
        return "experiment_updated", {"experiment_id": "5", "lifecycle_stage": value, **version(time)}

    def stages() -> list[tuple[Any, ...]]:
        return store.rows("SELECT run_id, lifecycle_stage FROM runs ORDER BY run_id")

    assert stages() == [("r", "active"), ("s", "deleted")]
    put(store, [stage("deleted", NOW + 2)], 6)
    assert stages() == [("r", "deleted"), ("s", "deleted")]
    put(store, [stage("active", NOW + 3)], 7)
    assert stages() == [("r", "active"), ("s", "active")]


def test_a_run_started_in_a_deleted_experiment_restores_it_with_a_tag(store: Store) -> None:
    """And says which run did it."""
    put(store, [created(), started("old")])
    put(store, [("experiment_updated", {"experiment_id": "5", "lifecycle_stage": "deleted", **version(NOW + 5)})], 5)
    query = "SELECT lifecycle_stage, tags['runstream.restored_by'] FROM experiments WHERE experiment_id = '5'"
    assert store.rows(query) == [("deleted", "")]
    put(store, [started("new", time_ms=NOW + 6)], 6)
    assert store.rows(query) == [("active", "new")]
    assert store.rows("SELECT run_id FROM runs WHERE lifecycle_stage = 'active' ORDER BY run_id") == [
        ("new",),
        ("old",),
    ]


def test_a_purge_is_permanent_also_for_late_journals(store: Store) -> None:
    """No view shows the run again, whatever arrives."""
    put(store, [created(), started("r"), points("r", [1.0])])
    put(store, [("purged", {"kind": "run", "id": "r", **version(NOW + 5)})], 5)
    late: list[Event] = [
        started("r", time_ms=NOW + 9),
        points("r", [2.0], first_step=5, first_seq=9),
        ("params", {"run_id": "r", "keys": ["a"], "values": ["b"], **version(NOW + 9)}),
        ("run_tags", {"run_id": "r", "keys": ["a"], "values": ["b"], **version(NOW + 9)}),
        ("artifact_logged", {"run_id": "r", "path": "a", "size_bytes": 1, **version(NOW + 9)}),
        (
            "input_logged",
            {"run_id": "r", "name": "a", "digest": "b", "source_type": "", "source": "", **version(NOW + 9)},
        ),
    ]
    put(store, late, 6)
    for view in REQUIRED:
        if view != "experiments":
            assert store.rows(f"SELECT * FROM {view}") == [], view


def test_an_experiment_used_again_after_its_purge_is_a_new_one(store: Store) -> None:
    """Name, tags, stage and artifact root of before are gone; runs of before stay away, late ones too."""
    put(
        store,
        [
            created("5", "old name", artifact_uri="s3://old/root"),
            (
                "experiment_updated",
                {"experiment_id": "5", "name": "renamed", "lifecycle_stage": "deleted", **version(NOW + 1)},
            ),
            ("experiment_tags", {"experiment_id": "5", "keys": ["t"], "values": ["old"], **version(NOW + 1)}),
        ],
    )
    put(store, [("purged", {"kind": "experiment", "id": "5", **version(NOW + 5)})], 5)
    query = "SELECT name, lifecycle_stage, tags FROM experiments WHERE experiment_id = '5'"
    assert store.rows(query) == []
    put(store, [started("late", time_ms=NOW + 2)], 6)
    assert store.rows(query) == []
    assert store.rows("SELECT * FROM runs") == []
    put(
        store,
        [created("5", "old name", artifact_uri="s3://new/root", time_ms=NOW + 9), started("new", time_ms=NOW + 9)],
        7,
    )
    assert store.rows("SELECT name, lifecycle_stage, artifact_uri FROM experiments WHERE experiment_id = '5'") == [
        ("old name", "active", "s3://new/root")
    ]
    assert store.rows("SELECT length(tags) FROM experiments WHERE experiment_id = '5'") == [(0,)]
    assert store.rows("SELECT run_id, experiment_name, lifecycle_stage FROM runs") == [("new", "old name", "active")]


def test_artifact_uris_move_with_the_store(store: Store) -> None:
    """Relative ones take the store's artifact root, full URLs stay."""
    store.execute("INSERT INTO settings (name, value, updated_at) SELECT 'artifact_root', 'file:///here', now64(3)")
    put(store, [created(), started("r"), started("s", artifact_uri="s3://bucket/x")])
    assert store.rows("SELECT run_id, artifact_uri FROM runs ORDER BY run_id") == [
        ("r", "file:///here/5/r/artifacts"),
        ("s", "s3://bucket/x"),
    ]
    assert store.rows("SELECT artifact_uri FROM experiments WHERE experiment_id = '5'") == [("file:///here/5",)]
