"""Who may do what on a running server: permissions per experiment on every route, browser sessions, audit lines."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest

pytest.importorskip("fastapi", reason="needs the server: pip install 'runstream[server]'")

from runstream_query.server.auth import AuthFile
from tests.e2e.mlflow_server import Served, served

API = "/api/2.0/mlflow"
PROXY = "/api/2.0/mlflow-artifacts/artifacts"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    cookies: list[str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Caller:
    """Sends requests with one set of credentials."""

    server: Served
    headers: dict[str, str] = field(default_factory=dict)

    def __call__(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        parts = urlsplit(self.server.url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        try:
            raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            kind = {"Content-Type": "application/json"} if body is not None and not isinstance(body, bytes) else {}
            connection.request(method, path, raw, kind | self.headers | (headers or {}))
            found = connection.getresponse()
            cookies = found.headers.get_all("set-cookie") or []
            return Answer(found.status, {k.lower(): v for k, v in found.getheaders()}, cookies, found.read())
        finally:
            connection.close()

    def post(self, path: str, **fields: Any) -> Answer:
        return self("POST", API + path, fields)


@dataclass
class House:
    """A server with users, and two experiments with a run and a model each."""

    server: Served
    auth_file: Path
    audit_file: Path
    admin: Caller
    limited: Caller
    """May edit the experiment `own` and read `shown`; nothing else."""
    reader: Caller
    """Reads everything but `secret`."""
    own: str = ""
    shown: str = ""
    secret: str = ""
    runs: dict[str, str] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)

    def audited(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.audit_file.read_text().splitlines()]


def cli(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "runstream", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("house")
    auth_file, audit_file = folder / "auth.json", folder / "audit.jsonl"
    tokens = {}

    def fill(content: AuthFile) -> None:
        content.add_user("ada", "correct horse 1", "write")
        content.add_user("eve", "correct horse 2", "write")
        for name, role in (("root", "admin"), ("limited", "write"), ("reader", "read")):
            tokens[name] = content.add_token(name, role)[1]

    AuthFile.change(auth_file, fill)
    with served(folder / "data", ["--auth-file", str(auth_file), "--audit-file", str(audit_file)]) as server:
        callers = {name: Caller(server, {"Authorization": f"Bearer {token}"}) for name, token in tokens.items()}
        found = House(server, auth_file, audit_file, callers["root"], callers["limited"], callers["reader"])
        for name in ("own", "shown", "secret"):
            made = found.admin.post("/experiments/create", name=name, tags=[{"key": "k", "value": name}])
            identity = made.json["experiment_id"]
            setattr(found, name, identity)
            run = found.admin.post("/runs/create", experiment_id=identity, start_time=1).json["run"]["info"]["run_id"]
            found.runs[name] = run
            assert found.admin.post("/runs/log-metric", run_id=run, key="m", value=1, timestamp=1).status == 200
            assert found.admin("PUT", f"{PROXY}/{identity}/{run}/artifacts/f.txt", name.encode()).status == 200
            model = found.admin.post("/logged-models", experiment_id=identity, name=name)
            found.models[name] = model.json["model"]["info"]["model_id"]
        # `own` by name on the command line, the others through the file
        cli("server", "auth", "grant", "limited", "none", "--all-others", "--file", str(auth_file))
        cli("server", "auth", "grant", "limited", "edit", "--experiment", "own", "--file", str(auth_file))
        AuthFile.change(auth_file, lambda content: content.grant("limited", "read", found.shown))
        AuthFile.change(auth_file, lambda content: content.grant("reader", "none", found.secret))
        assert "others:none" in cli("server", "auth", "list", "--file", str(auth_file))
        deadline = time.monotonic() + 20
        while found.limited("GET", f"{API}/experiments/get?experiment_id={found.secret}").status != 403:
            assert time.monotonic() < deadline, "the running server does not notice the permission"
        yield found


def operations(house: House, name: str) -> list[tuple[str, str, str, Any]]:
    """(needed permission, method, path, body) of everything that can be done with one of the experiments."""
    experiment, run, model = getattr(house, name), house.runs[name], house.models[name]
    base = f"{PROXY}/{experiment}/{run}/artifacts"
    logged = f"{API}/logged-models/{model}"
    value = uuid.uuid4().hex
    return [
        ("read", "GET", f"{API}/experiments/get?experiment_id={experiment}", None),
        ("read", "GET", f"{API}/experiments/get-by-name?experiment_name={name}", None),
        ("read", "GET", f"{API}/runs/get?run_id={run}", None),
        ("read", "GET", f"{API}/runs/get?run_uuid={run}", None),
        ("read", "GET", f"{API}/runs/get?runId={run}", None),
        ("read", "HEAD", f"{API}/runs/get?run_id={run}", None),
        ("read", "GET", f"{API}/metrics/get-history?run_id={run}&metric_key=m", None),
        ("read", "GET", f"{API}/metrics/get-history-bulk?run_id={run}&metric_key=m", None),
        ("read", "GET", f"{API}/metrics/get-history-bulk-interval?run_ids={run}&metric_key=m", None),
        ("read", "GET", f"/ajax-api/2.11/mlflow/metrics/get-history-bulk-interval?runIds={run}&metric_key=m", None),
        ("read", "GET", f"{API}/artifacts/list?run_id={run}", None),
        ("read", "GET", f"/get-artifact?run_id={run}&path=f.txt", None),
        ("read", "GET", f"/get-artifact?run_id={house.runs['own']}&run_id={run}&path=f.txt", None),
        ("read", "GET", f"{base}/f.txt", None),
        ("read", "GET", f"{PROXY}?path={experiment}/{run}/artifacts", None),
        ("read", "GET", f"{PROXY}?path={experiment}", None),
        ("read", "GET", logged, None),
        ("read", "GET", f"{logged}/artifacts/directories", None),
        ("edit", "POST", f"{API}/experiments/set-experiment-tag",
         {"experiment_id": experiment, "key": "n", "value": "v"}),
        ("edit", "POST", f"{API}/experiments/delete-experiment-tag", {"experimentId": experiment, "key": "n"}),
        ("edit", "POST", f"{API}/experiments/update", {"experiment_id": experiment, "new_name": name}),
        ("edit", "POST", f"{API}/runs/create", {"experiment_id": experiment, "start_time": 1}),
        ("edit", "POST", f"{API}/runs/update", {"run_id": run, "status": "RUNNING"}),
        ("edit", "POST", f"{API}/runs/set-tag", {"run_uuid": run, "key": "t", "value": value}),
        ("edit", "POST", f"{API}/runs/delete-tag", {"run_id": run, "key": "t"}),
        ("edit", "POST", f"{API}/runs/log-metric", {"runId": run, "key": "n", "value": 1, "timestamp": 1}),
        ("edit", "POST", f"{API}/runs/log-parameter", {"run_id": run, "key": value, "value": "v"}),
        ("edit", "POST", f"{API}/runs/log-batch", {"run_id": run, "tags": [{"key": "b", "value": value}]}),
        ("edit", "POST", f"{API}/runs/log-inputs", {"run_id": run, "models": [{"model_id": model}]}),
        ("edit", "POST", f"{API}/runs/outputs", {"run_id": run, "models": [{"model_id": model}]}),
        ("edit", "POST", f"{API}/upload-artifact?run_uuid={run}&path=ui.txt", b"x"),
        ("edit", "PUT", f"{base}/g.txt", b"x"),
        ("edit", "POST", f"{API}/logged-models", {"experiment_id": experiment, "name": "n"}),
        ("edit", "PATCH", logged, {"status": "LOGGED_MODEL_READY"}),
        ("edit", "POST", f"{logged}/params", {"params": [{"key": value, "value": "v"}]}),
        ("edit", "PATCH", f"{logged}/tags", {"tags": [{"key": "t", "value": "v"}]}),
        ("edit", "DELETE", f"{logged}/tags/t", None),
        ("manage", "DELETE", f"{base}/g.txt", None),
        ("manage", "DELETE", logged, None),
        ("manage", "POST", f"{API}/runs/delete", {"run_id": run}),
        ("manage", "POST", f"{API}/runs/restore", {"run_id": run}),
        ("manage", "POST", f"{API}/experiments/delete", {"experiment_id": experiment}),
        ("manage", "POST", f"{API}/experiments/restore", {"experiment_id": experiment}),
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "held"), [("secret", "none"), ("shown", "read"), ("own", "edit")])
def test_each_operation_needs_its_permission(house, name, held):
    """With every permission exactly the operations that it includes are answered, the others are 403."""
    order = ["none", "read", "edit", "manage"]
    for needed, method, path, body in operations(house, name):
        answer = house.limited(method, path, body)
        if order.index(held) >= order.index(needed):
            assert answer.status == 200, (needed, method, path, answer.body)
        else:
            assert answer.status == 403, (needed, method, path, answer.body)
            assert method == "HEAD" or answer.json["error_code"] == "PERMISSION_DENIED"
            assert b"secret" not in answer.body or "experiment_name" in path


def test_signed_addresses_need_the_same_permissions(house):
    """An address of an artifact is as good as the artifact; here it is refused afterwards, for the root is a folder."""
    for name, denied in (("secret", True), ("own", False)):
        run, folder = house.runs[name], f"{getattr(house, name)}/{house.runs[name]}/artifacts"
        for method, path, body in (
            ("POST", f"{API}/artifacts/presigned-upload-url", {"run_id": run, "path": "f.txt"}),
            ("POST", f"{API}/artifacts/presigned-upload-url", {"model_id": house.models[name], "path": "f.txt"}),
            ("POST", f"{API}/artifacts/presigned-download-url", {"runId": run, "path": "f.txt"}),
            ("GET", f"/api/2.0/mlflow-artifacts/presigned/{folder}/f.txt", None),
            ("POST", f"/api/2.0/mlflow-artifacts/mpu/create/{folder}", {"path": "f.txt", "num_parts": 1}),
        ):
            answer = house.limited(method, path, body)
            assert answer.status == 403 if denied else answer.status in (400, 501), (name, path, answer.body)


def test_managing_is_more_than_editing(house):
    """Whoever has no permissions of their own does what the role allows: delete and restore too."""
    for needed, method, path, body in operations(house, "secret"):
        if needed == "manage" and "artifacts" not in path:
            assert house.admin(method, path, body).status == 200, path


def test_searches_show_what_may_be_read(house):
    """Searches leave out what may not be read, page by page."""
    found: list[str] = []
    token = ""
    while True:
        page = house.limited("POST", f"{API}/experiments/search", {"max_results": 1, "page_token": token}).json
        found += [entry["name"] for entry in page.get("experiments", ())]
        assert len(page.get("experiments", ())) <= 1
        token = page.get("next_page_token", "")
        if not token:
            break
    assert set(found) >= {"own", "shown"} and "secret" not in found and "Default" not in found
    by_get = house.limited("GET", f"{API}/experiments/search?max_results=100").json["experiments"]
    assert [entry["name"] for entry in by_get] == found
    everything = [house.own, house.shown, house.secret]
    runs = house.limited.post("/runs/search", experiment_ids=everything).json["runs"]
    assert {run["info"]["experiment_id"] for run in runs} == {house.own, house.shown}
    assert house.limited.post("/runs/search", experimentIds=[house.secret]).json == {}
    assert house.limited.post("/runs/search", experiment_ids=[]).json == {}
    models = house.limited.post("/logged-models/search", experiment_ids=everything).json["models"]
    assert {model["info"]["experiment_id"] for model in models} == {house.own, house.shown}
    assert house.limited.post("/experiments/search-datasets", experiment_ids=[house.secret]).json == {}
    runs = house.admin.post("/runs/search", experiment_ids=everything).json["runs"]
    assert {run["info"]["experiment_id"] for run in runs} == set(everything)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/", b"SELECT * FROM experiments"),
        ("GET", "/?query=SELECT+1", None),
        ("GET", "/replicas_status", None),
        ("GET", "//?query=SELECT+1", None),
        ("GET", "/nothing", None),
    ],
)
def test_sql_is_not_for_limited_principals(house, method, path, body):
    """SQL reads all experiments, so a limited principal has none; neither have they routes that nobody thought of."""
    for caller in (house.limited, house.reader):
        assert caller(method, path, body).status == 403
    assert house.admin("POST", "/", b"SELECT 1").body == b"1\n"


def test_ways_around_the_rules(house):
    """An own run does not open another's artifacts, models or folders."""
    own, secret = house.runs["own"], house.runs["secret"]
    point = {"key": "m", "value": 1, "timestamp": 1, "model_id": house.models["secret"]}
    climbing = f"mlflow-artifacts:/{house.secret}/%2e%2e"
    refused = [
        ("PUT", f"{PROXY}/{house.own}/{secret}/artifacts/x", b"x"),
        ("GET", f"{PROXY}/{house.own}/../{house.secret}/{secret}/artifacts/f.txt", None),
        ("GET", f"{PROXY}/{house.own}%2f..%2f{house.secret}/{secret}/artifacts/f.txt", None),
        ("GET", f"{PROXY}?path=", None),
        ("GET", PROXY, None),
        ("PUT", f"{PROXY}/free/file", b"x"),
        ("POST", f"{API}/runs/log-metric", {"run_id": own, **point}),
        ("POST", f"{API}/runs/log-batch", {"run_id": own, "metrics": [point]}),
        ("POST", f"{API}/runs/outputs", {"run_id": own, "models": [{"model_id": house.models["secret"]}]}),
        ("POST", f"{API}/runs/create", {"start_time": 1}),
        ("POST", f"{API}/experiments/create", {"name": "x", "artifact_location": f"mlflow-artifacts:/{house.secret}"}),
        ("POST", f"{API}/experiments/create", {"name": "y", "artifact_location": climbing}),
    ]  # fmt: skip
    for method, path, body in refused:
        assert house.limited(method, path, body).status in (400, 403), (method, path)


