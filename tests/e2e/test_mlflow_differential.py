"""The same requests to MLflow's own server and to ours; the answers must be the same.

Status, error code, message and body are compared, after ids, times and random names have got shared names
(`mlflow_pair`). What differs on purpose is listed in deploy/server.md and is not asked here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import pytest

pytest.importorskip("mlflow", reason="needs MLflow: pip install -e '.[dev]'")
pytest.importorskip("fastapi", reason="needs the server: pip install 'runstream[server]'")

from tests.e2e.mlflow_pair import API, Pair, mlflow_server
from tests.e2e.mlflow_server import served

pytestmark = pytest.mark.timeout(600)
AJAX = "/ajax-api/2.0/mlflow"
PROXY = "/api/2.0/mlflow-artifacts/artifacts"
LONG = "k" * 251


def _first_difference(theirs: Any, ours: Any, place: str = "$") -> tuple[str, Any, Any]:
    """Where two answers differ first, and what stands there."""
    if isinstance(theirs, dict) and isinstance(ours, dict) and theirs.keys() == ours.keys():
        for key, value in theirs.items():
            if value != ours[key]:
                return _first_difference(value, ours[key], f"{place}.{key}")
    if isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        for index, value in enumerate(theirs):
            if value != ours[index]:
                return _first_difference(value, ours[index], f"{place}[{index}]")
    return place, theirs, ours


def _opening(error: Any) -> str:
    """The words of an error before the first thing that it quotes or lists."""
    return re.split("[:'\"`\n]", error["message"])[0].strip()


class Same:
    """Asks both servers and remembers where they disagree."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.asked = 0
        self.differences: list[str] = []

    def __call__(
        self, method: str, path: str, body: Any = None, *, message: bool | Literal["opening"] = True, **options: Any
    ) -> None:
        """`message`: the words of an error are compared too, or only how it opens; `options` as for `Pair.both`."""
        theirs, ours = self.pair.both(method, path, body, **options)
        self.asked += 1
        mine, other = ours.body, theirs.body
        if message is not True and theirs.code and ours.code:
            mine, other = ours.code, theirs.code
            if message == "opening":
                mine, other = (mine, _opening(ours.body)), (other, _opening(theirs.body))
        if (theirs.status, other) != (ours.status, mine):
            asked = "..." if isinstance(body, bytes) else json.dumps(body)[:200]
            place, expected, found = _first_difference(theirs.body, ours.body)
            self.differences.append(
                f"{method} {path} {asked} {options.get('query', '')}\n"
                f"    MLflow: {theirs.status} {place} {json.dumps(expected)[:400]}\n"
                f"    ours:   {ours.status} {place} {json.dumps(found)[:400]}"
            )

    def post(self, path: str, /, **body: Any) -> None:
        """A POST whose error messages are compared."""
        self("POST", path, body)

    def get(self, path: str, /, **query: Any) -> None:
        """A GET with these query parameters."""
        self("GET", path, query=query)

    def run(self, name: str, **fields: Any) -> None:
        """Make a run on both sides and call it `name`."""
        body = {"experiment_id": "$exp", "run_name": name, "start_time": 5, **fields}
        self("POST", "/runs/create", body, save={name: "run.info.run_id"})


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    with mlflow_server(folder / "theirs") as theirs, served(folder / "data") as ours:
        yield Pair(theirs, ours.url)


@pytest.fixture
def same(pair: Pair, request: pytest.FixtureRequest) -> Iterator[Same]:
    """A `Same` with an experiment `$exp` of this test's name."""
    found = Same(pair)
    found("POST", "/experiments/create", {"name": request.node.name}, save={"exp": "experiment_id"})
    yield found
    assert not found.differences, f"{len(found.differences)} of {found.asked}:\n" + "\n".join(found.differences)


def test_experiments(same):
    """Names, locations, tags, life cycle."""
    for name in ("", None, 5, "a" * 501, "x/y", "  ", "é☃"):
        same.post("/experiments/create", name=name)
    same.post("/experiments/create")
    same.post("/experiments/create", name="a", tags="5")
    same.post("/experiments/create", name="a", artifact_location=9.0)
    same.post("/experiments/create", name="a2", tags=[{"key": LONG, "value": "5"}])
    same.post("/experiments/create", name="a3", tags=[{"key": "k", "value": "v" * 20_001}])
    same.post("/experiments/create", name="a4", tags=[{"key": "../k", "value": "v"}])
    same("POST", "/experiments/create", {"name": "taken"}, save={"taken": "experiment_id"})
    same("POST", "/experiments/create", {"name": "taken"}, message=False)
    places = ["file:///tmp/zz", "/tmp/zz", "mlflow-artifacts:/abc", "s3://u:p@b/x"]
    for number, place in enumerate(places):
        body = {"name": f"at {number}", "artifact_location": place}
        same("POST", "/experiments/create", body, save={f"at{number}": "experiment_id"})
        same.get("/experiments/get", experiment_id=f"$at{number}")
        run = {"experiment_id": f"$at{number}", "run_name": "n", "start_time": 5}
        same("POST", "/runs/create", run, save={f"run{number}": "run.info.run_id"})
        same.get("/runs/get", run_id=f"$run{number}")
    for place in (
        "runs:/x",
        "s3://b/x#f",
        "/tmp/x;y",
        "s3://b/x?y=..",
        "s3://b/" + "x" * 2_100,
        "http://h/a",
        "ftp://h/x",
    ):
        same("POST", "/experiments/create", {"name": "bad", "artifact_location": place}, message=False)
    same.get("/experiments/get", experiment_id="$exp")
    for wrong in ("", "abc", "12345678", "-1", "1.5"):
        same.get("/experiments/get", experiment_id=wrong)
    same.get("/experiments/get")
    same.get("/experiments/get-by-name", experiment_name="taken")
    same.get("/experiments/get-by-name", experiment_name="nope")
    same.get("/experiments/get-by-name")
    for key, value in (
        ("k", "v"), ("k", "w"),
        ("", "v"), (None, "v"), ("k", None), ("k", 5), (LONG, "v"), ("k" * 250, "v"), ("k", "v" * 20_001),
        ("../a", "v"), ("a//b", "v"), ("é", "v"), ("a$b", "v"), ("/a", "v"), (".", "v"), ("a/./b", "v"),
        ("multi", "a\nb"),
    ):  # fmt: skip
        same.post("/experiments/set-experiment-tag", experiment_id="$exp", key=key, value=value)
    same.post("/experiments/set-experiment-tag", experiment_id="123456", key="a", value="b")
    same.post("/experiments/set-experiment-tag", experiment_id=5, key="a", value="b")
    same.get("/experiments/get", experiment_id="$exp")
    for identity, key in (("$exp", "k"), ("$exp", "k"), ("$exp", None), ("1234567", "k")):
        same.post("/experiments/delete-experiment-tag", experiment_id=identity, key=key)
    for new_name in ("", None, "b" * 501, "renamed"):
        same.post("/experiments/update", experiment_id="$exp", new_name=new_name)
    same.post("/experiments/update", experiment_id="1234567", new_name="exp7")
    same.get("/experiments/get", experiment_id="$exp")


