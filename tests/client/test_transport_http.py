"""Posting to a server that refuses, is busy, or is gone: what reaches the journal, and how often."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from runstream.config import Settings
from runstream.errors import SettingsError
from runstream.journal.recovery import recover
from runstream.recorder import Recorder
from runstream.remote.login import Login
from runstream.remote.server import Server, host_mark
from runstream.transport import Event, TransportError
from runstream.transport.directory import DirectoryTransport
from runstream.transport.http import HttpTransport
from runstream.transport.server import ServerTransport, direct_transport
from runstream_schemas import codec
from runstream_schemas.delivery import CONTENT_TYPE, EVENTS_PATH, decompress
from runstream_schemas.names import METRICS
from runstream_schemas.place import make_proof
from runstream_schemas.segment import Frame, read_frames
from tests.services.delivery_server import delivery_server
from tests.services.kafka_security import TestAuthority

from .directory_log import logged

SECONDS = 20.0
FINGERPRINT = codec.current("metric_batch").fingerprint
Reply = tuple[int, dict[str, str], Any]
OK: Reply = (200, {}, {"positions": [{"stream": "metrics", "partition": 0, "next_offset": 7}]})


class Script:
    """A server that answers each POST of events with the next of `replies` (the last for ever)."""

    def __init__(self) -> None:
        self.replies: list[Reply | Callable[[list[Frame]], Reply]] = [OK]
        self.requests: list[tuple[float, list[Frame], dict[str, str]]] = []
        self.info: dict[str, Any] = {"delivery": {"encodings": ["lz4", "gzip", "identity"]}}
        self.open: list[socket.socket] = []
        script = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                script.open.append(self.request)

            def do_GET(self) -> None:
                self._answer(200, {}, script.info)

            def do_POST(self) -> None:
                assert self.path == EVENTS_PATH and self.headers["Content-Type"] == CONTENT_TYPE
                body = self.rfile.read(int(self.headers["Content-Length"]))
                frames = list(read_frames(decompress(body, self.headers["Content-Encoding"]), 0))
                script.requests.append((time.monotonic(), frames, dict(self.headers)))  # type: ignore[arg-type]
                reply = script.replies[0] if len(script.replies) == 1 else script.replies.pop(0)
                self._answer(*(reply(frames) if callable(reply) else reply))  # type: ignore[arg-type]

            def _answer(self, status: int, headers: dict[str, str], content: Any) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def close(self) -> None:
        if self._thread.is_alive():
            self._http.shutdown()
            self._thread.join()
            self._http.server_close()

    def drop_connections(self) -> None:
        """As a restart does, and a server that finds a connection idle for too long."""
        for connection in self.open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.open.clear()

    @property
    def bodies(self) -> list[bytes]:
        return [frame.body for _, frames, _ in self.requests for frame in frames]


@pytest.fixture
def script() -> Iterator[Script]:
    made = Script()
    yield made
    made.close()


def settings_of(url: str, tmp_path: Path) -> Settings:
    return Settings.from_environment(
        {"RUNSTREAM_JOURNAL_DIR": str(tmp_path / "journal"), "RUNSTREAM_DELIVERY": "server"}, tracking_uri=url
    )


def transport_to(url: str, tmp_path: Path) -> HttpTransport:
    return HttpTransport(Server(settings_of(url, tmp_path)), encodings=("lz4", "gzip"))


def event(number: int, size: int = 10) -> Event:
    return Event(METRICS, "run", FINGERPRINT, f"{number:0{size}}".encode())


@pytest.mark.parametrize(
    ("reply", "said", "retryable", "rest"),
    [
        ((401, {}, {}), "wants a login", True, 30.0),
        ((403, {}, {"message": "This needs the role write"}), "This needs the role write", True, 30.0),
        ((429, {"Retry-After": "7"}, {"message": "busy"}), "busy", True, 7.0),
        ((503, {"Retry-After": "100000"}, {}), "503", True, 300.0),
        ((500, {}, {}), "500", True, None),
        ((400, {}, {"message": "damaged"}), "damaged", True, None),
        ((301, {"Location": "https://elsewhere/"}, {}), "https://elsewhere/", True, None),
        ((404, {}, {}), "knows no", True, None),
        ((200, {}, {"no": "positions"}), "not that of a runstream server", True, None),
        ((422, {}, {"refused": [{"index": 0, "reason": "unknown schema"}]}), "unknown schema", False, None),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_refusals_say_what_to_do_and_whether_to_try_again(
    script: Script, tmp_path: Path, reply: Reply, said: str, retryable: bool, rest: float | None
) -> None:
    """Only an event that is named as refused is given up; everything else stays in the journal."""
    script.replies = [reply]
    transport = transport_to(script.url, tmp_path)
    with pytest.raises(TransportError, match=said) as caught:
        transport.send([event(1)]).result(SECONDS)
    assert caught.value.retryable is retryable
    assert caught.value.retry_after_seconds == rest
    transport.close(1.0)


def test_a_server_that_asks_for_rest_gets_it(script: Script, tmp_path: Path) -> None:
    """Between a 429 and the next request lies what Retry-After says, also while somebody waits in flush."""
    script.replies = [(429, {"Retry-After": "1"}, {}), OK]
    recorder = Recorder(settings_of(script.url, tmp_path))
    recorder.run_channel("run").log_metric("loss", 1.0)
    assert recorder.flush(SECONDS).complete
    assert len(script.requests) == 2
    assert 1.0 <= script.requests[1][0] - script.requests[0][0] < 5.0
    recorder.close(SECONDS)


def test_one_refused_event_does_not_hold_up_the_others(
    script: Script, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is found, kept aside and counted; what was logged before and after it arrives."""
    tag = codec.current("run_tags").fingerprint

    def judge(frames: list[Frame]) -> Reply:
        bad = [index for index, frame in enumerate(frames) if b"poison" in frame.body]
        if bad:
            return 422, {}, {"refused": [{"index": index, "reason": "never"} for index in bad]}
        return OK

    script.replies = [judge]
    recorder = Recorder(settings_of(script.url, tmp_path))
    for value in ("before", "poison", "after"):
        recorder.control("run_tags", {"run_id": "run", "keys": ["k"], "values": [value]})
    recorder.run_channel("run").log_metric("loss", 1.0)
    report = recorder.flush(SECONDS)
    assert report.complete and report.refused_events == 1 and "never" in str(report.last_error)
    accepted = [frame for _, frames, _ in script.requests for frame in frames if b"poison" not in frame.body]
    tags = [codec.decode(tag, frame.body)[1] for frame in accepted if frame.fingerprint == tag]
    assert {"before", "after"} <= {fields["values"][0] for fields in tags}
    assert any(frame.fingerprint == FINGERPRINT for frame in accepted)
    assert sum("refuses an event" in record.message for record in caplog.records) == 1
    recorder.close(SECONDS)


