"""The one door to storage: files below one artifact URI, on any file system that fsspec knows.

Streams in constant memory, checks size and SHA-256, retries transient errors, and never lets an unfinished file look
like a finished one. Which files to move is decided in `transfer`; events are none of its business.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final, TypeVar

from ..entities import FileInfo
from ..errors import ArtifactError, InvalidInputError, MissingExtraError, NotFoundError, RunstreamError
from .path import artifact_path, is_temporary, temporary_name
from .retry import RetryPolicy, is_refused, is_transient

__all__ = ["ArtifactStore", "Uploaded", "local_path_of", "open_store"]

T = TypeVar("T")

CHUNK_BYTES: Final = 1 << 20
PART_BYTES: Final = 16 << 20
"""Part size of multipart uploads; grows for files that would need more than `MAX_PARTS`."""
MAX_PARTS: Final = 9_000
"""Below the 10,000 parts that S3 takes."""
_EXTRAS: Final = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}
_DOORS: Final = {"s3": "s3fs", "gcs": "gcsfs", "azure": "adlfs"}

Advance = Callable[[int], None]
"""Called with the number of bytes that have just been moved; may raise to cancel."""


@dataclass(frozen=True, slots=True)
class Uploaded:
    """A file that lies whole at its destination."""

    path: str
    """Relative to the artifact URI."""
    size_bytes: int
    digest: str
    """`sha256:` and 64 hex digits, of the bytes that were sent."""


def local_path_of(uri: str) -> Path | None:
    """The local folder behind a path, `file:` or `local:` URI; None for a remote one."""
    if "://" not in uri and not uri.startswith("file:"):
        return Path(uri)
    scheme, _, rest = uri.partition(":")
    if scheme not in ("file", "local"):
        return None
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        if host not in ("", "localhost"):
            raise InvalidInputError(f"artifact URI {uri!r} names the host {host!r}: write file:///path")
        rest = slash + path
    from urllib.parse import unquote

    return Path(unquote(rest))


def open_store(uri: str, retry: RetryPolicy | None = None) -> ArtifactStore:
    """The store below `uri`: a path, or any URL that fsspec knows (file, s3, gs, abfs, memory, sftp ...).

    Raises:
        MissingExtraError: the package for this kind of URL is not installed.
        ArtifactError: unknown kind of URL.
    """
    policy = retry or RetryPolicy()
    if uri.startswith("mlflow-artifacts:"):
        raise ArtifactError(f"{uri!r} lies behind a server: set the tracking URI to its http(s):// address")
    local = local_path_of(uri)
    if local is not None:
        return ArtifactStore(uri, str(local.absolute()), None, policy)
    scheme = uri.partition("://")[0]
    import importlib.util

    extra = _EXTRAS.get(scheme)
    if extra is not None and importlib.util.find_spec(_DOORS[extra]) is None:
        raise MissingExtraError(f"artifacts at {scheme}://", extra)
    import fsspec

    try:
        filesystem, root = fsspec.core.url_to_fs(uri, **_options(scheme))
    except ImportError as exc:
        raise ArtifactError(f"artifact URI {uri!r} needs a package that is not installed: {exc}") from exc
    except ValueError as exc:
        raise ArtifactError(f"artifact URI {uri!r} cannot be opened: {exc}") from exc
    return ArtifactStore(uri, str(root).rstrip("/"), filesystem, policy, needs_folders=extra is None)


def _options(scheme: str) -> dict[str, Any]:
    """What we ask of a file system beyond fsspec's own configuration, which goes first."""
    from fsspec.config import conf

    if _EXTRAS.get(scheme) != "s3" or "config_kwargs" in conf.get("s3", {}):
        return {}
    # Retries are ours: botocore's default of five tries, each with a pause of up to 20 s, inside each of our own tries
    # turned an endpoint that is away into an error after more than two minutes.
    # Signed addresses are of version 2 by default in some regions, which newer stores do not take.
    return {
        "config_kwargs": {
            "retries": {"total_max_attempts": 1},
            "connect_timeout": 10,
            "read_timeout": 60,
            "signature_version": "s3v4",
        }
    }


