"""`runstream artifacts`: list, download, upload."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .command import Group, RunId, session_of
from .failure import ExitCode, Failure
from .output import Column
from .text import size

if TYPE_CHECKING:
    from ..entities import FileInfo
    from ..storage.transfer import Progress, ProgressCallback
    from .session import Session

__all__ = ["artifacts"]


@click.group(cls=Group)
def artifacts() -> None:
    """Look at, download and upload the files of a run."""


@artifacts.command("list")
@click.argument("run", type=RunId())
@click.argument("path", default="")
@click.option("-r", "--recursive", is_flag=True, help="Everything below PATH, not one level.")
@click.pass_context
def list_(context: click.Context, run: str, path: str, recursive: bool) -> None:
    """List the artifacts of RUN, or what lies in its folder PATH."""
    session = session_of(context)
    found = _listing(session, session.run_id(run), path, recursive=recursive)
    if session.output.json:
        session.output.value(
            [{"path": each.path, "is_dir": each.is_dir, "size_bytes": each.file_size} for each in found]
        )
        return
    session.output.table(
        [Column("PATH", style="bold"), Column("SIZE", right=True)],
        [[f"{each.path}/" if each.is_dir else each.path, size(each.file_size)] for each in found],
        "No artifacts there.",
    )


@artifacts.command()
@click.argument("run", type=RunId())
@click.argument("path", default="")
@click.option(
    "-o",
    "--output",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    help="Folder to write into; made if missing. The current one if left out.",
)
@click.pass_context
def download(context: click.Context, run: str, path: str, folder: Path) -> None:
    """Download the file or folder PATH of RUN; all of its artifacts if PATH is left out."""
    session = session_of(context)
    run_id = session.run_id(run)
    if path and next(iter(session.client.artifacts_of(run_id).store.walk(path)), None) is None:
        raise Failure(
            f"run {run_id} has no artifact {path!r}; `runstream artifacts list` shows what it has", ExitCode.NOT_FOUND
        )
    folder.mkdir(parents=True, exist_ok=True)
    with _moving(session, f"downloading {path or 'all artifacts'}") as progress:
        written = Path(session.client.download_artifacts(run_id, path, folder, progress=progress))
    files = [written] if written.is_file() else sorted(each for each in written.rglob("*") if each.is_file())
    total = sum(each.stat().st_size for each in files)
    count = f"{len(files)} file{'' if len(files) == 1 else 's'}"
    session.output.done(
        f"Downloaded {count} ({size(total)}) to {written}.",
        {"run_id": run_id, "path": str(written), "files": [str(each) for each in files], "size_bytes": total},
    )


@artifacts.command()
@click.argument("run", type=RunId())
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("path", default="")
@click.pass_context
def upload(context: click.Context, run: str, source: Path, path: str) -> None:
    """Upload the file or folder SOURCE into the folder PATH of RUN's artifacts."""
    session = session_of(context)
    run_id = session.run_id(run)
    files = [source] if source.is_file() else sorted(each for each in source.rglob("*") if each.is_file())
    total = sum(each.stat().st_size for each in files)
    with session.writing(), _moving(session, f"uploading {source.name}") as progress:
        if source.is_file():
            session.client.log_artifact(run_id, source, path or None, progress=progress)
        else:
            session.client.log_artifacts(run_id, source, path or None, progress=progress)
    count = f"{len(files)} file{'' if len(files) == 1 else 's'}"
    session.output.done(
        f"Uploaded {count} ({size(total)}) to run {run_id}.",
        {"run_id": run_id, "path": path, "files": len(files), "size_bytes": total},
    )


@contextmanager
def _moving(session: Session, label: str) -> Iterator[ProgressCallback]:
    """A progress bar over the bytes of a transfer."""
    with session.output.progress(label, total=1.0) as advance:

        def moved(now: Progress) -> None:
            share = now.bytes_done / now.bytes_total if now.bytes_total else 1.0
            advance(
                share, f"{size(now.bytes_done)} of {size(now.bytes_total)}, {now.files_done}/{now.files_total} files"
            )

        yield moved


def _listing(session: Session, run_id: str, path: str, *, recursive: bool) -> list[FileInfo]:
    found = list(session.client.list_artifacts(run_id, path or None))
    if not recursive:
        return found
    everything: list[FileInfo] = []
    for each in found:
        everything.append(each)
        if each.is_dir:
            everything.extend(_listing(session, run_id, each.path, recursive=True))
    return everything
