"""How a command fails: exit codes, and one clear sentence for every error instead of a stack trace."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Final

__all__ = ["ExitCode", "Failure", "debugging", "explain", "need"]


class ExitCode(IntEnum):
    """What `$?` says. Part of the public interface."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    UNAVAILABLE = 4
    MISSING_PART = 5
    INTERRUPTED = 130
    BROKEN_PIPE = 141

    @property
    def label(self) -> str:
        """The name in `--json` errors: `failed`, `usage`, `not_found`, ..."""
        return self.name.lower()


class Failure(Exception):
    """A command ends with `message` on stderr and `code`."""

    def __init__(self, message: str, code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def need(extra: str) -> Iterator[None]:
    """Around imports of an optional part.

    Raises:
        Failure: it is not installed; gives the pip line.
    """
    try:
        yield
    except ModuleNotFoundError as exc:
        if (exc.name or "").startswith("runstream"):
            raise
        raise Failure(
            f"this command needs {exc.name}: pip install 'runstream[{extra}]'", ExitCode.MISSING_PART
        ) from exc


_BY_NAME: Final = {
    "NotFoundError": ExitCode.NOT_FOUND,
    "MissingExtraError": ExitCode.MISSING_PART,
    "UnavailableError": ExitCode.UNAVAILABLE,
    "TransportError": ExitCode.UNAVAILABLE,
    "TopicsError": ExitCode.UNAVAILABLE,
    "StoreBusy": ExitCode.UNAVAILABLE,
    "InvalidInputError": ExitCode.USAGE,
    "SettingsError": ExitCode.USAGE,
}
"""Error classes of the packages behind the commands, by name: importing them all would cost each start."""


def debugging() -> bool:
    """Whether RUNSTREAM_DEBUG asks for stack traces."""
    return os.environ.get("RUNSTREAM_DEBUG", "") not in ("", "0")


def explain(error: Exception) -> Failure:
    """The sentence and code for `error`; an error we do not know is named as a bug, with the way to its trace."""
    if isinstance(error, Failure):
        return error
    message = str(error).strip() or type(error).__name__
    for kind in type(error).__mro__:
        if kind.__name__ in _BY_NAME:
            return Failure(message, _BY_NAME[kind.__name__])
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("runstream"):
        return Failure(
            f"{message}. This command needs an optional part: pip install 'runstream[server]'", ExitCode.MISSING_PART
        )
    if isinstance(error, TimeoutError | ConnectionError):
        return Failure(message, ExitCode.UNAVAILABLE)
    ours = any(kind.__module__.partition(".")[0].startswith("runstream") for kind in type(error).__mro__)
    if ours:
        return Failure(message)
    if isinstance(error, OSError):
        return Failure(_operating_system(error))
    return Failure(
        f"unexpected {type(error).__name__}: {message}. This is a bug; RUNSTREAM_DEBUG=1 shows where it happened"
    )


def _operating_system(error: OSError) -> str:
    name = f"{error.filename}: " if error.filename else ""
    remedy = {
        errno.ENOSPC: "; free some space and try again",
        errno.EACCES: "; check the owner and mode of the file",
        errno.EROFS: "; the file system is read-only",
    }.get(error.errno or 0, "")
    return f"{name}{error.strerror or error}{remedy}"
