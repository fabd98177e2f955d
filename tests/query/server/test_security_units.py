"""Permissions, sessions, throttle and cookies of the server: what needs no running server."""

from __future__ import annotations

import json
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="needs the server: pip install 'runstream[server]'")

from runstream_query.server import session
from runstream_query.server.app import ENDPOINTS
from runstream_query.server.audit import Audit
from runstream_query.server.auth import AuthFile, AuthFileError
from runstream_query.server.authenticator import Authenticator
from runstream_query.server.cookie import SESSION, Cookies
from runstream_query.server.gateway import needed_role
from runstream_query.server.login import safe_next
from runstream_query.server.permission import RULES, guarded
from runstream_query.server.principal import PERMISSIONS, Principal
from runstream_query.server.session import Revoked, Session
from runstream_query.server.settings import ServerSettings
from runstream_query.server.throttle import FREE_FAILURES, MAX_WAIT_SECONDS, Throttle, network_of


def test_every_operation_has_a_rule():
    """An operation that is added without a rule is refused to limited principals; this test asks for one."""
    operations = {(endpoint.method, endpoint.path) for endpoint in ENDPOINTS}
    assert operations == set(RULES)
    for endpoint in ENDPOINTS:
        assert all(guarded(path) for path in endpoint.paths())


@pytest.mark.parametrize("path", ["/", "/replicas_status", "/docs", "/apix", "/API/2.0/x"])
def test_unknown_paths_are_closed_to_limited_principals(path):
    """What does not tell experiments apart is not for them."""
    assert not guarded(path)


@given(
    st.sampled_from(["read", "write", "admin"]),
    st.none() | st.sampled_from(PERMISSIONS),
    st.dictionaries(st.sampled_from(["1", "2"]), st.sampled_from(PERMISSIONS)),
)
def test_a_permission_never_exceeds_the_role(role, default, experiments):
    """The role is the upper bound, the own permission goes before the default, and admins are not limited."""
    principal = Principal("p", role, default, experiments)
    for experiment in ("1", "2", "3"):
        held = principal.permission(experiment)
        wanted = experiments.get(experiment, default)
        if role == "admin":
            assert held == "manage" and not principal.restricted
        elif role == "read":
            assert held == ("none" if wanted == "none" else "read")
        else:
            assert held == (wanted or "manage")
    if not principal.restricted and role != "admin":
        assert default is None and not experiments


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "/api/2.0/mlflow-artifacts/artifacts/0/r/artifacts/search"),
        ("DELETE", "/api/2.0/mlflow/logged-models/m/tags/search"),
        ("DELETE", "/api/2.0/mlflow-artifacts/artifacts/x/search-datasets"),
        ("POST", "/api/2.0/mlflow-artifacts/mpu/create/runs/search"),
        ("PUT", "/"),
    ],
)
def test_a_name_does_not_make_a_write_a_search(method, path):
    """Only the search operations themselves read by POST; an artifact called `search` is written all the same."""
    assert needed_role(method, path) == "write"


def test_grants_are_kept_and_taken_back(tmp_path):
    """Permissions survive saving and another password, and go away by name."""
    path = tmp_path / "auth.json"
    AuthFile.change(path, lambda content: content.add_user("ada", "correct horse 1", "write"))
    AuthFile.change(path, lambda content: content.grant("ada", "none", None))
    AuthFile.change(path, lambda content: content.grant("ada", "edit", "12"))
    AuthFile.change(path, lambda content: content.add_user("ada", "correct horse 2", "write"))
    ada = AuthFile.load(path).users["ada"].principal("ada")
    assert (ada.permission("12"), ada.permission("13")) == ("edit", "none")
    assert AuthFile.change(path, lambda content: content.revoke_grant("ada", "12"))
    assert not AuthFile.change(path, lambda content: content.revoke_grant("ada", "12"))
    assert AuthFile.load(path).users["ada"].experiments == {}
    for wrong in (lambda c: c.grant("eve", "read", "1"), lambda c: c.grant("ada", "read", "name")):
        with pytest.raises(AuthFileError):
            AuthFile.change(path, wrong)
    raw = json.loads(path.read_text())
    raw["users"]["ada"]["default"] = "all"
    path.write_text(json.dumps(raw))
    with pytest.raises(AuthFileError, match="unknown permission"):
        AuthFile.load(path)


# sessions


