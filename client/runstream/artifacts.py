"""`runstream.artifacts`: list, download and load artifacts. Names and order as in MLflow."""

from __future__ import annotations

import os
from typing import Any

from .active import tracker
from .api_artifacts import artifacts_of
from .entities import FileInfo
from .errors import InvalidInputError, MissingExtraError
from .run_artifacts import RunArtifacts
from .storage.content import parse_dict
from .storage.path import artifact_path as legal_path
from .storage.store import open_store
from .storage.transfer import Progress, ProgressCallback

__all__ = [
    "Progress",
    "ProgressCallback",
    "download_artifacts",
    "list_artifacts",
    "load_dict",
    "load_image",
    "load_text",
]

LocalPath = str | os.PathLike[str]


def download_artifacts(
    artifact_uri: str | None = None,
    run_id: str | None = None,
    artifact_path: str | None = None,
    dst_path: LocalPath | None = None,
    tracking_uri: str | None = None,
    *,
    progress: ProgressCallback | None = None,
) -> str:
    """Download a file or tree; its local path, below `dst_path` or a new temporary folder.

    Args:
        artifact_uri: `runs:/<run id>/<path>`, or the full address of an artifact; instead of `run_id`.
        artifact_path: below the run's artifacts; everything if left out.
        progress: called with a `Progress` as bytes move.
    """
    place, path = _place(artifact_uri, run_id, artifact_path, tracking_uri)
    return place.download(path, dst_path, progress)


def list_artifacts(
    artifact_uri: str | None = None,
    run_id: str | None = None,
    artifact_path: str | None = None,
    tracking_uri: str | None = None,
) -> list[FileInfo]:
    """What lies directly below a folder."""
    place, path = _place(artifact_uri, run_id, artifact_path, tracking_uri, is_folder=True)
    return place.list(path)


def load_text(artifact_uri: str) -> str:
    """The content of a text artifact."""
    place, path = _place(artifact_uri, None, None, None)
    try:
        return place.read(path).decode("utf-8")
    except UnicodeDecodeError as exc:
        raise InvalidInputError(f"artifact {artifact_uri!r} is no text in UTF-8: use download_artifacts") from exc


def load_dict(artifact_uri: str) -> Any:
    """The content of a JSON or YAML artifact."""
    place, path = _place(artifact_uri, None, None, None)
    return parse_dict(place.read(path), path)


def load_image(artifact_uri: str) -> Any:
    """A picture, as a pillow image."""
    try:
        from PIL import Image
    except ImportError as exc:
        raise MissingExtraError("load_image", packages="pillow") from exc
    from io import BytesIO

    place, path = _place(artifact_uri, None, None, None)
    picture = Image.open(BytesIO(place.read(path)))
    picture.load()
    return picture


def _place(
    artifact_uri: str | None,
    run_id: str | None,
    path: str | None,
    tracking_uri: str | None,
    *,
    is_folder: bool = False,
) -> tuple[RunArtifacts | _Address, str]:
    """Where an artifact lies, and its path there."""
    if (artifact_uri is None) == (run_id is None):
        raise InvalidInputError("give either artifact_uri= or run_id=")
    if artifact_uri is None or artifact_uri.startswith("runs:/"):
        if artifact_uri is not None:
            if path is not None:
                raise InvalidInputError("artifact_path goes with run_id=, not with artifact_uri=")
            run_id, _, path = artifact_uri.removeprefix("runs:/").lstrip("/").partition("/")
        if tracking_uri is not None:
            from .client import Client

            return Client(tracking_uri).artifacts_of(run_id or ""), path or ""
        return artifacts_of(run_id), path or ""
    if path is not None:
        raise InvalidInputError("artifact_path goes with run_id=, not with artifact_uri=")
    if is_folder:
        return _Address(artifact_uri.rstrip("/")), ""
    folder, _, name = artifact_uri.rstrip("/").rpartition("/")
    return _Address(folder), name


class _Address:
    """Artifacts below an address of any kind, without a run."""

    def __init__(self, uri: str) -> None:
        settings = tracker.settings()
        if settings.scheme == "http":
            from .remote.artifacts import open_artifacts

            self._store = open_artifacts(settings, uri)
        else:
            self._store = open_store(uri)

    def list(self, path: str) -> list[FileInfo]:
        return self._store.list(legal_path(path, root_is_legal=True))

    def read(self, path: str) -> bytes:
        return self._store.read(path)

    def download(self, path: str, folder: object, progress: ProgressCallback | None) -> str:
        from .run_artifacts import download

        return download(self._store, path, folder, progress)
