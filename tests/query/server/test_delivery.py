"""What the server makes of posted events: streams, keys, sizes, damage, bombs, roles."""

from __future__ import annotations

import gzip
import http.client
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import lz4.frame
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from runstream_query.api.backend import Backend
from runstream_query.api.state import ExperimentState, RunState
from runstream_query.server.delivery import Checked, RefusedEventError, Touched, checked
from runstream_query.server.principal import Principal
from runstream_schemas import codec
from runstream_schemas.delivery import CONTENT_TYPE, EVENTS_PATH, MAX_REQUEST_BYTES, MAX_REQUEST_EVENTS, POSITIONS_PATH
from runstream_schemas.limits import MAX_BODY_BYTES
from runstream_schemas.names import CONTROL, METRICS, EventName
from runstream_schemas.segment import Frame, encode_frame
from tests.services.delivery_server import delivery_server

RUN = "a" * 32
TAGS: dict[str, Any] = {"run_id": RUN, "keys": ["k"], "values": ["v"], "time_ms": 1, "seq": 1, "writer": 1}
BATCH: dict[str, Any] = {
    "run_id": RUN, "writer": 1, "first_seq": 0, "sent_at": 1, "keys": ["loss"], "steps": [1], "times": [1], "ki": [0],
    "ci": [0], "values": [0.5],
}  # fmt: skip


def frame(name: EventName, fields: dict[str, Any], key: str = RUN) -> bytes:
    return encode_frame(1, codec.current(name).fingerprint, key, codec.encode(name, fields))


def as_frame(name: EventName, fields: dict[str, Any], key: str = RUN) -> Frame:
    return Frame(0, 1, 1, codec.current(name).fingerprint, key, codec.encode(name, fields))


class Role:
    """Gives every request a principal, as the gateway does."""

    def __init__(self, app: ASGIApp, role: list[Any]) -> None:
        self._app, self._role = app, role

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["runstream_principal"] = Principal("someone", self._role[0])
        await self._app(scope, receive, send)


class Posting:
    """A server, and how to talk to it raw."""

    def __init__(self, url: str, role: list[Any]) -> None:
        self.address = urlsplit(url).netloc
        self.role = role

    def post(self, body: bytes, encoding: str = "", content_type: str = CONTENT_TYPE) -> tuple[int, dict[str, Any]]:
        headers = {"Content-Type": content_type} | ({"Content-Encoding": encoding} if encoding else {})
        return self._ask("POST", EVENTS_PATH, body, headers)

    def ends(self) -> dict[str, int]:
        """Bytes in the log, by stream."""
        status, answer = self._ask("GET", POSITIONS_PATH, None, {})
        assert status == 200
        return {entry["stream"]: entry["next_offset"] for entry in answer["positions"]}

    def _ask(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection(self.address, timeout=20)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Posting]:
    role: list[Any] = ["write"]
    log = tmp_path_factory.mktemp("delivery") / "data" / "log"
    with delivery_server(log, wrap=lambda app: Role(app, role)) as url:
        yield Posting(url, role)


@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress, lz4.frame.compress])
def test_events_go_to_the_stream_of_their_schema(server: Posting, pack: Callable[[bytes], bytes]) -> None:
    """A metric batch to metrics, a tag to control, in every coding; the answer says where the log stands."""
    before = server.ends()
    encoding = {"compress": "lz4" if pack is lz4.frame.compress else "gzip"}.get(pack.__name__, "")
    status, answer = server.post(pack(frame("metric_batch", BATCH) + frame("run_tags", TAGS)), encoding)
    assert status == 200, answer
    after = server.ends()
    assert after[METRICS] > before[METRICS] and after[CONTROL] > before[CONTROL]
    assert {entry["stream"]: entry["next_offset"] for entry in answer["positions"]} == after


