"""`kill -9` of the whole server under write load: what was answered 200 is there after the restart, exactly once."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("fastapi", reason="needs the server: pip install 'runstream[server]'")

from runstream_schemas.layout import DataDirectory, ServerAddress
from tests.e2e.mlflow_server import Served, served

API = "/api/2.0/mlflow"
WRITERS = 8
ACCEPTED = 1_500
"""Points that must have been accepted before the kill."""


class Connection:
    """One keep-alive connection to the server."""

    def __init__(self, server: Served) -> None:
        parts = urlsplit(server.url)
        self._http = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)

    def __call__(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        raw = None if body is None else json.dumps(body)
        self._http.request(method, API + path, raw, {"Content-Type": "application/json"})
        answer = self._http.getresponse()
        return answer.status, json.loads(answer.read())

    def close(self) -> None:
        self._http.close()


class Writer(threading.Thread):
    """Logs points, params and tags as fast as it can, and remembers what was answered 200."""

    def __init__(self, server: Served, number: int) -> None:
        super().__init__(daemon=True)
        self._connection = Connection(server)
        self._number = number
        _, made = self._connection("POST", "/runs/create", {"experiment_id": "0", "start_time": 1})
        self.run_id: str = made["run"]["info"]["run_id"]
        self.accepted: set[int] = set()
        self.unknown: set[int] = set()
        """Sent, but the server died before it answered: each may be there or not, but not twice."""
        self.params: dict[str, str] = {}

    def run(self) -> None:
        step = 0
        try:
            while True:
                if self._number % 2:
                    steps = {step}
                    body = {"run_id": self.run_id, "key": "m", "value": step / 2, "timestamp": 1 + step, "step": step}
                    path = "/runs/log-metric"
                else:
                    steps = set(range(step, step + 10))
                    points = [{"key": "m", "value": s / 2, "timestamp": 1 + s, "step": s} for s in sorted(steps)]
                    param = {"key": f"p{step}", "value": str(step)}
                    body = {"run_id": self.run_id, "metrics": points, "params": [param]}
                    path = "/runs/log-batch"
                step += len(steps)
                self.unknown = steps
                status, _ = self._connection("POST", path, body)
                if status == 200:
                    self.accepted |= steps
                    if "params" in body:
                        self.params[body["params"][0]["key"]] = body["params"][0]["value"]
                self.unknown = set()
        except (OSError, http.client.HTTPException):
            pass  # the server is gone
        finally:
            self._connection.close()


def kill_everything(server: Served, data: Path) -> None:
    """SIGKILL for the server, its workers and the local store process, at once."""
    doomed = [server.process.pid]
    for pid in doomed:
        doomed += [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    store = ServerAddress.read(DataDirectory(data).server_file)
    if store is not None:
        doomed.append(store.pid)
    for pid in doomed:
        os.kill(pid, signal.SIGKILL)
    server.process.wait(30)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.timeout(300)
def test_accepted_writes_survive_kill_9_under_load(tmp_path, workers):
    """Many writers, the server and its store killed in the middle, a restart: nothing accepted is lost or doubled."""
    data = tmp_path / "data"
    with served(data, ["--workers", str(workers), "--no-access-log"]) as server:
        writers = [Writer(server, number) for number in range(WRITERS)]
        for writer in writers:
            writer.start()
        deadline = time.monotonic() + 120
        while sum(len(writer.accepted) for writer in writers) < ACCEPTED:
            assert time.monotonic() < deadline, "the writers are too slow to say anything"
            time.sleep(0.01)
        kill_everything(server, data)
        for writer in writers:
            writer.join(60)
            assert not writer.is_alive()
    with served(data, ["--workers", str(workers), "--no-access-log"]) as server:
        ask = Connection(server)
        for writer in writers:
            status, found = ask("GET", f"/metrics/get-history?run_id={writer.run_id}&metric_key=m")
            assert status == 200
            times = Counter(point["step"] for point in found.get("metrics", ()))
            assert set(times.values()) <= {1}, "a point is there twice"
            assert writer.accepted - set(times) == set(), "an accepted point is lost"
            assert set(times) - writer.accepted <= writer.unknown, "a point that nobody sent is there"
            assert all(point["value"] == point["step"] / 2 for point in found.get("metrics", ()))
            status, run = ask("GET", f"/runs/get?run_id={writer.run_id}")
            params = {entry["key"]: entry["value"] for entry in run["run"]["data"].get("params", ())}
            assert writer.params.items() <= params.items(), "an accepted param is lost"
        ask.close()
