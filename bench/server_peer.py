"""The servers that bench/server.py compares: starting and stopping them, filling their stores, weighing them.

Each is started as its user would start it, on loopback, with everything below one folder, and stopped by process id.
MLflow's PostgreSQL is Debian's (package postgresql), run as the user `postgres` where this process is root; its driver
psycopg2-binary is installed into that folder alone.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

EMPTY = """
import uvicorn
from fastapi import FastAPI
app = FastAPI()
@app.post("/empty")
async def empty() -> dict[str, str]:
    return {}
uvicorn.run(app, host="127.0.0.1", port=PORT, log_level="warning", access_log=False)
"""
POSTGRES = Path("/usr/lib/postgresql")
"""Debian's place: one folder per version."""

FILL = """
import sys
from sqlalchemy import create_engine, insert
from mlflow.store.tracking.dbmodels.models import SqlRun, SqlMetric, SqlLatestMetric, SqlParam, SqlTag
sys.path.insert(0, sys.argv[1])
from server import runs_of, history_of
uri, experiment, long_run = sys.argv[2], int(sys.argv[3]), sys.argv[4]
runs, points = int(sys.argv[5]), int(sys.argv[6])
rows = {SqlRun: [], SqlMetric: [], SqlLatestMetric: [], SqlParam: [], SqlTag: []}
for each in runs_of(runs, experiment):
    run = each.run_id
    rows[SqlRun].append(dict(
        run_uuid=run, name=each.name, source_type="UNKNOWN", source_name="", entry_point_name="", user_id="ann",
        status="FINISHED", start_time=each.start, end_time=each.start + 1000, source_version="",
        lifecycle_stage="active", artifact_uri=f"mlflow-artifacts:/{experiment}/{run}/artifacts",
        experiment_id=experiment))
    for key, value in each.metrics.items():
        metric = dict(key=key, value=value, timestamp=each.start, step=0, is_nan=False, run_uuid=run)
        rows[SqlMetric].append(metric)
        rows[SqlLatestMetric].append(metric)
    rows[SqlParam] += [dict(key=key, value=value, run_uuid=run) for key, value in each.params.items()]
    rows[SqlTag] += [dict(key=key, value=value, run_uuid=run) for key, value in each.tags.items()]
rows[SqlMetric] += [
    dict(key="long", value=value, timestamp=at, step=step, is_nan=False, run_uuid=long_run)
    for step, at, value in history_of(points)]
with create_engine(uri).begin() as connection:
    for table, values in rows.items():
        for first in range(0, len(values), 5000):
            connection.execute(insert(table), values[first:first + 5000])
"""


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pss_mb(process_ids: Sequence[int]) -> float:
    """Proportional memory of processes and their children, MB: shared pages count once, divided among their users."""
    total = 0
    for root in process_ids:
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(root)
            for process in [parent, *parent.children(recursive=True)]:
                with contextlib.suppress(OSError):
                    text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                    total += int(text.partition("\nPss:")[2].split()[0]) * 1024
    return total / 1e6


class Peer:
    """One server under test."""

    def __init__(self, name: str, command: list[str], port: int, ready: str, env: dict[str, str] | None = None) -> None:
        """Start it, and return once `ready` (a path) answers."""
        self.name = name
        self.port = port
        self.base = f"http://127.0.0.1:{port}"
        self.long_run = self.experiment = ""
        self.fresh_runs: Iterator[str] | None = None
        """Runs of the table that nobody has asked for yet."""
        self.process = subprocess.Popen(
            command, env={**os.environ, **(env or {})}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            self._wait_for(ready)
        except RuntimeError:
            self.stop()
            raise

    def _wait_for(self, path: str, seconds: float = 240.0) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                with urllib.request.urlopen(self.base + path, timeout=5):
                    return
            except urllib.error.HTTPError as exc:
                if exc.code < 500:
                    return
            except OSError:
                pass
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name}: {self.base}{path} does not answer")
            time.sleep(0.1)

    def processes(self) -> list[int]:
        """The processes that it cannot do without."""
        return [self.process.pid]

    def stop(self) -> None:
        """End it and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:  # MLflow's server keeps job runners
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Runstream(Peer):
    """`runstream server` on a data directory, with its local store process."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "data"
        port = free_port()
        command = [sys.executable, "-m", "runstream", "server", "--port", str(port), "--tracking-uri", str(self.root)]
        super().__init__("runstream", command, port, "/ready")

    def _store(self) -> int | None:
        from runstream_schemas.layout import DataDirectory, ServerAddress

        address = ServerAddress.read(DataDirectory(self.root).server_file)
        return None if address is None else address.pid

    def processes(self) -> list[int]:
        """See `Peer`."""
        store = self._store()
        return [self.process.pid, *([] if store is None else [store])]

    def stop(self) -> None:
        """See `Peer`."""
        store = self._store()  # before the server ends
        super().stop()
        if store is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(store, signal.SIGTERM)