def test_deleted_experiments(same):
    """What is refused in a deleted experiment, and what its runs become."""
    same.run("kept")
    same.run("gone")
    same.post("/runs/delete", run_id="$gone")
    same.post("/experiments/restore", experiment_id="$exp")
    same.post("/experiments/delete", experiment_id="$exp")
    same.post("/experiments/delete", experiment_id="$exp")
    same.get("/experiments/get", experiment_id="$exp")
    same.get("/runs/get", run_id="$kept")
    same.post("/experiments/update", experiment_id="$exp", new_name="zzz")
    same.post("/experiments/set-experiment-tag", experiment_id="$exp", key="a", value="b")
    same.post("/experiments/delete-experiment-tag", experiment_id="$exp", key="b")
    same.post("/runs/create", experiment_id="$exp")
    same.post("/runs/log-metric", run_id="$kept", key="a", value=1, timestamp=1)
    same.post("/experiments/restore", experiment_id="$exp")
    same.get("/runs/get", run_id="$kept")
    same.get("/runs/get", run_id="$gone")
    for operation in ("delete", "restore"):
        for identity in ("123456", None, "x"):
            same.post(f"/experiments/{operation}", experiment_id=identity)


def test_experiment_searches(same):
    """Filters, orders, view types, page sizes and pages."""
    for number, name in enumerate(("a", "ab", "Abc", "sq'x", 'dq"x', "us_x")):
        tags = [{"key": "key", "value": name}, {"key": "group", "value": "s"}, {"key": "sp ace", "value": "z"}]
        same("POST", "/experiments/create", {"name": "S" + name, "tags": tags}, save={f"s{number}": "experiment_id"})
    same.post("/experiments/delete", experiment_id="$s1")
    base = "tags.group = 's'"
    for text in (
        base, f"{base} and name = 'Sa'", f"{base} AND attribute.name = 'Sa'", f"{base} and `name` LIKE 'Sa%'",
        f"{base} AND name ILIKE 'sa%'", "tag.key = 'a'", "tags.`key` = 'a'", 'tags."key" = "a"', "tags.key != 'a'",
        "tag.key ILIKE '%A%'", "tags.key LIKE 'us_x'", 'tags.key = "sq\'x"', "tags.key = 'dq\"x'",
        "tags.`sp ace` = 'z'", f"{base} and tags.zz IS NULL", f"tags.key IS NOT NULL and {base}",
        f"creation_time > 0 and {base}", f"last_update_time >= 5 AND {base}", f"name != 'Sa' AND {base}",
    ):  # fmt: skip
        same.post("/experiments/search", max_results=100, filter=text, order_by=["name"])
    for text in (
        "name = Sa", "name", "name =", "= 'x'", "name > 'x'", "creation_time = 'x'", "foo = 'x'", "metrics.a > 1",
        "params.a = 'x'", "name = 5", "tags.a = 5", "a.b.c = 'x'", "name == 'Sa'", "-- x", "name = 'x'; drop",
    ):  # fmt: skip
        same("POST", "/experiments/search", {"max_results": 100, "filter": text}, message="opening")
    for order in (
        ["name"], ["name DESC"], ["name desc"], ["attribute.name"], ["creation_time"], ["last_update_time DESC"],
        ["name DESC", "creation_time"], ["`name`"],
    ):  # fmt: skip
        same.post("/experiments/search", max_results=100, filter=base, order_by=order)
    for bad in (["foo"], ["name foo"], [""], ["name , creation_time"], ["metrics.a"], ["name ASC DESC"]):
        same("POST", "/experiments/search", {"max_results": 100, "filter": base, "order_by": bad}, message="opening")
    for view in ("ACTIVE_ONLY", "DELETED_ONLY", "ALL", 1, 2, 3, "1", None):
        same.post("/experiments/search", max_results=100, filter=base, order_by=["name"], view_type=view)
    for count in (0, -1, 1, "2", 50_000, 50_001, None, 2.0):
        same.post("/experiments/search", max_results=count, filter=base)
    same.post("/experiments/search")
    same("POST", "/experiments/search", {"max_results": 100, "page_token": "x"}, message=False)
    same.get("/experiments/search", max_results=10, filter=base, order_by=["name DESC"], view_type="ALL")
    page = {"max_results": 3, "filter": base, "order_by": ["name"]}
    same("POST", "/experiments/search", page, save={"token": "next_page_token"})
    same("POST", "/experiments/search", {**page, "page_token": "$token"})


