"""Which real services this run used: printed at the end of a session, so that nobody mistakes a skip for a pass."""

from __future__ import annotations

import os

_used: dict[str, list[str]] = {}

REQUIRED_ON_CI = ("kafka", "s3", "chdb", "go", "jdbc")
"""With CI=true a test that cannot get one of these fails instead of being skipped."""


def record(service: str, description: str) -> None:
    """Remember that `service` was really used, in which form."""
    known = _used.setdefault(service, [])
    if description not in known:
        known.append(description)


def known() -> dict[str, list[str]]:
    """The forms in which each service was used."""
    return _used


def line() -> str:
    """For example `real services: kafka=Apache Kafka 4.1.0 local, s3=rclone v1.75.2 local`."""
    return "real services: " + (", ".join(f"{name}={' + '.join(_used[name])}" for name in sorted(_used)) or "none")


def must_not_skip(service: str) -> bool:
    """Whether a missing `service` is a failure here."""
    return service in REQUIRED_ON_CI and os.environ.get("CI", "").lower() in ("1", "true", "yes")
