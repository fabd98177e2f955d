"""What a reader gives: entities, lifecycles, histories, listings and SQL, through a real local store process."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import pytest

from runstream.entities import FileInfo, Metric, ViewType
from runstream.errors import InvalidInputError, NotFoundError
from runstream_query import (
    ExperimentNotFound,
    InvalidQuery,
    Limits,
    QueryTimeout,
    Reader,
    RunNotFound,
    SqlError,
    runs_to_dataframe,
)
from tests.query.logged import Logged


@pytest.fixture(scope="module")
def experiment(logged: Logged) -> str:
    """One experiment with one run whose every fact is set."""
    found = logged.experiment("vision", created_at=5_000, tags={"team": "a", "gone": "x"})
    logged.event("experiment_tags", found, experiment_id=found, keys=[], values=[], deleted_keys=["gone"])
    logged.run(
        "full",
        found,
        name="first",
        started_at=10_000,
        status="FINISHED",
        ended_at=20_000,
        params={"lr": "0.1"},
        tags={"mlflow.runName": "first", "dropped": "x"},
        metrics={"loss": 2.0, "nan": math.nan},
        parent="mother",
    )
    logged.points("full", "loss", [(2, 12_000, 0.5), (1, 11_000, 1.0)])
    logged.event("run_tags", "full", run_id="full", keys=[], values=[], deleted_keys=["dropped"])
    logged.event("params", "full", run_id="full", keys=["lr"], values=["0.2"])
    logged.event("run_updated", "full", run_id="full", name="second")
    logged.event(
        "input_logged",
        "full",
        run_id="full",
        name="digits",
        digest="d1",
        source_type="local",
        source="{}",
        schema="",
        profile='{"rows": 3}',
        context="train",
        tags={"kind": "small"},
    )
    for path in ("model/MLmodel", "model/data/weights.bin", "report.txt"):
        logged.event("artifact_logged", "full", run_id="full", path=path, size_bytes=len(path))
    logged.send()
    return found


def test_run(reader: Reader, experiment: str, logged: Logged) -> None:
    """A run comes with all that was logged; the first param wins, the last tag and name."""
    run = reader.get_run("full")
    info = run.info
    assert (info.run_id, info.experiment_id, info.run_name, info.user_id) == ("full", experiment, "second", "ann")
    assert (info.status, info.start_time, info.end_time, info.lost) == ("FINISHED", 10_000, 20_000, False)
    assert info.artifact_uri == f"file://{logged.root}/artifacts/{experiment}/full/artifacts"
    assert (info.parent_run_id, info.source_name, info.source_version) == ("mother", "train.py", "abc")
    assert run.data.params == {"lr": "0.1"}
    assert run.data.tags == {"mlflow.runName": "first"}
    assert run.data.metrics["loss"] == 0.5 and math.isnan(run.data.metrics["nan"])
    (used,) = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest, used.dataset.schema) == ("digits", "d1", None)
    assert used.dataset.profile == '{"rows": 3}'
    assert {tag.key: tag.value for tag in used.tags} == {"mlflow.data.context": "train", "kind": "small"}


def test_experiment(reader: Reader, experiment: str) -> None:
    """An experiment is found by id and by name, with its tags; Default is always there."""
    found = reader.get_experiment(experiment)
    assert (found.name, found.tags, found.creation_time) == ("vision", {"team": "a"}, 5_000)
    assert reader.get_experiment_by_name("vision") == found
    assert reader.get_experiment_by_name("unknown") is None
    assert reader.get_experiment("0").name == "Default"
    assert [each.name for each in reader.search_experiments(filter_string="tags.team = 'a'")] == ["vision"]
    assert [each.name for each in reader.search_experiments(filter_string="name ILIKE 'VIS%'")] == ["vision"]
    assert reader.search_experiments(filter_string="tags.gone IS NOT NULL") == []


def test_experiments_page_by_page(reader: Reader, logged: Logged) -> None:
    """Experiments come the newest first, in pages that join to the whole."""
    names = [f"paged{number}" for number in range(5)]
    for number, name in enumerate(names):
        logged.experiment(name, created_at=50_000 + number)
    logged.send()
    found, token = [], None
    while True:
        page = reader.search_experiments(max_results=2, filter_string="name LIKE 'paged%'", page_token=token)
        found += [each.name for each in page]
        token = page.token
        if token is None:
            break
    assert found == names[::-1]


def test_what_is_not_there(reader: Reader) -> None:
    """A run or experiment that does not exist is named in the error; a metric that does not is empty."""
    with pytest.raises(RunNotFound, match="'nobody'"):
        reader.get_run("nobody")
    with pytest.raises(ExperimentNotFound, match="'77'"):
        reader.get_experiment("77")
    with pytest.raises(NotFoundError):
        reader.get_run("")
    assert reader.metric_history("nobody", "loss") == []
    assert reader.list_artifacts("nobody") == []


def test_deleted_and_restored(reader: Reader, logged: Logged) -> None:
    """View types follow the newest lifecycle of run and experiment."""
    experiment = logged.experiment("stages")
    for name in ("kept", "dropped", "back"):
        logged.run(f"stage-{name}", experiment)
    for name, stage in (("dropped", "deleted"), ("back", "deleted"), ("back", "active")):
        logged.event("run_updated", f"stage-{name}", run_id=f"stage-{name}", lifecycle_stage=stage)
    logged.send()

    def seen(view: ViewType) -> set[str]:
        return {run.info.run_id for run in reader.search_runs([experiment], run_view_type=view)}

    assert seen(ViewType.ACTIVE_ONLY) == {"stage-kept", "stage-back"}
    assert seen(ViewType.DELETED_ONLY) == {"stage-dropped"}
    assert seen(ViewType.ALL) == {"stage-kept", "stage-back", "stage-dropped"}
    assert reader.get_run("stage-dropped").info.lifecycle_stage == "deleted"
    assert len(reader.search_runs([experiment], "lifecycle_stage = 'deleted'", ViewType.ALL)) == 1

    logged.event("experiment_updated", experiment, experiment_id=experiment, lifecycle_stage="deleted")
    logged.send()
    assert seen(ViewType.ACTIVE_ONLY) == set()
    assert len(seen(ViewType.DELETED_ONLY)) == 3
    assert reader.get_experiment(experiment).lifecycle_stage == "deleted"
    assert "stages" not in [each.name for each in reader.search_experiments()]
    assert [each.name for each in reader.search_experiments(ViewType.DELETED_ONLY)] == ["stages"]

    logged.run("stage-new", experiment)  # restores the experiment
    logged.send()
    assert "stage-new" in seen(ViewType.ACTIVE_ONLY)
    assert reader.get_experiment(experiment).lifecycle_stage == "active"


def test_purged_runs_are_gone(reader: Reader, logged: Logged) -> None:
    """A purged run is in no answer, also when something of it arrives later."""
    experiment = logged.experiment("purging")
    for name in ("stays", "goes"):
        logged.run(f"purge-{name}", experiment, metrics={"m": 1.0}, params={"p": "1"})
    logged.send()
    assert len(reader.search_runs([experiment])) == 2
    logged.event("purged", "purge-goes", kind="run", id="purge-goes")
    logged.points("purge-goes", "m", [(5, 5, 5.0)])
    logged.send()
    assert [run.info.run_id for run in reader.search_runs([experiment], "metrics.m > 0")] == ["purge-stays"]
    with pytest.raises(RunNotFound):
        reader.get_run("purge-goes")
    assert reader.metric_history("purge-goes", "m") == []
    assert reader.metric_buckets(["purge-goes"], ["m"], 5) == {}
    assert reader.metric_points(["purge-goes"], ["m"], 5) == {}
    assert reader.latest_metrics(["purge-goes"]) == []


def test_raw_history(reader: Reader, experiment: str) -> None:
    """A raw history holds every point once, in the order of steps or of times, with its exact value."""
    expected = [Metric("loss", 2.0, 10_000, 0), Metric("loss", 1.0, 11_000, 1), Metric("loss", 0.5, 12_000, 2)]
    assert reader.metric_history("full", "loss") == expected
    assert reader.metric_history("full", "loss", first_step=1, last_step=1) == expected[1:2]
    assert math.isnan(reader.metric_history("full", "nan")[0].value)


def test_resent_points_come_once(reader: Reader, logged: Logged) -> None:
    """The same batch delivered twice is there once; two equal points of one run are there twice."""
    experiment = logged.experiment("resent")
    logged.run("resent", experiment)
    points = [(1, 100, 0.5), (1, 100, 0.5), (-3, 50, 7.0), (2**62, 60, -0.0)]
    logged.points("resent", "m", points)
    batch = list(logged._waiting)
    logged.send()
    logged.transport.send(batch).result(5.0)
    found = reader.metric_history("resent", "m")
    assert [(each.step, each.timestamp, each.value) for each in found] == sorted(points)
    by_time = reader.metric_history("resent", "m", order="time")
    assert [each.timestamp for each in by_time] == [50, 60, 100, 100]


def test_downsampling(reader: Reader, logged: Logged) -> None:
    """Buckets hold exact means and extremes; LTTB keeps both ends and a lone spike."""
    experiment = logged.experiment("charts")
    logged.run("chart", experiment)
    values = [math.sin(step / 50) + (100.0 if step == 777 else 0.0) for step in range(2_000)]
    values[5] = math.nan
    logged.points("chart", "m", [(step, 1_000 + step, value) for step, value in enumerate(values)])
    logged.points("chart", "one", [(4, 9, 2.5)])
    logged.send()
    found = reader.metric_buckets(["chart", "nobody"], ["m", "one", "none"], 20)
    assert found.keys() == {("chart", "m"), ("chart", "one")}
    assert [(b.count, b.mean, b.min, b.max) for b in found["chart", "one"]] == [(1, 2.5, 2.5, 2.5)]
    buckets = found["chart", "m"]
    assert len(buckets) == 20
    for number, bucket in enumerate(buckets):
        part = values[100 * number : 100 * (number + 1)]
        numbers = [value for value in part if not math.isnan(value)]
        assert (bucket.first_step, bucket.last_step, bucket.count) == (100 * number, 100 * number + 99, 100)
        assert bucket.mean == pytest.approx(sum(numbers) / len(numbers))
        assert (bucket.min, bucket.max, bucket.nan_count) == (min(numbers), max(numbers), 100 - len(numbers))
    points = reader.metric_points(["chart"], ["m"], 50)["chart", "m"]
    assert len(points) <= 50
    assert (points[0][0], points[-1][0]) == (0, 1_999)
    assert (777, values[777]) in points
    narrow = reader.metric_buckets(["chart"], ["m"], 10, first_step=770, last_step=779)["chart", "m"]
    assert [bucket.first_step for bucket in narrow] == list(range(770, 780))


@pytest.mark.parametrize("steps", [(-(1 << 63), (1 << 63) - 1), (0, 0), (-5, 5)])
def test_buckets_take_any_steps(reader: Reader, logged: Logged, steps: tuple[int, int]) -> None:
    """The whole range of 64 bits, a single step and negative ones fall into buckets without overflow."""
    run_id = f"steps{steps[0]}".replace("--", "-")
    logged.run(run_id, "0")
    logged.points(run_id, "m", [(steps[0], 1, 1.0), (steps[1], 2, 3.0)])
    logged.send()
    found = reader.metric_buckets([run_id], ["m"], 4)[run_id, "m"]
    assert sum(bucket.count for bucket in found) == 2
    assert (found[0].first_step, found[-1].last_step) == steps


def test_latest(reader: Reader, experiment: str) -> None:
    """The latest point of each metric, with extremes over all of its points."""
    found = {each.key: each for each in reader.latest_metrics(["full"])}
    loss = found["loss"]
    assert (loss.step, loss.timestamp, loss.value, loss.min, loss.max) == (2, 12_000, 0.5, 0.5, 2.0)
    assert math.isnan(found["nan"].value)
    assert [each.key for each in reader.latest_metrics(["full"], ["loss", "none"])] == ["loss"]


def test_artifacts(reader: Reader, experiment: str) -> None:
    """Listings show one level of folders, as they were logged."""
    assert reader.list_artifacts("full") == [FileInfo("model", True, None), FileInfo("report.txt", False, 10)]
    assert reader.list_artifacts("full", "model/") == [
        FileInfo("model/MLmodel", False, 13),
        FileInfo("model/data", True, None),
    ]
    assert reader.list_artifacts("full", "report.txt") == []
    for path in ("../x", "/etc", "a/../../b"):
        with pytest.raises(InvalidQuery):
            reader.list_artifacts("full", path)


def test_dataframe(reader: Reader, experiment: str) -> None:
    """Runs become a DataFrame with MLflow's columns and UTC times."""
    frame = runs_to_dataframe(reader.search_runs([experiment]))
    assert list(frame.columns[:6]) == ["run_id", "experiment_id", "status", "artifact_uri", "start_time", "end_time"]
    row = frame.iloc[0]
    assert (row["metrics.loss"], row["params.lr"], row["tags.mlflow.runName"]) == (0.5, "0.1", "first")
    assert row["end_time"].isoformat() == "1970-01-01T00:00:20+00:00"