def test_runs(same):
    """create, update, delete, restore; what a deleted run refuses."""
    tags = [
        {"key": "a", "value": "b"},
        {"key": "mlflow.user", "value": "w"},
        {"key": "mlflow.source.name", "value": "s"},
    ]
    same.run("r", user_id="u", start_time=456, tags=tags)
    same.get("/runs/get", run_id="$r")
    same.get("/runs/get", run_uuid="$r")
    for wrong in ({}, {"run_id": ""}, {"run_id": "nope"}):
        same.get("/runs/get", **wrong)
    fine = (
        {"start_time": "77"}, {"start_time": 2.0}, {"start_time": 1e3}, {"start_time": 0}, {"tags": None},
        {"run_name": "", "tags": [{"key": "mlflow.runName", "value": "tagged"}]}, {"run_name": "n" * 200},
        {"run_name": "x", "tags": [{"key": "mlflow.runName", "value": "x"}]}, {"run_name": "  "},
        {"unknown": {"a": 1}}, {"tags": [{"key": "k"}]}, {"tags": [{"key": "k", "value": "v", "more": 1}]},
        {"start_time": 9000000000000},
    )  # fmt: skip
    for number, fields in enumerate(fine):
        same.run(f"fine{number}", **fields)
    for fields in (
        {"experiment_id": 5}, {"experiment_id": "x"}, {"experiment_id": "999999"}, {"run_name": 5},
        {"start_time": "x"}, {"run_name": "x", "tags": [{"key": "mlflow.runName", "value": "y"}]},
    ):  # fmt: skip
        same.post("/runs/create", **{"experiment_id": "$exp", **fields})
    for change in (
        {"status": "FINISHED", "end_time": 99}, {"status": 3, "end_time": 5}, {"status": "3"}, {"end_time": 0},
        {"end_time": "12"}, {"run_name": ""}, {"run_name": "renamed"}, {"run_name": 5}, {"status": "KILLED"},
        {"status": "FAILED", "end_time": 1000}, {}, {"status": None}, {"end_time": "x"},
    ):  # fmt: skip
        same.post("/runs/update", run_id="$r", **change)
        same.get("/runs/get", run_id="$r")
    same.post("/runs/update", run_uuid="$r", status="FINISHED", end_time=77)
    for wrong in ({"run_id": "nope"}, {"status": "FINISHED"}, {"run_id": 5}):
        same.post("/runs/update", **wrong)
    same.post("/runs/delete", run_id="$r")
    same.get("/runs/get", run_id="$r")
    same.post("/runs/delete", run_id="$r")
    dataset = {"name": "n", "digest": "d", "source_type": "s", "source": "s"}
    model = {"artifact_path": "a", "flavors": {}, "utc_time_created": "2020-01-01 00:00:00", "run_id": "r"}
    for path, body in (
        ("update", {"status": "FAILED"}), ("log-metric", {"key": "k", "value": 1, "timestamp": 1}),
        ("log-parameter", {"key": "k", "value": "1"}), ("set-tag", {"key": "k", "value": "1"}),
        ("delete-tag", {"key": "a"}), ("log-batch", {"tags": [{"key": "q", "value": "r"}]}),
        ("log-batch", {"metrics": []}), ("log-inputs", {"datasets": [{"dataset": dataset}]}),
        ("log-model", {"model_json": json.dumps(model)}),
    ):  # fmt: skip
        same.post(f"/runs/{path}", run_id="$r", **body)
    same.get("/artifacts/list", run_id="$r")
    same.get("/metrics/get-history", run_id="$r", metric_key="k")
    same.post("/runs/restore", run_id="$r")
    same.post("/runs/restore", run_id="$r")
    same.get("/runs/get", run_id="$r")
    for operation in ("delete", "restore"):
        same.post(f"/runs/{operation}", run_id="nope")
        same.post(f"/runs/{operation}")
    place = {"name": "query", "artifact_location": "s3://bucket/a?region=x"}
    same("POST", "/experiments/create", place, save={"query": "experiment_id"})
    same.run("in_query", experiment_id="$query")
    same(
        "POST", "/logged-models", {"experiment_id": "$query", "name": "m"}, save={"query_model": "model.info.model_id"}
    )


def test_params_and_tags(same):
    """Names, values, lengths, changes, deletions."""
    same.run("t")
    both = (
        ("k", "v"), ("k", "v"), ("k", "w"), ("", "v"), (None, "v"), ("e", ""), ("e", ""), ("e", "x"), ("k", None),
        ("k2", None), ("n", 5), (LONG, "v"), ("k" * 250, "v"), ("l", "v" * 6_001), ("l", "v" * 6_001),
        ("l", "v" * 6_000), ("../a", "v"), ("a//b", "v"), ("é", "v"), ("a$b", "v"), ("/a", "v"), (".", "v"),
        ("..", "v"), ("a/b", "v"), ("a/", "v"), ("a b:c-d.e_f", "v"), ("a\nb", "v"), ("u", "\u2603 snow"), (5, "v"),
        ("K", "v"), ("obj", {"a": 1}), ("b", True),
    )  # fmt: skip
    for key, value in both:
        same.post("/runs/log-parameter", run_id="$t", key=key, value=value)
        same.post("/runs/set-tag", run_id="$t", key=key, value=value)
    for key, value in (("mlflow.runName", "via tag"), ("mlflow.runName", ""), ("mlflow.note.content", "x" * 9_000)):
        same.post("/runs/set-tag", run_id="$t", key=key, value=value)
    for path in ("/runs/log-parameter", "/runs/set-tag"):
        same.post(path, run_id="$t", key="noval")
        same.post(path, run_uuid="$t", key="uu", value="1")
        same.post(path, key="uu", value="1")
        same.post(path, run_id="nope", key="uu", value="1")
        same.post(path, run_id=5, key="uu", value="1")
        same.post(path, runId="$t", run_id="$t", key="camel", value="1")
    same.get("/runs/get", run_id="$t")
    for fields in (
        {"run_id": "$t", "key": "k"}, {"run_id": "$t", "key": "k"}, {"run_id": "$t"}, {"run_id": "nope", "key": "k"},
        {"run_id": "$t", "key": "mlflow.runName"}, {"key": "e"},
    ):  # fmt: skip
        same.post("/runs/delete-tag", **fields)
    same.get("/runs/get", run_id="$t")