def test_whoever_makes_an_experiment_manages_it(house):
    """A limited user may make experiments, and then they are theirs; a reader may not."""
    made = house.limited.post("/experiments/create", name="made")
    assert made.status == 200
    identity = made.json["experiment_id"]
    run = house.limited.post("/runs/create", experiment_id=identity, start_time=1)
    assert run.status == 200
    assert house.limited.post("/experiments/delete", experiment_id=identity).status == 200
    assert house.reader.post("/experiments/create", name="made by a reader").status == 403
    assert {"grant"} <= {line["audit"] for line in house.audited()}


def test_a_reader_with_an_exception(house):
    """Everything may be read but one experiment, and nothing written."""
    assert house.reader("GET", f"{API}/runs/get?run_id={house.runs['own']}").status == 200
    assert house.reader("GET", f"{API}/runs/get?run_id={house.runs['secret']}").status == 403
    assert house.reader.post("/runs/set-tag", run_id=house.runs["own"], key="k", value="v").status == 403


def test_denials_and_administration_leave_audit_lines(house):
    """Who, what, when and from where; no secrets."""
    house.limited.post("/runs/delete", run_id=house.runs["secret"])
    house.admin.post("/runs/delete", run_id=house.runs["shown"])
    house.admin.post("/runs/restore", run_id=house.runs["shown"])
    Caller(house.server, {"Authorization": "Bearer wrong-token"})("GET", f"{API}/runs/get?run_id=x")
    lines = house.audited()
    denied = [line for line in lines if line["audit"] == "denied" and line["path"].endswith("/runs/delete")]
    assert (
        denied and denied[-1]["who"] == "limited" and denied[-1]["from"] == "127.0.0.1" and denied[-1]["status"] == 403
    )
    deleted = [line for line in lines if line["audit"] == "delete" and line["about"] == house.runs["shown"]]
    assert deleted[-1]["who"] == "root" and deleted[-1]["request"]
    assert any(line["audit"] == "login-failed" for line in lines)
    text = house.audit_file.read_text()
    assert "wrong-token" not in text and "correct horse" not in text
    assert all(caller.headers["Authorization"].split()[1] not in text for caller in (house.admin, house.limited))


