"""The parts of the REST API that need no server: wire, paths, events, page tokens, users and tokens."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="needs the server: pip install 'runstream[server]'")

from runstream_query.api.artifact_root import ArtifactRoot, below, clean_path
from runstream_query.api.errors import STATUS_OF, ApiError
from runstream_query.api.event import Clock, metric_batch, value_seq
from runstream_query.api.metrics import BatchMetric, LogMetric, _plain_metric, _plain_points
from runstream_query.api.search_text import page_offset, page_token
from runstream_query.api.wire import parse
from runstream_query.server.auth import AuthFile, AuthFileError
from runstream_query.server.authenticator import Authenticator
from runstream_query.server.gateway import needed_role
from runstream_query.server.problems import as_api_error
from runstream_query.server.settings import ServerSettings
from runstream_schemas import codec


@given(st.text(max_size=40) | st.from_regex(r"(\.\.|%2e|%25|/|\\|a|\.){1,12}", fullmatch=True))
def test_a_clean_path_stays_inside(path: str) -> None:
    """Whatever comes in, what passes is relative, in normal form and climbs nowhere, also after decoding."""
    try:
        clean = clean_path(path)
    except ApiError as exc:
        assert exc.code == "INVALID_PARAMETER_VALUE"
        return
    assert not clean.startswith("/") and "\\" not in clean and "\0" not in clean
    assert ".." not in clean.split("/")
    assert (Path("/root") / clean).resolve().is_relative_to("/root")


@given(st.floats(), st.floats())
def test_points_are_told_apart_by_their_value(first: float, second: float) -> None:
    """Two values have one seq exactly where MLflow takes them for one point."""
    fields = [
        codec.decode(event.fingerprint, event.body)[1]
        for event in (metric_batch("r", [("m", value, 1, 1)], 1) for value in (first, second))
    ]
    clamped = [max(min(v, 1.7976931348623157e308), -1.7976931348623157e308) if v == v else v for v in (first, second)]
    same = clamped[0] == clamped[1] or (math.isnan(first) and math.isnan(second))
    assert (fields[0]["seqs"] == fields[1]["seqs"]) == same
    assert value_seq(0.0) == value_seq(-0.0 + 0.0)


def test_the_clock_never_repeats() -> None:
    """Versions of one process are strictly increasing."""
    clock = Clock()
    seen = [clock.next() for _ in range(10_000)]
    assert seen == sorted(set(seen))


@given(st.integers(0, 2**40))
def test_page_tokens_come_back(offset: int) -> None:
    """A token holds its offset; anything else is refused."""
    assert page_offset(page_token(offset)) == offset


@pytest.mark.parametrize("token", ["@", "bm9wZQ==", "eyJvZmZzZXQiOi0xfQ==", "W10="])
def test_foreign_page_tokens_are_refused(token: str) -> None:
    """A token that is not ours is a wrong parameter, not a failure."""
    with pytest.raises(ApiError) as caught:
        page_offset(token)
    assert caught.value.code == "INVALID_PARAMETER_VALUE"


@given(
    st.dictionaries(
        st.sampled_from(["run_id", "runId", "key", "value", "timestamp", "step", "other"]),
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=5)
        | st.lists(st.integers(), max_size=2),
    )
)
def test_any_json_is_a_message_or_a_wrong_parameter(fields: dict[str, object]) -> None:
    """Parsing never fails in any other way."""
    try:
        message = parse(LogMetric, fields)
    except ApiError as exc:
        assert STATUS_OF[exc.code] == 400
    else:
        assert message.run_id and message.key and isinstance(message.value, float)


def test_artifact_addresses() -> None:
    """Addresses below the root are told as mlflow-artifacts: and found again; others are left alone."""
    root = ArtifactRoot("file:///data/artifacts")
    told = root.present("file:///data/artifacts/0/r/artifacts")
    assert told == "mlflow-artifacts:/0/r/artifacts" == root.present("/data/artifacts/0/r/artifacts")
    assert root.stored(told) == root.path_of(told) == "0/r/artifacts"
    for foreign in ("s3://b/x", "file:///data/artifacts-2/x", "file:///etc"):
        assert root.present(foreign) == foreign and root.path_of(foreign) is None


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("mlflow-artifacts:/7", "mlflow-artifacts:/7/r/artifacts"),
        ("s3://bucket/a/", "s3://bucket/a/r/artifacts"),
        ("s3://bucket?x=1", "s3://bucket/r/artifacts?x=1"),
        ("mysql://me:secret@host:3306/db/a?driver=d&y", "mysql://me:secret@host:3306/db/a/r/artifacts?driver=d&y"),
        ("/folder/what?", "/folder/what?/r/artifacts"),
    ],
)
def test_addresses_below_a_location(location: str, expected: str) -> None:
    """The path of a run comes behind the path of its experiment, not behind a query."""
    assert below(location, "r/artifacts") == expected


def test_roles_of_requests() -> None:
    """Reading needs the role read, also where it is sent by POST."""
    assert needed_role("GET", "/api/2.0/mlflow/runs/get") == "read"
    assert needed_role("POST", "/api/2.0/mlflow/runs/search") == "read"
    assert needed_role("POST", "/") == "read"
    for method, path in (
        ("POST", "/api/2.0/mlflow/runs/log-metric"),
        ("DELETE", "/api/2.0/mlflow-artifacts/artifacts/x"),
    ):
        assert needed_role(method, path) == "write"


def test_the_auth_file(tmp_path: Path) -> None:
    """Weak passwords and bad names are refused; a damaged or open file lets the server not start."""
    content = AuthFile()
    with pytest.raises(AuthFileError):
        content.add_user("ada", "short", "read")
    with pytest.raises(AuthFileError):
        content.add_user("a b", "long enough password", "read")
    content.add_user("ada", "long enough password", "read")
    path = tmp_path / "auth.json"
    content.save(path)
    assert AuthFile.load(path).users["ada"].role == "read"
    assert Authenticator(path).enabled and not Authenticator(None).enabled
    path.chmod(0o640)
    with pytest.raises(AuthFileError, match="chmod 600"):
        AuthFile.load(path)
    path.chmod(0o600)
    path.write_text("{")
    with pytest.raises(AuthFileError):
        AuthFile.load(path)


def test_open_binding_needs_a_reason() -> None:
    """Loopback may be open; the network needs authentication or a word."""
    assert ServerSettings(host="127.0.0.1").problem() is None
    assert ServerSettings(host="::1").problem() is None
    assert ServerSettings(host="0.0.0.0").problem() is not None
    assert ServerSettings(host="192.168.0.1", open_to_network=True).problem() is None
    assert ServerSettings(host="0.0.0.0", auth_file=Path("x")).problem() is None


def test_every_error_becomes_the_one_body(caplog: pytest.LogCaptureFixture) -> None:
    """Foreign errors are mapped; a defect tells the client nothing of the inside."""
    from runstream_query.errors import QueryTimeout, StoreBusy

    assert as_api_error(QueryTimeout("late")).status == 503
    assert as_api_error(StoreBusy("busy")).status == 429
    assert as_api_error(codec.CodecError("x")).status == 400
    told = as_api_error(ZeroDivisionError("secret"))
    assert told.status == 500 and "secret" not in told.message and "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(
    ("metric", "plain"),
    [
        ({"key": "a/b", "value": 1.5, "timestamp": 0, "step": -1}, True),
        ({"key": "a", "value": 7, "timestamp": 5, "step": 0}, True),
        ({"key": "a", "value": math.inf, "timestamp": 5, "step": 0}, True),
        ({"key": "a", "value": "NaN", "timestamp": 5, "step": 0}, False),
        ({"key": "a", "value": True, "timestamp": 5, "step": 0}, False),
        ({"key": "a", "value": 1.0, "timestamp": "5", "step": 0}, False),
        ({"key": "a", "value": 1.0, "timestamp": -5, "step": 0}, False),
        ({"key": "a", "value": 1.0, "timestamp": 5, "step": 1 << 63}, False),
        ({"key": "a", "value": 1.0, "timestamp": 5}, False),
        ({"key": "a", "value": 1.0, "timestamp": 5, "model_id": "m"}, False),
        ({"key": "a", "value": 1.0, "timestamp": 5, "step": 0, "modelId": "m"}, False),
        ({"key": "../a", "value": 1.0, "timestamp": 5, "step": 0}, False),
        ({"key": "", "value": 1.0, "timestamp": 5, "step": 0}, False),
        ({"key": "a" * 251, "value": 1.0, "timestamp": 5, "step": 0}, False),
        ({"key": 5, "value": 1.0, "timestamp": 5, "step": 0}, False),
    ],
)
def test_points_without_models(metric: dict[str, object], plain: bool) -> None:
    """The short way through a batch takes only what the models take as it is, and gives the same points."""
    found = _plain_points([metric, metric])
    assert (found is not None) == plain
    if found is not None:
        model = BatchMetric.model_validate(metric)
        assert found == [(model.key, model.value, model.timestamp, model.step)] * 2
        assert isinstance(found[0][1], float)


@pytest.mark.parametrize(
    ("more", "plain"),
    [
        ({}, True),
        ({"run_uuid": "other"}, True),
        ({"run_id": ""}, False),
        ({"run_id": 5}, False),
        ({"runId": "other"}, False),
        ({"model_id": "m"}, False),
        ({"value": "NaN"}, False),
        ({"step": None}, False),
        ({"timestamp": -1}, False),
        ({"key": "../x"}, False),
    ],
)
def test_a_metric_without_models(more: dict[str, object], plain: bool) -> None:
    """The short way of log-metric takes only what the model takes as it is, and finds the same run and point."""
    fields = {"run_id": "r", "key": "k", "value": 0.5, "timestamp": 7, "step": 3} | more
    found = _plain_metric(fields)
    assert (found is not None) == plain
    if found is not None:
        model = parse(LogMetric, fields)
        assert found == (model.run_id, (model.key, model.value, model.timestamp, model.step))
