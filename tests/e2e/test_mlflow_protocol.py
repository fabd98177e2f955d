"""The server from the wire: MLflow's JSON, hostile paths and headers, authentication, limits, kill -9."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import math
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest

pytest.importorskip("fastapi", reason="needs the server: pip install 'runstream[server]'")

from tests.e2e.mlflow_server import Served, served

API = "/api/2.0/mlflow"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("protocol") / "data") as running:
        yield running


class Answer:
    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> tuple[int, str]:
        return self.status, self.json["error_code"]


def ask(
    server: Served, method: str, path: str, /, body: Any = None, headers: dict[str, str] | None = None, **query: Any
) -> Answer:
    """One raw request; the path is sent exactly as given."""
    parts = urlsplit(server.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    try:
        sent = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        given = {"Content-Type": "application/json"} if body is not None and not isinstance(body, bytes) else {}
        target = f"{path}?{urlencode(query, doseq=True)}" if query else path
        connection.request(method, target, sent, given | (headers or {}))
        answer = connection.getresponse()
        return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
    finally:
        connection.close()


def post(server: Served, path: str, /, **body: Any) -> Answer:
    return ask(server, "POST", API + path, body)


def new_run(server: Served) -> str:
    made = post(server, "/runs/create", experiment_id="0", start_time=1)
    assert made.status == 200, made.body
    return made.json["run"]["info"]["run_id"]


# JSON as protobuf reads it


def test_both_spellings_and_unknown_fields(server):
    """camelCase is taken like snake_case, unknown fields are ignored, both spellings of one field are refused."""
    run = new_run(server)
    sent = {"runId": run, "key": "m", "value": "2.5", "timestamp": "7", "step": "3", "somethingNew": {"a": [1]}}
    assert ask(server, "POST", API + "/runs/log-metric", sent).json == {}
    assert ask(server, "POST", API + "/runs/log-metric", {**sent, "run_id": run}).error[1] == "INVALID_PARAMETER_VALUE"
    found = ask(server, "GET", "/ajax-api/2.0/mlflow/metrics/get-history", run_id=run, metric_key="m").json
    assert found == {"metrics": [{"key": "m", "value": 2.5, "timestamp": 7, "step": 3}]}


def test_run_uuid_is_run_id(server):
    """Old clients say run_uuid."""
    run = new_run(server)
    assert post(server, "/runs/set-tag", run_uuid=run, key="k", value="v").json == {}
    tags = ask(server, "GET", API + "/runs/get", run_uuid=run).json["run"]["data"]["tags"]
    assert {"key": "k", "value": "v"} in tags


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_special_doubles_are_strings(server, value):
    """NaN and infinities are the strings of protobuf JSON; infinities are stored as the largest doubles."""
    run = new_run(server)
    assert post(server, "/runs/log-metric", run_id=run, key="m", value=value, timestamp=1).json == {}
    (metric,) = ask(server, "GET", API + "/runs/get", run_id=run).json["run"]["data"]["metrics"]
    (point,) = ask(server, "GET", API + "/metrics/get-history", run_id=run, metric_key="m").json["metrics"]
    expected = {"NaN": "NaN", "Infinity": sys.float_info.max, "-Infinity": -sys.float_info.max}[value]
    assert metric["value"] == expected and point["value"] == expected


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/runs/create", {"experiment_id": 123}, "Invalid value 123 for parameter 'experiment_id' supplied"),
        ("/runs/create", {"run_name": 1}, "Invalid value 1 for parameter 'run_name' supplied"),
        ("/runs/log-metric", {"run_id": 31}, "Invalid value 31 for parameter 'run_id' supplied"),
        ("/runs/log-metric", {}, "Missing value for required parameter 'run_id'"),
        ("/runs/log-metric", {"run_id": "a", "key": ""}, "Missing value for required parameter 'key'"),
        ("/runs/log-metric", {"run_id": "a", "key": "k"}, "Missing value for required parameter 'value'"),
        ("/runs/log-metric", {"run_id": "a", "key": "k", "value": True, "timestamp": 1}, "parameter 'value' supplied"),
        ("/runs/log-metric", {"run_id": "a", "key": "k", "value": 1}, "required parameter 'timestamp'"),
        ("/runs/log-metric", {"run_id": "a", "key": "k", "value": 1, "timestamp": "x"}, "parameter 'timestamp'"),
        ("/runs/log-batch", {"run_id": "a", "metrics": "foo"}, "Invalid value \"foo\" for parameter 'metrics'"),
        ("/runs/log-batch", {"run_id": "a", "metrics": [{"key": "m"}]}, "parameter 'metrics[0].value'"),
        ("/runs/log-batch", {"run_id": "a", "params": [{"value": "m"}]}, "parameter 'params[0].key'"),
        ("/runs/update", {"run_id": "a", "status": "BOGUS"}, "parameter 'status' supplied"),
        ("/runs/search", {"max_results": 50_001}, "parameter 'max_results' supplied"),
        ("/runs/search", {"page_token": "@@@"}, "token"),
        ("/experiments/create", {"name": "x", "artifact_location": "runs:/a/b"}, "runs:/ URI"),
        ("/experiments/create", {"name": "x", "artifact_location": "s3://b/../../etc"}, ".."),
        ("/experiments/search", {"max_results": -1}, "positive integer"),
    ],
)  # fmt: skip
def test_bad_requests_say_what_is_wrong(server, path, body, message):
    """Each wrong request is answered 400 INVALID_PARAMETER_VALUE with MLflow's sentence."""
    answer = ask(server, "POST", API + path, body)
    assert answer.error == (400, "INVALID_PARAMETER_VALUE")
    assert message in answer.json["message"]