REFUSED: dict[str, bytes] = {
    "an unknown schema": encode_frame(1, b"\1" * 8, RUN, b"x"),
    "a metric batch under another run's key": frame("metric_batch", BATCH, "b" * 32),
    "a tag under another run's key": frame("run_tags", TAGS, "b" * 32),
    "no key": frame("run_tags", TAGS, ""),
    "a key of 257 characters": frame("run_tags", {**TAGS, "run_id": "x" * 257}, "x" * 257),
    "a tag's body under the schema of a param": encode_frame(
        1, codec.current("experiment_created").fingerprint, RUN, codec.encode("run_tags", TAGS)
    ),
    "bytes behind the body": encode_frame(
        1, codec.current("run_tags").fingerprint, RUN, codec.encode("run_tags", TAGS) + b"\0"
    ),
    "a body that is too large": encode_frame(
        1, codec.current("metric_batch").fingerprint, RUN, codec.encode("metric_batch", BATCH) + bytes(MAX_BODY_BYTES)
    ),
    "a purge by somebody who is no admin": frame(
        "purged", {"kind": "run", "id": RUN, "time_ms": 1, "seq": 1, "writer": 1}
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_can_never_be_taken_is_named_and_nothing_stays(server: Posting, what: str) -> None:
    """422 with the index; the good event beside it is not appended either: the client sends it again alone."""
    before = server.ends()
    status, answer = server.post(frame("run_tags", TAGS) + REFUSED[what])
    assert status == 422, answer
    assert [entry["index"] for entry in answer["refused"]] == [1]
    assert answer["refused"][0]["reason"] and answer["error_code"] == "INVALID_PARAMETER_VALUE"
    assert server.ends() == before


def test_an_admin_may_purge(server: Posting) -> None:
    """The same event that the role write may not send."""
    server.role[0] = "admin"
    try:
        assert server.post(REFUSED["a purge by somebody who is no admin"])[0] == 200
    finally:
        server.role[0] = "write"


WHOLE = frame("run_tags", TAGS)


@pytest.mark.parametrize(
    ("body", "encoding", "status"),
    [
        (WHOLE[:-1], "", 400),
        (WHOLE[:-3] + b"xxx", "", 400),
        (b"junk" + WHOLE, "", 400),
        (gzip.compress(WHOLE)[:-4], "gzip", 400),
        (gzip.compress(WHOLE) + b"more", "gzip", 400),
        (lz4.frame.compress(WHOLE)[:-4], "lz4", 400),
        (lz4.frame.compress(WHOLE) + b"more", "lz4", 400),
        (b"no lz4", "lz4", 400),
        (WHOLE, "br", 400),
        (gzip.compress(bytes(1 << 28)), "gzip", 413),
        (lz4.frame.compress(bytes(1 << 28)), "lz4", 413),
        (bytes(MAX_REQUEST_BYTES + 1), "", 413),
        (WHOLE * (MAX_REQUEST_EVENTS + 1), "", 413),
        # Each header claims what makes the search behind it long: without a bound this took hours.
        ((b"RSF1" + bytes(4) + (1 << 23).to_bytes(4, "little") + bytes(20)) * 300_000, "", 400),
    ],
    ids=range(14),
)  # fmt: skip
def test_damage_and_bombs_are_refused(server: Posting, body: bytes, encoding: str, status: int) -> None:
    """Cut, changed or lengthened bodies, unknown codings, and bodies that unpack to more than may be."""
    before = server.ends()
    found, answer = server.post(body, encoding)
    assert (found, "refused" in answer) == (status, False), answer
    assert server.ends() == before


def test_nothing_and_other_content(server: Posting) -> None:
    """An empty body appends nothing; another content type is 415, so that no page's form can post here."""
    assert server.post(b"") == (200, {"positions": []})
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        assert server.post(WHOLE, content_type=content_type)[0] == 415


def test_experiment_events_share_one_partition() -> None:
    """Partition 0 follows from the schema, whatever the sender says."""
    experiment = {
        "experiment_id": "7",
        "name": "e",
        "artifact_uri": "",
        "created_at": 1,
        "time_ms": 1,
        "seq": 1,
        "writer": 1,
    }
    assert checked(as_frame("experiment_created", experiment, "7")).event.first_partition
    assert not checked(as_frame("run_tags", TAGS)).event.first_partition
    with pytest.raises(RefusedEventError):
        checked(as_frame("experiment_created", experiment, "8"))


@pytest.mark.parametrize(
    ("name", "fields", "key", "runs", "experiments", "lifecycles"),
    [
        ("metric_batch", BATCH, RUN, set(), set(), set()),
        ("run_tags", TAGS, RUN, {RUN}, set(), set()),
        ("run_updated", {"run_id": RUN, "time_ms": 1, "seq": 1, "writer": 1}, RUN, {RUN}, set(), set()),
        (
            "experiment_updated",
            {"experiment_id": "7", "lifecycle_stage": "deleted", "time_ms": 1, "seq": 1, "writer": 1},
            "7", set(), {"7"}, {"7"},
        ),
        ("purged", {"kind": "run", "id": RUN, "time_ms": 1, "seq": 1, "writer": 1}, RUN, {RUN}, set(), set()),
        ("purged", {"kind": "experiment", "id": "7", "time_ms": 1, "seq": 1, "writer": 1}, "7", set(), set(), {"7"}),
    ],
)  # fmt: skip
def test_what_the_server_must_read_anew(
    name: EventName, fields: dict[str, Any], key: str, runs: set[str], experiments: set[str], lifecycles: set[str]
) -> None:
    """Each event names the runs and experiments whose remembered state it changes."""
    touched = Touched()
    found: Checked = checked(as_frame(name, fields, key))
    found.touch(touched)
    assert (touched.runs, touched.experiments, touched.lifecycles) == (runs, experiments, lifecycles)


def test_state_that_the_server_remembers_is_read_anew(tmp_path: Path) -> None:
    """A posted event drops what the server has cached of its run, or of its experiment and all runs in it; no other."""
    held: dict[str, Any] = {}
    with delivery_server(tmp_path / "data" / "log", held=held) as url:
        backend: Backend = held["backend"]
        posting = Posting(url, ["admin"])

        def remembered() -> set[str]:
            for run_id, experiment in (("a" * 32, "7"), ("b" * 32, "7"), ("c" * 32, "8")):
                backend.remember_run(RunState(run_id, experiment, "", "", "RUNNING", 1, None, "", "active"))
            for experiment in ("7", "8"):
                backend.remember_experiment(ExperimentState(experiment, experiment, "", "active", 1, 1))
            return {"a" * 32, "b" * 32, "c" * 32, "7", "8"}

        def left() -> set[str]:
            return {*backend._runs, *backend._experiments}

        everything = remembered()
        assert posting.post(frame("metric_batch", BATCH))[0] == 200
        assert left() == everything
        assert posting.post(frame("run_tags", TAGS))[0] == 200
        assert left() == everything - {"a" * 32}
        remembered()
        deleted = {"experiment_id": "7", "lifecycle_stage": "deleted", "time_ms": 1, "seq": 1, "writer": 1}
        assert posting.post(frame("experiment_updated", deleted, "7"))[0] == 200
        assert left() == {"c" * 32, "8"}


def test_long_unicode_keys_are_compared_as_avro_writes_them(tmp_path: Path) -> None:
    """A run id of 256 wide characters has a length of two bytes in front."""
    key = "ü" * 256
    assert checked(as_frame("metric_batch", {**BATCH, "run_id": key}, key)).event.key == key
    with pytest.raises(RefusedEventError):
        checked(as_frame("metric_batch", {**BATCH, "run_id": key}, "ü" * 255))
