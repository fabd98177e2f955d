"""The client's settings, and what a tracking address means. Standard library alone; read when first used, not at
import.

| variable | meaning | default |
| --- | --- | --- |
| RUNSTREAM_TRACKING_URI | where to log: a folder, kafka://host:9092/PREFIX or http(s)://server | ./runstream-data |
| RUNSTREAM_STORE_URI | where to read: a folder or clickhouse://user:password@host:8443/db (secret) | the folder |
| RUNSTREAM_ARTIFACT_ROOT | any fsspec URL below which artifacts go | artifacts/ in the folder |
| RUNSTREAM_JOURNAL_DIR | journals of this host, on a local disk | journal/ in the folder, or the user's state folder |
| RUNSTREAM_JOURNAL_LIMIT_BYTES | undelivered metrics of a process above which they are thinned | 1073741824 (1 GiB) |
| RUNSTREAM_EXIT_TIMEOUT_SECONDS | how long the exit waits for delivery; the next process sends the rest | 10 |
| RUNSTREAM_DELIVERY | with http(s)://: `auto` goes straight to Kafka and storage where it can, `server` never | auto |
| RUNSTREAM_TRACKING_* | login and trust for http(s):// | see `remote.login` |
| RUNSTREAM_KAFKA_* | passed to the Kafka transport | see runstream_schemas.kafka_address |
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal
from urllib.parse import quote, unquote, urlsplit

from runstream_schemas.layout import DEFAULT_DIRECTORY, DataDirectory

from .errors import SettingsError

__all__ = ["ENVIRONMENT_VARIABLES", "Delivery", "Scheme", "Settings", "normal_tracking_uri"]

Scheme = Literal["file", "kafka", "http", "memory"]
Delivery = Literal["auto", "server"]

DEFAULT_JOURNAL_LIMIT_BYTES: Final = 1 << 30
MIN_JOURNAL_LIMIT_BYTES: Final = 1 << 20
DEFAULT_EXIT_TIMEOUT_SECONDS: Final = 10.0
ENVIRONMENT_VARIABLES: Final = (
    "RUNSTREAM_TRACKING_URI",
    "RUNSTREAM_STORE_URI",
    "RUNSTREAM_ARTIFACT_ROOT",
    "RUNSTREAM_JOURNAL_DIR",
    "RUNSTREAM_JOURNAL_LIMIT_BYTES",
    "RUNSTREAM_EXIT_TIMEOUT_SECONDS",
    "RUNSTREAM_DELIVERY",
)
"""Every variable that `Settings.from_environment` reads itself."""

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(//)?")


@dataclass(frozen=True, slots=True)
class Settings:
    """One process's settings for one tracking address. Secrets stay out of `repr`."""

    tracking_uri: str
    """Normal form: file:///absolute/dir, kafka://..., http(s)://... or memory://name (tests). Two equal strings are
    one target."""
    store_uri: str | None = field(default=None, repr=False)
    """Where readers read, if not in the data directory. May hold a password."""
    artifact_root: str | None = None
    """fsspec URL; None: below the data directory, and URIs are stored relative to it."""
    journal_dir: Path | None = None
    """Folder of journals; None: chosen by `journal.place`."""
    journal_limit_bytes: int = DEFAULT_JOURNAL_LIMIT_BYTES
    exit_timeout_seconds: float = DEFAULT_EXIT_TIMEOUT_SECONDS
    delivery: Delivery = "auto"
    """With a server as the address: `auto` goes straight to its log and storage where it can, `server` never."""

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str] | None = None, *, tracking_uri: str | os.PathLike[str] | None = None
    ) -> Settings:
        """Settings from `environment` (the process's own if None); `tracking_uri` goes before the variable.

        Raises:
            SettingsError: a value does not fit; names the variable.
        """
        env = os.environ if environment is None else environment

        def get(name: str) -> str | None:
            return env.get(f"RUNSTREAM_{name}") or None

        uri = tracking_uri if tracking_uri is not None else get("TRACKING_URI")
        journal_dir = get("JOURNAL_DIR")
        return cls(
            tracking_uri=normal_tracking_uri(uri if uri is not None else DEFAULT_DIRECTORY),
            store_uri=get("STORE_URI"),
            artifact_root=get("ARTIFACT_ROOT"),
            journal_dir=Path(journal_dir).expanduser().absolute() if journal_dir else None,
            journal_limit_bytes=_integer(get("JOURNAL_LIMIT_BYTES")),
            exit_timeout_seconds=_seconds(get("EXIT_TIMEOUT_SECONDS")),
            delivery=_delivery(get("DELIVERY")),
        )

    def at(self, tracking_uri: str | os.PathLike[str]) -> Settings:
        """The same settings for another tracking address."""
        return replace(self, tracking_uri=normal_tracking_uri(tracking_uri))

    @property
    def scheme(self) -> Scheme:
        """Which kind of log lies behind the tracking address (`http` for https too)."""
        scheme = urlsplit(self.tracking_uri).scheme
        return "http" if scheme == "https" else scheme  # type: ignore[return-value]  # normal form

    @property
    def data_directory(self) -> DataDirectory | None:
        """The data directory logged to; None for a remote log."""
        if self.scheme != "file":
            return None
        return DataDirectory(Path(unquote(urlsplit(self.tracking_uri).path)))


