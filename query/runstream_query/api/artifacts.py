"""Artifacts: list a run's, and the `mlflow-artifacts` proxy through which clients upload, download, list and delete.

Uploads are streamed to a bounded spool file and appear whole or not at all; downloads are always attachments, never
pages of this origin. Every path passes `artifact_root.clean_path`, and on local roots a symbolic link may not lead out.
"""

from __future__ import annotations

import mimetypes
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final
from urllib.parse import quote

from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response

from runstream.entities import FileInfo
from runstream.errors import ArtifactError, InvalidInputError, NotFoundError
from runstream.storage.store import ArtifactStore, local_path_of, open_store
from runstream.transport import Event
from runstream_schemas.delivery import CLIENT_HEADER

from .artifact_root import clean_path
from .backend import Backend
from .errors import ApiError, invalid, missing_resource
from .routing import Endpoint
from .wire import Empty, JsonResponse, Message, read

MAX_UI_UPLOAD_BYTES: Final = 10 * 1024 * 1024
"""Limit of MLflow's own upload-artifact route."""
MAX_LISTED_DELETIONS: Final = 10_000
_SPOOL_MEMORY_BYTES: Final = 1 << 20
_ATTACHMENT_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "sandbox; default-src 'none'",
}


def proxied_path(request: Request, path: str) -> str:
    """`clean_path` of a path that came to the proxy; `#` is for our own clients."""
    return clean_path(path, number_sign=CLIENT_HEADER in request.headers)


class ListArtifacts(Message):
    """artifacts/list"""

    required: ClassVar[tuple[str, ...]] = ("run_id",)
    run_id: str | None = None
    path: str | None = None
    page_token: str | None = None


class ListProxied(Message):
    """mlflow-artifacts/artifacts"""

    path: str | None = None


def artifact_store(backend: Backend, *, served: bool = True) -> ArtifactStore:
    """The store below the server's artifact root; with `served`, only where the server serves it."""
    if served and not backend.artifacts.served:
        raise ApiError(
            "TEMPORARILY_UNAVAILABLE",
            "This server does not serve artifacts: start it with --serve-artifacts, or use their own address.",
        )
    return open_store(backend.artifacts.url)


def _inside(store: ArtifactStore, path: str) -> Path | None:
    """The local file of `path`, None on a remote store.

    Raises:
        ApiError: a symbolic link leads out of the root.
    """
    root = local_path_of(store.uri)
    if root is None:
        return None
    target = root / path
    if not target.resolve().is_relative_to(root.resolve()):
        raise invalid("Invalid path: it leads out of the artifact root through a symbolic link")
    return target


def _translated(error: ArtifactError) -> ApiError:
    if error.retryable:
        return ApiError("TEMPORARILY_UNAVAILABLE", str(error), retry_after_seconds=1)
    return ApiError("INTERNAL_ERROR", str(error))


@contextmanager
def translated() -> Iterator[None]:
    """Errors of storage as answers."""
    try:
        yield
    except NotFoundError as exc:
        raise missing_resource(str(exc)) from exc
    except ArtifactError as exc:
        raise _translated(exc) from exc
    except InvalidInputError as exc:
        raise invalid(f"Invalid path: {exc}") from exc


def _list(store: ArtifactStore, path: str) -> list[FileInfo]:
    try:
        local = _inside(store, path)
        if local is not None and local.is_file():
            return []
        return store.list(path)
    except ArtifactError as exc:
        raise _translated(exc) from exc
    except InvalidInputError as exc:
        raise invalid(f"Invalid path: {exc}") from exc


def _files(entries: list[FileInfo], strip: str = "") -> list[dict[str, Any]]:
    files = []
    for entry in entries:
        shown: dict[str, Any] = {"path": entry.path[len(strip) :].lstrip("/"), "is_dir": entry.is_dir}
        if entry.file_size:
            shown["file_size"] = entry.file_size
        files.append(shown)
    return files


async def listed(backend: Backend, artifact_uri: str, path: str) -> dict[str, Any]:
    """The answer of a listing below a presented artifact address.

    Raises:
        ApiError: the address is not below this server's root, or the path is not safe.
    """
    base = backend.artifacts.path_of(artifact_uri)
    if base is None:
        raise invalid(
            f"The artifacts lie at '{artifact_uri}', outside this server's artifact root: list them there directly."
        )
    store = artifact_store(backend)
    below = clean_path(path)
    entries = await run_in_threadpool(_list, store, f"{base}/{below}" if below else base)
    answer: dict[str, Any] = {"root_uri": artifact_uri}
    if entries:
        answer["files"] = _files(entries, base)
    return answer


