"""Errors of the local store process.

IngestError
  LocalStoreError            the process cannot start or go on; the message is for a person
    EngineMissing            chDB is not installed
    EngineRefused            the store's files cannot be opened
    AlreadyRunning           another local store process owns the data directory
    PortTaken                the port asked for is in use
  EngineQueryError           one query or insert failed; has `code`
    Refused                  the gate or the interface refused a request before the engine saw it
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from ..errors import IngestError

__all__ = [
    "AlreadyRunning",
    "EngineMissing",
    "EngineQueryError",
    "EngineRefused",
    "LocalStoreError",
    "PortTaken",
    "Refused",
]

_CODE: Final = re.compile(r"Code: (\d+)\. ")


class LocalStoreError(IngestError):
    """The local store process cannot start or go on. `exit_code` is what the command exits with."""

    exit_code = 1


class EngineMissing(LocalStoreError):
    """chDB is not installed."""

    exit_code = 4


class EngineRefused(LocalStoreError):
    """The store's files cannot be opened."""

    exit_code = 5

    @classmethod
    def explain(cls, directory: Path, text: str) -> EngineRefused:
        """The engine's refusal as one sentence with a remedy."""
        lowered = text.lower()
        if (
            "newer" in lowered
            or "unknown format version" in lowered
            or "not supported" in lowered
            or "unknown codec" in lowered
        ):
            remedy = 'a newer engine wrote them; upgrade with: pip install -U "runstream[server]"'
        elif "read-only file system" in lowered or "permission denied" in lowered:
            remedy = "they are not writable by this user"
        elif "no space left" in lowered or "not_enough_space" in lowered:
            remedy = "the disk is full; free some space and start again"
        elif "cannot lock file" in lowered or "another server instance" in lowered or "already" in lowered:
            remedy = "another program holds them open; stop it first"
        else:
            remedy = (
                "they may be damaged. The log holds every fact: move this folder away and start again, "
                "and it is built anew from the log"
            )
        reason = " ".join(text.split())[:300]
        return cls(f"the store's files in {directory} cannot be opened: {remedy} (the engine says: {reason})")


class AlreadyRunning(LocalStoreError):
    """Another local store process owns the data directory."""

    exit_code = 3

    def __init__(self, directory: Path, pid: int | None) -> None:
        owner = f"process {pid}" if pid else "another process"
        super().__init__(f"{owner} already serves {directory}; nothing to do")
        self.pid = pid


class PortTaken(LocalStoreError):
    """The port asked for is in use."""

    exit_code = 6

    def __init__(self, port: int) -> None:
        super().__init__(f"port {port} on 127.0.0.1 is taken by another program; leave --port out to get a free one")
        self.port = port


class EngineQueryError(IngestError):
    """One query or insert failed. The message starts with `Code: N. DB::Exception:` as clients expect."""

    def __init__(self, message: str, code: int) -> None:
        text = message if message.startswith("Code: ") else f"Code: {code}. DB::Exception: {message}"
        super().__init__(text)
        self.code = code

    @classmethod
    def parse(cls, text: str) -> EngineQueryError:
        """The engine's error text with its code; 1002 (UNKNOWN_EXCEPTION) where it names none."""
        match = _CODE.search(text)
        start = match.start() if match else 0
        return cls(text[start:].strip(), int(match[1]) if match else 1002)


class Refused(EngineQueryError):
    """Refused before the engine saw it."""