@pytest.mark.parametrize("body", [b"{", b"[1]", b"\xff\xfe", b'{"run_id": "\\ud800"}', b'"x"', b"nul", b"{" * 5000])
def test_bodies_that_are_no_json_objects(server, body):
    """Garbage is a wrong request, never a failure of the server."""
    answer = ask(server, "POST", API + "/runs/log-metric", body, {"Content-Type": "application/json"})
    assert answer.error == (400, "INVALID_PARAMETER_VALUE")


def test_unpaired_surrogates_are_refused(server):
    """Text that is no Unicode cannot be stored and says so."""
    run = new_run(server)
    body = b'{"run_id": "%s", "key": "k", "value": "a\\ud800b"}' % run.encode()
    assert ask(server, "POST", API + "/runs/set-tag", body, {"Content-Type": "application/json"}).status == 400


def test_content_type_is_needed(server):
    """A form of a foreign page cannot post: only application/json is taken."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        answer = ask(server, "POST", API + "/runs/create", b"{}", {"Content-Type": kind})
        assert answer.error == (400, "INVALID_PARAMETER_VALUE")


def test_unknown_paths_and_methods(server):
    """404 and 405 carry the same error body."""
    assert ask(server, "GET", API + "/nothing").error == (404, "ENDPOINT_NOT_FOUND")
    assert ask(server, "GET", API + "/runs/create").status == 405
    assert ask(server, "GET", "/health").body == b"OK"
    assert ask(server, "GET", "/version").body
    assert ask(server, "GET", "/ready").json == {"ready": True, "problems": []}
    assert b"runstream_server_requests_total" in ask(server, "GET", "/metrics").body
    described = ask(server, "GET", "/openapi.json").json["paths"]
    assert "post" in described[API + "/runs/log-batch"] and "/health" in described


def test_headers_of_every_answer(server):
    """Security headers and a request id; the client's own id is kept if it is harmless."""
    answer = ask(server, "GET", API + "/runs/get", headers={"X-Request-Id": "abc-1"}, run_id="nope")
    assert answer.error == (404, "RESOURCE_DOES_NOT_EXIST")
    assert answer.headers["x-request-id"] == "abc-1"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert ask(server, "GET", "/health", headers={"X-Request-Id": "a b\tc"}).headers["x-request-id"] != "a b\tc"


# security


def test_foreign_host_header_is_refused(server):
    """DNS rebinding: a page of evil.example that resolves to this machine gets nothing."""
    answer = ask(server, "POST", API + "/experiments/search", {"max_results": 1}, {"Host": "evil.example:5000"})
    assert answer.error == (403, "PERMISSION_DENIED")
    assert ask(server, "GET", "/health", headers={"Host": "10.0.0.1"}).status == 200


def test_foreign_origin_may_not_write(server):
    """Cross-origin writes are refused, our own origin passes."""
    body = {"name": f"o-{uuid.uuid4().hex}"}
    assert ask(server, "POST", API + "/experiments/create", body, {"Origin": "https://evil.example"}).status == 403
    assert ask(server, "POST", API + "/experiments/create", body, {"Origin": "null"}).status == 403
    assert ask(server, "POST", API + "/experiments/create", body, {"Origin": server.url}).status == 200