def test_metrics(same):
    """Numbers in all their spellings, names, histories and their pages."""
    same.run("m")
    for fields in (
        {}, {}, {"value": 2}, {"step": 5}, {"step": "7"}, {"step": -3}, {"step": 2.0}, {"step": None}, {"step": "x"},
        {"step": 2**63 - 1}, {"step": -(2**63)}, {"timestamp": "5"}, {"timestamp": 0}, {"timestamp": None},
        {"timestamp": 1e3}, {"value": "NaN", "key": "nan"}, {"value": "Infinity", "key": "inf"},
        {"value": "-Infinity", "key": "ninf"}, {"value": "1.5", "key": "str"},
        {"value": None}, {"value": "x"}, {"value": 1e308, "key": "big"}, {"value": 0, "key": "zero"},
        {"value": -0.0, "key": "zero"}, {"key": ""}, {"key": None}, {"key": 5}, {"key": LONG}, {"key": "k" * 250},
        {"key": "../a"}, {"key": "a//b"}, {"key": "é"}, {"key": "a$"}, {"key": "a b/c:d-e.f"}, {"run_id": None},
        {"run_id": "nope"}, {"run_id": 31}, {"run_id": ""}, {"unknown": 5}, {"model_id": 5},
        {"value": 0.1 + 0.2, "key": "f"}, {"value": ""}, {"step": ""},
        {"dataset_name": "d", "dataset_digest": "e", "key": "ds"},
    ):  # fmt: skip
        same.post("/runs/log-metric", **{"run_id": "$m", "key": "a", "value": 1, "timestamp": 1, **fields})
    same.post("/runs/log-metric", run_uuid="$m", key="uu", value=1, timestamp=1)
    same("POST", "/runs/log-metric", {"run_id": "$m", "key": "a", "value": 1, "timestamp": -1}, message=False)
    for raw in (b"", b"null", b'{"run_id": "x", "value": NaN}', b'{"run_id":"a","run_id":"b"}'):
        same("POST", "/runs/log-metric", raw, headers={"Content-Type": "application/json"})
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-8"):
        same("POST", "/runs/log-metric", b"{}", headers={"Content-Type": kind})
    same.get("/runs/get", run_id="$m")
    for key in ("a", "nan", "inf", "ninf", "str", "zero", "none", "f", "big"):
        same.get("/metrics/get-history", run_id="$m", metric_key=key)
    for query in (
        {"metric_key": "a"}, {"run_id": "$m"}, {"run_id": "nope", "metric_key": "a"},
        {"run_id": "$m", "metric_key": ""}, {"run_id": "$m", "metric_key": "a", "max_results": 2},
        {"run_id": "$m", "metric_key": "a", "max_results": 0}, {"run_id": "$m", "metric_key": "a", "max_results": -1},
        {"run_id": "$m", "metric_key": "a", "page_token": "x"}, {"run_uuid": "$m", "metric_key": "a"},
        {"run_id": "$m", "metric_key": "a", "max_results": 99_999},
        {"run_id": "$m", "metric_key": "a", "page_token": "eyJvZmZzZXQiOiAyfQ=="},
    ):  # fmt: skip
        same.get("/metrics/get-history", **query)


def test_the_latest_value(same):
    """The largest step counts, then the largest time, then the largest value."""
    same.run("l")
    for value, timestamp, step in ((1, 1, 1), (2, 5, 0), (3, 1, 1), (0, 2, 1), (9, 2, 1), (-5, 2, 1)):
        same.post("/runs/log-metric", run_id="$l", key="q", value=value, timestamp=timestamp, step=step)
        same.get("/runs/get", run_id="$l")
    same.get("/metrics/get-history", run_id="$l", metric_key="q")