def authenticator(path) -> Authenticator:
    found = Authenticator(path)
    found.close()
    return found


@pytest.fixture
def auth_file(tmp_path):
    path = tmp_path / "auth.json"
    AuthFile.change(path, lambda content: content.add_user("ada", "correct horse 1", "write"))
    return path


def test_every_change_of_the_auth_file_is_told(auth_file):
    """Whoever made it, and without anything secret; a file that was gone for a while hides nothing."""
    told = []
    found = Authenticator(auth_file, told.append)
    found.close()
    identity, token = AuthFile.change(auth_file, lambda content: content.add_token("ci", "write"))
    AuthFile.change(auth_file, lambda content: content.grant("ci", "read", "7"))
    found.follow_file(now=True)
    AuthFile.change(auth_file, lambda content: content.add_user("ada", "correct horse 2", "admin"))
    found.follow_file(now=True)
    auth_file.rename(auth_file.with_name("away"))
    found.follow_file(now=True)
    auth_file.with_name("away").rename(auth_file)
    AuthFile.change(auth_file, lambda content: content.revoke("ci"))
    found.follow_file(now=True)
    found.follow_file(now=True)
    assert told == [
        f"token {identity} (ci) added: write 7:read",
        "user ada: admin instead of write",
        "user ada: another password",
        f"token {identity} (ci) removed",
    ]
    assert token not in "".join(told) and "correct" not in "".join(told)


def test_a_session_is_known_to_every_process(auth_file):
    """A cookie of one process is taken by another one; a changed one by nobody."""
    first, second = authenticator(auth_file), authenticator(auth_file)
    cookie = first.open_session("ada")
    found = second.session_of(cookie)
    assert found is not None and found[0].name == "ada"
    body, _, signature = cookie.partition(".")
    forged = session.sign(Session.new("ada"), b"another key")
    for wrong in (body, f"{body}.", f".{signature}", f"{body}x.{signature}", forged, "", "é", "." * 3000):
        assert second.session_of(wrong) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.add_user("ada", "correct horse 2", "write"),
        lambda content: content.revoke("ada"),
        lambda content: setattr(content, "session_key", "0" * 64),
    ],
)
def test_a_session_ends_with_its_user(auth_file, change):
    """Another password, a revoked user and another key end the sessions."""
    server = authenticator(auth_file)
    cookie = server.open_session("ada")
    AuthFile.change(auth_file, change)
    server.follow_file(now=True)
    assert server.session_of(cookie) is None


def test_signing_out_ends_the_session_everywhere(auth_file, monkeypatch):
    """A cookie that was signed out is refused by the other processes too; other sessions go on."""
    monkeypatch.setattr(session, "_CHECK_FILE_SECONDS", 0.0)
    first, second = authenticator(auth_file), authenticator(auth_file)
    cookie, other = first.open_session("ada"), first.open_session("ada")
    assert second.session_of(cookie) is not None
    first.close_session(first.session_of(cookie)[1])
    assert first.session_of(cookie) is None and second.session_of(cookie) is None
    assert second.session_of(other) is not None


@pytest.mark.parametrize(
    ("began", "seen", "good"),
    [
        (0, 0, True),
        (-session.IDLE_SECONDS - 1, -session.IDLE_SECONDS - 1, False),
        (-session.ABSOLUTE_SECONDS - 1, 0, False),
        (-session.ABSOLUTE_SECONDS + 60, 0, True),
        (3600, 3600, False),
    ],
)
def test_a_session_has_an_idle_and_an_absolute_end(began, seen, good):
    """Neither silence nor endless use keeps a session for ever; one from the future was not made by us."""
    now = int(time.time())
    made = Session("ada", "id", now + began, now + seen)
    assert (session.verify(session.sign(made, b"k"), b"k") is not None) is good


