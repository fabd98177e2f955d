"""`runstream rebuild`: a new database from the log, compared with the one in use and swapped in when told to."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Final

import click

from .backend import ingest_settings, store_address
from .command import Command, session_of
from .failure import ExitCode, Failure, need
from .session import local_store_pid

if TYPE_CHECKING:
    from runstream_ingest.log import EventLog, Positions
    from runstream_ingest.rebuild import RebuildReport
    from runstream_ingest.store import Store, StoreAddress

    from .session import Session

__all__ = ["rebuild"]

FRESH_SUFFIX: Final = "_rebuild"
"""Behind the database's name: where the new tables are made, and where the old ones lie after the swap."""
COMPARED_SUFFIX: Final = "_compare"
"""Where they are made without --yes: a comparison must not drop the old tables of an earlier swap."""


@click.command(cls=Command)
@click.option("--yes", is_flag=True, help="Swap the new tables in. Without it they are built and compared only.")
@click.option("--accept-differences", is_flag=True, help="Swap although views answer otherwise (after a mended bug).")
@click.option("--drop-old", is_flag=True, help="Only drop what an earlier rebuild left beside the database, and stop.")
@click.pass_context
def rebuild(context: click.Context, yes: bool, accept_differences: bool, drop_old: bool) -> None:
    """Build the database anew from the log, compare every view with the present one, and swap it in with --yes.

    What lies before the log's start is copied from the present database; a gap between the two is refused. Nothing is
    dropped: after the swap the old tables lie beside the database until `runstream rebuild --drop-old`. What was
    removed for good stays removed. Needs room for a second copy of the data.
    """
    session = session_of(context)
    with need("server"):
        from runstream_ingest import rebuild as work
        from runstream_ingest.store import connect

    from ..errors import UnavailableError

    try:
        address = store_address(session)
    except UnavailableError as exc:
        _start_over(session, exc, yes=yes)
        return
    fresh_address = replace(address, database=address.database + FRESH_SUFFIX)
    compared_address = replace(address, database=address.database + COMPARED_SUFFIX)
    if drop_old:
        _drop(fresh_address)
        _drop(compared_address)
        session.output.done(f"Dropped {fresh_address.database}.", {"dropped": fresh_address.database})
        return
    if not yes:
        _drop(compared_address)  # a comparison that was killed left it
        fresh_address = compared_address
    elif session.settings.data_directory is None and ingest_settings(session).store_cluster:
        # The swap would put tables without replicas in their place, on one server of the cluster.
        raise Failure(
            "RUNSTREAM_STORE_CLUSTER is set, and a swap works on one server only: give a new database in "
            "RUNSTREAM_STORE_URI, run `runstream migrate` and start workers on it, and they fill it from the log",
            ExitCode.USAGE,
        )
    with ExitStack() as stack:
        fresh = connect(fresh_address, create_database=True)
        stack.callback(fresh.close)
        old = connect(address)
        stack.callback(old.close)
        if not yes:
            stack.callback(_drop_compared, fresh)
        open_log, starts, ends = _log_of(session, fresh_address.database)
        advance = stack.enter_context(session.output.progress("rebuilding"))
        settings = session.settings
        report = work.rebuild(
            open_log,
            starts,
            ends,
            old,
            fresh,
            swap=yes,
            accept_differences=accept_differences or not yes,
            settings=None if settings.data_directory is not None else ingest_settings(session).worker(),
            progress=lambda line: advance(0.0, line),
        )
    _tell(session, report, fresh_address.database)


def _drop(address: StoreAddress) -> None:
    from runstream_ingest import rebuild as work
    from runstream_ingest.store import connect

    store = connect(address, create_database=True)
    try:
        work.drop_old(store)
    finally:
        store.close()


def _drop_compared(fresh: Store) -> None:
    """Drop what was made to be compared, also after a failure, whose reason must not be hidden by another."""
    from runstream_ingest import rebuild as work
    from runstream_ingest.errors import StoreError

    try:
        work.drop_old(fresh)
    except StoreError as exc:
        logging.getLogger("runstream").warning("%s could not be dropped: %s", fresh.database, exc)


def _start_over(session: Session, problem: Exception, *, yes: bool) -> None:
    """Set a local store that cannot be opened aside and let a new one be built, if the log still has everything.

    Raises:
        Failure: it has not, the address is no data directory, or `yes` was not said.
    """
    from runstream_ingest.log.directory import start_positions

    from ..reading import close_readers

    directory = session.settings.data_directory
    if directory is None or local_store_pid(directory) is not None:
        raise problem
    if any(start_positions(directory.log).values()):
        raise Failure(
            f"{problem}. The log no longer begins at its start, so a new store would lack what was logged before: "
            f"put {directory.database} back from a backup"
        ) from problem
    if not yes:
        raise Failure(
            f"{problem}. The log still has everything: `runstream rebuild --yes` sets {directory.database} aside and "
            "builds a new store from it"
        ) from problem
    aside = directory.database.with_name(f"{directory.database.name}.{time.strftime('%Y%m%d-%H%M%S')}")
    directory.database.rename(aside)
    close_readers()
    runs = int(session.sql("SELECT count() AS runs FROM runs")[0]["runs"])
    session.output.done(
        f"Built a new store with {runs} runs from the log. The old one lies in {aside}.",
        {"swapped": True, "copied": {}, "dead_letters": 0, "differences": [], "aside": str(aside)},
    )


def _log_of(session: Session, database: str) -> tuple[Callable[[], EventLog], Positions, Callable[[], Positions]]:
    """A way to open the whole log without disturbing the workers, where it begins, and where it ends now."""
    directory = session.settings.data_directory
    if directory is not None:
        from runstream_ingest.log.directory import DirectoryLog, end_positions, start_positions

        root = directory.log
        return (lambda: DirectoryLog(root)), start_positions(root), (lambda: end_positions(root))
    from runstream_ingest.log.kafka_whole import whole_log

    return whole_log(ingest_settings(session).kafka_address(), database)


def _tell(session: Session, report: RebuildReport, fresh: str) -> None:
    out = session.output
    if out.json:
        out.value({"swapped": report.swapped, **_plain(report)})
        return
    for table, what in report.copied.items():
        out.write(f"copied from the old database: {table} ({what})")
    if report.dead_letters:
        out.write(f"{report.dead_letters} records were refused again; their dead letters are from the first time")
    for one in report.differences:
        out.write(f"{one.view} answers otherwise: {one.old_rows} rows before, {one.fresh_rows} now")
    if report.swapped:
        out.write(f"The rebuilt tables are in use. `runstream rebuild --drop-old` drops the old ones, now in {fresh}.")
    elif report.differences:
        out.write("Nothing was changed. `runstream rebuild --yes --accept-differences` swaps it in all the same.")
    else:
        out.write("Every view gives the same answer. Nothing was changed; `runstream rebuild --yes` swaps it in.")


def _plain(report: RebuildReport) -> Mapping[str, Any]:
    return {
        "copied": report.copied,
        "dead_letters": report.dead_letters,
        "differences": [asdict(one) for one in report.differences],
    }