async def _list_run(backend: Backend, request: Request) -> Response:
    message = await read(ListArtifacts, request)
    path = clean_path(message.path or "")
    state = await backend.run(message.run_id or "")
    return JsonResponse(await listed(backend, state.artifact_uri, path))


async def _list_proxied(backend: Backend, request: Request) -> Response:
    message = await read(ListProxied, request)
    path = proxied_path(request, message.path or "")
    entries = await run_in_threadpool(_list, artifact_store(backend), path)
    return JsonResponse({"files": _files(entries, path)} if entries else {})


def attachment(name: str) -> str:
    """The Content-Disposition of a download called `name` (RFC 6266)."""
    plain = "".join(c if c.isascii() and c.isprintable() and c not in '"\\' else "_" for c in name) or "download"
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"


def _fetch(store: ArtifactStore, path: str) -> tuple[Path, bool]:
    """A local file with the artifact's content, and whether it is a temporary one."""
    try:
        local = _inside(store, path)
        if local is not None:
            if local.is_dir():
                raise invalid(f"Artifact path refers to a directory, not a file: '{path}'")
            if not local.is_file():
                raise missing_resource(f"No such artifact: '{path}'")
            return local, False
        if store.size(path) is None:
            raise missing_resource(f"No such artifact: '{path}'")
        handle, name = tempfile.mkstemp(prefix="runstream-download-")
        os.close(handle)
        target = Path(name)
        try:
            store.get(path, target)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        return target, True
    except ArtifactError as exc:
        raise _translated(exc) from exc
    except InvalidInputError as exc:
        raise invalid(f"Invalid path: {exc}") from exc


async def download(backend: Backend, path: str) -> Response:
    """The file at `path` (clean) below the root, as an attachment."""
    if not path:
        raise invalid("Invalid path")
    file, temporary = await run_in_threadpool(_fetch, artifact_store(backend), path)
    name = path.rsplit("/", 1)[-1]
    media_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
    return FileResponse(
        file,
        media_type=media_type,
        headers={**_ATTACHMENT_HEADERS, "Content-Disposition": attachment(name)},
        background=BackgroundTask(file.unlink, missing_ok=True) if temporary else None,
    )


async def _download(backend: Backend, request: Request) -> Response:
    return await download(backend, proxied_path(request, request.path_params["path"]))


async def _get_artifact(backend: Backend, request: Request) -> Response:
    run_id = request.query_params.get("run_id") or request.query_params.get("run_uuid")
    if not run_id:
        raise invalid("Request must specify run_id.")
    path = clean_path(request.query_params.get("path", ""))
    if not path:
        raise invalid("Request must specify path.")
    state = await backend.run(run_id)
    base = backend.artifacts.path_of(state.artifact_uri)
    if base is None:
        raise invalid(
            f"The artifacts lie at '{state.artifact_uri}', outside this server's artifact root: read them there."
        )
    return await download(backend, f"{base}/{path}")


async def _spool(request: Request, limit_bytes: int, folder: Path | None) -> Path:
    """The request's body in a temporary file of at most `limit_bytes`; removed again if anything goes wrong."""
    declared = request.headers.get("content-length")
    too_large = ApiError("INVALID_PARAMETER_VALUE", f"The artifact is larger than {limit_bytes} bytes.", status=413)
    if declared is not None and declared.isdigit() and int(declared) > limit_bytes:
        raise too_large
    handle, name = await run_in_threadpool(partial(tempfile.mkstemp, prefix="runstream-upload-", dir=folder))
    size = 0
    try:
        with os.fdopen(handle, "wb") as file:
            pending = bytearray()
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit_bytes:
                    raise too_large
                pending += chunk
                if len(pending) >= _SPOOL_MEMORY_BYTES:
                    await run_in_threadpool(file.write, bytes(pending))
                    pending.clear()
            await run_in_threadpool(file.write, bytes(pending))
    except BaseException as exc:
        Path(name).unlink(missing_ok=True)
        if isinstance(exc, ClientDisconnect):
            raise invalid("The client left before its upload was complete.") from exc
        raise
    return Path(name)