def test_ended_sessions_leave_the_file(tmp_path):
    """The list of signed-out sessions holds only those whose cookies could still be taken."""
    path = tmp_path / "out"
    path.write_text(f"old {int(time.time()) - 1}\nbroken\n")
    revoked = Revoked(path)
    revoked.add(Session.new("ada"))
    assert "old" not in path.read_text() and len(path.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("root", "proto", "behind", "expected"),
    [
        ("", None, False, "runstream_session=v; Path=/; HttpOnly; SameSite=Lax"),
        ("", b"https", False, "runstream_session=v; Path=/; HttpOnly; SameSite=Lax"),
        ("", b"https", True, "__Host-runstream_session=v; Path=/; HttpOnly; SameSite=Lax; Secure"),
        ("/team", b"https", True, "__Secure-runstream_session=v; Path=/team; HttpOnly; SameSite=Lax; Secure"),
    ],
)
def test_cookies_are_as_narrow_as_they_can_be(root, proto, behind, expected):
    """Secure and prefixed where the browser speaks https; a forwarded header counts only behind a proxy."""
    cookies = Cookies(ServerSettings(root_path=root, behind_proxy=behind))
    headers = [] if proto is None else [(b"x-forwarded-proto", proto)]
    written = cookies.write({"headers": headers, "scheme": "http"}, SESSION, "v").decode()
    assert written == expected
    assert cookies.read(written.partition(";")[0].encode(), SESSION) == "v"


@pytest.mark.parametrize(
    "wanted",
    [
        "//evil.example",
        "https://evil.example",
        "/\\evil.example",
        "/\t/evil",
        "evil",
        "",
        "/a\nb",
        "/é",
        "/" + "a" * 3000,
    ],
)
def test_signing_in_leads_nowhere_else(wanted):
    """After the log-in only a path of this server is opened."""
    assert safe_next(wanted) == "/login"


def test_signing_in_leads_back():
    """A path of ours is."""
    assert safe_next("/metrics?x=1") == "/metrics?x=1"


# throttle


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_guessing_becomes_slow_and_never_stops_for_good():
    """After the free failures each one doubles the wait, to a bound; time heals; other addresses are not touched."""
    clock = Clock()
    throttle = Throttle(clock)
    for _ in range(FREE_FAILURES):
        assert throttle.wait_seconds("ada", "10.0.0.1") == 0
        throttle.failed("ada", "10.0.0.1")
    waits = []
    for _ in range(12):
        waits.append(throttle.wait_seconds("ada", "10.0.0.1"))
        throttle.failed("ada", "10.0.0.1")
    assert waits == sorted(waits) and 0 < waits[0] < 2 and waits[-1] == MAX_WAIT_SECONDS
    assert throttle.wait_seconds("ada", "10.0.0.2") == 0 and throttle.wait_seconds("eve", "10.0.0.1") == 0
    clock.now += MAX_WAIT_SECONDS
    assert throttle.wait_seconds("ada", "10.0.0.1") == 0
    throttle.succeeded("ada", "10.0.0.1")
    throttle.failed("ada", "10.0.0.1")
    assert throttle.wait_seconds("ada", "10.0.0.1") == 0


def test_many_names_from_one_address_are_slowed_down():
    """Trying one password with every name is guessing too."""
    throttle = Throttle(Clock())
    for index in range(100):
        throttle.failed(f"user{index}", "10.0.0.1")
    assert throttle.wait_seconds("fresh", "10.0.0.1") > 0 and throttle.wait_seconds("fresh", "10.0.0.2") == 0


def test_right_passwords_do_not_add_up():
    """Many people behind one address who give the right password are not slowed down."""
    throttle = Throttle(Clock())
    for index in range(1000):
        throttle.failed(f"user{index}", "10.0.0.1")  # counted before the check
        throttle.succeeded(f"user{index}", "10.0.0.1")
    assert throttle.wait_seconds("another", "10.0.0.1") == 0


@pytest.mark.parametrize(
    ("address", "network"),
    [("10.0.0.1", "10.0.0.1"), ("2001:db8::1:2", "2001:db8::/64"), ("::ffff:10.0.0.1", "10.0.0.1"), ("-", "-")],
)
def test_one_host_counts_once(address, network):
    """An IPv6 host has a whole /64 to choose addresses from."""
    assert network_of(address) == network


def test_audit_lines_cannot_be_forged(tmp_path):
    """One line per act, whatever is in a path; long texts are cut."""
    file = tmp_path / "audit"
    audit = Audit(file)
    scope = {"method": "GET", "path": '/x\n{"audit": "login"}\x1b[0m', "runstream_address": "10.0.0.1"}
    audit.note("denied", scope, status=403, reason="r" * 10_000)
    audit.close()
    (line,) = file.read_text().splitlines()
    assert "\x1b" not in line and len(line) < 2_000
    assert json.loads(line)["path"] == scope["path"] and json.loads(line)["from"] == "10.0.0.1"
    assert os.stat(file).st_mode & 0o777 == 0o600