# browsers

PAGE = {"Accept": "text/html,*/*;q=0.8", "Sec-Fetch-Mode": "navigate"}


def form_of(answer: Answer) -> str:
    return re.search(r'name="form" value="([^"]+)"', answer.body.decode())[1]


def cookie_of(answer: Answer, name: str) -> str:
    return next(cookie for cookie in answer.cookies if name in cookie).partition(";")[0]


def sign_in(server: Served, name: str, password: str, **others: str) -> Answer:
    browser = Caller(server)
    page = browser("GET", "/login", headers=PAGE)
    assert page.status == 200
    fields = {"form": form_of(page), "name": name, "password": password, **others}
    headers = {
        "Content-Type": "application/x-www-form-urlencoded",
        "Cookie": cookie_of(page, "login"),
        "Origin": server.url,
        "Sec-Fetch-Site": "same-origin",
        **PAGE,
    }
    return browser("POST", "/login", urlencode(fields).encode(), headers)


def test_browsers_are_led_to_the_form_and_programs_are_not(house):
    """A page asked for without credentials leads to /login; an API client gets 401 as ever."""
    browser = Caller(house.server)
    answer = browser("GET", f"{API}/experiments/get?experiment_id=0", headers=PAGE)
    assert answer.status == 303 and "www-authenticate" not in answer.headers
    assert answer.headers["location"] == "/login?next=/api/2.0/mlflow/experiments/get%3Fexperiment_id%3D0"
    assert browser("GET", f"{API}/experiments/get?experiment_id=0").headers["www-authenticate"].startswith("Basic")
    assert browser("POST", f"{API}/experiments/search", {"max_results": 1}, PAGE).status == 401