def test_batches(same):
    """Limits, missing fields, repeated and changed params; a refused batch changes nothing."""
    same.run("b")
    point, many = (
        {"key": "a", "value": 1, "timestamp": 1},
        [{"key": f"x{number}", "value": "1"} for number in range(101)],
    )
    for fields in (
        {}, {"run_id": None}, {"run_id": "nope"}, {"run_id": 5}, {"run_id": ""}, {"metrics": "foo"},
        {"params": "foo"}, {"tags": "foo"}, {"metrics": [{"key": "mae", "value": 2.5}]},
        {"metrics": [{"key": "mae", "timestamp": 1}]}, {"metrics": [{"value": 1, "timestamp": 1}]},
        {"metrics": [{"key": "", "value": 1, "timestamp": 1}]}, {"metrics": [point]}, {"metrics": [point, point]},
        {"metrics": [{**point, "step": "3"}]}, {"metrics": [{**point, "value": "NaN", "key": "nan"}]},
        {"metrics": [{**point, "value": "Infinity", "key": "up"}]}, {"metrics": [{**point, "value": None}]},
        {"metrics": [{**point, "key": "../x"}]}, {"metrics": [{**point, "key": LONG}]}, {"metrics": [point] * 1_000},
        {"metrics": [point] * 1_001}, {"metrics": [{**point, "unknown": 1}]},
        {"params": [{"key": "p", "value": "1"}]}, {"params": [{"key": "p", "value": "1"}]},
        {"params": [{"key": "p", "value": "2"}]}, {"params": [{"key": "q", "value": "1"}] * 2},
        {"params": [{"key": "r"}]}, {"params": [{"value": "r"}]}, {"params": [{"key": "", "value": "x"}]},
        {"params": [{"key": "l", "value": "v" * 6_001}]}, {"params": [{"key": LONG, "value": "v"}]},
        {"params": [{"key": "../x", "value": "v"}]}, {"params": many}, {"params": many[:100]},
        {"tags": [{"key": "t", "value": "1"}, {"key": "t", "value": "2"}]}, {"tags": [{"key": "t"}]},
        {"tags": [{"value": "t"}]}, {"tags": [{"key": "mlflow.runName", "value": "bn"}]},
        {"tags": [{"key": "l", "value": "v" * 8_001}]}, {"tags": [{"key": LONG, "value": "v"}]}, {"tags": many},
        {"tags": many[:100], "params": many[:100], "metrics": [{**point, "step": step} for step in range(801)]},
        {"params": [{"key": "p", "value": "9"}, {"key": "new", "value": "9"}]},
        {"params": [{"key": "p1", "value": "1"}, {"key": "p", "value": "9"}, {"key": "x1", "value": "8"}]},
        {"metrics": [{**point, "step": 1.0}]}, {"params": [{"key": "é☃", "value": "1"}]},
    ):  # fmt: skip
        same.post("/runs/log-batch", **{"run_id": "$b", **fields})
    same.get("/runs/get", run_id="$b")
    same.get("/metrics/get-history", run_id="$b", metric_key="a")


def test_histories_of_several_runs(same):
    """In bulk, and sampled by MLflow's own rule."""
    for name, count in (("b1", 10), ("b2", 20), ("b3", 0)):
        same.run(name)
        points = [(1, 2, 10), (1, 3, 11), (1, 3, 12), (2, 3, 12)] if count else []
        metrics = [{"key": "A", "timestamp": t, "step": s, "value": v} for t, s, v in points]
        metrics += [{"key": "S", "timestamp": 1, "step": step, "value": step} for step in range(count)]
        same.post("/runs/log-batch", run_id=f"${name}", metrics=metrics)
    bulk = f"{AJAX}/metrics/get-history-bulk"
    for query in (
        {"metric_key": "k"}, {"run_id": [], "metric_key": "k"},
        {"run_id": [f"i{n}" for n in range(101)], "metric_key": "k"}, {"run_id": ["$b1"]},
        {"run_id": ["$b1"], "metric_key": "A"}, {"run_id": ["$b1"], "metric_key": "A", "max_results": 2},
        {"run_id": ["nope"], "metric_key": "A"}, {"run_id": ["$b1"], "metric_key": ""},
    ):  # fmt: skip
        same.get(bulk, **query)
    sampled = {"run_ids": ["$b1"], "metric_key": "S"}
    for query in (
        {"metric_key": "k"}, {"run_ids": [f"i{n}" for n in range(101)], "metric_key": "k"},
        {**sampled, "max_results": 0}, {**sampled, "max_results": 2_501}, {**sampled, "metric_key": ""},
        {"run_ids": ["1"], "max_results": 5}, {**sampled, "start_step": 1, "end_step": 0},
        {**sampled, "start_step": 1}, {**sampled, "end_step": 1}, {**sampled, "max_results": 5},
        {**sampled, "max_results": 5, "start_step": 0, "end_step": 4},
        {**sampled, "max_results": 3, "start_step": 1, "end_step": 7},
        {**sampled, "run_ids": ["$b1", "$b2"], "max_results": 5},
        {**sampled, "run_ids": ["$b2", "$b1", "$b3"], "max_results": 7}, sampled, {**sampled, "max_results": 1},
        {"run_ids": ["$b2"], "metric_key": "S", "max_results": 2}, {**sampled, "metric_key": "none"},
    ):  # fmt: skip
        same.get(f"{AJAX}/metrics/get-history-bulk-interval", **query)
    again = [{"key": "S", "timestamp": 2, "step": step, "value": step} for step in range(10)]
    same.post("/runs/log-batch", run_id="$b1", metrics=again)
    same.get(f"{AJAX}/metrics/get-history-bulk-interval", **sampled, max_results=5)