@dataclass(frozen=True, slots=True)
class ArtifactStore:
    """Files below `uri`. Safe to use from several threads; make a new one in a forked child."""

    uri: str
    root: str
    """`uri` as the file system spells it."""
    _filesystem: Any = field(repr=False)
    """The fsspec file system, or None for local folders, which need none."""
    _retry: RetryPolicy = field(repr=False)
    needs_folders: bool = True
    """Whether folders must be made before files; making one on an object store could create a bucket."""

    @property
    def is_local(self) -> bool:
        return self._filesystem is None

    @property
    def filesystem(self) -> Any:
        """The fsspec file system, or None for local folders."""
        return self._filesystem

    def put(self, source: Path, path: str, advance: Advance | None = None) -> Uploaded:
        """Upload the regular file `source`; returns when it lies whole at `path`. Blocks; retries transient errors.

        Bytes appended to `source` meanwhile are left out.

        Raises:
            ArtifactError: it could not be written, or what arrived has another size.
        """

        def once() -> Uploaded:
            with open(source, "rb") as stream:
                return self._write(stream, path, os.fstat(stream.fileno()).st_size, advance)

        return self._guarded(f"upload of {path!r}", once)

    def put_bytes(self, content: bytes, path: str) -> Uploaded:
        """Write `content` whole at `path`; otherwise as `put`."""
        from io import BytesIO

        return self._guarded(f"upload of {path!r}", lambda: self._write(BytesIO(content), path, len(content), None))

    def get(self, path: str, target: Path, advance: Advance | None = None) -> Uploaded:
        """Download `path` to the file `target`, which appears only when it is whole. Blocks; retries.

        Raises:
            NotFoundError: there is no such file.
            ArtifactError: it could not be read whole.
        """

        def once() -> Uploaded:
            target.parent.mkdir(parents=True, exist_ok=True)
            draft = target.with_name(temporary_name(target.name))
            try:
                with self._reading(path) as stream, open(draft, "xb") as file:
                    done = _copy(stream, file, None, advance)
                expected = self._size(path)
                if expected is not None and expected != done[0]:
                    raise ConnectionError(f"got {done[0]} of {expected} bytes")
                draft.replace(target)
            finally:
                draft.unlink(missing_ok=True)
            return Uploaded(path, done[0], done[1])

        return self._guarded(f"download of {path!r}", once)

    def read(self, path: str) -> bytes:
        """The whole content of `path`, in memory."""

        def once() -> bytes:
            with self._reading(path) as stream:
                return bytes(stream.read())

        return self._guarded(f"read of {path!r}", once)

    def size(self, path: str) -> int | None:
        """Bytes of the file at `path`, or None where there is none."""
        return self._guarded(f"look-up of {path!r}", lambda: self._size(path))

    def list(self, path: str = "") -> list[FileInfo]:
        """What lies directly below the folder `path`, by name; a file's own path lists nothing, as in MLflow."""

        def once() -> list[FileInfo]:
            return sorted(self._entries(path), key=lambda info: info.path)

        return self._guarded(f"listing of {path or self.uri!r}", once)

    def walk(self, path: str = "") -> Iterator[FileInfo]:
        """Every file below `path`; `path` itself if it is a file. Depth first."""
        size = self.size(path) if path else None
        if size is not None:
            yield FileInfo(path, False, size)
            return
        for info in self.list(path):
            if info.is_dir:
                yield from self.walk(info.path)
            else:
                yield info

    def delete(self, path: str) -> None:
        """Remove the file or tree at `path` ("" for everything); a missing one is no error."""

        def once() -> None:
            with suppress(FileNotFoundError):
                if self._filesystem is None:
                    _remove_local(self._at(path))
                else:
                    self._filesystem.rm(self._at(path), recursive=True)

        self._guarded(f"removal of {path or self.uri!r}", once)

    def _at(self, path: str) -> str:
        clean = artifact_path(path, root_is_legal=True)
        return f"{self.root}/{clean}" if clean else self.root

    def _write(self, stream: IO[bytes], path: str, size: int, advance: Advance | None) -> Uploaded:
        destination = self._at(path)
        if self._filesystem is None:
            written, digest = _write_local(stream, Path(destination), size, advance)
        else:
            if self.needs_folders:
                with suppress(FileExistsError, NotImplementedError):
                    self._filesystem.makedirs(destination.rpartition("/")[0], exist_ok=True)
            written, digest = _write_remote(self._filesystem, stream, destination, size, advance)
        arrived = self._size(path)
        if arrived != written:
            raise ArtifactError(
                f"artifact {path!r}: sent {written} bytes, but {arrived} lie at {self.uri}", retryable=True
            )
        return Uploaded(path, written, digest)

    @contextmanager
    def _reading(self, path: str) -> Iterator[IO[bytes]]:
        if self._filesystem is None:
            with open(self._at(path), "rb") as local:
                yield local
        else:
            with self._filesystem.open(self._at(path), "rb", block_size=PART_BYTES) as remote:
                yield remote

    def _size(self, path: str) -> int | None:
        place = self._at(path)
        if self._filesystem is None:
            local = Path(place)
            return local.stat().st_size if local.is_file() else None
        try:
            self._filesystem.invalidate_cache()
            info = self._filesystem.info(place)
        except FileNotFoundError:
            return None
        size = info.get("size")
        return int(size) if info.get("type") == "file" and size is not None else None

    def _entries(self, path: str) -> Iterator[FileInfo]:
        place = self._at(path)
        prefix = artifact_path(path, root_is_legal=True)
        for name, is_dir, size in _listed_local(Path(place)) if self.is_local else self._listed_remote(place):
            if not is_temporary(name):
                yield FileInfo(f"{prefix}/{name}" if prefix else name, is_dir, None if is_dir else size)

    def _listed_remote(self, place: str) -> Iterator[tuple[str, bool, int | None]]:
        try:
            self._filesystem.invalidate_cache()
            found = self._filesystem.ls(place, detail=True)
        except FileNotFoundError:
            return
        for info in found:
            full = str(info["name"]).rstrip("/")
            if full.strip("/") != place.strip("/"):  # a folder's own marker, or a file asked for itself
                yield full.rpartition("/")[2], info["type"] == "directory", info.get("size")

    def _guarded(self, what: str, operation: Callable[[], T]) -> T:
        """`operation()` under the retry policy; every foreign error leaves as ArtifactError."""
        try:
            return self._retry.call(f"{what} at {self.uri}", operation)
        except RunstreamError:
            raise
        except FileNotFoundError as exc:
            raise NotFoundError(f"{what} at {self.uri} failed: there is no such file or bucket") from exc
        except Exception as exc:
            raise ArtifactError(f"{what} at {self.uri} failed: {_reason(exc)}", retryable=is_transient(exc)) from exc


