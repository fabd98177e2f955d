"""Finds the local store process of a data directory, or starts it. Owns no SQL.

db/server.json says where it is and how to log in; who can log in there has found it
db/start.lock  is held by the one reader that starts it, so that a hundred readers start one process
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import http.client
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from runstream.errors import MissingExtraError
from runstream_schemas.layout import READER, DataDirectory, ServerAddress

from .errors import StoreUnavailable
from .store import StoreAddress

__all__ = ["IDLE_EXIT_SECONDS", "LocalStore"]

IDLE_EXIT_SECONDS: Final = 60
"""How long a process that a reader started stays without work."""
_PROBE_SECONDS: Final = 5.0
_POLL_SECONDS: Final = 0.01
_SLOW_POLL_SECONDS: Final = 0.05
_STARTS: Final = 3
"""How often a start is tried in one search: the process may be killed while it starts."""


class LocalStore:
    """The local store process of one data directory. Any thread."""

    def __init__(self, directory: DataDirectory, artifact_root: str | None = None) -> None:
        """Args:
        artifact_root: passed on to a process that is started here.
        """
        self._directory = directory
        self._artifact_root = artifact_root

    def locate(self, timeout_seconds: float) -> StoreAddress:
        """The address of the live process; started if there is none. Blocks at most `timeout_seconds`.

        Raises:
            StoreUnavailable: it does not start; says why.
            MissingExtraError: the store is not installed.
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            address = self._live()
            if address is not None:
                return address
            with self._may_start() as mine:
                if mine:
                    return self._start(deadline)
            if time.monotonic() > deadline:
                raise StoreUnavailable(
                    f"another reader has been starting the local store of {self._directory.root} for "
                    f"{timeout_seconds:.0f} s; see {self._directory.server_log}"
                )
            time.sleep(_SLOW_POLL_SECONDS)

    def status(self) -> Mapping[str, Any]:
        """What the process says of itself: state, positions, end, trouble; empty where it does not answer."""
        address = ServerAddress.read(self._directory.server_file)
        return (_ask(address) if address is not None else None) or {}

    def _live(self) -> StoreAddress | None:
        try:
            address = ServerAddress.read(self._directory.server_file)
        except OSError as exc:
            raise StoreUnavailable(
                f"{self._directory.server_file} cannot be read: {exc.strerror}; the data directory belongs to "
                "another user, who may share it through `runstream server`"
            ) from exc
        if address is None or _ask(address) is None:
            return None
        return StoreAddress(address.host, address.port, READER, address.reader_token)

    @contextlib.contextmanager
    def _may_start(self) -> Iterator[bool]:
        """Hold the right to start the process; False where another reader has it."""
        path = self._directory.database / "start.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            root = self._directory.root
            raise StoreUnavailable(f"the data directory {root} cannot be used: {path}: {exc.strerror}") from exc
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(file)

    def _start(self, deadline: float) -> StoreAddress:
        address = self._live()  # another reader may have started it before the lock was ours
        if address is not None:
            return address
        if importlib.util.find_spec("chdb") is None:
            raise MissingExtraError("the local store", "server")
        began = time.monotonic()
        print(
            f"runstream: starting the local store of {self._directory.root} "
            f"(it leaves {IDLE_EXIT_SECONDS} s after its last use)",
            file=sys.stderr,
            flush=True,
        )
        for attempt in range(_STARTS):
            log_size = self._log_size()
            pid = self._spawn(attempt)
            while time.monotonic() < deadline:
                address = self._live()
                if address is not None:
                    return address
                if not _runs(pid):
                    break
                # Checking costs a look at one file.
                time.sleep(_POLL_SECONDS if time.monotonic() - began < 2 else _SLOW_POLL_SECONDS)
            else:
                raise StoreUnavailable(
                    f"the local store of {self._directory.root} did not answer within {time.monotonic() - began:.0f} s "
                    f"(process {pid}); see {self._directory.server_log}{self._tail(log_size)}"
                )
            # It ended: another start may have won meanwhile, or it was killed.
            address = self._live()
            if address is not None:
                return address
            if self._said(log_size):
                break
        reason = self._said(log_size) or "it ended without a word"
        raise StoreUnavailable(
            f"the local store of {self._directory.root} cannot be started: {reason}\n"
            f"(its log: {self._directory.server_log}){'' if self._said(log_size) else self._tail(log_size)}"
        )

    def _spawn(self, attempt: int) -> int:
        """Start the process in a session of its own; its pid. Not our child: nobody here has to wait for it."""
        command = [sys.executable, "-P", "-m", "runstream_ingest", "local", str(self._directory.root)]
        command += ["--idle-exit", str(IDLE_EXIT_SECONDS)]
        environment = {name: value for name, value in os.environ.items() if name != "RUNSTREAM_ARTIFACT_ROOT"}
        if self._artifact_root:
            environment["RUNSTREAM_ARTIFACT_ROOT"] = self._artifact_root
        if attempt:
            # A crash at the start may depend on the process's memory layout, and so on the size of its environment: one
            # did, in 18 of 18 starts under one size and 0 of 24 under the next larger ones.
            environment["RUNSTREAM_START_ATTEMPT"] = str(attempt) * 37 * attempt
        if environment.get("PYTHONPATH"):
            # The process runs in /, so that it keeps no folder of the user's busy.
            paths = environment["PYTHONPATH"].split(os.pathsep)
            environment["PYTHONPATH"] = os.pathsep.join(str(Path(path).absolute()) for path in paths if path)
        shell = 'log=$1; shift; "$@" </dev/null >>"$log" 2>&1 & echo $!'
        try:
            done = subprocess.run(
                ["/bin/sh", "-c", shell, "sh", str(self._directory.server_log), *command],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                cwd="/",
                env=environment,
                start_new_session=True,
                check=True,
            )
            return int(done.stdout)
        except (OSError, ValueError, subprocess.CalledProcessError) as exc:
            raise StoreUnavailable(f"the local store of {self._directory.root} cannot be started: {exc}") from exc

    def _log_size(self) -> int:
        try:
            return self._directory.server_log.stat().st_size
        except OSError:
            return 0

    def _said(self, since: int) -> str:
        """The sentence that a start left behind for a person."""
        lines = [
            line
            for line in _text_from(self._directory.server_log, since).splitlines()
            if line.startswith("runstream: ")
        ]
        return lines[-1].removeprefix("runstream: ") if lines else ""

    def _tail(self, since: int) -> str:
        lines = _text_from(self._directory.server_log, since).strip().splitlines()[-8:]
        return "".join(f"\n  {line}" for line in lines)


def _ask(address: ServerAddress) -> Mapping[str, Any] | None:
    """The status of the process at `address`; None where nobody answers who knows its token."""
    login = base64.b64encode(f"{READER}:{address.reader_token}".encode()).decode("ascii")
    connection = http.client.HTTPConnection(address.host, address.port, timeout=_PROBE_SECONDS)
    try:
        connection.request("GET", "/runstream/status", headers={"Authorization": f"Basic {login}"})
        response = connection.getresponse()
        body = response.read()
        found = json.loads(body) if response.status == 200 else None
        return found if isinstance(found, dict) else None
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        # In a container nobody may collect it: a zombie is as good as gone.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return True


def _text_from(path: Path, offset: int) -> str:
    """What was written to the log behind `offset`; all of it where it was begun anew."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 64_000, offset if offset <= size else 0))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""
