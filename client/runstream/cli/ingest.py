"""`runstream ingest`: the worker from the log into the store, in the foreground."""

from __future__ import annotations

import os
from pathlib import Path

import click

from .command import Command, session_of
from .failure import ExitCode, Failure, need

__all__ = ["ingest"]


@click.command(cls=Command)
@click.argument("data_directory", required=False, type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--idle-exit",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    metavar="SECONDS",
    help="Leave after so long without work (data directory only); 0 stays.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    default=0,
    show_default=True,
    help="On 127.0.0.1 (data directory only); 0 takes a free one.",
)
@click.pass_context
def ingest(context: click.Context, data_directory: Path | None, idle_exit: float, port: int) -> None:
    """Move the log into the store until stopped (Ctrl-C or SIGTERM: it finishes its batch first).

    With DATA_DIRECTORY, or a tracking address that is one, this is the local store process, which also answers SQL;
    readers start one by themselves. With a kafka:// address it is a worker into RUNSTREAM_STORE_URI; several share
    the partitions. `python -m runstream_ingest settings` explains every setting.
    """
    session = session_of(context)
    directory = data_directory
    if directory is None:
        settings = session.settings
        found = settings.data_directory
        if found is None and settings.scheme != "kafka":
            raise Failure(f"{settings.tracking_uri} has no log that could be ingested from here", ExitCode.USAGE)
        directory = None if found is None else found.root
        os.environ["RUNSTREAM_TRACKING_URI"] = settings.tracking_uri  # what the worker's own settings read
    if directory is not None:
        with need("server"):
            from runstream_ingest.local.process import serve
        context.exit(serve(directory, idle_exit or None, port))
    with need("server"):
        from runstream_ingest.service import run
    context.exit(run())
