"""A data directory with its local store process, shared by the tests of one module."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runstream.config import Settings
from runstream_query import Reader, open_reader
from tests.query.logged import Logged
from tests.services import used


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Return once `condition` holds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    """Whether the process has ended (a zombie has)."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (ProcessLookupError, FileNotFoundError):
        return True


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Logged]:
    """A fresh data directory; its store process is stopped in the end."""
    found = Logged(tmp_path_factory.mktemp("data"))
    try:
        yield found
    finally:
        found.transport.close(1.0)
        pid = found.stop_store()
        if pid is not None:
            wait_until(lambda: gone(pid))


@pytest.fixture(scope="module")
def reader(logged: Logged) -> Iterator[Reader]:
    """Reads the data directory; the first read starts the store process."""
    used.record("chdb", "local store process")
    found = open_reader(Settings.from_environment({}, tracking_uri=logged.root))
    try:
        yield found
    finally:
        found.close()
