"""`runstream migrate`: topics and tables, created and brought up to date."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from .command import Command, session_of
from .failure import ExitCode, Failure, need

if TYPE_CHECKING:
    from .session import Session

__all__ = ["migrate"]


@click.command(cls=Command)
@click.option("--dry-run", is_flag=True, help="Only say what is missing.")
@click.pass_context
def migrate(context: click.Context, dry_run: bool) -> None:
    """Create Kafka topics and database tables that are missing, and bring older tables up to date.

    Reads RUNSTREAM_TRACKING_URI and RUNSTREAM_STORE_URI. A topic that differs from what it should be is reported and
    left alone. A data directory needs no migration by hand: its local store process does that when it starts.
    """
    session = session_of(context)
    settings = session.settings()
    if settings.scheme == "http":
        raise Failure(f"{settings.tracking_uri} is looked after by its server; run migrate there", ExitCode.USAGE)
    if settings.scheme != "kafka":
        version = int(session.sql("SELECT count() AS views FROM system.tables WHERE name = 'latest_metrics'")[0]["views"])
        session.output.done(
            f"{settings.tracking_uri} is up to date.", {"address": settings.tracking_uri, "applied": [], "views": version}
        )
        return
    os.environ["RUNSTREAM_TRACKING_URI"] = settings.tracking_uri
    value: dict[str, Any] = {"address": settings.tracking_uri, "dry_run": dry_run}
    value |= _topics(session, dry_run=dry_run)
    value |= _tables(session, dry_run=dry_run)
    if session.output.json:
        session.output.value(value)
