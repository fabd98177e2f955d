"""/ready: what it says when the store is away, to whom, and that asking costs nothing."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the server: pip install 'runstream[server]'")

from runstream_query.server.auth import AuthFile
from tests.e2e.mlflow_server import served


def ask(url: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, exc.read()


@pytest.mark.parametrize("authenticated", [False, True])
def test_ready_says_what_is_missing(tmp_path, authenticated):
    """503 and the reason while the store is away; strangers are told the part only; the process itself is healthy."""
    arguments = []
    if authenticated:
        AuthFile.change(tmp_path / "auth.json", lambda content: content.add_token("t", "read"))
        arguments = ["--auth-file", str(tmp_path / "auth.json")]
    address = "clickhouse://user:hush-hush@127.0.0.1:1/runstream"
    with served(tmp_path / "data", arguments, {"RUNSTREAM_STORE_URI": address}) as server:
        with ThreadPoolExecutor(40) as many:
            answers = set(many.map(ask, [server.url + "/ready"] * 200))
        assert len(answers) == 1
        status, body = answers.pop()
        found = json.loads(body)
        assert status == 503 and found["ready"] is False and b"hush-hush" not in body
        (problem,) = found["problems"]
        assert problem == "store" if authenticated else problem.startswith("store: ")
        assert ask(server.url + "/health") == (200, b"OK")
        # However many ask, it is looked at once a second at most, and said once.
        assert sum("not ready" in line for line in server.lines) <= 2
