"""Where a run comes from: entry point, git state, command line, user, host, Python and package versions.

`capture` is quick, since `start_run` waits for it; what needs a process or a walk over site-packages comes later, from
`capture_slowly` in a background thread. Nothing here raises: what cannot be found out is left out.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from runstream_schemas.limits import MAX_TAG_VALUE_CHARS

from . import git

__all__ = ["BackgroundCapture", "Source", "capture", "in_notebook", "installed_packages"]

MAX_COMMAND_CHARS: Final = 4_000
"""The command line tag is cut to this length."""
_FRESH_SECONDS: Final = 10.0
"""A dirty flag found this recently serves further runs of the process, so that a thousand runs start git once."""


@dataclass(frozen=True, slots=True)
class Source:
    """What is known at once about the code that starts a run."""

    name: str
    """Entry point: path of the script, module name or notebook."""
    type: str
    """LOCAL, NOTEBOOK or PROJECT."""
    user: str
    checkout: git.Checkout | None
    extra: Mapping[str, str]
    """`runstream.*` tags: command line, host, Python, platform, process."""

    @property
    def version(self) -> str:
        """Git commit, or empty."""
        return self.checkout.commit if self.checkout else ""

    def tags(self) -> dict[str, str]:
        """Everything under MLflow's reserved names and `runstream.*`; nothing empty."""
        found = {
            "mlflow.user": self.user,
            "mlflow.source.name": self.name,
            "mlflow.source.type": self.type,
        }
        if self.checkout is not None:
            found["mlflow.source.git.commit"] = self.checkout.commit
            found["mlflow.source.git.branch"] = self.checkout.branch
            found["mlflow.source.git.repoURL"] = self.checkout.repository
        found.update(self.extra)
        return {key: value for key, value in found.items() if value}


def capture() -> Source:
    """What can be known within a few milliseconds; reads some small files and starts no process."""
    notebook = in_notebook()
    name = (_notebook_name() if notebook else "") or _entry_point()
    kind = "NOTEBOOK" if notebook else "PROJECT" if os.environ.get("RUNSTREAM_PROJECT_NAME") else "LOCAL"
    return Source(
        name=clean_text(name, 1_000),
        type=kind,
        user=clean_text(_user(), 250),
        checkout=git.find_checkout(_code_folder()),
        extra={
            "runstream.commandLine": clean_text(_command_line(), MAX_COMMAND_CHARS),
            "runstream.host": clean_text(os.uname().nodename, 250),
            "runstream.python": ".".join(map(str, sys.version_info[:3])),
            "runstream.platform": clean_text(sys.platform, 250),
            "runstream.workingDirectory": clean_text(_working_directory(), 1_000),
            "runstream.processId": str(os.getpid()),
        },
    )


def installed_packages() -> str:
    """`name==version` lines of every installed distribution, sorted, cut at the limit of a tag.

    Read from the folder names in `sys.path`, which takes milliseconds where reading their metadata takes a second.
    """
    found: dict[str, str] = {}
    for place in sys.path:
        try:
            names = [entry.name for entry in os.scandir(place or ".")]
        except OSError:
            continue
        for entry in names:
            stem, dot, suffix = entry.rpartition(".")
            if dot and suffix in ("dist-info", "egg-info"):
                name, _, rest = stem.partition("-")
                version = rest.split("-py")[0]
                if version:
                    found.setdefault(name.lower().replace("_", "-"), version)
    return clean_text("\n".join(sorted(f"{name}=={version}" for name, version in found.items())), MAX_TAG_VALUE_CHARS)


def in_notebook() -> bool:
    """Whether this code runs in a Jupyter kernel (not merely in a terminal IPython)."""
    shell = _ipython()
    return shell is not None and "IPKernelApp" in getattr(shell, "config", {})


def clean_text(text: str, max_chars: int) -> str:
    """`text` fit for a tag: no halves of surrogate pairs (bytes of a command line that were not UTF-8), cut."""
    whole = text.encode("utf-8", "replace").decode("utf-8").replace("\x00", "")
    return whole if len(whole) <= max_chars else f"{whole[: max_chars - 4]} ..."


