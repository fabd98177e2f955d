"""Where the server's artifacts lie, and the addresses clients are given for them.

Artifacts below the root are told to clients as `mlflow-artifacts:/<path>`, so that an unmodified MLflow client reads
and writes them through this server; everything else keeps its own address and is the client's business. Paths from
clients are cleaned here, and nowhere else.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote, urlsplit, urlunsplit

from .errors import invalid

PROXY_SCHEME: Final = "mlflow-artifacts:/"
MAX_PATH_CHARS: Final = 1_000
_BARE_PATH: Final = "file:///"
"""Before a path given without a scheme: what lies in the store is a URL, and clients are told the path again."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_DRIVE = re.compile(r"[a-zA-Z]:")


def clean_path(path: str, *, number_sign: bool = False) -> str:
    """`path` in normal form, relative and inside its root; "" for the root itself.

    Args:
        number_sign: whether `#` is taken, which MLflow refuses and our own clients may have in names.

    Raises:
        ApiError: it is absolute, climbs with `..` (also percent-encoded, at any depth), has a scheme, a drive, a
            backslash, a fragment or a control character, or is too long.
    """
    decoded = path
    for _ in range(10):
        further = unquote(decoded)
        if further == decoded:
            break
        decoded = further
    else:
        raise invalid("Invalid path")
    for candidate in (path, decoded):
        if (
            len(candidate) > MAX_PATH_CHARS
            or _CONTROL.search(candidate)
            or "\\" in candidate
            or ("#" in candidate and not number_sign)
            or candidate.startswith(("/", "~"))
            or ".." in candidate.split("/")
            or _DRIVE.match(candidate)
            or "://" in candidate
            or candidate.lower().startswith("file:")
        ):
            raise invalid("Invalid path")
    normal = posixpath.normpath(path)
    return "" if normal == "." else normal


def below(location: str, path: str) -> str:
    """The address of `path` below `location`, whose query, if it has one, stays at the end."""
    parts = urlsplit(location)
    if not parts.scheme or not parts.query:
        return f"{location.rstrip('/')}/{path}"
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{path}"))


@dataclass(frozen=True, slots=True)
class ArtifactRoot:
    """The root under which this server keeps artifacts, and whether it serves them."""

    url: str
    """A folder or any fsspec URL, without a slash at the end."""
    served: bool = True

    def _relative(self, uri: str) -> str | None:
        for prefix in self.prefixes():
            if uri.startswith(prefix + "/"):
                return uri[len(prefix) + 1 :]
        return None

    @property
    def shown(self) -> str | None:
        """Where clients are told that the root is; None: where it is."""
        return PROXY_SCHEME.rstrip("/") if self.served else None

    def prefixes(self) -> tuple[str, ...]:
        """How an address below the root may begin, without the slash behind."""
        bare = self.url.removeprefix("file://")
        return (bare, f"file://{bare}") if bare.startswith("/") else (self.url,)

    def present(self, uri: str) -> str:
        """The address of `uri` (from a view) that clients are told."""
        relative = self._relative(uri) if self.served else None
        if relative is not None:
            return PROXY_SCHEME + relative
        return uri[len(_BARE_PATH) :] if uri.startswith(_BARE_PATH + "/") else uri

    def stored(self, uri: str) -> str:
        """The address of a presented `uri` as events carry it: relative to the root where it lies below it."""
        if uri.startswith(PROXY_SCHEME):
            return uri.removeprefix(PROXY_SCHEME).lstrip("/")
        relative = self._relative(uri)
        if relative is not None:
            return relative
        return _BARE_PATH + uri if uri.startswith("/") else uri

    def path_of(self, uri: str) -> str | None:
        """Where a presented address lies below the root; None if it is not ours to serve."""
        if uri.startswith(PROXY_SCHEME):
            relative = urlsplit(uri).path.lstrip("/")
        else:
            found = self._relative(uri)
            if found is None:
                return None
            relative = found
        return clean_path(relative)
