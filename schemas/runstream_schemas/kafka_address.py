"""Where Kafka is and how to log in: the `kafka://` address and the RUNSTREAM_KAFKA_* settings of client and worker.

Standard library alone; kafka-python is imported when a client's options are asked for.

| variable | meaning | default |
| --- | --- | --- |
| RUNSTREAM_KAFKA_SECURITY_PROTOCOL | PLAINTEXT, SSL, SASL_PLAINTEXT, SASL_SSL | PLAINTEXT; SASL_SSL with a user |
| RUNSTREAM_KAFKA_SASL_MECHANISM | PLAIN, SCRAM-SHA-256, SCRAM-SHA-512 or OAUTHBEARER | SCRAM-SHA-512 with a user name |
| RUNSTREAM_KAFKA_USERNAME | user for PLAIN and SCRAM | |
| RUNSTREAM_KAFKA_PASSWORD | its password (secret) | |
| RUNSTREAM_KAFKA_PASSWORD_FILE | a file that holds the password, read at every connection's making | |
| RUNSTREAM_KAFKA_OAUTH_TOKEN | a fixed bearer token (secret) | |
| RUNSTREAM_KAFKA_OAUTH_TOKEN_FILE | a file that holds the token, read again at each login | |
| RUNSTREAM_KAFKA_OAUTH_TOKEN_URL | OAuth token endpoint for the client credentials grant | |
| RUNSTREAM_KAFKA_OAUTH_CLIENT_ID | client id for the token endpoint | |
| RUNSTREAM_KAFKA_OAUTH_CLIENT_SECRET | its secret (secret) | |
| RUNSTREAM_KAFKA_OAUTH_SCOPE | scope to ask for | |
| RUNSTREAM_KAFKA_SSL_CAFILE | PEM file with the authorities to trust | the system's |
| RUNSTREAM_KAFKA_SSL_CERTFILE | PEM file with the client's certificate | |
| RUNSTREAM_KAFKA_SSL_KEYFILE | PEM file with its key | |
| RUNSTREAM_KAFKA_SSL_PASSWORD | the key's password (secret) | |
| RUNSTREAM_KAFKA_SSL_CHECK_HOSTNAME | 0 takes a certificate for another host name | 1 |
"""

from __future__ import annotations

import json
import logging
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

__all__ = ["ENVIRONMENT_VARIABLES", "KafkaAddress", "KafkaSecurity", "open_client"]

_PROTOCOLS: Final = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
_MECHANISMS: Final = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER")
# Kafka allows 249 characters in a topic name; `.dead-letters` is our longest ending.
_PREFIX: Final = re.compile(r"[a-zA-Z0-9._-]{1,230}\Z")
_EXAMPLE: Final = "kafka://broker1:9092,broker2:9092/PREFIX"

ENVIRONMENT_VARIABLES: Final = tuple(
    f"RUNSTREAM_KAFKA_{name}"
    for name in (
        "SECURITY_PROTOCOL", "SASL_MECHANISM", "USERNAME", "PASSWORD", "PASSWORD_FILE", "OAUTH_TOKEN",
        "OAUTH_TOKEN_FILE", "OAUTH_TOKEN_URL", "OAUTH_CLIENT_ID", "OAUTH_CLIENT_SECRET", "OAUTH_SCOPE", "SSL_CAFILE",
        "SSL_CERTFILE", "SSL_KEYFILE", "SSL_PASSWORD", "SSL_CHECK_HOSTNAME",
    )
)  # fmt: skip
"""Every variable that `KafkaSecurity.from_environment` reads."""


@dataclass(frozen=True, slots=True)
class KafkaAddress:
    """The brokers to ask first and the prefix of our topics."""

    brokers: tuple[str, ...]
    """`host:port`, at least one."""
    prefix: str

    @classmethod
    def parse(cls, uri: str) -> KafkaAddress:
        """`kafka://host:port[,host:port]/PREFIX`; the port defaults to 9092.

        Raises:
            ValueError: another form; says which part is wrong.
        """
        scheme, separator, rest = uri.partition("://")
        if scheme != "kafka" or not separator:
            raise ValueError(f"not a Kafka address: {_without_login(uri)!r}; expected {_EXAMPLE}")
        hosts, _, prefix = rest.partition("/")
        if "@" in hosts:
            raise ValueError(
                "a Kafka address carries no user or password: set RUNSTREAM_KAFKA_USERNAME and RUNSTREAM_KAFKA_PASSWORD"
            )
        brokers = tuple(_broker(part.strip(), uri) for part in hosts.split(","))
        if not _PREFIX.match(prefix):
            raise ValueError(
                f"Kafka address {uri!r} needs a topic prefix of letters, digits, '.', '_' and '-' behind the brokers: "
                f"{_EXAMPLE}"
            )
        return cls(brokers, prefix)

    def __str__(self) -> str:
        return f"kafka://{','.join(self.brokers)}/{self.prefix}"


