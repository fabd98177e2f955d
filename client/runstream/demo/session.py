"""The demo from start to end: start the training processes, watch them, then report."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, Final

from .progress import Screen, State
from .report import Report, shown_address
from .training import JOBS, Job, Progress, prepare_environment, train

if TYPE_CHECKING:
    from ..cli.session import Session

__all__ = ["run_demo"]

_PRELOAD: Final = [
    "runstream.demo.training",
    "matplotlib.figure",
    "sklearn.datasets",
    "sklearn.ensemble",
    "sklearn.linear_model",
    "sklearn.metrics",
    "sklearn.model_selection",
    "sklearn.neural_network",
]
_LOOK_EVERY_SECONDS: Final = 1.0
_STOP_SECONDS: Final = 10.0
"""How long interrupted training processes get to end their runs."""


@dataclass(slots=True)
class _Child:
    process: Any
    """A process of the forkserver context (its class is not exported)."""
    messages: Connection
    state: State


def run_demo(session: Session, *, processes: int, hints: bool = True, jobs: Sequence[Job] = JOBS) -> bool:
    """Train every job of `jobs`, at most `processes` at once, and print what they logged.

    Args:
        hints: say what to try next.

    Returns:
        Whether every run finished and reading found exactly what was logged.
    """
    import runstream

    prepare_environment()
    if session.tracking_uri is not None:
        runstream.set_tracking_uri(session.tracking_uri)
    tracking_uri = runstream.get_tracking_uri()
    mark = secrets.token_hex(4)
    states = [State(job) for job in jobs]
    out = session.output
    if not out.json:
        at_once = min(processes, len(jobs))
        out.heading(f"Training {len(jobs)} scikit-learn models in {at_once} processes")
        out.write(f"Each logs by itself to {shown_address(tracking_uri)}\n")
    started = time.monotonic()
    with Screen(states, plain=out.json) as screen:
        stop = threading.Event()
        watcher = threading.Thread(target=_watch_store, args=(mark, screen, stop), name="demo-watch", daemon=True)
        watcher.start()
        try:
            _train_all(states, tracking_uri, mark, processes, screen if not out.json else None)
        finally:
            stop.set()
            watcher.join(timeout=_STOP_SECONDS)
    report = Report(session, states, mark, trained_seconds=time.monotonic() - started)
    return report.show(hints=hints)


def _train_all(states: Sequence[State], tracking_uri: str, mark: str, processes: int, screen: Screen | None) -> None:
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        # One process imports scikit-learn; the training processes are forked from it and start at once.
        context.set_forkserver_preload(_PRELOAD)
    waiting = list(states)
    working: dict[Connection, _Child] = {}
    try:
        while waiting or working:
            while waiting and len(working) < processes:
                child = _start(context, waiting.pop(0), tracking_uri, mark)
                working[child.messages] = child
            for ready in wait(list(working), timeout=0.5):
                assert isinstance(ready, Connection)
                if not _receive(working[ready]):
                    _finish(working.pop(ready))
            if screen is not None:
                screen.refresh()
    except BaseException:
        _stop(list(working.values()))
        raise


def _start(context: Any, state: State, tracking_uri: str, mark: str) -> _Child:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(state.job, tracking_uri, mark, sender), name=state.job.name)
    process.start()
    sender.close()
    return _Child(process, receiver, state)


def _child(job: Job, tracking_uri: str, mark: str, sender: Connection) -> None:
    """The training process."""

    def send(progress: Progress) -> None:
        with suppress(BrokenPipeError):  # the screen is gone; training goes on
            sender.send(progress)

    try:
        train(job, tracking_uri, mark, send)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as exc:
        if os.environ.get("RUNSTREAM_DEBUG", "") not in ("", "0"):
            raise
        send(Progress(job.name, 0, None, 0, error=f"{type(exc).__name__}: {exc}"))
        sys.exit(1)


def _receive(child: _Child) -> bool:
    """Take one message; False once the process has closed its end."""
    try:
        message = child.messages.recv()
    except (EOFError, ConnectionResetError):
        return False
    child.state.update(message)
    return True


def _finish(child: _Child) -> None:
    child.messages.close()
    child.process.join()
    code = child.process.exitcode
    child.process.close()
    state = child.state
    if code != 0 and not state.error:
        state.done = False
        state.error = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"


def _stop(children: Sequence[_Child]) -> None:
    """After an interrupt: the processes got the signal, too, and end their runs; who does not is terminated."""
    deadline = time.monotonic() + _STOP_SECONDS
    for child in children:
        child.process.join(timeout=max(0.0, deadline - time.monotonic()))
        if child.process.exitcode is None:
            child.process.terminate()
            child.process.join(timeout=1.0)
        child.messages.close()


def _watch_store(mark: str, screen: Screen, stop: threading.Event) -> None:
    """Ask, while training goes on, how many points SQL sees; trouble is left to the report, which asks again."""
    import runstream

    query = (
        "SELECT count() AS points FROM metrics WHERE run_id IN "
        "(SELECT run_id FROM tags WHERE key = 'demo.session' AND value = {mark:String})"
    )
    while not stop.wait(_LOOK_EVERY_SECONDS):
        with suppress(Exception):
            rows = runstream.sql(query, parameters={"mark": mark}, output_format="rows")
            screen.stored = int(rows[0]["points"])
