"""Artifacts of a server's clients: straight to storage where this process may write there, through the server if not.

`open_artifacts` decides, once for each root and process. `ProxyFiles` has as much of an fsspec file system as
`storage.store` uses, over the server's artifact proxy; uploads and downloads stream.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException, HTTPResponse
from typing import IO, Any, Final, cast

from runstream_schemas.delivery import ARTIFACT_PATH

from ..config import Settings
from ..errors import ArtifactError
from ..storage.path import temporary_name
from ..storage.retry import RetryPolicy
from ..storage.store import ArtifactStore, local_path_of, open_store
from .connection import Connection, RequestError, Upload
from .server import Server, ServerInfo, server_of

__all__ = ["ProxyFiles", "artifacts_way", "open_artifacts"]

PROBE_SECONDS: Final = 15.0
_PROXY_PATH: Final = "/api/2.0/mlflow-artifacts/artifacts"
_LOG = logging.getLogger("runstream.artifacts")


def open_artifacts(settings: Settings, uri: str, retry: RetryPolicy | None = None) -> ArtifactStore:
    """The store below `uri`, as `storage.open_store`; with a server as the tracking address, perhaps through it.

    Blocks for the server's answer, and once for a try to write.

    Raises:
        ArtifactError: neither way is open.
    """
    if settings.scheme != "http":
        return open_store(uri, retry)
    try:
        server = server_of(settings)
        info = server.info()
    except RequestError as exc:
        raise ArtifactError(f"where artifacts lie is not known: {exc}", retryable=True) from exc
    below = info.relative(uri)
    if below is None:
        return open_store(uri, retry)
    root, reason = artifacts_way(settings, info)
    if root is not None:
        return open_store(f"{root}/{below}" if below else root, retry)
    if not info.artifacts_served:
        raise ArtifactError(f"artifacts at {uri}: {reason}, and the server does not pass them on (--serve-artifacts)")
    return ArtifactStore(uri, below, ProxyFiles(server), retry or RetryPolicy(), needs_folders=False)


_ways: dict[tuple[int, str, str], tuple[str | None, str]] = {}
_deciding = threading.Lock()


def _after_fork_in_child() -> None:
    global _deciding
    _deciding = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)


def artifacts_way(settings: Settings, info: ServerInfo) -> tuple[str | None, str]:
    """The root to write to directly, or None; and why, for people. Tried once in a process."""
    if settings.delivery == "server":
        return None, "RUNSTREAM_DELIVERY=server"
    key = (os.getpid(), settings.tracking_uri, info.artifact_uri)
    with _deciding:
        if key not in _ways:
            _ways[key] = found = _try(info)
            _LOG.info("artifacts go %s", found[0] or f"through the server: {found[1]}")
        return _ways[key]


def _try(info: ServerInfo) -> tuple[str | None, str]:
    uri = info.artifact_uri
    if not uri:
        return None, "the server does not tell where they lie"
    if local_path_of(uri) is not None:
        folder = info.is_here(uri, info.artifact_proof)
        if folder is None:
            return None, "the folder lies on the server's machine"
        return (uri, "") if os.access(folder, os.W_OK) else (None, f"{folder} may not be written by this user")
    try:
        store = open_store(uri, RetryPolicy(attempts=1))  # here, not in the thread: it imports
    except Exception as exc:
        return None, " ".join(str(exc).split())[:300]
    found: list[str] = []

    def probe() -> None:
        try:
            _put(store, temporary_name("probe"))
            found.append("")
        except Exception as exc:
            found.append(" ".join(str(exc).split())[:300] or type(exc).__name__)

    thread = threading.Thread(target=probe, name="runstream-artifact-probe", daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    if not found:
        return None, f"{uri} does not answer within {PROBE_SECONDS:.0f} s"
    return (uri, "") if not found[0] else (None, found[0])


def _put(store: ArtifactStore, name: str) -> None:
    """Write and remove a file whose name no listing shows."""
    place = f"{store.root}/{name}"
    with store._filesystem.open(place, "wb") as file:
        file.write(b"runstream")
    with suppress(Exception):  # who may write need not be allowed to delete
        store._filesystem.rm_file(place)


class ProxyFiles:
    """Files below the server's artifact root. Any thread."""

    keeps_whole_files_only = True
    """A file that is not closed never shows: `storage.store` may discard it."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def open(self, path: str, mode: str, block_size: int | None = None) -> Any:
        """A file to write whole (`wb`; it is there once `close` returns) or to read in order (`rb`)."""
        if mode == "wb":
            return ProxyUpload(self._server.connection(600.0), f"{_PROXY_PATH}/{path.strip('/')}")
        return self._reading(path)

    @contextmanager
    def _reading(self, path: str) -> Iterator[IO[bytes]]:
        with (
            _missing(path),
            self._server.borrowed() as connection,
            connection.answering("GET", f"{_PROXY_PATH}/{path.strip('/')}") as response,
        ):
            yield cast(IO[bytes], _Body(response))

    def info(self, path: str) -> dict[str, Any]:
        """Size and kind of a file; raises FileNotFoundError where there is none."""
        with _missing(path), self._server.borrowed() as connection:
            found = connection.request("GET", ARTIFACT_PATH, query={"path": path.strip("/")}).json()
        size = found.get("size_bytes")
        if not isinstance(size, int):
            raise FileNotFoundError(path)
        return {"name": path, "type": "file", "size": size}

    def ls(self, path: str, detail: bool = True) -> list[dict[str, Any]]:
        """What lies directly below a folder."""
        with _missing(path), self._server.borrowed() as connection:
            found = connection.request("GET", _PROXY_PATH, query={"path": path.strip("/")}).json()
        return [
            {
                "name": f"{path.rstrip('/')}/{entry['path']}",
                "type": "directory" if entry.get("is_dir") else "file",
                "size": int(entry.get("file_size") or 0),
            }
            for entry in found.get("files") or ()
        ]

    def rm(self, path: str, recursive: bool = False) -> None:
        """Remove a file or tree."""
        with _missing(path), self._server.borrowed() as connection:
            connection.request("DELETE", f"{_PROXY_PATH}/{path.strip('/')}")

    def rm_file(self, path: str) -> None:
        """Remove a file."""
        self.rm(path)

    def invalidate_cache(self) -> None:
        """Nothing is kept."""


class ProxyUpload:
    """A file on its way to the server, which keeps nothing of it unless `close` is reached."""

    def __init__(self, connection: Connection, path: str) -> None:
        self._upload: Upload | None = connection.upload("PUT", path, {"Content-Type": "application/octet-stream"})

    def write(self, data: bytes) -> int:
        """Send a piece."""
        assert self._upload is not None, "the file is closed"
        return self._upload.write(data)

    def close(self) -> None:
        """Wait until the server has all of it."""
        upload, self._upload = self._upload, None
        if upload is not None:
            upload.finish()

    def discard(self) -> None:
        """Break off."""
        upload, self._upload = self._upload, None
        if upload is not None:
            upload.abort()


class _Body:
    """The answer's body; an end that comes too early is an error, not an end."""

    def __init__(self, response: HTTPResponse) -> None:
        self._response = response

    def read(self, size: int = -1) -> bytes:
        try:
            data = self._response.read() if size < 0 else self._response.read(size)
        except (HTTPException, OSError) as exc:
            raise ConnectionError(f"the server broke the download off: {type(exc).__name__}") from exc
        if not data and size != 0 and self._response.length:
            raise ConnectionError(f"the server broke the download off, {self._response.length} bytes are missing")
        return data


@contextmanager
def _missing(path: str) -> Iterator[None]:
    """404 as FileNotFoundError, refusals as PermissionError: what file systems raise."""
    try:
        yield
    except RequestError as exc:
        if exc.status == 404:
            raise FileNotFoundError(path) from exc
        raise