def _listed_local(folder: Path) -> Iterator[tuple[str, bool, int | None]]:
    if folder.is_dir():
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir() or entry.is_file():
                    yield entry.name, entry.is_dir(), None if entry.is_dir() else entry.stat().st_size


def _write_local(stream: IO[bytes], target: Path, size: int, advance: Advance | None) -> tuple[int, str]:
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(temporary_name(target.name))
    try:
        with open(draft, "xb") as file:
            done = _copy(stream, file, size, advance)
            file.flush()
            os.fdatasync(file.fileno())  # the event that follows must not outlive the content in a power cut
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
    return done


def _write_remote(
    filesystem: Any, stream: IO[bytes], target: str, size: int, advance: Advance | None
) -> tuple[int, str]:
    part_bytes = max(PART_BYTES, -(-size // MAX_PARTS))
    file = filesystem.open(target, "wb", block_size=part_bytes)
    try:
        done = _copy(stream, file, size, advance)
    except BaseException:
        _abandon(filesystem, file, target)
        raise
    file.close()
    return done


def _abandon(filesystem: Any, file: Any, target: str) -> None:
    """End an upload such that nothing of it is left at `target`."""
    from fsspec.spec import AbstractBufferedFile

    with suppress(Exception):
        if getattr(filesystem, "keeps_whole_files_only", False):
            file.discard()
        elif isinstance(file, AbstractBufferedFile):
            # Closing, also by the finalizer, would commit what has been written so far as if it were the whole file.
            file.closed = True
            file.discard()
        else:  # written in place
            file.close()
            filesystem.rm_file(target)


def _copy(source: IO[bytes], target: IO[bytes], limit_bytes: int | None, advance: Advance | None) -> tuple[int, str]:
    """Move `source` to `target`, at most `limit_bytes`; the number of bytes and their digest."""
    digest, moved = hashlib.sha256(), 0
    while limit_bytes is None or moved < limit_bytes:
        chunk = source.read(CHUNK_BYTES if limit_bytes is None else min(CHUNK_BYTES, limit_bytes - moved))
        if not chunk:
            break
        target.write(chunk)
        digest.update(chunk)
        moved += len(chunk)
        if advance is not None:
            advance(len(chunk))
    return moved, f"sha256:{digest.hexdigest()}"


def _remove_local(place: str) -> None:
    path = Path(place)
    if path.is_dir() and not path.is_symlink():
        import shutil

        shutil.rmtree(path)
    else:
        path.unlink()


def _reason(error: Exception) -> str:
    if isinstance(error, PermissionError) or is_refused(error):
        return f"permission refused ({error}): check the credentials and the access rights of this process"
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        return f"no credentials were found ({error}): set them in the environment or in the provider's own files"
    return f"{type(error).__name__}: {error}"
