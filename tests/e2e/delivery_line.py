"""A real `runstream server` that can be killed and restarted on its port, and clients that know its address alone."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.services.cache import free_ports
from tests.services.process import ServerProcess, wait_until

CLIENT = """
import sys, time
import runstream
name, points, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
runstream.set_experiment("line")
with runstream.start_run(run_name=name) as run:
    print(run.info.run_id, flush=True)
    runstream.log_param("points", points)
    for step in range(points):
        runstream.log_metric("loss", step + 0.5, step=step)
        if step % 100 == 99:
            print(step + 1, flush=True)
            time.sleep(pause)
"""


class DeliveryLine:
    """A server, clients, and what SQL says of them. Enter it, and everything ends with it."""

    def __init__(
        self,
        folder: Path,
        tracking_uri: str,
        *,
        server: Mapping[str, str] | None = None,
        client: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        """
        Args:
            server, client: further environment variables.
        """
        self.folder = folder
        [self.port] = free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}"
        self.clients: list[ServerProcess] = []
        self._client = dict(client or {})
        self.server = ServerProcess(
            [sys.executable, "-m", "runstream", "server", "--port", str(self.port), *arguments],
            folder / "server.log",
            _clean() | {"RUNSTREAM_TRACKING_URI": tracking_uri, **(server or {})},
        )

    def __enter__(self) -> DeliveryLine:
        self.start_server()
        return self

    def __exit__(self, *_: object) -> None:
        for process in [self.server, *self.clients]:
            process.stop(10.0)

    def start_server(self) -> None:
        self.server.start()
        self.server.wait_ready(self._answers, 60.0)

    def start_client(self, name: str, points: int, pause_seconds: float = 0.0) -> ServerProcess:
        client = ServerProcess(
            [sys.executable, "-c", CLIENT, name, str(points), str(pause_seconds)],
            self.folder / f"client-{name}.log",
            self.environment(),
        )
        client.start()
        self.clients.append(client)
        return client

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`runstream ARGUMENTS` as a client of the server."""
        return subprocess.run(
            [sys.executable, "-m", "runstream", *arguments],
            env=self.environment(), capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip

    def python(self, code: str) -> subprocess.CompletedProcess[str]:
        """A script as a client of the server."""
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            env=self.environment(), capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip

    def sql(self, statement: str) -> list[dict[str, Any]]:
        """What a client reads through the server."""
        done = self.command("sql", "--json", statement)
        assert done.returncode == 0, done.stderr
        rows: list[dict[str, Any]] = json.loads(done.stdout)
        return rows

    def check(self, complete: Mapping[str, int]) -> None:
        """Every point that a client said to have logged is there once; `complete` (name -> points) is whole."""
        rows = self.sql(
            "SELECT r.name AS name, m.run_id AS run, count() AS points, uniqExact(m.step) AS steps, "
            "min(m.step) AS first, max(m.step) AS last, countIf(m.value != m.step + 0.5) AS wrong "
            "FROM metrics AS m JOIN runs AS r ON r.run_id = m.run_id WHERE m.key = 'loss' GROUP BY name, run"
        )
        found = {row["run"]: row for row in rows}
        for client in self.clients:
            identity, points = said(client)
            if not identity:
                continue
            row = found.get(identity, {"points": 0, "steps": 0, "first": 0, "last": -1, "wrong": 0})
            assert row["points"] == row["steps"] == row["last"] - row["first"] + 1, row
            assert row["first"] == 0 and row["wrong"] == 0, row
            assert row["points"] >= points, f"{row} of {points}"
        whole = {row["name"]: row["points"] for row in rows}
        assert {name: whole.get(name) for name in complete} == dict(complete)

    def wait_said(self, points: int) -> None:
        """Until every client has logged so many points."""

        def reached() -> bool:
            return all(said(client)[1] >= points for client in self.clients)

        wait_until(reached, 60.0, f"clients at {points} points")

    def environment(self) -> dict[str, str]:
        """What a client needs: the address."""
        return _clean() | {
            "RUNSTREAM_TRACKING_URI": self.url,
            "RUNSTREAM_JOURNAL_DIR": str(self.folder / "journal"),
            "RUNSTREAM_EXIT_TIMEOUT_SECONDS": "60",
            "PYTHONUNBUFFERED": "1",
            **self._client,
        }

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()


def said(client: ServerProcess) -> tuple[str, int]:
    """(run id, points logged) as the client has printed them so far; its warnings stand between."""
    lines = [line for line in client.log.read_text().splitlines() if re.fullmatch(r"[0-9a-f]{32}|\d{1,9}", line)]
    return (lines[0] if lines else ""), (int(lines[-1]) if len(lines) > 1 else 0)


def stop_store(data: Path) -> None:
    """End the local store process of a data directory."""
    import signal
    from contextlib import suppress

    from runstream_schemas.layout import DataDirectory, ServerAddress

    address = ServerAddress.read(DataDirectory(data).server_file)
    if address is not None:
        with suppress(ProcessLookupError):
            os.kill(address.pid, signal.SIGTERM)


def _clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("RUNSTREAM_", "MLFLOW_"))} | {
        "PYTHONUNBUFFERED": "1"
    }
