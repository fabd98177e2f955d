"""`runstream migrate`: topics and tables, created and brought up to date."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .backend import ingest_settings
from .command import Command, session_of
from .failure import ExitCode, Failure

if TYPE_CHECKING:
    from runstream_ingest.config import IngestSettings

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
    settings = session.settings
    if settings.scheme == "http":
        raise Failure(f"{settings.tracking_uri} is looked after by its server; run migrate there", ExitCode.USAGE)
    if settings.scheme != "kafka":
        session.sql("SELECT count() FROM experiments")  # the local store process migrates when it starts
        session.output.done(
            f"{settings.tracking_uri} is up to date.",
            {"address": settings.tracking_uri, "dry_run": dry_run, "topics": [], "applied": []},
        )
        return
    worker = ingest_settings(session)
    topics = _topics(session, worker, dry_run=dry_run)
    applied = _tables(session, worker, dry_run=dry_run)
    if session.output.json:
        session.output.value(
            {"address": settings.tracking_uri, "dry_run": dry_run, "topics": topics, "applied": applied}
        )


def _topics(session: Session, worker: IngestSettings, *, dry_run: bool) -> list[dict[str, Any]]:
    """Create missing topics; say what is different about those that exist."""
    from runstream_ingest.log.kafka_topics import ensure_topics

    rows: list[dict[str, Any]] = []
    for topic in ensure_topics(worker.kafka_address(), dry_run=dry_run):
        rows.append({"topic": topic.name, "created": topic.created, "differences": list(topic.differences)})
    if not session.output.json:
        for row in rows:
            done = "is missing" if dry_run and row["created"] else "created" if row["created"] else "is there"
            session.output.write(f"topic {row['topic']} {done}")
            for difference in row["differences"]:
                session.output.write(f"  differs and is left alone: {difference}")
    return rows


def _tables(session: Session, worker: IngestSettings, *, dry_run: bool) -> list[dict[str, Any]]:
    """Bring the database up to date."""
    from runstream_ingest import migration
    from runstream_ingest.store import connect

    address = worker.store_address()
    store = connect(address, create_database=not dry_run, timeout_seconds=worker.store_timeout_seconds)
    try:
        if dry_run:
            known = migration.applied(store)
            new = [each for each in migration.migrations() if each.version not in known]
        else:
            cluster = worker.store_cluster or None
            new = list(migration.migrate(store, "Replicated" if cluster else "MergeTree", cluster))
    finally:
        store.close()
    if not session.output.json:
        verb = "is missing" if dry_run else "applied"
        for each in new:
            session.output.write(f"migration {each.version} ({each.name}) {verb}")
        if not new:
            session.output.write(f"{address} is up to date")
    return [{"version": each.version, "name": each.name} for each in new]
