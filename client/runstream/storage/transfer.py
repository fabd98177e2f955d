"""Moves trees of artifacts: what a local folder holds, several files at once, with progress.

Owns which files are taken and in which order; how one file is moved is `store`'s.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..errors import InvalidInputError, NotFoundError
from .path import artifact_path, local_target
from .store import CHUNK_BYTES, ArtifactStore, Uploaded

__all__ = ["Progress", "ProgressCallback", "download_tree", "files_below", "upload_files"]

_LOG = logging.getLogger("runstream.artifacts")
PARALLEL_FILES: Final = 8
"""Files moved at once; with `store.PART_BYTES` it bounds the memory of a transfer."""
LONG_WORK_SECONDS: Final = 2.0
"""Work longer than this is worth a progress line."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a transfer has come."""

    files_done: int
    files_total: int
    bytes_done: int
    bytes_total: int
    path: str
    """The file that moved last."""


ProgressCallback = Callable[[Progress], None]
"""Called from the moving threads, one at a time, after each chunk; an exception cancels the transfer."""


def files_below(folder: Path) -> list[tuple[Path, str]]:
    """The regular files of `folder` with their artifact paths, sorted by path.

    Symbolic links to files are followed, also out of the folder (model caches are made of them), and a warning then
    names them. Links to folders, broken links, pipes, sockets and devices are left out, with a warning.

    Raises:
        InvalidInputError: a file's name is no legal artifact path.
    """
    taken: list[tuple[Path, str]] = []
    outside: list[str] = []
    skipped: list[str] = []
    root = folder.resolve()
    for parent, folders, names in os.walk(folder, onerror=_raise):
        for name in folders:
            if Path(parent, name).is_symlink():
                skipped.append(str(Path(parent, name)))
        for name in names:
            file = Path(parent, name)
            try:
                mode = file.stat().st_mode
            except OSError:
                mode = 0
            if not stat.S_ISREG(mode):
                skipped.append(str(file))
                continue
            if file.is_symlink() and not file.resolve().is_relative_to(root):
                outside.append(str(file))
            taken.append((file, artifact_path(file.relative_to(folder).as_posix(), "file name")))
    if outside:
        _LOG.warning("%d links lead out of %s and were followed: %s", len(outside), folder, _some(outside))
    if skipped:
        _LOG.warning("%d entries of %s are no files and were left out: %s", len(skipped), folder, _some(skipped))
    return sorted(taken, key=lambda item: item[1])


def upload_files(
    store: ArtifactStore,
    files: Sequence[tuple[Path, str]],
    *,
    recorded: Mapping[str, tuple[int, str]] | None = None,
    done: Callable[[Uploaded], None] | None = None,
    progress: ProgressCallback | None = None,
) -> list[Uploaded]:
    """Upload `files` (local file, artifact path), several at once. Blocks until all are there.

    Args:
        recorded: artifact path -> (size in bytes, digest) of files known to be there already. Those whose local
            content is the same, and that still have that size at the destination, are not sent again.
        done: called after each file that lies whole at its destination, from any thread, one call at a time.

    Raises:
        ArtifactError: the first file that failed for good; files already `done` stay.
    """
    known = recorded or {}
    meter = _Meter("upload", len(files), sum(_size_of(file) for file, _ in files), progress)
    lock = threading.Lock()

    def move(item: tuple[Path, str]) -> Uploaded:
        file, path = item
        before = known.get(path)
        if before is not None and _is_there(store, file, path, before):
            uploaded = Uploaded(path, *before)
            meter.advance(path, before[0])
        else:
            moved = meter.file(path)
            uploaded = store.put(file, path, moved)
            if done is not None:
                with lock:
                    done(uploaded)
        meter.finished(path)
        return uploaded

    return _all_of(move, files, meter)


