"""Where a run's artifacts lie: what is stored in its start event, and the full address that people and code use."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from .config import Settings
from .errors import ArtifactError, InvalidInputError

__all__ = ["PROXY_SCHEME", "artifact_root", "full_artifact_uri", "location_uri", "stored_artifact_uri"]

PROXY_SCHEME: Final = "mlflow-artifacts:/"
"""Artifact addresses below a server's root, as MLflow's clients know them."""


def artifact_root(settings: Settings) -> str:
    """Full address of the root of all artifacts, without a slash at the end.

    A server's own is mlflow-artifacts:, as MLflow's clients know it; asking the server is left to whoever uses it.

    Raises:
        ArtifactError: a remote log without RUNSTREAM_ARTIFACT_ROOT.
    """
    if settings.artifact_root:
        return location_uri(settings.artifact_root)
    directory = settings.data_directory
    if settings.scheme == "http":
        return PROXY_SCHEME.rstrip("/")
    if directory is None and settings.store_uri and "://" not in settings.store_uri:
        return Path(settings.store_uri).absolute().joinpath("artifacts").as_uri()
    if directory is None:
        raise ArtifactError(
            f"{settings.tracking_uri} names no place for artifacts: set RUNSTREAM_ARTIFACT_ROOT to an fsspec URL, "
            "such as s3://bucket/prefix"
        )
    return directory.artifacts.absolute().as_uri()


def location_uri(location: object) -> str:
    """A user's artifact location as a full URL: local paths become file:///, and a slash at the end goes.

    Raises:
        InvalidInputError: no str or path, or empty.
    """
    text = str(location) if isinstance(location, str | Path) else ""
    if not text.strip() or "\0" in text:
        raise InvalidInputError(f"artifact location {location!r} must be a path or a URL, such as s3://bucket/prefix")
    from .storage.store import local_path_of

    local = local_path_of(text)
    uri = text if local is None else local.expanduser().absolute().as_uri()
    return uri.rstrip("/") if not uri.endswith(":///") else uri


def stored_artifact_uri(settings: Settings, experiment_id: str, run_id: str, location: str = "") -> str:
    """What the start event of a run holds: a full URL, or a path relative to the store's own artifact root.

    Args:
        location: the experiment's own artifact location, if it has one.
    """
    if location:
        return f"{location}/{run_id}/artifacts"
    below = f"{experiment_id}/{run_id}/artifacts"
    return f"{location_uri(settings.artifact_root)}/{below}" if settings.artifact_root else below


def full_artifact_uri(settings: Settings, stored: str) -> str:
    """The full address behind a stored one; a relative one itself where the root is not known."""
    if "://" in stored or stored.startswith(PROXY_SCHEME):
        return stored
    try:
        return f"{artifact_root(settings)}/{stored}"
    except ArtifactError:
        return stored
