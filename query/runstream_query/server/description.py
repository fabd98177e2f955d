"""What this server tells our own clients of itself: addresses without credentials, and how to know a folder again."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from urllib.parse import urlsplit

from runstream.addresses import artifact_root
from runstream.config import Settings
from runstream.remote.server import host_mark
from runstream.storage.store import local_path_of
from runstream_query.store import StoreAddress
from runstream_schemas.delivery import MAX_REQUEST_BYTES
from runstream_schemas.names import DATABASE
from runstream_schemas.place import make_proof

from .delivery import ArtifactPlace, DeliveryLimits, LogPlace, ServerDescription, SqlPlace
from .settings import ServerSettings

__all__ = ["describe_server"]


def describe_server(settings: ServerSettings, addresses: Settings) -> ServerDescription:
    """The description of now; touches local folders only."""
    return ServerDescription(
        version=_version(),
        authentication=settings.auth_file is not None,
        host=host_mark(),
        log=_log(addresses),
        artifacts=_artifacts(artifact_root(addresses), served=settings.serve_artifacts),
        sql=_sql(settings, addresses),
        delivery=DeliveryLimits(max_request_bytes=min(MAX_REQUEST_BYTES, settings.max_body_bytes)),
    )


def _log(addresses: Settings) -> LogPlace:
    directory = addresses.data_directory
    if directory is None:
        return LogPlace(uri=addresses.tracking_uri if addresses.scheme == "kafka" else "")
    directory.root.mkdir(parents=True, exist_ok=True)
    return LogPlace(uri=directory.root.as_uri(), proof=make_proof(directory.root) or "")


def _artifacts(root: str, *, served: bool) -> ArtifactPlace:
    root = root.rstrip("/")
    local = local_path_of(root)
    if local is not None:
        folder = local.absolute()
        return ArtifactPlace(uri=folder.as_uri(), proof=make_proof(folder) or "", served=served)
    if _has_login(root):
        return ArtifactPlace(served=served)
    return ArtifactPlace(uri=root, served=served)


def _has_login(uri: str) -> bool:
    """Whether a URL may hold a secret: such an address is told to nobody."""
    try:
        parts = urlsplit(uri)
    except ValueError:
        return True
    return "@" in parts.netloc or bool(parts.query) or "::" in uri


def _sql(settings: ServerSettings, addresses: Settings) -> SqlPlace:
    if settings.sql_uri is not None:
        return SqlPlace(database=StoreAddress.parse(settings.sql_uri).database)
    if addresses.data_directory is not None and addresses.store_uri is None:
        return SqlPlace(database=DATABASE)
    return SqlPlace()


def _version() -> str:
    try:
        return version("runstream")
    except PackageNotFoundError:
        return ""