def download_tree(store: ArtifactStore, path: str, folder: Path, *, progress: ProgressCallback | None = None) -> Path:
    """Download the file or tree at `path` ("" for everything) below `folder`; the local path of it.

    Raises:
        NotFoundError: nothing lies there.
        ArtifactError: a file could not be read whole.
        InvalidInputError: a remote name would leave `folder`.
    """
    found = list(store.walk(path))
    if not found and path:
        raise NotFoundError(f"there is no artifact {path!r} at {store.uri}: list what is there with list_artifacts()")
    targets = [(local_target(folder, info.path), info.path) for info in found]
    folder.mkdir(parents=True, exist_ok=True)
    meter = _Meter("download", len(found), sum(info.file_size or 0 for info in found), progress)

    def move(item: tuple[Path, str]) -> Uploaded:
        target, remote = item
        fetched = store.get(remote, target, meter.file(remote))
        meter.finished(remote)
        return fetched

    _all_of(move, targets, meter)
    return local_target(folder, path) if path else folder


def _all_of(
    move: Callable[[tuple[Path, str]], Uploaded], items: Sequence[tuple[Path, str]], meter: _Meter
) -> list[Uploaded]:
    try:
        if len(items) <= 1:  # also at interpreter exit, when no thread can be started any more
            return [move(item) for item in items]
        from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

        with ThreadPoolExecutor(min(PARALLEL_FILES, len(items)), thread_name_prefix="runstream-artifact") as pool:
            futures = [pool.submit(move, item) for item in items]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
                failed = next((f.exception() for f in futures if f.done() and f.exception() is not None), None)
                if failed is not None:
                    raise failed
                return [future.result() for future in futures]
            except BaseException:
                meter.cancel()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        meter.close()


def _is_there(store: ArtifactStore, file: Path, path: str, before: tuple[int, str]) -> bool:
    size, digest = before
    return _size_of(file) == size and store.size(path) == size and _digest_of(file) == digest


def _digest_of(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def _size_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as exc:
        raise InvalidInputError(f"cannot read {str(file)!r}: {exc.strerror}") from exc


def _raise(error: OSError) -> None:
    raise InvalidInputError(f"cannot read the folder {error.filename!r}: {error.strerror}") from error


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


class _Cancelled(Exception):
    """Another file of the same transfer has failed."""


class _Meter:
    """Counts what has moved and tells the callback, or, on long work without one, the terminal or the log."""

    def __init__(self, verb: str, files: int, size: int, callback: ProgressCallback | None) -> None:
        self._verb, self._files, self._bytes = verb, files, size
        self._callback = callback or self._show
        self._lock = threading.Lock()
        self._files_done = self._bytes_done = 0
        self._cancelled = False
        self._shown_at = time.monotonic() - 10 + LONG_WORK_SECONDS
        self._drawn = False

    def file(self, path: str) -> Callable[[int], None]:
        """The counter of one file; bytes that a retry sends again count again, up to the total."""
        return lambda moved: self.advance(path, moved)

    def advance(self, path: str, moved: int) -> None:
        with self._lock:
            if self._cancelled:
                raise _Cancelled
            self._bytes_done = min(self._bytes, self._bytes_done + moved)
            self._tell(path)

    def finished(self, path: str) -> None:
        with self._lock:
            self._files_done += 1
            self._tell(path)

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True

    def close(self) -> None:
        if self._drawn:
            print(file=sys.stderr)

    def _tell(self, path: str) -> None:
        self._callback(Progress(self._files_done, self._files, self._bytes_done, self._bytes, path))

    def _show(self, progress: Progress) -> None:
        now = time.monotonic()
        tty = sys.stderr is not None and sys.stderr.isatty()
        if now - self._shown_at < (0.2 if self._drawn else 10):
            return
        self._shown_at = now
        line = (
            f"{self._verb}: {progress.files_done} of {progress.files_total} files, "
            f"{progress.bytes_done / 1e6:.1f} of {progress.bytes_total / 1e6:.1f} MB"
        )
        if tty:
            self._drawn = True
            print(f"\rrunstream {line}", end="", file=sys.stderr, flush=True)
        else:
            _LOG.info("%s", line)
