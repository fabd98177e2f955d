"""A server with data on it, its SQL port and its local store's, for tests that ask both with real clients."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import clickhouse_connect
from clickhouse_connect.driver.client import Client

from runstream_schemas.layout import READER, WRITER, DataDirectory, ServerAddress

from .mlflow_server import Served, served

RUNS = 3
POINTS = 500

_LOGGING = f"""
import math, runstream
for number in range({RUNS}):
    with runstream.start_run(run_name=f"run {{number}}", tags={{"team": "ä'\\\\"}}):
        runstream.log_params({{"lr": 0.1 * number, "text": "it's\\t\\n"}})
        for step in range({POINTS}):
            runstream.log_metric("loss", step + number, step=step)
        runstream.log_metric("odd", math.nan)
"""


@dataclass(frozen=True)
class Place:
    """Where SQL is answered, and as whom to ask."""

    host: str
    port: int
    user: str
    password: str

    def client(self, **options: Any) -> Client:
        """A new clickhouse_connect client with connections of its own."""
        options = {"database": "runstream", "dedicated_pool": True} | options
        return clickhouse_connect.get_client(
            host=self.host, port=self.port, username=self.user, password=self.password, **options
        )


@dataclass(frozen=True)
class Line:
    """The server, and the store process behind it."""

    server: Served

    @property
    def store(self) -> ServerAddress:
        """The store's address now: a query through the server starts it anew where it has left for want of use."""
        with urlopen(f"{self.server.url}/?query=SELECT%201", timeout=90) as answer:
            assert answer.read() == b"1\n"
        address = ServerAddress.read(DataDirectory(self.server.data).server_file)
        assert address is not None
        return address

    @property
    def places(self) -> dict[str, Place]:
        """The two ports by name."""
        port = urlsplit(self.server.url).port
        assert port is not None
        store = self.store
        return {
            "server": Place("127.0.0.1", port, "default", ""),
            "store": Place(store.host, store.port, READER, store.reader_token),
        }

    def writer(self) -> Client:
        """The store's writer, who sees everything that runs."""
        store = self.store
        return Place(store.host, store.port, WRITER, store.writer_token).client()

    def running(self, writer: Client) -> int:
        """Queries in the engine beside the one that asks."""
        rows = writer.query(
            "SELECT count() FROM system.processes WHERE query NOT LIKE '%system.processes%'"
        ).result_rows
        return int(rows[0][0])


@contextmanager
def sql_line(folder: Path, *arguments: str) -> Iterator[Line]:
    """A server on a directory into which some runs have been logged."""
    data = folder / "data"
    subprocess.run(
        [sys.executable, "-c", _LOGGING],
        env=os.environ | {"RUNSTREAM_TRACKING_URI": str(data)},
        check=True,
        timeout=60,
        cwd=folder,
    )
    with served(data, arguments) as server:
        yield Line(server)


def wait_for(condition: Callable[[], bool], seconds: float) -> float:
    """Wait until `condition` holds; after how many seconds it did.

    Raises:
        AssertionError: it did not in time.
    """
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"not within {seconds} s"
        time.sleep(0.02)
    return time.monotonic() - began
