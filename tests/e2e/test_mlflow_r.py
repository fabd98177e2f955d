"""What MLflow's R client puts on the wire, replayed: every value is a string, and runs are named twice.

R itself and its package are not needed: requests are written as its REST layer writes them (all leaves through
`as.character`, JSON with unboxed scalars, absent arguments left out), answers are read as it reads them.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import pytest

pytest.importorskip("fastapi", reason="needs the server: pip install 'runstream[server]'")

from tests.e2e.mlflow_server import Served, served

AGENT = "mlflow-r-client/2.22.0"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("r") / "data") as running:
        yield running


def as_character(value: Any) -> Any:
    """R's `as.character` on every leaf: 15 significant digits, and an exponent where that is shorter."""
    if isinstance(value, dict):
        return {key: as_character(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_character(item) for item in value]
    if isinstance(value, str):
        return value
    digits, exponent = f"{value:.14e}".split("e")
    short = f"{digits.rstrip('0').rstrip('.')}e{exponent}"
    plain = f"{value:.15g}"
    return short if len(short) < len(plain) or "e" in plain else plain


def rest(server: Served, path: str, data: dict[str, Any] | None = None, **query: str) -> Any:
    """`mlflow_rest`: GET with a query, or POST of the data as strings."""
    url = f"{server.url}/api/2.0/mlflow/{path}" + (f"?{urlencode(query)}" if query else "")
    headers = {"User-Agent": AGENT, "Accept": "application/json, text/xml, application/xml, */*"}
    body = None
    if data is not None:
        headers["Content-Type"] = "application/json"
        body = json.dumps(as_character(data)).encode()
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60) as answer:
        return json.loads(answer.read())


def named(run_id: str) -> dict[str, str]:
    return {"run_uuid": run_id, "run_id": run_id}


def test_numbers_as_r_writes_them():
    """The replay itself: R writes 100000 as 1e+05 and 123456 as it is."""
    assert [as_character(value) for value in (100000, 123456, 0.1, 0, 1e-5, 1700000000000, 1795610264017)] == [
        "1e+05", "123456", "0.1", "0", "1e-05", "1.7e+12", "1795610264017",
    ]  # fmt: skip


def test_an_experiment_in_r(server):
    """create, get, search, rename, tag, delete, restore."""
    identity = rest(server, "experiments/create", {"name": "from R"})["experiment_id"]
    found = rest(server, "experiments/get", experiment_id=identity)["experiment"]
    assert (found["name"], found["lifecycle_stage"]) == ("from R", "active")
    assert rest(server, "experiments/get-by-name", experiment_name="from R")["experiment"] == found
    search = {"max_results": 1000, "experiment_view_type": "ACTIVE_ONLY", "order_by": [], "filter": "name = 'from R'"}
    assert rest(server, "experiments/search", search)["experiments"] == [found]
    assert rest(server, "experiments/update", {"experiment_id": identity, "new_name": "renamed"}) == {}
    tag = {"experiment_id": identity, "key": "size", "value": 3}
    assert rest(server, "experiments/set-experiment-tag", tag) == {}
    assert rest(server, "experiments/get", experiment_id=identity)["experiment"]["tags"] == [
        {"key": "size", "value": "3"}
    ]
    assert rest(server, "experiments/delete", {"experiment_id": identity}) == {}
    assert rest(server, "experiments/restore", {"experiment_id": identity}) == {}


def test_a_run_in_r(server):
    """start, log, batch, read, search, end: with numbers such as 1e+05 and 1.7e+12."""
    made = rest(
        server,
        "runs/create",
        {
            "experiment_id": "0",
            "user_id": "r-user",
            "start_time": 1700000000000,
            "tags": [{"key": "mlflow.user", "value": "r-user"}, {"key": "mlflow.source.type", "value": "LOCAL"}],
        },
    )
    run_id = made["run"]["info"]["run_uuid"]
    assert made["run"]["info"]["start_time"] == 1700000000000
    assert rest(server, "runs/log-parameter", {**named(run_id), "key": "alpha", "value": 0.5}) == {}
    for step, value in ((0, 0.1), (100000, 0.01), (123456, "NaN")):
        point = {"key": "rmse", "value": value, "timestamp": 1700000000000, "step": step}
        assert rest(server, "runs/log-metric", {**named(run_id), **point}) == {}
    assert rest(server, "runs/set-tag", {**named(run_id), "key": "color", "value": "red"}) == {}
    assert rest(server, "runs/set-tag", {**named(run_id), "key": "gone", "value": "x"}) == {}
    assert rest(server, "runs/delete-tag", {"run_id": run_id, "key": "gone"}) == {}
    batch = {
        "run_id": run_id,
        "metrics": [
            {"key": "a", "value": 1, "step": 200000, "timestamp": 1.6e12},
            {"key": "a", "value": "Infinity", "step": 200001, "timestamp": 1600000000001},
        ],
        "params": [{"key": "p", "value": "v"}],
        "tags": [],
    }
    assert rest(server, "runs/log-batch", batch) == {}
    run = rest(server, "runs/get", **named(run_id))["run"]
    assert {item["key"]: item["value"] for item in run["data"]["params"]} == {"alpha": "0.5", "p": "v"}
    assert {item["key"]: item["step"] for item in run["data"]["metrics"]} == {"rmse": 123456, "a": 200001}
    points = rest(server, "metrics/get-history", **named(run_id), metric_key="rmse")["metrics"]
    assert [(item["step"], item["value"], item["timestamp"]) for item in points] == [
        (0, 0.1, 1700000000000), (100000, 0.01, 1700000000000), (123456, "NaN", 1700000000000),
    ]  # fmt: skip
    search = {"experiment_ids": ["0"], "filter": "params.p = 'v'", "run_view_type": "ACTIVE_ONLY", "order_by": []}
    assert [item["info"]["run_id"] for item in rest(server, "runs/search", search)["runs"]] == [run_id]
    assert rest(server, "artifacts/list", **named(run_id))["root_uri"].endswith(f"{run_id}/artifacts")
    ended = rest(server, "runs/update", {**named(run_id), "status": "FINISHED", "end_time": 1700000100000})
    assert ended["run_info"]["end_time"] == 1700000100000 and ended["run_info"]["run_uuid"] == run_id
    assert rest(server, "runs/delete", {"run_id": run_id}) == {}
    assert rest(server, "runs/restore", {"run_id": run_id}) == {}


@pytest.mark.parametrize("step", ["1e-05", "1.5e+00", "1e+99", "1e5x", "1e+19"])
def test_numbers_that_are_no_integers(server, step):
    """An exponent makes no fraction whole and no number small enough."""
    run_id = rest(server, "runs/create", {"experiment_id": "0", "start_time": 1})["run"]["info"]["run_id"]
    point = {**named(run_id), "key": "m", "value": 1, "timestamp": 1, "step": step}
    with pytest.raises(urllib.error.HTTPError) as caught:
        rest(server, "runs/log-metric", point)
    assert caught.value.code == 400
    assert json.loads(caught.value.read())["error_code"] == "INVALID_PARAMETER_VALUE"