class BackgroundCapture:
    """Finds the slow facts in a daemon thread and hands them to each run that asked.

    One thread per process at a time, whatever the number of runs. After a fork the child starts afresh.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._condition = threading.Condition()
        self._waiting: list[tuple[int, Callable[[Mapping[str, str]], None], Path | None]] = []
        self._running = False
        self._ticket = self._served = 0
        self._packages: str | None = None
        self._dirty: dict[Path, tuple[float, bool | None]] = {}

    def request(self, checkout: git.Checkout | None, deliver: Callable[[Mapping[str, str]], None]) -> int:
        """Have `deliver(tags)` called from the background thread, soon; a ticket for `wait`. Does not block."""
        if self._pid != os.getpid():
            self._reset()
        with self._condition:
            self._ticket += 1
            ticket = self._ticket
            self._waiting.append((ticket, deliver, checkout.folder if checkout else None))
            if self._running:
                return ticket
            self._running = True
        try:
            threading.Thread(target=self._work, name="runstream-source", daemon=True).start()
        except RuntimeError:  # interpreter exit: no thread can be started any more, and the facts are no use
            with self._condition:
                self._running = False
                self._waiting.clear()
                self._served = ticket
        return ticket

    def wait(self, ticket: int, timeout_seconds: float) -> bool:
        """Block until the facts of `ticket` are delivered; False when the time is up first."""
        if self._pid != os.getpid():
            return False
        with self._condition:
            return self._condition.wait_for(lambda: self._served >= ticket, timeout_seconds)

    def _work(self) -> None:
        while True:
            with self._condition:
                if not self._waiting:
                    self._running = False
                    return
                ticket, deliver, folder = self._waiting.pop(0)
            try:
                deliver(self._facts(folder))
            except Exception:  # the run may have ended meanwhile; these facts are a courtesy
                pass
            finally:
                with self._condition:
                    self._served = ticket
                    self._condition.notify_all()

    def _facts(self, folder: Path | None) -> dict[str, str]:
        if self._packages is None:
            self._packages = installed_packages()
        facts = {"runstream.packages": self._packages} if self._packages else {}
        if folder is not None:
            found = self._dirty.get(folder)
            if found is None or self._clock() - found[0] > _FRESH_SECONDS:
                found = self._dirty[folder] = (self._clock(), git.is_dirty(folder))
            if found[1] is not None:
                facts["mlflow.source.git.dirty"] = "true" if found[1] else "false"
        return facts


def _ipython() -> Any:
    module = sys.modules.get("IPython")
    if module is None:
        return None
    try:
        return module.get_ipython()
    except Exception:  # a half-initialised IPython is no notebook
        return None


def _notebook_name() -> str:
    namespace = getattr(_ipython(), "user_ns", {})
    path = namespace.get("__vsc_ipynb_file__") or os.environ.get("JPY_SESSION_NAME") or ""
    return str(path) or "notebook"


def _entry_point() -> str:
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name and spec.name != "__main__":  # python -m package.module
        return str(spec.name).removesuffix(".__main__")
    file = getattr(main, "__file__", None)
    if file:
        return str(file)
    return (sys.argv[0] if sys.argv else "") or "<console>"


def _code_folder() -> Path:
    """Where the code lies that was started: its checkout counts, not that of the working directory."""
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    if file and not in_notebook():
        folder = Path(file).absolute().parent
        if "site-packages" not in folder.parts and folder.name != "bin":  # an installed command works for the cwd
            return folder
    return Path(_working_directory())


def _command_line() -> str:
    import shlex

    return shlex.join(getattr(sys, "orig_argv", None) or sys.argv)


def _working_directory() -> str:
    try:
        return str(Path.cwd())
    except OSError:  # it has been removed
        return ""


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # containers run under ids that have no name
        return f"uid {os.getuid()}"