def test_sql(reader: Reader, experiment: str) -> None:
    """SQL answers as rows, DataFrame or Arrow; values are bound by the store."""
    query = "SELECT run_id, status FROM runs WHERE run_id = {id:String}"
    assert reader.sql(query, {"id": "full"}, "rows") == [{"run_id": "full", "status": "FINISHED"}]
    assert reader.sql(query, {"id": "' OR 1 = 1 --"}, "rows") == []
    assert reader.sql(query, {"id": "full"}).to_dict("list") == {"run_id": ["full"], "status": ["FINISHED"]}
    assert reader.sql(query, {"id": "full"}, "arrow").to_pylist() == [{"run_id": "full", "status": "FINISHED"}]
    frame = reader.sql("SELECT step, value FROM metrics WHERE run_id = 'full' AND key = 'loss' ORDER BY step")
    assert frame["value"].tolist() == [2.0, 1.0, 0.5]
    assert reader.sql("SELECT 1 AS one WHERE 0", output_format="rows") == []


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda r: r.sql("SELECT nonsense FROM runs"), "nonsense"),
        (lambda r: r.sql("SELEC 1"), "Syntax error"),
        (lambda r: r.sql("INSERT INTO runs VALUES (1)"), "read"),
        (lambda r: r.sql("DROP TABLE points"), "read"),
        (lambda r: r.sql("SELECT 1; SELECT 2"), "one statement"),
        (lambda r: r.sql("SELECT file('/etc/passwd')"), "file"),
        (lambda r: r.sql("SELECT number FROM numbers(100)", limits=Limits(max_rows=5), output_format="rows"), "rows"),
    ],
)
def test_sql_errors(reader: Reader, call: Callable[[Reader], object], expected: str) -> None:
    """SQL that the store refuses is an error with its message and code, without the driver's noise."""
    with pytest.raises(SqlError) as caught:
        call(reader)
    assert expected in str(caught.value)
    assert caught.value.code
    assert "http://" not in str(caught.value)
    assert isinstance(caught.value, InvalidInputError)