@dataclass(frozen=True, slots=True)
class KafkaSecurity:
    """How a client logs in. Secrets stay out of `repr`."""

    protocol: str = "PLAINTEXT"
    mechanism: str | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    password_file: str | None = None
    oauth_token: str | None = field(default=None, repr=False)
    oauth_token_file: str | None = None
    oauth_token_url: str | None = None
    oauth_client_id: str | None = None
    oauth_client_secret: str | None = field(default=None, repr=False)
    oauth_scope: str | None = None
    ssl_cafile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_password: str | None = field(default=None, repr=False)
    ssl_check_hostname: bool = True

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> KafkaSecurity:
        """The settings in `environment`, checked against each other.

        Raises:
            ValueError: an unknown protocol or mechanism, or one that lacks what it needs; names the variable.
        """

        def get(name: str) -> str | None:
            return environment.get(f"RUNSTREAM_KAFKA_{name}") or None

        username = get("USERNAME")
        mechanism = get("SASL_MECHANISM") or ("SCRAM-SHA-512" if username else None)
        check = (get("SSL_CHECK_HOSTNAME") or "1").lower()
        security = cls(
            protocol=(get("SECURITY_PROTOCOL") or ("SASL_SSL" if mechanism else "PLAINTEXT")).upper(),
            mechanism=mechanism.upper() if mechanism else None,
            username=username,
            password=get("PASSWORD"),
            password_file=get("PASSWORD_FILE"),
            oauth_token=get("OAUTH_TOKEN"),
            oauth_token_file=get("OAUTH_TOKEN_FILE"),
            oauth_token_url=get("OAUTH_TOKEN_URL"),
            oauth_client_id=get("OAUTH_CLIENT_ID"),
            oauth_client_secret=get("OAUTH_CLIENT_SECRET"),
            oauth_scope=get("OAUTH_SCOPE"),
            ssl_cafile=get("SSL_CAFILE"),
            ssl_certfile=get("SSL_CERTFILE"),
            ssl_keyfile=get("SSL_KEYFILE"),
            ssl_password=get("SSL_PASSWORD"),
            ssl_check_hostname=check not in ("0", "false", "no", "off"),
        )
        security._check()
        return security

    def _check(self) -> None:
        if self.protocol not in _PROTOCOLS:
            raise ValueError(
                f"RUNSTREAM_KAFKA_SECURITY_PROTOCOL is {self.protocol!r}; expected one of {', '.join(_PROTOCOLS)}"
            )
        if self.mechanism is not None and self.mechanism not in _MECHANISMS:
            raise ValueError(
                f"RUNSTREAM_KAFKA_SASL_MECHANISM is {self.mechanism!r}; expected one of {', '.join(_MECHANISMS)}"
            )
        if self.protocol.startswith("SASL") != (self.mechanism is not None):
            raise ValueError(
                f"RUNSTREAM_KAFKA_SECURITY_PROTOCOL={self.protocol} and RUNSTREAM_KAFKA_SASL_MECHANISM="
                f"{self.mechanism or '(none)'} do not fit: a mechanism goes with SASL_SSL or SASL_PLAINTEXT"
            )
        if self.mechanism == "OAUTHBEARER":
            grant = self.oauth_token_url and self.oauth_client_id and self.oauth_client_secret
            if not (self.oauth_token or self.oauth_token_file or grant):
                raise ValueError(
                    "OAUTHBEARER needs RUNSTREAM_KAFKA_OAUTH_TOKEN, RUNSTREAM_KAFKA_OAUTH_TOKEN_FILE, or "
                    "RUNSTREAM_KAFKA_OAUTH_TOKEN_URL with RUNSTREAM_KAFKA_OAUTH_CLIENT_ID and _CLIENT_SECRET"
                )
        elif self.mechanism and not (self.username and (self.password or self.password_file)):
            raise ValueError(
                f"{self.mechanism} needs RUNSTREAM_KAFKA_USERNAME and RUNSTREAM_KAFKA_PASSWORD (or _PASSWORD_FILE)"
            )

    def options(self) -> dict[str, Any]:
        """Keyword arguments for any kafka-python client. Holds secrets: never log it.

        Raises:
            ValueError: a file that is named cannot be read.
        """
        options: dict[str, Any] = {"security_protocol": self.protocol}
        if self.protocol.endswith("SSL"):
            for name in ("ssl_cafile", "ssl_certfile", "ssl_keyfile", "ssl_password"):
                value = getattr(self, name)
                if value is not None:
                    options[name] = _Secret(value) if name == "ssl_password" else value
            for name in ("ssl_cafile", "ssl_certfile", "ssl_keyfile"):
                if name in options and not Path(options[name]).is_file():
                    raise ValueError(f"RUNSTREAM_KAFKA_{name.upper()} names no file: {options[name]}")
            options["ssl_check_hostname"] = self.ssl_check_hostname
        if self.mechanism is not None:
            _keep_logins_out_of_logs()
            options["sasl_mechanism"] = self.mechanism
            if self.mechanism == "OAUTHBEARER":
                options["sasl_oauth_token_provider"] = _token_provider(self)
            else:
                options["sasl_plain_username"] = self.username
                password = self.password or _read_secret(self.password_file, "RUNSTREAM_KAFKA_PASSWORD_FILE")
                options["sasl_plain_password"] = _Secret(password)
        return options


