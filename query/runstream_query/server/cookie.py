"""The server's cookies: their names, where they are sent, and how they are read back."""

from __future__ import annotations

from typing import Final

from starlette.types import Scope

from .settings import ServerSettings

SESSION: Final = "runstream_session"
LOGIN: Final = "runstream_login"
_MAX_HEADER_BYTES: Final = 16_384


class Cookies:
    """Writes and reads cookies for one server."""

    def __init__(self, settings: ServerSettings) -> None:
        self._path = settings.root_path or "/"
        self._behind_proxy = settings.behind_proxy

    def secure(self, scope: Scope) -> bool:
        """Whether the browser speaks https, to us or to the proxy."""
        if self._behind_proxy:
            for name, value in reversed(scope["headers"]):
                if name == b"x-forwarded-proto":
                    return bool(value.strip().lower() == b"https")
        return bool(scope["scheme"] == "https")

    def _prefix(self, secure: bool) -> str:
        # Browsers take `__Host-` only with the path /, and then from no other host and no unencrypted page.
        return "" if not secure else "__Host-" if self._path == "/" else "__Secure-"

    def write(self, scope: Scope, name: str, value: str, *, strict: bool = False) -> bytes:
        """The Set-Cookie header; an empty value removes the cookie."""
        secure = self.secure(scope)
        parts = [f"{self._prefix(secure)}{name}={value}", f"Path={self._path}", "HttpOnly"]
        parts.append("SameSite=Strict" if strict else "SameSite=Lax")
        if secure:
            parts.append("Secure")
        if not value:
            parts.append("Max-Age=0")
        return "; ".join(parts).encode("ascii")

    def read(self, header: bytes | None, name: str) -> str | None:
        """The value of a cookie, from the Cookie header; the most trustworthy prefix first."""
        if header is None or len(header) > _MAX_HEADER_BYTES:
            return None
        found: dict[str, str] = {}
        for part in header.decode("latin-1").split(";"):
            key, equals, value = part.strip().partition("=")
            if equals:
                found.setdefault(key, value)
        for prefix in ("__Host-", "__Secure-", ""):
            if prefix + name in found:
                return found[prefix + name]
        return None