def test_the_form_is_strict(house):
    """No scripts, no frames, no caching, cookies that scripts cannot read."""
    page = Caller(house.server)("GET", "/login", headers=PAGE)
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "form-action 'self'" in policy and "unsafe-inline" not in policy
    assert page.headers["x-frame-options"] == "DENY" and page.headers["cache-control"] == "no-store"
    assert b"<script" not in page.body
    (cookie,) = page.cookies
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    hostile = Caller(house.server)("GET", '/login?next="><script>alert(1)</script>'.replace(" ", "%20"), headers=PAGE)
    assert b"<script" not in hostile.body


def test_a_session_from_log_in_to_log_out(house):
    """The cookie opens what the user may do, from our own pages only, until it is signed out."""
    done = sign_in(house.server, "ada", "correct horse 1", next="/metrics")
    assert done.status == 303 and done.headers["location"] == "/metrics"
    cookie = cookie_of(done, "session")
    assert "HttpOnly" in "".join(done.cookies) and "correct" not in "".join(done.cookies)
    browser = Caller(house.server, {"Cookie": cookie})
    seen = browser("GET", f"{API}/experiments/get?experiment_id=0")
    assert seen.status == 200 and seen.headers["cache-control"] == "private, no-store"
    tag = {"experiment_id": "0", "key": "k", "value": "v"}
    path = f"{API}/experiments/set-experiment-tag"
    origin = house.server.url
    assert browser("POST", path, tag).status == 403
    assert browser("POST", path, tag, {"Origin": "http://evil.example"}).status == 403
    assert browser("POST", path, tag, {"Origin": "null"}).status == 403
    assert browser("POST", path, tag, {"Origin": origin, "Sec-Fetch-Site": "same-site"}).status == 403
    assert browser("POST", "/", b"SELECT 1", {"Sec-Fetch-Site": "cross-site"}).status == 403
    assert browser("POST", path, tag, {"Origin": origin}).status == 200
    assert browser("POST", path, tag, {"Sec-Fetch-Site": "same-origin"}).status == 200
    account = browser("GET", "/login", headers=PAGE)
    assert b"signed in as ada" in account.body
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Origin": origin}
    assert browser("POST", "/logout", b"form=wrong", headers).status == 403
    out = browser("POST", "/logout", urlencode({"form": form_of(account)}).encode(), headers)
    assert out.status == 303 and "Max-Age=0" in out.cookies[0]
    assert browser("GET", f"{API}/experiments/get?experiment_id=0").status == 401
    acts = [line["audit"] for line in house.audited() if line.get("user") == "ada"]
    assert acts[-2:] == ["login", "logout"]