def test_run_searches(same):
    """MLflow's search language, orders, view types, page sizes, experiments."""
    rows: list[dict[str, Any]] = [
        {"m": 0.1, "p": "1", "t": "x", "status": "FINISHED"}, {"m": 0.5, "p": "10", "t": "X", "status": "FAILED"},
        {"m": "NaN", "p": "2", "t": "y'z"}, {"p": "a b", "t": 'q"q'},
        {"m": "Infinity", "p": "", "t": "", "status": "FINISHED"}, {"m": -3, "p": "A", "status": "KILLED"},
    ]  # fmt: skip
    for number, row in enumerate(rows):
        tags = [{"key": "idx", "value": str(number)}, *([{"key": "t", "value": row["t"]}] if "t" in row else [])]
        fields = {
            "run_name": f"run {number}",
            "start_time": 1_000 + number * 10,
            "user_id": f"u{number % 2}",
            "tags": tags,
        }
        same.run(f"q{number}", **fields)
        pairs = [("m", row["m"]), ("val loss", number)] if "m" in row else []
        metrics = [{"key": key, "value": value, "timestamp": 1, "step": 0} for key, value in pairs]
        params = [{"key": "p", "value": row["p"]}, {"key": "a.b", "value": "z"}]
        same.post("/runs/log-batch", run_id=f"$q{number}", metrics=metrics, params=params)
        if "status" in row:
            same.post("/runs/update", run_id=f"$q{number}", status=row["status"], end_time=5_000 + number)
    for number, context in ((0, "training"), (1, "test")):
        dataset = {"name": f"ds{number}", "digest": f"d{number}", "source_type": "s", "source": "s"}
        entry = {"tags": [{"key": "mlflow.data.context", "value": context}], "dataset": dataset}
        same.post("/runs/log-inputs", run_id=f"$q{number}", datasets=[entry])
    same.run("deleted", start_time=1)
    same.post("/runs/delete", run_id="$deleted")
    where = {"experiment_ids": ["$exp"]}
    for text in (
        "metrics.m > 0.2", "metric.m < 1", "metrics.m = 0.1", "metrics.m != 0.1", "metrics.m >= 0.5",
        "metrics.`val loss` > 0", 'metrics."val loss" > 0', "metrics.m > -1", "metrics.m > 1e-1", "metrics.m>0.2",
        "metrics.m > 0.2 and metrics.m < 0.6", "metrics.nope > 0", "params.p = '1'", 'param.p = "1"',
        "parameters.p = '1'", "params.p != '1'", "params.p LIKE '1%'", "params.p ILIKE 'a%'", "params.p = ''",
        "params.p IS NULL", "params.p IS NOT NULL", "params.zz IS NULL", "params.a.b = 'z'", "params.`a.b` = 'z'",
        "params.p LIKE '_'", "tags.t = 'x'", "tag.t != 'x'", "tags.t LIKE 'x'", "tags.t ILIKE 'x'", "tags.t IS NULL",
        'tags.t = "y\'z"', "tags.t = 'q\"q'", "tags.t = ''", "tags.`mlflow.runName` = 'run 1'",
        "tags.mlflow.runName = 'run 1'", "attributes.status = 'FINISHED'", "attr.status = 'FINISHED'",
        "run.status = 'FINISHED'", "status != 'FINISHED'", "status = 'finished'", "status LIKE 'F%'",
        "run_name = 'run 1'", "attributes.`run name` = 'run 1'", 'attributes."Run name" = \'run 1\'',
        "run_name ILIKE 'RUN%'", "run_id = '$q1'", "run_id IN ('$q1','$q2')", "run_id NOT IN ('$q1')",
        "artifact_uri = 'mlflow-artifacts:/$exp/$q1/artifacts'", "artifact_uri != 'x'", "artifact_uri LIKE '%/$q1/%'",
        "artifact_uri LIKE 'mlflow-artifacts:/%'", "artifact_uri LIKE 'MLFLOW%'", "artifact_uri ILIKE 'MLFLOW%'",
        "run_id LIKE '%'", "start_time > 1010", "attributes.Created > 1010", "end_time > 0", "end_time < 5001",
        "end_time != 5000", "user_id = 'u1'", "artifact_uri LIKE '%'", "dataset.name = 'ds1'",
        "datasets.digest = 'd1'", "dataset.context = 'training'", "dataset.name LIKE 'ds%'",
        "dataset.name IN ('ds0','ds1')", "dataset.name != 'ds1'",
        "metrics.m > 0.2 AND params.p = '10' AND tags.t = 'X' AND status = 'FAILED'", "  status   =   'FINISHED'  ",
        "status = 'FINISHED'\nAND metrics.m > 0",
    ):  # fmt: skip
        same.post("/runs/search", **where, filter=text)
    for text in (
        "metrics.m = 'x'", "metrics.m > abc", "metrics.m LIKE '1'", "params.p = 1",
        "params.p > '1'", "tags.idx = 1", "status = FINISHED", "start_time = '1010'", "start_time LIKE '1'",
        "dataset.foo = 'x'", "m > 1", "foo.bar = 1", "metrics.m", "metrics.m >", "> 1", "metrics.m > 0.2;",
        "params.p = '1' -- c", "metrics.m == 0.1", "metrics.m BETWEEN 0 AND 1", "params.p = 'x", "params.p = `1`",
        "1 = 1", "model.name = 'x'", "metrics.a = 1; metrics.b = 2", "metrics.m ~ 1", "params.p = x", "params.p = `x`",
        "metrics.m = metrics.n", "1 > metrics.m", "start_time > x", "start_time LIKE 1", "status = true", "params.p LR",
        "attribute.start != 1", "dataset.profile = 'x'", "datasets.name > 'x'", "metrics.m > 1 NAND params.p = 'x'",
        "`metrics.m > 1", "params.p = LR'", 'tags.t = "x\'', "tags.t = = 'x'", "status IS 'x'", "foo IS NULL", "a = 1",
    ):  # fmt: skip
        same("POST", "/runs/search", {**where, "filter": text}, message="opening")
    same("POST", "/runs/search", {**where, "filter": "params.p IN ()"}, message=False)
    same("POST", "/runs/search", {**where, "filter": "metrics.m IN (1)"}, message=False)
    for order in (
        ["metrics.m"], ["metrics.m DESC"], ["metric.m asc"], ["params.p"], ["params.p DESC"], ["tags.t"],
        ["tags.t DESC"], ["start_time"], ["start_time DESC"], ["attribute.end_time"], ["end_time DESC"],
        ["status DESC", "metrics.m"], ["run_name"], ["Created DESC"], ["user_id"], ["metrics.`val loss` DESC"],
        ['metrics."val loss"'], ["metrics.nope"], ["tags.`mlflow.runName`"], ["params.a.b"], None, [],
    ):  # fmt: skip
        same.post("/runs/search", **where, order_by=order)
    for bad in (
        ["nope"], ["foo.bar"], [""], ["metrics.m foo"], ["metrics.val loss"], ["metrics"], ["dataset.name"], [5], "x",
        ["metrics.m DESCC"], ["metrics.m DESC, params.p"],
    ):  # fmt: skip
        same("POST", "/runs/search", {**where, "order_by": bad}, message="opening")
    for view in ("ACTIVE_ONLY", "DELETED_ONLY", "ALL", 1, 2, 3, "2", None):
        same.post("/runs/search", **where, run_view_type=view)
    for count in (0, -1, 1, 2, "3", 50_000, 2.0):
        same.post("/runs/search", **where, max_results=count)
    same("POST", "/runs/search", {**where, "max_results": 50_001}, message="opening")
    for named in ([], None, ["99999"], ["$exp", "$exp"], "$exp"):
        same.post("/runs/search", experiment_ids=named)
    same("POST", "/runs/search", {**where, "page_token": "x"}, message=False)
    same("POST", "/runs/search", {**where, "max_results": 4}, save={"token": "next_page_token"})
    same("POST", "/runs/search", {**where, "max_results": 4, "page_token": "$token"})


