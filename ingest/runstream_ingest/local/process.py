"""The local store process: the one process of a data directory that opens chDB. It ingests the log and serves SQL.

    flock on db/lock -> listen -> restrict -> open the engine -> migrate -> worker and HTTP -> publish db/server.json

`serve` is `python -m runstream_ingest local DATA_DIR`. Its exit codes:

    0  it was stopped, or left because nothing was asked of it        3  another process already serves the directory
    1  it failed; see db/server.log                                   4  chDB is not installed
    2  wrong use                                                      5  the store's files cannot be opened
                                                                      6  the port asked for is taken
"""

from __future__ import annotations

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
    say = say or _say
    directory = DataDirectory(data_directory.absolute())
    try:
        with Ownership.take(directory) as ownership:
            handler = _log_to(directory.server_log)
            try:
                return _serve(directory, ownership, idle_exit_seconds or None, port, say)
            except LocalStoreError:
                logger.exception("cannot go on")
                raise
            except Exception as exc:
                logger.exception("cannot go on")
                say(f"runstream: the local store process failed: {exc} (details in {directory.server_log})")
                return 1
            finally:
                logging.getLogger().removeHandler(handler)
                handler.close()
    except LocalStoreError as exc:
        say(f"runstream: {exc}")
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
        # What a killed predecessor left there is nobody's; the engine's own choice would be /tmp.
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in (directory.log, temporary, directory.database / "files", directory.database / "config"):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise EngineRefused(f"cannot make folders in {directory.root}: {exc.strerror}") from exc
    os.environ["TMPDIR"] = str(temporary)


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


def _log_to(path: Path) -> logging.Handler:
    try:
        if path.exists() and path.stat().st_size > MAX_LOG_BYTES:
            path.replace(path.with_name(f"{path.name}.1"))
        handler: logging.Handler = logging.FileHandler(path, encoding="utf-8")
    except OSError:
        handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    if root.level in (logging.NOTSET, logging.WARNING):
        root.setLevel(logging.INFO)
    return handler


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