@pytest.mark.parametrize(
    "arguments",
    [
        {"query": ""},
        {"query": 5},
        {"query": "SELECT '\ud800'"},
        {"query": "SELECT 1", "parameters": {"unused": "x"}},
        {"query": "SELECT {id:String}"},
        {"query": "SELECT {id:String}", "parameters": {"other": "x"}},
        {"query": "SELECT 1", "parameters": ["x"]},
        {"query": "SELECT 1", "output_format": "json"},
        {"query": "SELECT 1", "limits": Limits(max_rows=0)},
    ],
)
def test_wrong_sql_calls(reader: Reader, arguments: dict[str, object]) -> None:
    """Wrong use of `sql` is refused before the store is asked."""
    with pytest.raises(InvalidQuery):
        reader.sql(**arguments)  # type: ignore[arg-type]


def test_slow_sql_is_stopped(reader: Reader) -> None:
    """A query over its time limit ends with an error that says so."""
    with pytest.raises(QueryTimeout):
        reader.sql(
            "SELECT count() FROM numbers(1000000000000) WHERE sipHash64(number) = 1", limits=Limits(max_seconds=0.3)
        )


@pytest.mark.parametrize("buckets", [0, -1, 10**9, "5", True, 2.5])
def test_wrong_buckets(reader: Reader, buckets: object) -> None:
    """A number of buckets that is none is refused."""
    for call in (reader.metric_buckets, reader.metric_points):
        with pytest.raises(InvalidQuery, match="expected a whole number"):
            call(["full"], ["loss"], buckets)  # type: ignore[arg-type]


