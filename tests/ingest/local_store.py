"""A local store process for tests: started, asked, stopped or killed."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import clickhouse_connect
from clickhouse_connect.driver.client import Client

from runstream_schemas.layout import READER, WRITER, DataDirectory, ServerAddress

START_SECONDS = 30.0


class LocalStore:
    """One process over one data directory."""

    def __init__(
        self, root: Path, *, idle_exit: float = 0, port: int = 0, environment: Mapping[str, str] | None = None
    ) -> None:
        self.directory = DataDirectory(root)
        self._said = root.parent / f"{root.name}.said.{time.monotonic_ns()}"
        command = [sys.executable, "-m", "runstream_ingest", "local", str(root)]
        with open(self._said, "wb") as said:
            self.process = subprocess.Popen(
                [*command, "--idle-exit", str(idle_exit), "--port", str(port)],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )
        self._clients: list[Client] = []

    @property
    def said(self) -> str:
        """What the process has told a person."""
        return self._said.read_text()

    @property
    def log(self) -> str:
        return self.directory.server_log.read_text()

    def address(self) -> ServerAddress:
        """Wait until it is published and return its address."""
        found: list[ServerAddress] = []

        def published() -> bool:
            assert self.process.poll() is None, f"it ended with {self.process.returncode}: {self.said}"
            address = ServerAddress.read(self.directory.server_file)
            if address is not None and address.pid == self.process.pid:
                found.append(address)
            return bool(found)

        wait_for(published, START_SECONDS)
        return found[0]

    def client(self, user: str = READER, **options: Any) -> Client:
        """A new clickhouse_connect client, closed with the process."""
        address = self.address()
        token = address.reader_token if user == READER else address.writer_token
        options = {"database": "runstream", "dedicated_pool": True, **options}
        client = clickhouse_connect.get_client(
            host=address.host, port=address.port, username=user, password=token, **options
        )
        self._clients.append(client)
        return client

    def writer(self, **options: Any) -> Client:
        return self.client(WRITER, **options)

    def request(
        self,
        method: str = "GET",
        path: str = "/",
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        *,
        user: str | None = READER,
        timeout: float = 30.0,
        **parameters: str,
    ) -> tuple[int, dict[str, str], bytes]:
        """One raw HTTP request: status, headers (lower case) and body."""
        address = self.address()
        sent = dict(headers or {})
        if user is not None:
            sent["X-ClickHouse-User"] = user
            sent["X-ClickHouse-Key"] = address.reader_token if user == READER else address.writer_token
        connection = http.client.HTTPConnection(address.host, address.port, timeout=timeout)
        try:
            connection.request(method, f"{path}?{urlencode(parameters)}", body, sent)
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def status(self) -> dict[str, Any]:
        code, _, body = self.request(path="/runstream/status")
        assert code == 200, body
        answer: dict[str, Any] = json.loads(body)
        return answer

    def kill(self) -> None:
        """SIGKILL, at once."""
        self._close_clients()
        self.process.kill()
        self.process.wait(30)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self._close_clients()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def _close_clients(self) -> None:
        for client in self._clients:
            client.close()
        self._clients.clear()


@contextmanager
def local_store(root: Path, **options: Any) -> Iterator[LocalStore]:
    """A process that is gone in the end, whatever happens."""
    store = LocalStore(root, **options)
    try:
        yield store
    finally:
        if store.process.poll() is None:
            store.stop()
        store._close_clients()


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until `condition` holds.

    Raises:
        AssertionError: it did not in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.01)
