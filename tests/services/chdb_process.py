"""chDB in a process of its own, driven through `Store` calls: a test process must never open it, for it forks later.

`python -m tests.services.chdb_process DIRECTORY SOCKET` is the child; `ChdbProcess` is the parent's end.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

_KEY = b"tests"
_numbers = itertools.count()


class ChdbProcess:
    """One engine over one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._sockets = Path(tempfile.mkdtemp(prefix="chdb-"))
        address = str(self._sockets / "s")
        self._listener = Listener(address, authkey=_KEY, backlog=16)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.services.chdb_process", str(directory), address],
            cwd=Path(__file__).parents[2],
        )
        # The child calls once, so that a child that fails to start is noticed by its exit.
        waiter = threading.Thread(target=self._wait_for_death, daemon=True)
        waiter.start()
        self._control = self._listener.accept()
        self.address: str = self._control.recv()

    def _wait_for_death(self) -> None:
        if self.process.wait() != 0 and not hasattr(self, "address"):
            Client(str(self._sockets / "s"), authkey=_KEY).send("dead")

    def store(self, database: str | None = None) -> RemoteStore:
        """A store on a database, made if it is missing; None makes a new one."""
        name = database or f"test_{os.getpid()}_{next(_numbers)}"
        return RemoteStore(Client(self.address, authkey=_KEY), name)

    def kill(self) -> None:
        """SIGKILL, as a machine that runs out of memory would."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        self._control.close()
        self._listener.close()
        for file in self._sockets.iterdir():
            file.unlink()
        self._sockets.rmdir()


class RemoteStore:
    """The `ChdbStore` of the child, called from here."""

    def __init__(self, connection: Connection, database: str) -> None:
        self._connection = connection
        self.database = database
        self._lock = threading.Lock()
        self._call("open", database)

    def _call(self, method: str, *arguments: Any) -> Any:
        from runstream_ingest.errors import StoreBusy

        try:
            with self._lock:  # tests look while a worker works
                self._connection.send((method, arguments))
                result, error = self._connection.recv()
        except (EOFError, OSError) as exc:
            raise StoreBusy(f"the store's process is gone: {exc}") from exc
        if error is not None:
            raise error[0](error[1], code=error[2])
        return result

    def insert(self, table: str, columns: Sequence[str], chunks: Sequence[bytes]) -> None:
        self._call("insert", table, list(columns), list(chunks))

    def execute(self, sql: str, parameters: Mapping[str, int | float | str] | None = None) -> None:
        self._call("execute", sql, parameters)

    def rows(self, sql: str, parameters: Mapping[str, int | float | str] | None = None) -> list[tuple[Any, ...]]:
        return self._call("rows", sql, parameters)

    def cpu_seconds(self) -> tuple[float, float, int]:
        """CPU seconds and peak memory (bytes) of the engine's process; wall-clock seconds there."""
        return self._call("cpu_seconds")

    def close(self) -> None:
        self._connection.close()


def _serve(connection: Connection, engine: Any) -> None:
    import resource

    from runstream_ingest.errors import StoreError
    from runstream_ingest.local.store import ChdbStore

    store: Any = None
    while True:
        try:
            method, arguments = connection.recv()
        except (EOFError, OSError):
            return
        result: Any = None
        error = None
        try:
            if method == "open":
                ChdbStore(engine, "default").execute(f"CREATE DATABASE IF NOT EXISTS {arguments[0]}")
                store = ChdbStore(engine, arguments[0])
            elif method == "cpu_seconds":
                usage = resource.getrusage(resource.RUSAGE_SELF)
                result = (usage.ru_utime + usage.ru_stime, time.monotonic(), usage.ru_maxrss * 1024)
            else:
                result = getattr(store, method)(*arguments)
        except StoreError as exc:
            error = (type(exc), str(exc), exc.code)
        connection.send((result, error))


def main() -> None:
    directory, address = sys.argv[1:]
    from runstream_ingest.local.engine import Engine

    engine = Engine(Path(directory))
    own = f"{address}.engine"
    listener = Listener(own, authkey=_KEY, backlog=16)
    control = Client(address, authkey=_KEY)
    control.send(own)

    def leave_with_parent() -> None:
        try:
            control.recv()
        except (EOFError, OSError):
            os._exit(0)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    while True:
        threading.Thread(target=_serve, args=(listener.accept(), engine), daemon=True).start()


if __name__ == "__main__":
    main()
