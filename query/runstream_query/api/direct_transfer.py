"""Uploads in parts and signed addresses: clients move large artifacts straight to and from object storage.

Where the artifact root is on S3, the `mlflow-artifacts` proxy hands out signed URLs of single parts and of whole files,
so that content does not pass through this server. Elsewhere the answer is the one upon which MLflow's clients fall back
to an upload or download in one piece. The store's own rules hold: a part has at least 5 MiB (but for the last one), an
upload at most 10,000 parts, an address at most 7 days of life.
"""

from __future__ import annotations

import posixpath
from typing import Any, ClassVar, Final

from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from runstream.storage.signed import SignedStore, signed_store

from .artifact_root import clean_path
from .artifacts import artifact_store, attachment, logged_events, translated
from .backend import Backend
from .errors import ApiError, invalid, missing_resource
from .routing import Endpoint
from .wire import Empty, Int32, Int64, JsonResponse, Message, read

MAX_PARTS: Final = 10_000
MAX_EXPIRATION_SECONDS: Final = 604_800
DOWNLOAD_SECONDS: Final = 300
UPLOAD_SECONDS: Final = 3_600
NO_UPLOAD: Final = "Multipart upload is not supported for the current artifact repository"
NO_DOWNLOAD: Final = "Multipart download is not supported for the current artifact repository"
"""MLflow's clients know these sentences and go on without parts."""


class CreateUpload(Message):
    """mlflow-artifacts/mpu/create"""

    required: ClassVar[tuple[str, ...]] = ("path",)
    path: str | None = None
    num_parts: Int64 | None = None


class Part(Message):
    """A part that the store has taken"""

    part_number: Int64 | None = None
    etag: str | None = None
    url: str | None = None


class CompleteUpload(Message):
    """mlflow-artifacts/mpu/complete"""

    required: ClassVar[tuple[str, ...]] = ("path", "parts")
    path: str | None = None
    upload_id: str | None = None
    parts: list[Part] | None = Field(default=None)


class AbortUpload(Message):
    """mlflow-artifacts/mpu/abort"""

    required: ClassVar[tuple[str, ...]] = ("path",)
    path: str | None = None
    upload_id: str | None = None


class SignUpload(Message):
    """artifacts/presigned-upload-url"""

    required: ClassVar[tuple[str, ...]] = ("path",)
    run_id: str | None = None
    model_id: str | None = None
    path: str | None = None
    expiration: Int32 | None = None


class SignDownload(Message):
    """artifacts/presigned-download-url"""

    required: ClassVar[tuple[str, ...]] = ("run_id", "path")
    run_id: str | None = None
    path: str | None = None
    expiration: Int32 | None = None


def _signed(backend: Backend, refusal: str) -> SignedStore:
    store = signed_store(artifact_store(backend))
    if store is None:
        raise ApiError("NOT_IMPLEMENTED", refusal)
    return store


def _destination(request: Request, path: str | None) -> str:
    """The folder of the address and the file's own name, as MLflow's server joins them."""
    folder = clean_path(request.path_params["path"])
    name = posixpath.basename(path or "")
    target = clean_path(f"{folder}/{name}" if folder else name)
    if not name or not target:
        raise invalid("Invalid path")
    return target


async def _create(backend: Backend, request: Request) -> Response:
    message = await read(CreateUpload, request)
    target = _destination(request, message.path)
    count = 1 if message.num_parts is None else message.num_parts
    if not 1 <= count <= MAX_PARTS:
        raise invalid(f"'num_parts' must be from 1 to {MAX_PARTS}: use larger parts.")
    store = _signed(backend, NO_UPLOAD)
    with translated():
        upload_id, urls = await run_in_threadpool(store.begin, target, count, UPLOAD_SECONDS)
    credentials = [{"url": url, "part_number": number} for number, url in enumerate(urls, 1)]
    return JsonResponse({"upload_id": upload_id, "credentials": credentials})


async def _complete(backend: Backend, request: Request) -> Response:
    message = await read(CompleteUpload, request)
    target = _destination(request, message.path)
    store = _signed(backend, NO_UPLOAD)
    parts: list[tuple[int, str]] = []
    for index, part in enumerate(message.parts or ()):
        if part.part_number is None or not part.etag:
            raise invalid(f"'parts[{index}]' needs a part_number and the etag that the store answered.")
        parts.append((part.part_number, part.etag))
    if not parts or not message.upload_id:
        raise invalid("An upload is completed with its 'upload_id' and at least one part.")
    with translated():
        size_bytes = await run_in_threadpool(store.complete, target, message.upload_id, parts)
    events = logged_events(backend, target, size_bytes, "")
    if events:
        await backend.write(*events)
    return Empty()


async def _abort(backend: Backend, request: Request) -> Response:
    message = await read(AbortUpload, request)
    target = _destination(request, message.path)
    store = _signed(backend, NO_UPLOAD)
    with translated():
        await run_in_threadpool(store.abort, target, message.upload_id or "")
    return Empty()


