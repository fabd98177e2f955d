"""`runstream sync`: deliver what processes that are gone have left in their journals."""

from __future__ import annotations

import fcntl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .command import Command, session_of
from .failure import ExitCode, Failure

if TYPE_CHECKING:
    from ..config import Settings

__all__ = ["Leftover", "leftover_journals", "sync"]


@dataclass(frozen=True, slots=True)
class Leftover:
    """A journal whose process is gone."""

    folder: Path
    size_bytes: int


@click.command(cls=Command)
@click.option(
    "--timeout", type=click.FloatRange(0.1), default=60.0, show_default=True, help="Seconds to wait for the log."
)
@click.option(
    "--any-host",
    is_flag=True,
    help="Also journals that other machines wrote into this folder; only if their processes are surely gone.",
)
@click.pass_context
def sync(context: click.Context, timeout: float, any_host: bool) -> None:
    """Deliver journals that killed or interrupted processes left on this machine.

    The next run on this machine does the same by itself, and so does reading from a data directory. Exit code 4 if
    the log cannot be reached: nothing is lost then, and the command may be repeated.
    """
    from ..journal.recovery import recover_all

    session = session_of(context)
    out = session.output
    left = leftover_journals(session.settings)
    with out.progress(f"delivering {len(left)} journals"):
        reports = recover_all(session.settings, timeout, any_host=any_host)
    journals = sum(report.journals for report in reports.values())
    points = sum(report.points for report in reports.values())
    events = sum(report.events for report in reports.values())
    unfinished = [entry for report in reports.values() for entry in report.unfinished]
    damaged = [line for report in reports.values() for line in report.damaged]
    foreign = [entry for report in reports.values() for entry in report.foreign]
    error = next((report.last_error for report in reports.values() if report.last_error), None)
    if out.json:
        out.value(
            {
                "complete": not unfinished,
                "journals": journals,
                "points": points,
                "events": events,
                "unfinished": unfinished,
                "damaged": damaged,
                "foreign": foreign,
                "error": error,
                "targets": sorted(reports),
            }
        )
    else:
        if journals:
            count = "one journal" if journals == 1 else f"{journals} journals"
            out.write(f"Delivered {count}: {points} metric points in {events} events.")
        elif not unfinished:
            out.write("Nothing was left behind.")
        for line in damaged:
            out.note(f"damaged: {line}")
        if foreign:
            out.note(f"{len(foreign)} journals of other machines were left alone; --any-host delivers them, too")
    if unfinished:
        why = f": {error}" if error else ""
        count = "one journal waits" if len(unfinished) == 1 else f"{len(unfinished)} journals wait"
        raise Failure(f"{count} still, the log did not take everything in time{why}", ExitCode.UNAVAILABLE)


def leftover_journals(settings: Settings) -> list[Leftover]:
    """Journals below this machine's journal folders that no living process holds. Changes nothing."""
    from ..journal.place import journal_folders

    return [
        Leftover(lock.parent, sum(file.stat().st_size for file in lock.parent.iterdir() if file.is_file()))
        for folder in journal_folders(settings)
        for lock in sorted(folder.glob("*/lock"))
        if not _held(lock)
    ]


def _held(lock: Path) -> bool:
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return True  # delivered and removed this very moment
    return False
