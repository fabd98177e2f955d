"""`runstream version`: versions of runstream, Python and the parts that are installed."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

import click

from .command import Command, session_of

__all__ = ["PARTS", "version", "version_of"]

PARTS = (
    "kafka-python",
    "fastavro",
    "fsspec",
    "chdb",
    "clickhouse-connect",
    "pandas",
    "pyarrow",
    "s3fs",
    "gcsfs",
    "adlfs",
)
"""Distributions whose version matters when something goes wrong."""


def version_of(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return installed(distribution)
    except PackageNotFoundError:
        return None


@click.command(cls=Command)
@click.pass_context
def version(context: click.Context) -> None:
    """Show versions of runstream, Python and installed parts."""
    out = session_of(context).output
    parts = {name: version_of(name) for name in PARTS}
    own = version_of("runstream") or "unknown"
    if out.json:
        out.value(
            {"runstream": own, "python": platform.python_version(), "system": platform.platform(), "parts": parts}
        )
        return
    out.write(f"runstream {own}")
    out.fields(
        "",
        [
            ("Python", platform.python_version()),
            ("system", platform.platform()),
            *((name, found or "not installed") for name, found in parts.items()),
        ],
    )