async def _download_url(store: SignedStore, path: str, seconds: int) -> tuple[str, int]:
    with translated():
        found = await run_in_threadpool(store.download_url, path, attachment(path.rsplit("/", 1)[-1]), seconds)
    if found is None:
        raise missing_resource(f"No such artifact: '{path}'")
    return found


async def _sign_proxied(backend: Backend, request: Request) -> Response:
    path = clean_path(request.path_params["path"])
    if not path:
        raise invalid("Invalid path")
    url, size = await _download_url(_signed(backend, NO_DOWNLOAD), path, DOWNLOAD_SECONDS)
    return JsonResponse({"url": url, "headers": {}, "file_size": size})


def _proxied(kind: str, uri: str) -> ApiError | None:
    """MLflow's refusal for artifacts that lie behind the proxy: those have the proxy's own addresses."""
    scheme = uri.partition(":")[0]
    if scheme not in ("http", "https", "mlflow-artifacts"):
        return None
    return invalid(
        f"Presigned {kind} is not supported for proxied artifact storage (artifact URI scheme: {scheme})."
        " This endpoint requires a direct cloud storage artifact URI."
    )


async def _direct(backend: Backend, uri: str, kind: str) -> tuple[SignedStore, str]:
    """The store and the folder of artifacts that clients reach themselves."""
    refusal = _proxied(kind, uri)
    if refusal is not None:
        raise refusal
    base = backend.artifacts.path_of(uri)
    unsupported = f"Presigned {kind} is not supported for the current artifact repository"
    if base is None:
        raise ApiError("NOT_IMPLEMENTED", unsupported)
    store = signed_store(artifact_store(backend, served=False))
    if store is None:
        raise ApiError("NOT_IMPLEMENTED", unsupported)
    return store, base


def _expiration(value: int | None, default: int) -> int:
    seconds = default if value is None else value
    if not 1 <= seconds <= MAX_EXPIRATION_SECONDS:
        raise invalid(f"expiration must be between 1 and {MAX_EXPIRATION_SECONDS} seconds (got {seconds}).")
    return seconds


async def _sign_upload(backend: Backend, request: Request) -> Response:
    message = await read(SignUpload, request)
    if bool(message.run_id) == bool(message.model_id):
        raise invalid("Exactly one of run_id and model_id must be provided.")
    path = clean_path(message.path or "")
    seconds = _expiration(message.expiration, 900)
    if message.model_id:
        uri = await _model_uri(backend, message.model_id)
    else:
        uri = (await backend.active_run(message.run_id or "")).artifact_uri
    store, base = await _direct(backend, uri, "upload")
    with translated():
        url = await run_in_threadpool(store.upload_url, f"{base}/{path}", seconds)
    return JsonResponse({"presigned_url": url})


async def _model_uri(backend: Backend, model_id: str) -> str:
    from .model_rows import model_rows

    rows = await backend.read(model_rows, backend.reading, backend.artifacts, [model_id])
    if not rows or rows[0].lifecycle_stage == "deleted":
        raise missing_resource(f"Logged model with ID '{model_id}' not found.")
    return rows[0].artifact_uri


async def _sign_download(backend: Backend, request: Request) -> Response:
    message = await read(SignDownload, request)
    path = clean_path(message.path or "")
    seconds = _expiration(message.expiration, DOWNLOAD_SECONDS)
    state = await backend.run(message.run_id or "")
    store, base = await _direct(backend, state.artifact_uri, "download")
    url, size = await _download_url(store, f"{base}/{path}", seconds)
    return JsonResponse({"presigned_url": url, "file_size": size})


def capabilities(backend: Backend) -> dict[str, Any]:
    """What clients may ask of these routes, for server-info."""
    url = backend.artifacts.url
    able = url.startswith(("s3://", "s3a://"))
    return {
        "multipart_uploads_enabled": able and backend.artifacts.served,
        "multipart_downloads_enabled": able and backend.artifacts.served,
        "presigned_upload_run_id_supported": able and not backend.artifacts.served,
        "presigned_upload_model_id_supported": able and not backend.artifacts.served,
    }


ENDPOINTS = (
    Endpoint("POST", "/mlflow/artifacts/presigned-upload-url", _sign_upload, SignUpload),
    Endpoint("POST", "/mlflow/artifacts/presigned-download-url", _sign_download, SignDownload),
    Endpoint("POST", "/mlflow-artifacts/mpu/create/{path:path}", _create, CreateUpload),
    Endpoint("POST", "/mlflow-artifacts/mpu/complete/{path:path}", _complete, CompleteUpload),
    Endpoint("POST", "/mlflow-artifacts/mpu/abort/{path:path}", _abort, AbortUpload),
    Endpoint("GET", "/mlflow-artifacts/presigned/{path:path}", _sign_proxied),
)