def test_inputs(same):
    """Data sets of runs, and where they were read."""
    same.run("i")
    dataset = {"name": "n", "digest": "d", "source_type": "s", "source": "src"}
    context = [{"key": "mlflow.data.context", "value": "train"}, {"key": "foo", "value": "bar"}]
    for fields in (
        {}, {"run_id": None}, {"run_id": "nope", "datasets": [{"dataset": dataset}]}, {"datasets": []},
        {"datasets": "x"}, {"datasets": [{"dataset": {**dataset, "name": "n" * 501}}]},
        {"datasets": [{"dataset": {**dataset, "digest": "n" * 37}}]},
        {"datasets": [{"dataset": {**dataset, "source": "n" * 65_536}}]},
        {"datasets": [{"dataset": dataset, "tags": [{"key": "k", "value": "v"}]}]},
        {"datasets": [{"dataset": dataset, "tags": [{"key": "k", "value": "w"}, {"key": "k2", "value": "w"}]}]},
        {"datasets": [{"dataset": {**dataset, "name": "n2", "schema": "sch", "profile": "prof"}, "tags": context}]},
        {"datasets": [{"dataset": {**dataset, "name": "n5"}, "tags": [{"key": "k" * 256, "value": "v"}]}]},
        {"datasets": [{"dataset": {**dataset, "name": "n6"}, "tags": [{"key": "k", "value": "v" * 501}]}]},
        {"datasets": [{"dataset": {**dataset, "name": "n7"}}, {"dataset": {**dataset, "name": "n7"}}]},
    ):  # fmt: skip
        same.post("/runs/log-inputs", **{"run_id": "$i", **fields})
    same.get("/runs/get", run_id="$i")
    for named in ([], ["1"] * 21, ["$exp"], ["999999"]):
        same.post(f"{AJAX}/experiments/search-datasets", experiment_ids=named)


def test_logged_models(same):
    """Make, finish, tag, log metrics of, search and delete models; what runs read and made."""
    same.run("lm")
    made = {"experiment_id": "$exp", "name": "mod", "model_type": "T", "source_run_id": "$lm"}
    pairs = {"params": [{"key": "p", "value": "1"}], "tags": [{"key": "t", "value": "1"}]}
    for name, body in (
        ("m1", {**made, **pairs}),
        ("m2", {"experiment_id": "$exp", "name": "second"}),
        ("m3", {**made, "name": "z"}),
    ):
        same("POST", "/logged-models", body, save={name: "model.info.model_id"})
    for fields in (
        {"experiment_id": None}, {"experiment_id": "x"}, {"experiment_id": "99999"}, {"name": "a/b"}, {"name": "a.b"},
        {"name": 5}, {"params": "x"}, {"tags": "x"},
    ):  # fmt: skip
        same.post("/logged-models", **{"experiment_id": "$exp", **fields})
    for model in ("$m1", "$m2", "nope"):
        same.get(f"/logged-models/{model}")
    same.get("/logged-models/$m1/artifacts/directories")
    for model, status in (("$m1", "LOGGED_MODEL_READY"), ("$m2", 3), ("nope", 2)):
        same("PATCH", f"/logged-models/{model}", {"model_id": model, "status": status})
    same("PATCH", "/logged-models/$m1/tags", {"tags": [{"key": "t", "value": "2"}, {"key": "u", "value": "3"}]})
    for body in ({"tags": "x"}, {}):
        same("PATCH", "/logged-models/$m1/tags", body)
    same("PATCH", "/logged-models/nope/tags", {"tags": [{"key": "t", "value": "2"}]})
    for model in ("$m1", "$m1", "nope"):
        same("DELETE", f"/logged-models/{model}/tags/u")
    same.post("/logged-models/$m1/params", model_id="$m1", params=[{"key": "q", "value": "5"}])
    same.post("/logged-models/nope/params", model_id="nope", params=[{"key": "q", "value": "6"}])
    point = {"run_id": "$lm", "key": "acc", "timestamp": 5, "step": 2}
    on = {"dataset_name": "D", "dataset_digest": "g"}
    same.post("/runs/log-metric", **point, **on, value=0.9, model_id="$m1")
    same.post("/runs/log-metric", **point, **on, value=0.5, model_id="$m2")
    same.post("/runs/log-metric", **{**point, "step": 3}, value=0.7, model_id="$m3")
    same.post("/runs/log-batch", run_id="$lm", metrics=[{"key": "b", "value": 1, "timestamp": 2, "model_id": "$m1"}])
    same.get("/logged-models/$m1")
    same.get("/runs/get", run_id="$lm")
    same.post("/runs/outputs", run_id="$lm", models=[{"model_id": "$m1", "step": 3}])
    for body in ({"run_id": "$lm"}, {"models": [{"model_id": "$m1"}]}, {"run_id": "$lm", "models": "x"}):
        same.post("/runs/outputs", **body)
    same.post("/runs/log-inputs", run_id="$lm", models=[{"model_id": "$m3"}])
    same.get("/runs/get", run_id="$lm")
    where = {"experiment_ids": ["$exp"]}
    for text in (
        None, "", "name = 'mod'", "attributes.name = 'mod'", "name != 'mod'", "name LIKE 'm%'", "name ILIKE 'M%'",
        "name IN ('mod')", "model_id = '$m1'", "model_id IN ('$m1','$m2')", "model_type = 'T'",
        "source_run_id = '$lm'", "creation_timestamp > 0", "metrics.acc > 0.6", "metrics.acc = 0.5",
        "metrics.`acc` > 0.6", "params.p = '1'", "params.p LIKE '1'", "tags.t = '2'",
        "name = 'mod' AND metrics.acc > 0.1", "name = 'mod' OR name = 'z'", "name",
    ):  # fmt: skip
        same.post("/logged-models/search", **where, filter=text)
    for order in (
        [{"field_name": "name"}], [{"field_name": "name", "ascending": False}], [{"field_name": "metrics.acc"}],
        [{"field_name": "creation_timestamp", "ascending": True}],
        [{"field_name": "metrics.acc", "ascending": False}],
        [{"field_name": "metrics.acc", "dataset_name": "D", "dataset_digest": "g"}], [{"field_name": "foo"}], "x",
    ):  # fmt: skip
        same.post("/logged-models/search", **where, order_by=order)
    for clause in ([on], [{"dataset_name": "Z"}], [{}], "x"):
        same.post("/logged-models/search", **where, datasets=clause)
    for count in (1, 2, 5_000, None):
        same.post("/logged-models/search", **where, max_results=count)
    same("DELETE", "/logged-models/$m2")
    same.get("/logged-models/$m2")
    same.get("/logged-models/$m2", allow_deleted="true")
    same("DELETE", "/logged-models/nope")
    same.post("/logged-models/search", **where)
    model = {"artifact_path": "a", "flavors": {"x": {"config": 1, "y": 2}}, "utc_time_created": "2020-01-01 00:00:00"}
    for text in ("x", "{}", None, 5, json.dumps({**model, "run_id": "r", "model_uuid": "uu"})):
        same("POST", "/runs/log-model", {"run_id": "$lm", "model_json": text}, message=False)
    same.get("/runs/get", run_id="$lm")