HOSTILE = [
    "../secret", "..%2fsecret", "%2e%2e/secret", "%252e%252e/secret", "%25252e%25252e%25252fsecret", "a/../../secret",
    "/etc/passwd", "//etc/passwd", "%2fetc/passwd", "%252fetc%252fpasswd", "file:///etc/passwd", "..\\secret",
    "..%5csecret", "C:/x", "a%00b", "http://127.0.0.1/x", "~root/x", "a#b", "%2e%2e%5c%2e%2e%5cx",
]  # fmt: skip


@pytest.mark.parametrize("path", HOSTILE)
def test_hostile_artifact_paths(server, path):
    """No spelling of a path leads out of the artifact root, in any route that takes one."""
    secret = server.data / "secret"
    secret.parent.mkdir(parents=True, exist_ok=True)
    secret.write_text("secret")
    run = new_run(server)
    raw = path.replace("#", "%23").replace("\\", "%5c")
    root = "/api/2.0/mlflow-artifacts/artifacts/"
    for answer in (
        ask(server, "GET", root + raw),
        ask(server, "PUT", root + raw, b"overwritten"),
        ask(server, "DELETE", root + raw),
        ask(server, "GET", "/get-artifact", run_id=run, path=path),
        ask(server, "GET", API + "/artifacts/list", run_id=run, path=path),
        ask(server, "GET", root.rstrip("/"), path=path),
        ask(server, "POST", "/ajax-api/2.0/mlflow/upload-artifact?" + urlencode({"run_uuid": run, "path": path}), b"x"),
    ):
        assert answer.status in (400, 404), (path, answer.status, answer.body)
        assert b"secret\n" not in answer.body and answer.body != b"secret"
    assert secret.read_text() == "secret"


def test_symbolic_links_do_not_lead_out(server, tmp_path):
    """A link below the root to somewhere else is neither read, written, listed nor removed through."""
    (tmp_path / "outside.txt").write_text("outside")
    root = server.data / "artifacts"
    root.mkdir(parents=True, exist_ok=True)
    (root / "link").symlink_to(tmp_path)
    base = "/api/2.0/mlflow-artifacts/artifacts"
    assert ask(server, "GET", f"{base}/link/outside.txt").status == 400
    assert ask(server, "PUT", f"{base}/link/new.txt", b"x").status == 400
    assert ask(server, "DELETE", f"{base}/link/outside.txt").status == 400
    assert ask(server, "GET", base, path="link").status == 400
    assert (tmp_path / "outside.txt").read_text() == "outside" and not (tmp_path / "new.txt").exists()


def test_foreign_artifact_locations_are_not_served(server):
    """An experiment may say its artifacts lie in /etc; the server does not read them for anybody."""
    name = f"evil-{uuid.uuid4().hex}"
    for location in ("http://127.0.0.1:1/x", "ftp://host/x", "mlflow-artifacts://host:9/x"):
        made = post(server, "/experiments/create", name=name + location, artifact_location=location)
        assert made.error == (400, "INVALID_PARAMETER_VALUE")
    for location in ("file:///etc", "/etc", "dbfs:/etc"):
        made = post(server, "/experiments/create", name=name + location, artifact_location=location)
        assert made.status == 200
        run = post(server, "/runs/create", experiment_id=made.json["experiment_id"], start_time=1).json["run"]["info"]
        assert ask(server, "GET", API + "/artifacts/list", run_id=run["run_id"]).status == 400
        assert ask(server, "GET", "/get-artifact", run_id=run["run_id"], path="passwd").status == 400


def test_user_files_are_attachments(server):
    """An uploaded page is never shown in this origin."""
    run = new_run(server)
    path = f"/api/2.0/mlflow-artifacts/artifacts/0/{run}/artifacts/x.html"
    assert ask(server, "PUT", path, b"<script>alert(1)</script>").status == 200
    answer = ask(server, "GET", path)
    assert answer.status == 200 and answer.headers["content-disposition"].startswith("attachment")
    assert "sandbox" in answer.headers["content-security-policy"]
    assert ask(server, "DELETE", path).status == 200
    assert ask(server, "GET", path).error == (404, "RESOURCE_DOES_NOT_EXIST")


def test_too_large_bodies(server):
    """A body beyond the limit is refused, with and without a declared length."""
    big = b'{"run_id": "' + b"x" * (33 << 20) + b'"}'
    try:
        answer = ask(server, "POST", API + "/runs/log-batch", big, {"Content-Type": "application/json"})
    except (BrokenPipeError, ConnectionResetError):
        return  # refused while we were still sending
    assert answer.status == 413


