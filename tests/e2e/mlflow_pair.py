"""MLflow's own server and ours side by side: one request goes to both, and the answers are compared.

Ids, times and random names differ between two servers: each side remembers its own ids under shared names (`$run`),
requests are written with those names, and answers are brought back to them before they are compared.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

START_SECONDS = 180.0
FIRST_EXPERIMENT = 700_000_001
"""Ids of MLflow's server begin here, so that they cannot be taken for other numbers in an answer."""
API = "/api/2.0/mlflow"
VOLATILE = {
    "creation_time": "time",
    "last_update_time": "time",
    "start_time": "time",
    "end_time": "time",
    "creation_timestamp_ms": "time",
    "last_updated_timestamp_ms": "time",
    "next_page_token": "token",
}
"""Fields whose values only need to be there."""
_UNORDERED = frozenset({"tags", "params", "dataset_inputs", "model_inputs", "model_outputs", "dataset_summaries"})
_EXTRA = frozenset({"sqlstate", "error_class", "workspace"})
"""Of MLflow's newest answers; only clients that use workspaces read them."""
_RANDOM_NAME = re.compile(r"[a-z]+-[a-z]+-\d{1,4}")


@dataclass
class Side:
    """One of the two servers."""

    url: str
    ids: dict[str, str] = field(default_factory=dict)
    """Shared name -> this server's id."""

    def filled(self, value: Any) -> Any:
        """`value` with this server's ids for the shared names in its strings."""
        if isinstance(value, str):
            return re.sub(r"\$(\w+)", lambda found: self.ids.get(found[1], found[0]), value)
        if isinstance(value, Mapping):
            return {key: self.filled(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.filled(item) for item in value]
        return value

    def shared(self, value: Any, key: str = "") -> Any:
        """`value` with shared names for this server's ids, and without what differs by nature."""
        if isinstance(value, str):
            for name, identity in sorted(self.ids.items(), key=lambda item: -len(item[1])):
                value = value.replace(identity, f"${name}") if len(identity) > 3 else value
            if key in ("run_name", "name", "value") and _RANDOM_NAME.fullmatch(value):
                return "<name>"
            if key == "experiment_id" and re.fullmatch(r"\d{6,}", value):
                return "<new>"
            return "<token>" if VOLATILE.get(key) == "token" else value
        if isinstance(value, dict):
            found = {name: self.shared(item, name) for name, item in value.items() if name not in _EXTRA}
            if key == "data" and "metrics" in found:  # the newest point of each key, in no order
                found["metrics"].sort(key=lambda metric: str(metric["key"]))
            return found
        if isinstance(value, list):
            items = [self.shared(item) for item in value]
            return sorted(items, key=lambda item: json.dumps(item, sort_keys=True)) if key in _UNORDERED else items
        if isinstance(value, int) and VOLATILE.get(key) == "time" and value > 1_000_000_000_000:
            return "<now>"
        return value


@dataclass
class Reply:
    """One answer in comparable form."""

    status: int
    body: Any
    raw: Any

    @property
    def code(self) -> str | None:
        return self.body.get("error_code") if isinstance(self.body, dict) else None


class Pair:
    """Both servers."""

    def __init__(self, theirs: str, ours: str) -> None:
        self.theirs, self.ours = Side(theirs), Side(ours)
        self._session = requests.Session()

    def ask(
        self, side: Side, method: str, path: str, body: Any, query: Mapping[str, Any], headers: Mapping[str, str]
    ) -> Reply:
        """One request to one side."""
        address = side.url + side.filled(path if path.startswith(("/api", "/ajax")) else API + path)
        given: dict[str, Any] = {"params": side.filled(dict(query)), "headers": dict(headers), "timeout": 60}
        if isinstance(body, bytes):
            given["data"] = body
        elif body is not None:
            given["data"] = json.dumps(side.filled(body))
            given["headers"].setdefault("Content-Type", "application/json")
        answer = self._session.request(method, address, **given)
        try:
            raw = answer.json()
        except ValueError:
            raw = answer.text
        return Reply(answer.status_code, side.shared(raw), raw)

    def both(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        save: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, Any] | None = None,
    ) -> tuple[Reply, Reply]:
        """The request to both; `save` remembers ids: shared name -> dotted path in the answer."""
        found = []
        for side in (self.theirs, self.ours):
            reply = self.ask(side, method, path, body, query or {}, headers or {})
            for name, place in (save or {}).items():
                value = reply.raw
                for part in place.split("."):
                    value = value[int(part)] if isinstance(value, list) else value[part]
                side.ids[name] = str(value)
            if save:
                reply = Reply(reply.status, side.shared(reply.raw), reply.raw)
            found.append(reply)
        return found[0], found[1]


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """MLflow's own server on SQLite in `folder`; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    database = folder / "mlflow.db"
    env = {key: value for key, value in os.environ.items() if not key.startswith(("RUNSTREAM_", "MLFLOW_"))}
    env |= {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{database}", "--artifacts-destination", str(folder / "artifacts")]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=env, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        url = f"http://127.0.0.1:{port}"
        try:
            _wait_ready(url, process, folder / "server.log")
            requests.get(f"{url}{API}/experiments/get", params={"experiment_id": "0"}, timeout=60).raise_for_status()
            with sqlite3.connect(database) as connection:
                connection.execute(
                    "INSERT INTO experiments"
                    " (experiment_id, name, lifecycle_stage, creation_time, last_update_time, workspace)"
                    " VALUES (?, 'first', 'deleted', 0, 0, 'default')",
                    (FIRST_EXPERIMENT,),
                )
            connection.close()
            yield url
        finally:
            os.killpg(process.pid, 15)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()


def _wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            if requests.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except requests.RequestException:
            time.sleep(0.1)
    raise RuntimeError(f"MLflow's server did not start:\n{log.read_text()[-3000:]}")