def test_a_login_that_is_refused_is_told_once(script: Script, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One warning, and flush says why; nothing is lost: with a right login all of it arrives."""
    script.replies = [(401, {}, {})]
    settings = settings_of(script.url, tmp_path)
    recorder = Recorder(settings)
    recorder.run_channel("run").log_metric("loss", 1.0)
    for _ in range(3):
        report = recorder.flush(0.5)
        assert not report.complete and "RUNSTREAM_TRACKING_TOKEN" in str(report.last_error)
    with caplog.at_level(logging.WARNING):
        recorder.close(0.5)
    assert sum("delivery fails" in record.message for record in caplog.records) == 1
    assert len(script.requests) == 1, "it is not hammered"
    script.replies = [OK]
    report = recover(settings, SECONDS)
    assert report.points == 1 and not report.unfinished


def test_what_a_proxy_finds_too_large_is_sent_in_parts(script: Script, tmp_path: Path) -> None:
    """413 halves the requests until they pass; a single event that does not pass is refused for good."""

    def limited(frames: list[Frame]) -> Reply:
        return OK if sum(len(frame.body) for frame in frames) < 200_000 else (413, {}, {})

    script.replies = [limited]
    transport = transport_to(script.url, tmp_path)
    events = [event(number, 20_000) for number in range(40)]
    for _ in range(10):
        try:
            transport.send(events).result(SECONDS)
            break
        except TransportError as exc:
            assert exc.retryable
    else:
        raise AssertionError("never small enough")
    assert set(script.bodies) == {item.body for item in events}
    with pytest.raises(TransportError) as caught:
        transport.send([event(1, 300_000)]).result(SECONDS)
    assert not caught.value.retryable
    transport.close(1.0)


def test_what_gathers_while_a_request_is_under_way_goes_together(script: Script, tmp_path: Path) -> None:
    """100 sends behind a slow answer need few requests, and their order is kept."""
    gate = threading.Event()

    def slow(_: list[Frame]) -> Reply:
        assert gate.wait(SECONDS)
        return OK

    script.replies = [slow]
    transport = transport_to(script.url, tmp_path)
    receipts = [transport.send([event(number)]) for number in range(100)]
    with pytest.raises(TimeoutError):
        receipts[0].result(0.01)
    gate.set()
    for receipt in receipts:
        receipt.result(SECONDS)
    assert script.bodies == [event(number).body for number in range(100)]
    assert len(script.requests) <= 3
    transport.close(1.0)


def test_an_idle_connection_that_the_server_closed_is_no_failure(script: Script, tmp_path: Path) -> None:
    """The request goes again over a new one; a server that is gone is an error to try again later."""
    transport = transport_to(script.url, tmp_path)
    transport.send([event(1)]).result(SECONDS)
    script.drop_connections()
    transport.send([event(2)]).result(SECONDS)
    assert script.bodies == [event(1).body, event(2).body]
    script.close()
    script.drop_connections()
    with pytest.raises(TransportError, match="cannot be reached") as caught:
        transport.send([event(3)]).result(SECONDS)
    assert caught.value.retryable
    transport.close(1.0)


def test_real_server_takes_what_the_recorder_logs(tmp_path: Path) -> None:
    """Through the real routes: every point once, positions as the log has them."""
    log = tmp_path / "data" / "log"
    with delivery_server(log) as url:
        recorder = Recorder(settings_of(url, tmp_path))
        channel = recorder.run_channel("a" * 32)
        for step in range(5_000):
            channel.log_metric("loss", step, step)
        recorder.control("run_tags", {"run_id": "a" * 32, "keys": ["k"], "values": ["v"]})
        report = recorder.close(SECONDS)
    assert report.complete and report.delivered_points == 5_000
    assert report.positions == DirectoryTransport(log).end_positions(1.0)


def test_a_forked_child_delivers_by_itself(tmp_path: Path) -> None:
    """Parent and child log on after a fork between two deliveries: everything of both arrives, each point once."""
    log = tmp_path / "data" / "log"
    with delivery_server(log) as url:
        code = f"""
import os, sys
from pathlib import Path
from runstream.config import Settings
from runstream.recorder import Recorder
recorder = Recorder(Settings.from_environment(tracking_uri={url!r}))
channel = recorder.run_channel("a" * 32)
channel.log_metric("parent", 1.0)
assert recorder.flush(20).complete
pid = os.fork()
if pid == 0:
    channel.log_metric("child", 2.0)
    done = recorder.flush(20).complete
    recorder.close(20)
    os._exit(0 if done else 1)
channel.log_metric("parent", 3.0)
assert recorder.flush(20).complete
assert os.waitpid(pid, 0)[1] == 0
recorder.close(20)
"""
        environment = {"RUNSTREAM_DELIVERY": "server", "RUNSTREAM_JOURNAL_DIR": str(tmp_path / "journal")}
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
    values = [value for name, fields in logged(log.parent) if name == "metric_batch" for value in fields["values"]]
    assert sorted(values) == [1.0, 2.0, 3.0]


def test_https_with_an_authority_of_ones_own(tmp_path: Path) -> None:
    """Trusted by name it works; without, the error names the variable; the insecure setting takes anything."""
    authority = TestAuthority(tmp_path / "tls")
    pair = (tmp_path / "tls" / "server.crt", tmp_path / "tls" / "server.key")
    with delivery_server(tmp_path / "data" / "log", tls=pair) as url:

        def sent(environment: dict[str, str]) -> None:
            server = Server(settings_of(url, tmp_path))
            server.login = Login.from_environment(url, environment)
            transport = HttpTransport(server)
            fields = {"run_id": "r", "keys": [], "values": [], "time_ms": 1, "seq": 1, "writer": 1}
            try:
                body = codec.encode("run_tags", fields)
                transport.send([Event("control", "r", codec.current("run_tags").fingerprint, body)]).result(SECONDS)
            finally:
                transport.close(1.0)

        with pytest.raises(TransportError, match="RUNSTREAM_TRACKING_CA_FILE"):
            sent({})
        sent({"RUNSTREAM_TRACKING_CA_FILE": str(authority.authority)})
        sent({"RUNSTREAM_TRACKING_INSECURE_TLS": "1"})


def test_a_proxy_of_the_environment_is_used_but_for_loopback(
    script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A server elsewhere is asked for through HTTP_PROXY, with the whole URL; one here never, nor one in NO_PROXY."""
    seen: list[str] = []

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            body = b'{"positions": []}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_port}")
            monkeypatch.setenv("no_proxy", "")
            away = transport_to("http://tracking.example:5000/prefix", tmp_path)
            assert away.end_positions(5.0) == {}
            away.close(1.0)
            assert seen == ["http://tracking.example:5000/prefix/api/runstream/1.0/positions"]
            transport_to(script.url, tmp_path).send([event(1)]).result(SECONDS)
            assert len(seen) == 1 and script.bodies == [event(1).body]
            monkeypatch.setenv("no_proxy", "nowhere.invalid")
            with pytest.raises(TransportError):
                transport_to("http://nowhere.invalid:5000", tmp_path).end_positions(5.0)
            assert len(seen) == 1
        finally:
            proxy.shutdown()
            thread.join()


def test_secrets_show_nowhere(script: Script, tmp_path: Path) -> None:
    """Not in a repr, not in an error; but in the header."""
    environment = {"RUNSTREAM_TRACKING_TOKEN": "rst_secret", "RUNSTREAM_TRACKING_USERNAME": "u"}
    login = Login.from_environment(script.url, environment)
    assert login.headers() == {"Authorization": "Bearer rst_secret"}
    assert login.as_password == ("token", "rst_secret")
    assert "secret" not in repr(login)
    pair = {"RUNSTREAM_TRACKING_USERNAME": "u", "RUNSTREAM_TRACKING_PASSWORD": "pä:ss"}
    other = Login.from_environment("http://h", pair)
    assert other.headers()["Authorization"].startswith("Basic ") and "pä" not in repr(other)


@pytest.mark.parametrize(
    "environment",
    [
        {"RUNSTREAM_TRACKING_USERNAME": "u"},
        {"RUNSTREAM_TRACKING_PASSWORD": "hidden"},
        {"RUNSTREAM_TRACKING_TOKEN": "hid\nden"},
        {"RUNSTREAM_TRACKING_CA_FILE": "/nowhere/ca.pem"},
        {"RUNSTREAM_TRACKING_USERNAME": "a:b", "RUNSTREAM_TRACKING_PASSWORD": "hidden"},
    ],
)
def test_half_a_login_is_an_error_that_names_the_variable(environment: dict[str, str]) -> None:
    """And never the secret."""
    with pytest.raises(SettingsError, match="RUNSTREAM_TRACKING_") as caught:
        Login.from_environment("http://h", environment)
    assert "hid" not in str(caught.value)


def test_credentials_of_mlflow_are_for_the_same_server_only() -> None:
    """They do as a fall-back, unless MLFLOW_TRACKING_URI says that they are another server's."""
    token = {"MLFLOW_TRACKING_TOKEN": "t"}
    assert Login.from_environment("http://h", token).token == "t"
    assert Login.from_environment("http://h", token | {"MLFLOW_TRACKING_URI": "http://h/"}).token == "t"
    assert not Login.from_environment("http://h", token | {"MLFLOW_TRACKING_URI": "http://other"}).given
    own = token | {"RUNSTREAM_TRACKING_USERNAME": "u", "RUNSTREAM_TRACKING_PASSWORD": "p"}
    assert Login.from_environment("http://h", own).token is None


@pytest.mark.parametrize(
    "uri", ["http://user:hidden@h", "http://h?a=hidden", "http://h#x", "http://h:port", "https://"]
)
def test_addresses_that_must_not_be_stored(uri: str) -> None:
    """A login in the address would lie in journals and messages."""
    with pytest.raises(SettingsError) as caught:
        Settings.from_environment({}, tracking_uri=uri)
    assert "user:hidden" not in str(caught.value)


def test_a_folder_of_another_machine_is_not_written_to(script: Script, tmp_path: Path) -> None:
    """The server's path exists here too, but another word lies in it, or none: events go through the server."""
    (tmp_path / "data" / "log").mkdir(parents=True)
    place = {"uri": (tmp_path / "data").as_uri(), "proof": "0" * 32}
    script.info = {"host": "x", "log": place, "delivery": {"encodings": ["gzip"]}}
    settings = Settings.from_environment({}, tracking_uri=script.url)
    server = Server(settings)
    transport, why = direct_transport(server.info())
    assert transport is None and "another machine" in why
    both = ServerTransport(settings, server)
    both.send([event(1)]).result(SECONDS)
    assert script.bodies == [event(1).body] and "through" in both.way
    both.close(1.0)


def near(script: Script, tmp_path: Path, *, authentication: bool) -> ServerTransport:
    """A transport to a server whose data directory is this machine's."""
    data = tmp_path / "data"
    (data / "log").mkdir(parents=True)
    script.info = {
        "authentication": authentication,
        "host": host_mark(),
        "log": {"uri": data.as_uri(), "proof": make_proof(data)},
        "delivery": {"encodings": ["gzip"]},
    }
    settings = Settings.from_environment({}, tracking_uri=script.url)
    return ServerTransport(settings, Server(settings))


@pytest.mark.parametrize("authentication", [True, False])
def test_administrative_events_go_through_a_server_with_authentication(
    script: Script, tmp_path: Path, authentication: bool
) -> None:
    """Though the log can be reached; all else goes straight, and one receipt covers both."""
    fields = {"experiment_id": "7", "lifecycle_stage": "deleted", "time_ms": 1, "seq": 1, "writer": 1}
    body = codec.encode("experiment_updated", fields)
    deletion = Event("control", "7", codec.current("experiment_updated").fingerprint, body, True)
    transport = near(script, tmp_path, authentication=authentication)
    positions = transport.send([event(1), deletion]).result(SECONDS)
    assert script.bodies == ([body] if authentication else [])
    straight = DirectoryTransport(tmp_path / "data" / "log").end_positions(1.0)
    assert straight[METRICS, 0] > 0 and (straight["control", 0] > 0) is not authentication
    assert positions[METRICS, 0] == straight[METRICS, 0] if not authentication else (METRICS, 0) in positions
    transport.close(1.0)


def test_a_direct_way_that_fails_is_left_for_the_server(script: Script, tmp_path: Path) -> None:
    """After three failures in a row, each of which the journal makes good, events are posted."""
    transport = near(script, tmp_path, authentication=False)
    transport.send([event(1)]).result(SECONDS)
    assert not script.bodies
    shutil.rmtree(tmp_path / "data")
    for _ in range(3):
        with pytest.raises(TransportError) as caught:
            transport.send([event(2)]).result(SECONDS)
        assert caught.value.retryable
    transport.send([event(2)]).result(SECONDS)
    assert script.bodies == [event(2).body] and "the direct way failed" in transport.way
    transport.close(1.0)


@pytest.mark.parametrize("uri", ["kafka://127.0.0.1:1/p", "kafka://no-such-host.invalid:9092/p"])
def test_brokers_out_of_reach_are_found_out_quickly(script: Script, tmp_path: Path, uri: str) -> None:
    """Nobody listens, or the name is not known: within seconds events go through the server."""
    script.info = {"log": {"uri": uri}, "delivery": {"encodings": ["gzip"]}}
    settings = Settings.from_environment({}, tracking_uri=script.url)
    transport = ServerTransport(settings, Server(settings))
    began = time.monotonic()
    transport.send([event(1)]).result(SECONDS)
    assert time.monotonic() - began < 10.0
    assert script.bodies == [event(1).body] and "cannot be reached" in transport.way
    transport.close(1.0)
