"""Audit lines: one JSON object per administrative act, log-in and denial, for those who answer for the server.

    {"audit": "denied", "time": "2026-01-31T12:00:00Z", "who": "ada", "from": "10.0.0.7", "request": "1f-3",
     "method": "POST", "path": "/api/2.0/mlflow/runs/delete", "status": 403, "reason": "..."}

They never hold passwords, tokens, cookies or query strings. They go to standard error, or to the file that
RUNSTREAM_SERVER_AUDIT_FILE names (mode 0600, appended to, one write a line, so that processes may share it).
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Literal

from starlette.types import Scope

logger = logging.getLogger("runstream.server")
Act = Literal[
    "login", "login-failed", "logout", "denied", "delete", "purge", "restore", "rename", "grant", "users-changed"
]
MAX_TEXT_CHARS = 300


class Audit:
    """Writes the lines. Used on the event loop; a line is one short write."""

    def __init__(self, file: Path | None = None) -> None:
        """Raises:
        OSError: the file cannot be opened.
        """
        self._handle = (
            None if file is None else os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        )

    def note(self, act: Act, scope: Scope | None = None, **fields: str | int | None) -> None:
        """Write one line; `scope` says who sent which request from where."""
        line: dict[str, str | int | None] = {
            "audit": act,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        if scope is not None:
            principal = scope.get("runstream_principal")
            line["who"] = "-" if principal is None else principal.name
            line["from"] = scope.get("runstream_address", "-")
            line["request"] = scope.get("runstream_request_id", "-")
            line["method"] = scope["method"]
            line["path"] = scope["path"]
        else:
            line["process"] = os.getpid()
        line |= fields
        short = {key: value[:MAX_TEXT_CHARS] if isinstance(value, str) else value for key, value in line.items()}
        text = json.dumps(short) + "\n"  # ASCII: control characters of a path cannot forge a line
        try:
            if self._handle is None:
                sys.stderr.write(text)
                sys.stderr.flush()
            else:
                os.write(self._handle, text.encode("ascii"))
        except (OSError, ValueError) as exc:
            logger.error("an audit line is lost: %s", exc)

    def close(self) -> None:
        """Close the file."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