def test_artifacts(same):
    """Listings, downloads, hostile paths, uploads of the UI, and what the proxy refuses."""
    same.run("ar")
    root = "$exp/$ar/artifacts"
    files = {"a.txt": b"hello", "d/e/b.json": b"{}", "empty": b"", "sp%20ace%25.txt": b"sp", "d/x.txt": b"x"}
    for name, data in files.items():
        for side in (same.pair.theirs, same.pair.ours):
            assert same.pair.ask(side, "PUT", f"{PROXY}/{root}/{name}", data, {}, {}).status == 200
    for path in (None, "d", "d/e", "nope", "a.txt", "../x", "/etc", "", "d/", "d/../a.txt", "%2e%2e/x", "file:///etc"):
        query = {"run_id": "$ar"} if path is None else {"run_id": "$ar", "path": path}
        same.get("/artifacts/list", **query)
    for query in ({}, {"run_id": "nope"}, {"run_uuid": "$ar"}):
        same.get("/artifacts/list", **query)
    for path in (root, f"{root}/d", "nope", "../x", "/etc"):
        same.get(PROXY, path=path)
    for name in (f"{root}/a.txt", f"{root}/empty", f"{root}/nope", "..%2f..%2fetc/passwd", f"{root}/sp%20ace%25.txt"):
        same.get(f"{PROXY}/{name}")
    upload = f"{AJAX}/upload-artifact"
    for query, data in (
        ({}, b"x"), ({"run_uuid": "$ar"}, b"x"), ({"run_uuid": "$ar", "path": ""}, b"x"),
        ({"run_uuid": "$ar", "path": "../t"}, b"x"), ({"run_uuid": "$ar", "path": "t"}, None),
        ({"run_uuid": "$ar", "path": "up.txt"}, b"hello"), ({"run_uuid": "nope", "path": "up.txt"}, b"hello"),
        ({"run_uuid": "$ar", "path": "big.txt"}, bytes(10 * 1024 * 1024 + 1)),
        ({"run_uuid": "$ar", "path": "q/w.txt"}, b"x"),
    ):  # fmt: skip
        same("POST", upload, data, query=query)
    for name in (f"{root}/a.txt", "..%2fx"):
        same("DELETE", f"{PROXY}/{name}")
    same.get("/artifacts/list", run_id="$ar")
    mpu = "/api/2.0/mlflow-artifacts/mpu"
    for operation, body in (
        ("create", {}), ("create", {"path": "x", "num_parts": 2}), ("complete", {}),
        ("abort", {"path": "x", "upload_id": "u"}), ("complete", {"path": "x", "upload_id": "u"}),
        ("complete", {"path": "x", "upload_id": "u", "parts": [{"part_number": 1, "etag": "e"}]}),
    ):  # fmt: skip
        same("POST", f"{mpu}/{operation}/{root}", body)
    same.get(f"/api/2.0/mlflow-artifacts/presigned/{root}/up.txt")
    for operation in ("upload", "download"):
        for body in (
            {"run_id": "$ar", "path": "x"}, {"run_id": "$ar"}, {"run_id": "$ar", "path": "../x"},
            {"run_id": "nope", "path": "x"}, {"path": "x"},
        ):  # fmt: skip
            same("POST", f"{API}/artifacts/presigned-{operation}-url", body, message=False)