def _put(store: ArtifactStore, source: Path, path: str) -> tuple[int, str]:
    try:
        local = _inside(store, path)
        if local is not None and local.is_dir():
            raise invalid(f"Artifact path refers to a directory, not a file: '{path}'")
        done = store.put(source, path)
        return done.size_bytes, done.digest
    except ArtifactError as exc:
        raise _translated(exc) from exc
    except InvalidInputError as exc:
        raise invalid(f"Invalid path: {exc}") from exc


def _run_path(path: str) -> tuple[str, str] | None:
    """(run id, path below the run's artifacts) of a path in the usual layout."""
    parts = path.split("/", 3)
    return (parts[1], parts[3]) if len(parts) == 4 and parts[2] == "artifacts" and parts[3] else None


def logged_events(backend: Backend, path: str, size_bytes: int, digest: str, *, deleted: bool = False) -> list[Event]:
    """The event that a file of a run came or went; none for other paths."""
    place = _run_path(path)
    if place is None:
        return []
    run_id, below = place
    return [
        backend.events.make(
            "artifact_logged",
            run_id,
            run_id=run_id,
            path=below,
            size_bytes=size_bytes,
            digest=digest,
            deleted=deleted,
        )
    ]


async def store_body(
    backend: Backend, request: Request, path: str, limit_bytes: int, *, may_be_empty: bool = True
) -> None:
    """Stream the request's body to `path` (clean) below the root, and record it once it is whole."""
    if not path:
        raise invalid("Invalid path")
    store = artifact_store(backend)
    spooled = await _spool(request, limit_bytes, backend.spool_folder)
    try:
        if not may_be_empty and (await run_in_threadpool(spooled.stat)).st_size == 0:
            raise invalid("Request must specify data.")
        size_bytes, digest = await run_in_threadpool(_put, store, spooled, path)
    finally:
        await run_in_threadpool(spooled.unlink, missing_ok=True)
    events = logged_events(backend, path, size_bytes, digest)
    if events:
        await backend.write(*events)


async def _upload(backend: Backend, request: Request) -> Response:
    path = proxied_path(request, request.path_params["path"])
    await store_body(backend, request, path, backend.max_artifact_bytes)
    return Empty()


async def _upload_ui(backend: Backend, request: Request) -> Response:
    run_id = request.query_params.get("run_uuid")
    if not run_id:
        raise invalid("Request must specify run_uuid.")
    path = clean_path(request.query_params.get("path", ""))
    if not path:
        raise invalid("Request must specify path.")
    state = await backend.active_run(run_id)
    base = backend.artifacts.path_of(state.artifact_uri)
    if base is None:
        raise invalid(f"The artifacts lie at '{state.artifact_uri}', outside this server's artifact root.")
    try:
        await store_body(backend, request, f"{base}/{path}", MAX_UI_UPLOAD_BYTES, may_be_empty=False)
    except ApiError as exc:
        if exc.status == 413:
            raise invalid("Artifact size is too large. Max size is 10MB.") from None
        raise
    return Response(media_type="application/json")


def _remove(store: ArtifactStore, path: str) -> list[str]:
    """Remove the file or tree; the files that were in it."""
    try:
        _inside(store, path)
        gone = []
        for info in store.walk(path):
            gone.append(info.path)
            if len(gone) > MAX_LISTED_DELETIONS:
                raise invalid(f"'{path}' holds more than {MAX_LISTED_DELETIONS} files: delete smaller parts.")
        store.delete(path)
        return gone
    except ArtifactError as exc:
        raise _translated(exc) from exc
    except InvalidInputError as exc:
        raise invalid(f"Invalid path: {exc}") from exc


async def _delete(backend: Backend, request: Request) -> Response:
    path = proxied_path(request, request.path_params["path"])
    if not path:
        raise invalid("Invalid path")
    gone = await run_in_threadpool(_remove, artifact_store(backend), path)
    events = [item for file in gone for item in logged_events(backend, file, 0, "", deleted=True)]
    if events:
        await backend.write(*events)
    return Empty()


_PROXY: Final = "/mlflow-artifacts/artifacts"

ENDPOINTS = (
    Endpoint("GET", "/mlflow/artifacts/list", _list_run, ListArtifacts),
    Endpoint("POST", "/mlflow/upload-artifact", _upload_ui),
    Endpoint("GET", _PROXY, _list_proxied, ListProxied),
    Endpoint("GET", _PROXY + "/{path:path}", _download),
    Endpoint("PUT", _PROXY + "/{path:path}", _upload),
    Endpoint("DELETE", _PROXY + "/{path:path}", _delete),
    Endpoint("GET", "/get-artifact", _get_artifact, absolute=True),
)
