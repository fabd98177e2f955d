"""A real `runstream server` process on a fresh data directory, for tests that drive it from outside."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

START_SECONDS = 40.0
_URL = re.compile(r"serving .* on (http://\S+) \(process")


@dataclass
class Served:
    """A running server."""

    url: str
    data: Path
    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    """Everything it has said so far."""

    def stop(self, how: int = signal.SIGTERM) -> int:
        """End it and wait; its exit code."""
        self.process.send_signal(how)
        return self.process.wait(30)


@contextmanager
def served(data: Path, arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> Iterator[Served]:
    """Start the server on a free port and wait until it says where; stop it and its store at the end."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("RUNSTREAM_", "MLFLOW_"))}
    env |= {"PYTHONUNBUFFERED": "1", **(environment or {})}
    command = [sys.executable, "-m", "runstream", "server", "--port", "0", "--tracking-uri", str(data), *arguments]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    found: queue.Queue[str] = queue.Queue()
    server = Served("", data, process)

    def listen() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            server.lines.append(line)
            match = _URL.search(line)
            if match:
                found.put(match[1].replace("localhost", "127.0.0.1"))
        found.put("")

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        server.url = found.get(timeout=START_SECONDS)
        if not server.url:
            raise RuntimeError("the server did not start:\n" + "".join(server.lines))
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        listener.join(5)
        if process.stderr is not None:
            process.stderr.close()
        _stop_store(data)


def _stop_store(data: Path) -> None:
    from runstream_schemas.layout import DataDirectory, ServerAddress

    address = ServerAddress.read(DataDirectory(data).server_file)
    if address is not None:
        try:
            os.kill(address.pid, signal.SIGTERM)
        except ProcessLookupError:
            return
