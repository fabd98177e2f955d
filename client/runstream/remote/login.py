"""How a client proves itself to a server, and whom it trusts: tokens, passwords, certificates. Secrets stay out of
`repr`.

| variable | meaning | default |
| --- | --- | --- |
| RUNSTREAM_TRACKING_TOKEN | token for an http(s) tracking address (secret) | |
| RUNSTREAM_TRACKING_USERNAME | user, instead of a token | |
| RUNSTREAM_TRACKING_PASSWORD | its password (secret) | |
| RUNSTREAM_TRACKING_CA_FILE | PEM file with the authorities to trust for https | the system's |
| RUNSTREAM_TRACKING_INSECURE_TLS | 1 takes any certificate | 0 |
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ..errors import SettingsError

if TYPE_CHECKING:
    import ssl

__all__ = ["ENVIRONMENT_VARIABLES", "Login"]

ENVIRONMENT_VARIABLES: Final = (
    "RUNSTREAM_TRACKING_TOKEN",
    "RUNSTREAM_TRACKING_USERNAME",
    "RUNSTREAM_TRACKING_PASSWORD",
    "RUNSTREAM_TRACKING_CA_FILE",
    "RUNSTREAM_TRACKING_INSECURE_TLS",
)
TOKEN_USER: Final = "token"
"""User name under which a token goes as a password, where a program knows passwords only."""


@dataclass(frozen=True, slots=True)
class Login:
    """Credentials and trust for one server."""

    token: str | None = field(default=None, repr=False)
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    ca_file: str | None = None
    verify: bool = True

    @classmethod
    def from_environment(cls, tracking_uri: str, environment: Mapping[str, str] | None = None) -> Login:
        """The login for `tracking_uri`.

        Where no RUNSTREAM_ variable gives one, MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and _PASSWORD, do,
        unless MLFLOW_TRACKING_URI names another server: that one's credentials must not come here.

        Raises:
            SettingsError: half a login, or one that cannot be sent.
        """
        env = os.environ if environment is None else environment
        found = cls._named(env, "RUNSTREAM")
        if found is None and (env.get("MLFLOW_TRACKING_URI") or tracking_uri).rstrip("/") == tracking_uri:
            found = cls._named(env, "MLFLOW")
        token, user, password = found or (None, None, None)
        ca_file = env.get("RUNSTREAM_TRACKING_CA_FILE") or None
        if ca_file is not None and not os.path.isfile(ca_file):  # noqa: PTH113
            raise SettingsError(f"RUNSTREAM_TRACKING_CA_FILE is {ca_file!r}: there is no such file")
        insecure = env.get("RUNSTREAM_TRACKING_INSECURE_TLS", "").lower() in ("1", "true", "yes", "on")
        return cls(token, user, password, ca_file, not insecure)

    @staticmethod
    def _named(env: Mapping[str, str], prefix: str) -> tuple[str | None, str | None, str | None] | None:
        token, user, password = (env.get(f"{prefix}_TRACKING_{name}") for name in ("TOKEN", "USERNAME", "PASSWORD"))
        if token:
            if not token.isascii() or not token.isprintable() or " " in token.strip():
                raise SettingsError(f"{prefix}_TRACKING_TOKEN is no token: it must be printable ASCII without spaces")
            return token.strip(), None, None
        if not user and not password:
            return None
        if not user or not password:
            missing = "USERNAME" if not user else "PASSWORD"
            raise SettingsError(f"{prefix}_TRACKING_{missing} is not set, its other half is: set both")
        if ":" in user:
            raise SettingsError(f"{prefix}_TRACKING_USERNAME is {user!r}: a user name has no colon")
        return None, user, password

    @property
    def given(self) -> bool:
        """Whether there are credentials."""
        return self.token is not None or self.user is not None

    @property
    def as_password(self) -> tuple[str, str]:
        """(user, password) for programs that know nothing else; two empty strings where there are no credentials."""
        if self.token is not None:
            return TOKEN_USER, self.token
        return self.user or "", self.password or ""

    def headers(self) -> dict[str, str]:
        """The Authorization header, if there are credentials."""
        if self.token is not None:
            return {"Authorization": f"Bearer {self.token}"}
        if self.user is not None:
            pair = f"{self.user}:{self.password}".encode()
            return {"Authorization": "Basic " + base64.b64encode(pair).decode("ascii")}
        return {}

    def tls(self) -> ssl.SSLContext:
        """What a TLS connection must fulfil."""
        import ssl

        try:
            context = ssl.create_default_context(cafile=self.ca_file)
        except ssl.SSLError as exc:
            raise SettingsError(f"RUNSTREAM_TRACKING_CA_FILE is {self.ca_file!r}: it holds no certificates") from exc
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context
