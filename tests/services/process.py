"""A server process that can be killed, paused and started again, and that never outlives its starter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_DIE_WITH_PARENT = """
import ctypes, os, sys
try:
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: the tests' servers must not outlive a killed test run
except AttributeError:
    pass  # not Linux
os.execvp(sys.argv[1], sys.argv[1:])
"""


class ServiceError(RuntimeError):
    """A service did not start, or was not ready in time; the message carries the end of its log."""


def wait_until(condition: Callable[[], bool], timeout_seconds: float, what: str) -> None:
    """Poll `condition` until it holds.

    Raises:
        ServiceError: not within the time; names `what`.
    """
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise ServiceError(f"{what}: not within {timeout_seconds:g} s")
        time.sleep(0.02)


class ServerProcess:
    """One command with its output in a file.

    It dies with the thread that started it (PR_SET_PDEATHSIG): start it from a thread that lives as long as it should.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.command = list(command)
        self.log = log
        self._environment = dict(environment) if environment is not None else None
        self._process: subprocess.Popen[bytes] | None = None
        self._paused = False

    @property
    def pid(self) -> int:
        if self._process is None:
            raise ServiceError(f"{self.command[0]} was not started")
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it, unless it runs."""
        if self.running:
            return
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-E", "-c", _DIE_WITH_PARENT, *self.command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
            )
        self._paused = False

    def wait_ready(self, ready: Callable[[], bool], timeout_seconds: float) -> None:
        """Until `ready`; fails at once where the process has ended."""

        def condition() -> bool:
            if not self.running:
                raise ServiceError(f"{self.command[0]} ended while starting:\n{self.log_tail()}")
            return ready()

        try:
            wait_until(condition, timeout_seconds, f"{self.command[0]} ready")
        except ServiceError as exc:
            raise ServiceError(f"{exc}\n{self.log_tail()}") from None

    def kill(self) -> None:
        """kill -9, and wait for the end of it."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def pause(self) -> None:
        """SIGSTOP."""
        os.kill(self.pid, signal.SIGSTOP)
        self._paused = True

    def unpause(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)
        self._paused = False

    def stop(self, timeout_seconds: float = 20.0) -> int | None:
        """SIGTERM, then kill -9 after the time. The exit status."""
        if self._process is None:
            return None
        if self._process.poll() is None:
            if self._paused:
                self.unpause()
            self._process.terminate()
            try:
                self._process.wait(timeout_seconds)
            except subprocess.TimeoutExpired:
                self.kill()
        return self._process.returncode

    def log_tail(self, lines: int = 25) -> str:
        """The end of its output."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except FileNotFoundError:
            return ""