# authentication


def runstream(*arguments: str, stdin: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-m", "runstream", *arguments],
        input=stdin, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_refuses_the_network_without_authentication(tmp_path):
    """Listening beyond loopback needs authentication or an explicit flag."""
    done = subprocess.run(
        [sys.executable, "-m", "runstream", "server", "--host", "0.0.0.0", "--tracking-uri", str(tmp_path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode != 0 and "--auth-file" in done.stderr


def test_users_tokens_and_roles(tmp_path):
    """Tokens and passwords open what their role allows; a revoked one opens nothing within a second."""
    file = str(tmp_path / "auth.json")
    runstream(
        "server",
        "auth",
        "add-user",
        "ada",
        "--role",
        "write",
        "--file",
        file,
        "--password-stdin",
        stdin="correct horse 1\n",
    )
    token = runstream("server", "auth", "add-token", "dash", "--role", "read", "--file", file)
    content = Path(file).read_text()
    assert token not in content and "correct horse" not in content and os.stat(file).st_mode & 0o777 == 0o600
    with served(tmp_path / "data", ["--auth-file", file]) as server:

        def call(method: str, path: str, header: str | None, body: Any = None) -> int:
            headers = {"Authorization": header} if header else {}
            return ask(server, method, path, body, headers).status

        def basic(name: str, password: str) -> str:
            return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()

        read = API + "/experiments/get?experiment_id=0"
        create = {"name": "n"}
        assert call("GET", read, None) == 401 and call("GET", "/health", None) == 200
        assert call("GET", "/metrics", None) == 401
        assert call("GET", read, f"Bearer {token}") == 200
        assert call("POST", API + "/experiments/create", f"Bearer {token}", create) == 403
        assert call("POST", API + "/experiments/search", f"Bearer {token}", {"max_results": 1}) == 200
        for wrong in (
            basic("ada", "wrong"),
            basic("eve", "correct horse 1"),
            "Bearer x",
            "Basic !!",
            "Digest a",
            "Basic",
        ):
            assert call("GET", read, wrong) == 401
        assert call("POST", API + "/experiments/create", basic("ada", "correct horse 1"), create) == 200
        assert call("GET", read, basic("x", token)) == 200
        runstream("server", "auth", "revoke", "dash", "--file", file)
        waiting = 50
        while call("GET", read, f"Bearer {token}") != 401:
            waiting -= 1
            assert waiting, "the revoked token is still taken"
        os.chmod(file, 0o644)
        os.utime(file)
        waiting = 50
        while call("GET", read, basic("ada", "correct horse 1")) != 401:
            waiting -= 1
            assert waiting, "a file that others may read is still trusted"


# life and death


def test_accepted_writes_survive_kill_9(tmp_path):
    """What was answered 200 is there after the server and its store are killed."""
    with served(tmp_path / "data") as server:
        run = new_run(server)
        for i in range(200):
            assert post(server, "/runs/log-metric", run_id=run, key="m", value=i, timestamp=1, step=i).status == 200
        assert post(server, "/runs/log-parameter", run_id=run, key="p", value="v").status == 200
        server.stop(signal.SIGKILL)
    with served(tmp_path / "data") as server:
        points = ask(server, "GET", API + "/metrics/get-history", run_id=run, metric_key="m").json["metrics"]
        assert [point["value"] for point in points] == list(range(200))
        data = ask(server, "GET", API + "/runs/get", run_id=run).json["run"]["data"]
        assert data["params"] == [{"key": "p", "value": "v"}]
        assert post(server, "/runs/log-parameter", run_id=run, key="p", value="w").error[1] == "INVALID_PARAMETER_VALUE"


def test_stops_cleanly(tmp_path):
    """SIGTERM ends the server with code 0 (or the signal's), and it says so."""
    with served(tmp_path / "data") as server:
        new_run(server)
        assert server.stop() in (0, -signal.SIGTERM, 143)


def test_half_open_and_broken_clients_do_no_harm(server):
    """Connections that say nothing, half a request, or nonsense leave the server answering."""
    parts = urlsplit(server.url)
    held = []
    for sent in (b"", b"POST /api/2.0/mlflow/runs/create HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{",
                 b"GET / HTTP/9.9\r\n\r\n", b"\x00\xff" * 100, b"GET " + b"a" * 100_000):  # fmt: skip
        connection = socket.create_connection((parts.hostname, parts.port), timeout=10)
        with contextlib.suppress(OSError):
            connection.sendall(sent)
        held.append(connection)
    run = new_run(server)
    assert post(server, "/runs/log-metric", run_id=run, key="m", value=math.pi, timestamp=1).status == 200
    for connection in held:
        connection.close()


def test_several_workers_see_each_others_writes(tmp_path):
    """With two processes behind one port, whoever answers a read has seen what the other wrote."""
    with served(tmp_path / "data", ["--workers", "2", "--root-path", "/team"]) as server:
        assert server.url.endswith("/team")
        server.url = server.url.removesuffix("/team")
        run = new_run(server)
        for i in range(40):
            assert post(server, "/runs/log-metric", run_id=run, key="m", value=i, timestamp=1, step=i).status == 200
            found = ask(server, "GET", "/team" + API + "/metrics/get-history", run_id=run, metric_key="m").json
            assert len(found["metrics"]) == i + 1
        assert server.stop() in (0, -signal.SIGTERM, 143)


def test_beyond_its_limit_it_refuses_at_once(tmp_path):
    """With all places taken a request is answered 503 with Retry-After; when they are free it serves again."""
    with served(tmp_path / "data", environment={"RUNSTREAM_SERVER_MAX_REQUESTS": "3"}) as server:
        run = new_run(server)
        parts = urlsplit(server.url)
        held = [socket.create_connection((parts.hostname, parts.port), timeout=10) for _ in range(3)]
        head = f"POST {API}/runs/set-tag HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        head += "Content-Length: 9\r\n\r\n{"
        for connection in held:
            connection.sendall(head.encode())
        tries = 100
        while (answer := post(server, "/runs/set-tag", run_id=run, key="k", value="v")).status == 200:
            tries -= 1
            assert tries, "three requests in work, and no refusal"
        assert answer.error == (503, "TEMPORARILY_UNAVAILABLE") and answer.headers["retry-after"] == "1"
        for connection in held:
            connection.close()
        tries = 100
        while post(server, "/runs/set-tag", run_id=run, key="k", value="v").status != 200:
            tries -= 1
            assert tries, "places are not freed when clients leave"


# SQL over HTTP


def test_sql_over_http(server):
    """curl and clickhouse_connect ask the server's own port, and see what was just logged."""
    run = new_run(server)
    for i in range(50):
        post(server, "/runs/log-metric", run_id=run, key="m", value=i, timestamp=1, step=i)
    sql = f"SELECT count(), sum(value) FROM metrics WHERE run_id = '{run}'"
    assert ask(server, "POST", "/", sql.encode()).body == b"50\t1225\n"
    assert ask(server, "GET", "/", query=sql + " FORMAT JSONCompactEachRow").body == b"[50, 1225]\n"
    assert ask(server, "GET", "/ping").body == b"Ok.\n"
    import clickhouse_connect

    parts = urlsplit(server.url)
    with clickhouse_connect.get_client(host=parts.hostname, port=parts.port, database="runstream") as client:
        found = client.query("SELECT count() FROM metrics WHERE run_id = {run:String}", parameters={"run": run})
        assert found.result_rows == [(50,)]
        assert len(client.query("SELECT number FROM numbers(100000)").result_rows) == 100_000


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT file('/etc/passwd')",
        "SELECT * FROM file('/etc/passwd', 'LineAsString')",
        "SELECT * FROM url('http://127.0.0.1:1/', 'LineAsString')",
        "SELECT * FROM system.processes",
        "INSERT INTO settings VALUES ('artifact_root', '/etc', now())",
        "DROP TABLE points",
        "SELECT 1; SELECT 2",
        "SELECT 1 INTO OUTFILE '/tmp/x'",
        "SELECT * APPLY(file) FROM (SELECT '/etc/passwd')",
        "SET ROLE runstream_writer",
    ],
)
def test_hostile_sql_is_refused(server, sql):
    """The store's gate stands behind the port; the caller's own users and passwords are not passed on."""
    for headers in ({}, {"X-ClickHouse-User": "writer", "X-ClickHouse-Key": "x"}):
        answer = ask(server, "POST", "/", sql.encode(), headers)
        assert answer.status >= 400 and answer.status < 600 and b"root:" not in answer.body
        assert int(answer.headers["x-clickhouse-exception-code"]) > 0