class _Secret(str):
    """A text that prints as stars: kafka-python logs its whole configuration at DEBUG."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


def open_client(kind: Any, **options: Any) -> Any:
    """A kafka-python admin client or consumer whose threads and sockets end where its constructor fails.

    By itself it leaves its I/O thread running then, one for every attempt to reach brokers that are away.
    """
    client: Any = object.__new__(kind)
    try:
        client.__init__(**options)
    except BaseException:
        network = getattr(client, "_net", None)
        for end in (getattr(getattr(client, "_client", None), "close", None), getattr(network, "stop", None)):
            if end is not None:
                with suppress(Exception):
                    end()
        raise
    return client


def _keep_logins_out_of_logs() -> None:
    """kafka-python logs whole requests at DEBUG, the login's bytes with password or token among them."""
    for name in ("kafka.net.connection", "kafka.net.transport", "kafka.net.sasl", "kafka.protocol.parser"):
        logger = logging.getLogger(name)
        if logger.level < logging.INFO:
            logger.setLevel(logging.INFO)


def _without_login(uri: str) -> str:
    return re.sub(r"//[^/@]*@", "//...@", uri)


def _broker(text: str, uri: str) -> str:
    """`text` as `host:port`."""
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):  # no port; a bare IPv6 address ends in a bracket
        host, port = text, "9092"
    if not host or not port.isascii() or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise ValueError(f"broker {text!r} in {uri!r} is not host:port; expected {_EXAMPLE}")
    return f"{host}:{port}"


def _read_secret(path: str | None, variable: str) -> str:
    try:
        return Path(path or "").read_text(encoding="utf-8").strip()
    except OSError as exc:
        raise ValueError(f"{variable} cannot be read: {exc}") from exc


def _token_provider(security: KafkaSecurity) -> Any:
    """What kafka-python asks for a bearer token at each login."""
    from kafka.net.sasl.oauth import AbstractTokenProvider

    class TokenProvider(AbstractTokenProvider):  # type: ignore[misc,no-any-unimported,unused-ignore]
        """Fixed, from a file, or by the client credentials grant, kept until shortly before it runs out."""

        def __init__(self) -> None:
            super().__init__()
            self._token = ""
            self._until = 0.0

        def token(self) -> str:
            if security.oauth_token:
                return security.oauth_token
            if security.oauth_token_file:
                return _read_secret(security.oauth_token_file, "RUNSTREAM_KAFKA_OAUTH_TOKEN_FILE")
            if time.monotonic() >= self._until:
                self._token, lifetime_seconds = _grant(security)
                self._until = time.monotonic() + max(0.0, lifetime_seconds - 60.0)
            return self._token

        def extensions(self) -> dict[str, str]:
            return {}

    return TokenProvider()


def _grant(security: KafkaSecurity) -> tuple[str, float]:
    """A token by the client credentials grant, and its life in seconds. Blocks at most 10 s."""
    url = security.oauth_token_url or ""
    if not url.startswith(("https://", "http://")):
        raise ValueError("RUNSTREAM_KAFKA_OAUTH_TOKEN_URL must start with https://")
    form = {
        "grant_type": "client_credentials",
        "client_id": security.oauth_client_id or "",
        "client_secret": security.oauth_client_secret or "",
    }
    if security.oauth_scope:
        form["scope"] = security.oauth_scope
    request = urllib.request.Request(url, data=urllib.parse.urlencode(form).encode(), method="POST")
    with urllib.request.urlopen(request, timeout=10) as answer:
        reply = json.load(answer)
    return str(reply["access_token"]), float(reply.get("expires_in", 300))