def test_a_foreign_form_cannot_sign_in(house):
    """A form that was not made for this browser opens nothing, even with the right password."""
    browser = Caller(house.server)
    page = browser("GET", "/login", headers=PAGE)
    body = urlencode({"form": form_of(page), "name": "ada", "password": "correct horse 1"}).encode()
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    assert browser("POST", "/login", body, kind).status == 403
    assert browser("POST", "/login", body, kind | {"Cookie": "runstream_login=x"}).status == 403
    cookie = {"Cookie": cookie_of(page, "login")}
    assert browser("POST", "/login", body, kind | cookie | {"Origin": "http://evil.example"}).status == 403
    assert browser("POST", "/login", body, kind | cookie | {"Sec-Fetch-Site": "cross-site"}).status == 403
    assert browser("POST", "/login", body, {"Content-Type": "text/plain"} | cookie).status == 403
    assert browser("POST", "/login", b"x" * 20_000, kind | cookie).status == 413
    assert browser("POST", "/login", body, kind | cookie).status == 303


def test_a_session_ends_when_the_user_is_revoked(house):
    """Taking the user away closes the browser's session within a second."""
    AuthFile.change(house.auth_file, lambda content: content.add_user("bob", "correct horse 3", "read"))
    deadline = time.monotonic() + 20
    while (done := sign_in(house.server, "bob", "correct horse 3")).status != 303:
        assert time.monotonic() < deadline, "the new user cannot sign in"
    browser = Caller(house.server, {"Cookie": cookie_of(done, "session")})
    assert browser("GET", f"{API}/experiments/get?experiment_id=0").status == 200
    AuthFile.change(house.auth_file, lambda content: content.revoke("bob"))
    while browser("GET", f"{API}/experiments/get?experiment_id=0").status != 401:
        assert time.monotonic() < deadline, "the session outlives its user"
    told = [line["about"] for line in house.audited() if line["audit"] == "users-changed"]
    assert "user bob removed" in told


def test_guessing_is_slowed_down(house):
    """After some wrong passwords the next one is not looked at, in the form and in headers alike."""
    import base64

    for index in range(40):
        answer = sign_in(house.server, "eve", f"wrong {index}")
        if answer.status == 429:
            break
        assert answer.status == 403 and b"wrong" in answer.body
    assert answer.status == 429 and int(answer.headers["retry-after"]) >= 1
    header = base64.b64encode(b"eve:correct horse 2").decode()
    refused = Caller(house.server, {"Authorization": f"Basic {header}"})("GET", f"{API}/runs/get?run_id=x")
    assert refused.status == 429 and refused.json["error_code"] == "REQUEST_LIMIT_EXCEEDED"
    assert sign_in(house.server, "ada", "correct horse 1").status == 303, "another user at the same address may"
