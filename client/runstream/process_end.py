"""How the process ends decides how its open runs end: FINISHED, FAILED or KILLED.

| end of the process | status |
| --- | --- |
| normal end, `sys.exit()` or `sys.exit(0)` | FINISHED |
| uncaught exception; `sys.exit(code)`, `exit(code)` or `quit(code)` with another code | FAILED |
| uncaught KeyboardInterrupt; SIGTERM | KILLED |

`raise SystemExit(1)` outside of any `with start_run()` cannot be told from a normal end. kill -9 and power loss leave
the run RUNNING; its heartbeat stops, and readers show it as lost.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Final, NoReturn

__all__ = ["ProcessEnd", "status_of_exception"]

SIGNAL_SECONDS: Final = 5.0
"""How long SIGTERM waits until the runs' ends are in the journal and, if the log is near, delivered."""


def status_of_exception(kind: type[BaseException], value: BaseException | None) -> str:
    """The status of a run that ends with this exception."""
    if issubclass(kind, SystemExit):
        return "FINISHED" if getattr(value, "code", None) in (None, 0, False) else "FAILED"
    return "KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED"


class _Exit(SystemExit):
    """A SystemExit whose fate can be watched: unlike the builtin one it takes weak references."""


class ProcessEnd:
    """Watches while runs are open, and puts every hook back when none is."""

    def __init__(
        self, end_runs: Callable[[str], None], settle: Callable[[float], None], deliver: Callable[[float], None]
    ) -> None:
        """
        Args:
            end_runs: ends every open run of this process with the status given; does not block on the network.
            settle: waits, at most the seconds given, for facts of the runs that are still being found out.
            deliver: waits, at most the seconds given, until everything is in the log. Only SIGTERM needs it: the
                recorder itself delivers at interpreter exit.
        """
        self._end_runs, self._settle, self._deliver = end_runs, settle, deliver
        self._registered = self._hooked = False
        self._status = "FINISHED"
        self._exits: list[tuple[weakref.ref[_Exit], Any]] = []
        self._before_excepthook: Any = None
        self._before_exits: dict[str, Any] = {}
        self._exit_hooks: dict[str, Any] = {}
        self._before_signal: Any = None
        self._masks: dict[int, set[Any]] = {}

    def watch(self) -> None:
        """A run has been opened. May be called from any thread; SIGTERM is only watched from the main one."""
        if not self._registered:
            atexit.register(self.at_exit)
            self._registered = True
        if not self._hooked and not _interactive():
            self._hooked = True
            self._before_excepthook, sys.excepthook = sys.excepthook, self._excepthook
            self._hook_exits()
        self._hook_signal()

    def rest(self) -> None:
        """No run is open any more."""
        self._exits.clear()
        self._status = "FINISHED"
        if self._hooked:
            self._hooked = False
            if sys.excepthook == self._excepthook:
                sys.excepthook = self._before_excepthook
            for name, hook in self._exit_hooks.items():
                holder = sys if name == "sys.exit" else builtins
                if getattr(holder, name.rpartition(".")[2], None) is hook:
                    setattr(holder, name.rpartition(".")[2], self._before_exits[name])
        if (
            self._before_signal is not None
            and threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGTERM) == self._on_signal
        ):
            signal.signal(signal.SIGTERM, self._before_signal)
            self._before_signal = None

    def judge(self, status: str) -> str:
        """`status`, or KILLED if SIGTERM has come meanwhile and the program's own handler dealt with it."""
        return "KILLED" if self._status == "KILLED" else status

    def at_exit(self) -> None:
        """End what is open. Runs at interpreter exit, before delivery is closed."""
        if any(reference() is not None and code not in (None, 0, False) for reference, code in self._exits):
            self._note("FAILED")  # still held by a traceback; a caught one would be long gone
        self._end_runs(self._status)
        self._settle(2.0)

    def before_fork(self) -> None:
        """Hold SIGTERM back: CPython forgets one that reaches a child before its interpreter is ready."""
        if self._before_signal is not None:
            self._masks[threading.get_ident()] = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def after_fork_in_parent(self) -> None:
        """Let SIGTERM through again."""
        mask = self._masks.pop(threading.get_ident(), None)
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def after_fork_in_child(self) -> None:
        """The child never ends the parent's runs, so SIGTERM means what it meant before they were opened."""
        mask = self._masks.pop(threading.get_ident(), None)
        self._masks.clear()
        if self._before_signal is not None:
            with contextlib.suppress(ValueError):  # embedded in a sub-interpreter, where signals are not ours
                signal.signal(signal.SIGTERM, self._before_signal)
            self._before_signal = None
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _note(self, status: str) -> None:
        if self._status != "KILLED":
            self._status = status

    def _excepthook(self, kind: type[BaseException], value: BaseException, traceback: TracebackType | None) -> Any:
        self._note(status_of_exception(kind, value))
        return self._before_excepthook(kind, value, traceback)

    def _hook_exits(self) -> None:
        """Let `sys.exit`, `exit` and `quit` raise an exception of ours."""

        def leave(code: Any = None) -> NoReturn:
            # No local name may hold the exception: its traceback holds this frame, and it would never be freed.
            raise self._marked(code)

        self._before_exits = {"sys.exit": sys.exit}
        self._before_exits |= {name: getattr(builtins, name) for name in ("exit", "quit") if hasattr(builtins, name)}
        self._exit_hooks = dict.fromkeys(self._before_exits, leave)
        sys.exit = leave
        for name in self._before_exits.keys() - {"sys.exit"}:
            setattr(builtins, name, leave)

    def _marked(self, code: Any) -> _Exit:
        marked = _Exit() if code is None else _Exit(code)
        if threading.current_thread() is threading.main_thread():

            def freed(_: object) -> None:
                try:
                    sys._getframe(1)
                except ValueError:
                    # No Python code runs: the interpreter itself took the exception, so the process ends with `code`.
                    self._note(status_of_exception(SystemExit, SystemExit(code)))

            self._exits = [each for each in self._exits if each[0]() is not None]
            self._exits.append((weakref.ref(marked, freed), code))
        return marked

    def _hook_signal(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        before = signal.getsignal(signal.SIGTERM)
        # None: a handler that is not Python's; SIG_IGN: the program wants to live on.
        if before == self._on_signal or before is None or before is signal.SIG_IGN:
            return
        self._before_signal = before
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        before = self._before_signal
        self._status = "KILLED"
        if callable(before):
            # The program decides: it may save a checkpoint and log more. Its runs are KILLED when it ends.
            before(number, frame)
            return
        # Here, in the interrupted thread: it may hold the journal's lock, which is reentrant for this very case.
        self._end_runs("KILLED")
        # What waits for other threads waits in one of its own, for those may wait for the interrupted one.
        worker = threading.Thread(target=self._leave, name="runstream-sigterm", daemon=True)
        worker.start()
        worker.join(SIGNAL_SECONDS)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def _leave(self) -> None:
        self._settle(SIGNAL_SECONDS / 5)
        self._deliver(SIGNAL_SECONDS / 2)


def _interactive() -> bool:
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)
