"""The local store process: the one process of a data directory that opens chDB. It ingests the log and serves SQL.

    flock on db/lock -> listen -> restrict -> open the engine -> migrate -> worker and HTTP -> publish db/server.json

`serve` is `python -m runstream_ingest local DATA_DIR`. Its exit codes:

    0  it was stopped, or left because nothing was asked of it        3  another process already serves the directory
    1  it failed; see db/server.log                                   4  chDB is not installed
    2  wrong use                                                      5  the store's files cannot be opened
                                                                      6  the port asked for is taken
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from runstream_schemas.layout import DataDirectory

from ..errors import IngestError
from . import landlock
from .errors import EngineRefused, LocalStoreError, PortTaken
from .ownership import Ownership

__all__ = ["DEFAULT_IDLE_EXIT_SECONDS", "serve"]

logger = logging.getLogger(__name__)

DEFAULT_IDLE_EXIT_SECONDS: Final = 60.0
HOST: Final = "127.0.0.1"
MAX_LOG_BYTES: Final = 5 * 1024 * 1024
"""server.log is moved to server.log.1 at a start that finds it larger."""


def serve(
    data_directory: Path,
    idle_exit_seconds: float | None = DEFAULT_IDLE_EXIT_SECONDS,
    port: int = 0,
    *,
    say: Callable[[str], None] | None = None,
) -> int:
    """Run until stopped by SIGTERM or SIGINT, or idle; blocks. Main thread only.

    Args:
        data_directory: made if missing.
        idle_exit_seconds: leave after so long without a request, without anything to ingest and without anything
            appended to the log; 0 or None stays for ever.
        port: on 127.0.0.1; 0 takes any free one.
        say: gets each line that is meant for a person; standard error by default.

    Returns:
        The exit code, see the module. Errors are told in one sentence; their details go to db/server.log.
    """
    directory = DataDirectory(data_directory.absolute())
    with _Voice(say) as voice:
        try:
            with Ownership.take(directory) as ownership:
                handler = voice.log_to(directory.server_log)
                try:
                    return _serve(directory, ownership, idle_exit_seconds or None, port, voice.say)
                except LocalStoreError:
                    raise
                except IngestError as exc:
                    # Of the database (migrations) or the store: its message is for a person.
                    raise EngineRefused(str(exc)) from exc
                except Exception as exc:
                    logger.exception("cannot go on")
                    voice.say(f"runstream: the local store process failed: {exc} (see {directory.server_log})")
                    return 1
                finally:
                    logging.getLogger().removeHandler(handler)
                    handler.close()
        except LocalStoreError as exc:
            voice.say(f"runstream: {exc}")
            return exc.exit_code


def _serve(
    directory: DataDirectory,
    ownership: Ownership,
    idle_exit_seconds: float | None,
    port: int,
    say: Callable[[str], None],
) -> int:
    _make_folders(directory)
    with _listen(port) as listener:
        problem = _restrict(directory)
        if problem is None:
            logger.info("restricted by Landlock to the store's files")
        else:
            logger.warning("not restricted by Landlock: %s", problem)
        # Imported now, so that a second start answers in milliseconds; Landlock must come before the first thread.
        from .runtime import Runtime

        runtime = Runtime(directory, listener, idle_exit_seconds, ownership)
        stop = _stop_on_signals(runtime.stop)
        try:
            runtime.run(say)
        finally:
            stop()
    return 0


def _make_folders(directory: DataDirectory) -> None:
    temporary = directory.database / "tmp"
    try:
        # What a killed predecessor left there is nobody's.
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in (directory.log, temporary, directory.database / "files", directory.database / "config"):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise EngineRefused(f"cannot make folders in {directory.root}: {exc.strerror}") from exc


def _restrict(directory: DataDirectory) -> str | None:
    if os.environ.get("RUNSTREAM_LANDLOCK", "1") in ("0", "false", "no"):
        return "RUNSTREAM_LANDLOCK=0"
    grants = {
        # server.json and server.log are written there but not read: the first holds the writer's token.
        directory.database: landlock.WRITE_ONLY,
        directory.database / "files": landlock.READ_WRITE,
        directory.database / "config": landlock.READ_WRITE,
        directory.database / "tmp": landlock.READ_WRITE,
        directory.log: landlock.READ_WRITE,
    }
    return landlock.restrict(grants, landlock.program_paths())


def _listen(port: int) -> socket.socket:
    # The protocol is named, for asyncio sets TCP_NODELAY only then: without it every answer waits 40 ms for an ACK.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
    except OSError as exc:
        listener.close()
        if port:
            raise PortTaken(port) from exc
        raise
    return listener


def _stop_on_signals(stop: Callable[[], None]) -> Callable[[], None]:
    """Stop gracefully on SIGTERM and SIGINT; returns the undoing."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, _: object) -> None:
        # From another thread: a handler may interrupt code that holds a lock.
        threading.Thread(target=stop, name="stop", daemon=True).start()

    for number in before:
        signal.signal(number, handle)

    def undo() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    return undo


class _Voice:
    """Two ways out: `say` for a person, db/server.log for everything else, the engine's own remarks included.

    The engine writes to the file descriptors 1 and 2; from `log_to` on these are the log, and `say` keeps the terminal.
    """

    def __init__(self, say: Callable[[str], None] | None) -> None:
        self._say = say
        self._kept: list[tuple[int, int]] = []

    def say(self, line: str) -> None:
        """One line for a person."""
        if self._say is not None:
            self._say(line)
            return
        terminal = next((copy for number, copy in self._kept if number == 2), 2)
        with contextlib.suppress(OSError):  # nobody listens any more
            os.write(terminal, f"{line}\n".encode())

    def log_to(self, path: Path) -> logging.Handler:
        """Send the process's log, standard output and standard error to `path`."""
        handler: logging.Handler
        try:
            if path.exists() and path.stat().st_size > MAX_LOG_BYTES:
                path.replace(path.with_name(f"{path.name}.1"))
            handler = logging.FileHandler(path, encoding="utf-8")
            file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except OSError:
            handler = logging.StreamHandler(sys.stderr)
        else:
            sys.stdout.flush()
            sys.stderr.flush()
            for number in (1, 2):
                self._kept.append((number, os.dup(number)))
                os.dup2(file, number)
            os.close(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root = logging.getLogger()
        root.addHandler(handler)
        if root.level in (logging.NOTSET, logging.WARNING):
            root.setLevel(logging.INFO)
        return handler

    def __enter__(self) -> _Voice:
        return self

    def __exit__(self, *_: object) -> None:
        while self._kept:
            number, copy = self._kept.pop()
            os.dup2(copy, number)
            os.close(copy)