def test_threads_share_a_reader(reader: Reader, experiment: str) -> None:
    """Many threads read at once, each its own answer."""
    failures: list[BaseException] = []

    def read(number: int) -> None:
        try:
            for _ in range(5):
                rows = reader.sql(
                    "SELECT {n:Int64} AS n, run_id FROM runs WHERE run_id = 'full'", {"n": number}, "rows"
                )
                assert rows == [{"n": number, "run_id": "full"}]
                assert reader.get_run("full").info.run_name == "second"
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)


def test_an_experiment_is_what_the_view_says(reader: Reader, logged: Logged, experiment: str) -> None:
    """One experiment by id or name, read directly, equals its row of the public view; deleted and purged ones too."""
    again = logged.experiment("purged and used again")
    logged.event("purged", again, kind="experiment", id=again)
    logged.run("after-the-purge", again)
    gone = logged.experiment("purged for good")
    logged.event("purged", gone, kind="experiment", id=gone)
    logged.send()
    with pytest.raises(ExperimentNotFound):
        reader.get_experiment(gone)
    assert reader.get_experiment(again).lifecycle_stage == "active"
    assert reader.get_experiment_by_name("purged for good") is None
    every = reader.search_experiments(ViewType.ALL)
    assert len(every) > 1
    for each in every:
        assert reader.get_experiment(each.experiment_id) == each
        named = [other for other in every if other.name == each.name]
        assert reader.get_experiment_by_name(each.name) in named


