"""Which real services this run used: printed at the end of a session, so that nobody mistakes a skip for a pass."""

from __future__ import annotations

import os

_used: dict[str, str] = {}

REQUIRED_ON_CI = ("kafka", "s3", "chdb", "go", "jdbc")
"""With CI=true a test that cannot get one of these fails instead of being skipped."""


def record(service: str, description: str) -> None:
    """Remember that `service` was really used, in which form."""
    known = _used.get(service)
    if known is None:
        _used[service] = description
    elif description not in known.split(" + "):
        _used[service] = f"{known} + {description}"


def line() -> str:
    """For example `real services: kafka=Apache Kafka 4.1.0 local, s3=rclone v1.75.2 local`."""
    return "real services: " + (", ".join(f"{name}={text}" for name, text in sorted(_used.items())) or "none")


def must_not_skip(service: str) -> bool:
    """Whether a missing `service` is a failure here."""
    return service in REQUIRED_ON_CI and os.environ.get("CI", "").lower() in ("1", "true", "yes")