class Mlflow(Peer):
    """`mlflow server` with its default number of workers."""

    def __init__(self, name: str, folder: Path, uri: str, packages: Path | None = None) -> None:
        port = free_port()
        self.uri = uri
        self._env = {"MLFLOW_DISABLE_TELEMETRY": "true"}
        if packages is not None:
            self._env["PYTHONPATH"] = str(packages)
        command = [
            sys.executable, "-m", "mlflow", "server", "--port", str(port), "--backend-store-uri", uri,
            "--artifacts-destination", str(folder / "artifacts"),
            # On a busy machine its supervisor would kill workers that are slow to start.
            "--uvicorn-opts", "--timeout-worker-healthcheck 120",
        ]  # fmt: skip
        super().__init__(name, command, port, "/health", self._env)

    def fill(self, runs: int, points: int) -> None:
        """Put the runs of `server.runs_of` and one history into its database, through MLflow's own table classes."""
        place = str(Path(__file__).parent)
        arguments = [place, self.uri, self.experiment, self.long_run, str(runs), str(points)]
        subprocess.run([sys.executable, "-c", FILL, *arguments], check=True, env={**os.environ, **self._env})


class Postgres:
    """A PostgreSQL of its own below `folder`, as Debian configures it, on loopback."""

    def __init__(self, folder: Path) -> None:
        versions = sorted(POSTGRES.glob("*/bin/postgres")) if POSTGRES.is_dir() else []
        if not versions:
            raise FileNotFoundError("no PostgreSQL: apt-get install postgresql, or leave it out with --no-postgres")
        self._bin = versions[-1].parent
        self._user = "postgres" if os.geteuid() == 0 else None
        self._place = folder / "postgres"
        self._place.mkdir(mode=0o700)
        if self._user:
            account = pwd.getpwnam(self._user)
            os.chown(self._place, account.pw_uid, account.pw_gid)
            folder.chmod(0o755)
        self.packages = folder / "packages"
        install = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "psycopg2-binary"]
        subprocess.run([*install, "--target", str(self.packages)], check=True)
        data = str(self._place / "data")
        self._run("initdb", "-D", data, "-U", "mlflow", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8")
        self._port = free_port()
        self.process = subprocess.Popen(
            [str(self._bin / "postgres"), "-D", data, "-p", str(self._port), "-k", str(self._place), "-h", "127.0.0.1"],
            user=self._user, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=self._place,
        )  # fmt: skip
        for _ in range(300):
            ready = [str(self._bin / "pg_isready"), "-h", "127.0.0.1", "-p", str(self._port), "-q"]
            if subprocess.run(ready, check=False).returncode == 0:
                break
            time.sleep(0.1)
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self._port), "-U", "mlflow", "mlflow")

    @property
    def uri(self) -> str:
        """For `--backend-store-uri`."""
        return f"postgresql+psycopg2://mlflow@127.0.0.1:{self._port}/mlflow"

    def _run(self, command: str, *arguments: str) -> None:
        subprocess.run(
            [str(self._bin / command), *arguments],
            check=True,
            user=self._user,
            cwd=self._place,
            stdout=subprocess.DEVNULL,
        )

    def stop(self) -> None:
        """End it and wait for its end."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(20)