def test_buckets_of_one_long_series(reader: Reader, logged: Logged) -> None:
    """At most as many buckets as asked for hold every point once, in order; times come where they are asked for."""
    logged.run("wide", "0")
    logged.points("wide", "m", [(3 * number - 500, 1_000 + number, float(number)) for number in range(1_000)])
    logged.send()
    found = reader.metric_buckets(["wide"], ["m"], 7)["wide", "m"]
    timed = reader.metric_buckets(["wide"], ["m"], 7, timestamps=True)["wide", "m"]
    assert len(found) == 7
    assert [bucket.count for bucket in found] == [bucket.count for bucket in timed]
    assert sum(bucket.count for bucket in found) == 1_000
    following = 0
    for bucket, with_times in zip(found, timed, strict=True):
        first, last = following, following + bucket.count - 1
        following = last + 1
        assert (bucket.first_step, bucket.last_step) == (3 * first - 500, 3 * last - 500)
        assert (bucket.min, bucket.max, bucket.mean) == (first, last, (first + last) / 2)
        assert bucket.first_timestamp is bucket.last_timestamp is None
        assert (with_times.first_timestamp, with_times.last_timestamp) == (1_000 + first, 1_000 + last)


def test_points_of_one_long_series(reader: Reader, logged: Logged) -> None:
    """Few points of many keep both ends and a single spike, are real, in order, and leave out what is no number."""
    experiment = logged.experiment("long points")
    logged.run("longpoints", experiment)
    series = {step: (math.sin(step / 5_000), step) for step in range(-20_000, 20_000)}
    series[-20_000] = (0.25, 7)
    series[123] = (50.0, 8)
    series[124] = (math.nan, 9)
    series[19_999] = (math.nan, 9)
    series[-5_000] = (-math.inf, 9)
    items = [(step, 100_000 + at, value) for step, (value, at) in series.items()]
    for first in range(0, len(items), 10_000):
        logged.points("longpoints", "m", items[first : first + 10_000])
    logged.send()
    found = reader.metric_points(["longpoints"], ["m"], 50)["longpoints", "m"]
    assert len(found) == 50
    assert found[0] == (-20_000, 0.25)
    assert found[-1] == (19_998, series[19_998][0])
    assert (123, 50.0) in found
    assert all(value == series[step][0] for step, value in found)
    assert [step for step, _ in found] == sorted({step for step, _ in found})
    part = reader.metric_points(["longpoints"], ["m"], 10, first_step=0, last_step=15_000)["longpoints", "m"]
    assert (part[0][0], part[-1][0], len(part)) == (0, 15_000, 10)
    logged.points("longpoints", "nothing", [(step, 1, math.nan) for step in (0, 1_000_000)])
    logged.send()
    assert reader.metric_points(["longpoints"], ["nothing"], 10) == {}