def normal_tracking_uri(uri: str | os.PathLike[str]) -> str:
    """`uri` in its normal form: paths absolute, as file:// URIs.

    Raises:
        SettingsError: another scheme, or an address that is malformed.
    """
    text = os.fspath(uri)
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise SettingsError(f"tracking URI {text!r} is empty or no text: give a folder, kafka://... or http(s)://...")
    match = _SCHEME.match(text)
    # One letter before the colon is a drive or a folder's name, never a scheme.
    scheme = match[1].lower() if match and len(match[1]) > 1 and (match[2] or match[1].lower() == "file") else ""
    if not scheme:
        return _file_uri(Path(text).expanduser())
    if scheme == "file":
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise SettingsError(f"tracking URI {text!r} names the host {parts.netloc!r}: write file:///absolute/dir")
        return _file_uri(Path(unquote(parts.path)))
    if scheme == "kafka":
        from runstream_schemas.kafka_address import KafkaAddress

        try:
            return str(KafkaAddress.parse(text))
        except ValueError as exc:
            raise SettingsError(f"tracking URI: {exc}") from exc
    if scheme in ("http", "https"):
        return _server_uri(text)
    if scheme == "memory":
        if not urlsplit(text).netloc:
            raise SettingsError(f"tracking URI {text!r} names no host")
        return text.rstrip("/")
    raise SettingsError(
        f"tracking URI {text!r} has the unknown scheme {scheme!r}: give a folder, file:///dir, "
        "kafka://host:9092/PREFIX or http(s)://server"
    )


def _server_uri(text: str) -> str:
    parts = urlsplit(text)
    try:
        host, port = parts.hostname, parts.port
    except ValueError as exc:
        raise SettingsError("tracking URI: the server's port or host is malformed; write https://host:port") from exc
    if parts.username is not None or parts.password is not None:
        # Journals keep the address, and messages show it.
        raise SettingsError(
            f"tracking URI: {parts.scheme}://{host} comes with a login; put it into RUNSTREAM_TRACKING_TOKEN, or "
            "RUNSTREAM_TRACKING_USERNAME and RUNSTREAM_TRACKING_PASSWORD"
        )
    if not host or any(character.isspace() for character in text):
        raise SettingsError(f"tracking URI {text!r} names no host")
    if parts.query or parts.fragment:
        raise SettingsError(f"tracking URI {text!r} must end with the server's path, without ? and #")
    name = f"[{host}]" if ":" in host else host
    return f"{parts.scheme.lower()}://{name}{f':{port}' if port is not None else ''}{parts.path.rstrip('/')}"


def _file_uri(path: Path) -> str:
    # resolve(): two spellings of one folder must be one target, or two journals would think they are strangers.
    return "file://" + quote(str(path.absolute().resolve()))


def _integer(text: str | None) -> int:
    if text is None:
        return DEFAULT_JOURNAL_LIMIT_BYTES
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < MIN_JOURNAL_LIMIT_BYTES:
        raise SettingsError(
            f"RUNSTREAM_JOURNAL_LIMIT_BYTES is {text!r}: give at least {MIN_JOURNAL_LIMIT_BYTES} (1 MiB)"
        )
    return value


def _delivery(text: str | None) -> Delivery:
    if text is None or text == "auto":
        return "auto"
    if text == "server":
        return "server"
    raise SettingsError(f"RUNSTREAM_DELIVERY is {text!r}: give auto or server")


def _seconds(text: str | None) -> float:
    if text is None:
        return DEFAULT_EXIT_TIMEOUT_SECONDS
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1e9:
        raise SettingsError(f"RUNSTREAM_EXIT_TIMEOUT_SECONDS is {text!r}: give seconds, 0 or more")
    return value