@pytest.mark.parametrize("extra", ["", "".join(map(chr, range(32)))])
def test_large_lists_reach_the_store_as_they_are(reader: Reader, extra: str) -> None:
    """A list too large for the URL arrives whole, whatever its elements hold, and costs no more than its size."""
    values = ["", "a,b", "') --", "\\", "{c:String}", "äöü", *(f"{number:064x}" for number in range(500)), extra]
    assert reader.rows("SELECT {c:Array(String)}", {"c": values}) == [(values,)]
    assert reader.rows("SELECT {c:Array(String)}", {"c": ["x" * 20_000]}) == [(["x" * 20_000],)]


def test_many_runs_are_the_same_runs(reader: Reader, logged: Logged, experiment: str) -> None:
    """Runs read by the hundred, in a way of their own, equal those read one by one; deleted and purged ones too."""
    many = logged.experiment("many")
    ids = [f"many{number:04}" for number in range(130)]
    for number, run_id in enumerate(ids):
        logged.run(run_id, many, params={"n": str(number)}, tags={"t": "x"}, metrics={"loss": float(number)})
        if number % 3 == 0:
            logged.points(run_id, "loss", [(5, 1_000, math.nan if number % 2 else 7.5), (4, 9_000, 1.0)])
            logged.event("run_tags", run_id, run_id=run_id, keys=[], values=[], deleted_keys=["t"])
            logged.event("params", run_id, run_id=run_id, keys=["n"], values=["later"])
        if number % 4 == 0:
            logged.event("run_updated", run_id, run_id=run_id, status="FINISHED", ended_at=5, name="renamed")
        if number % 5 == 0:
            logged.event("run_updated", run_id, run_id=run_id, lifecycle_stage="deleted")
    logged.event("purged", ids[7], kind="run", id=ids[7])
    logged.send()
    wanted = [*reversed(ids), "full", "nowhere"]
    together = reader.get_runs(wanted)
    assert [run.info.run_id for run in together] == [each for each in wanted[:-1] if each != ids[7]]
    alone = [reader.get_run(run.info.run_id) for run in together]
    assert repr(together) == repr(alone)  # NaN equals itself here
    assert any(run.info.lifecycle_stage == "deleted" for run in together)
