"""What a test broker asks of its clients: nothing, SASL PLAIN, SCRAM, OAuth bearer, or a certificate; also by TLS."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from .cache import free_ports
from .process import ServiceError

USER = "trainer"
PASSWORD = "correct horse battery staple"


@dataclass(frozen=True, slots=True)
class ServerSecurity:
    """Broker settings and the client settings that fit them (as RUNSTREAM_KAFKA_* variables)."""

    protocol: str
    settings: dict[str, str] = field(default_factory=dict)
    format_arguments: Sequence[str] = ()
    java_options: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)
    """What a client must have in its environment."""
    inter_broker_port: int | None = None
    """Brokers talk to each other here, without security: what clients do is what is tested."""

    def client_options(self) -> dict[str, Any]:
        """The same for a bare kafka-python client."""
        from runstream_schemas.kafka_address import KafkaSecurity

        return KafkaSecurity.from_environment(self.environment).options()


def plaintext() -> ServerSecurity:
    """No security."""
    return ServerSecurity("PLAINTEXT")


def scram(mechanism: str = "SCRAM-SHA-512", tls: TestAuthority | None = None) -> ServerSecurity:
    """A user with a SCRAM password, stored in the cluster when it is formatted."""
    login = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
    return _sasl(
        mechanism,
        {f"listener.name.client.{mechanism.lower()}.sasl.jaas.config": login},
        tls,
        format_arguments=("--add-scram", f"{mechanism}=[name={USER},password={PASSWORD}]"),
    )


def plain(tls: TestAuthority | None = None) -> ServerSecurity:
    """SASL PLAIN: the password goes over the wire, so it belongs with TLS."""
    login = f'org.apache.kafka.common.security.plain.PlainLoginModule required user_{USER}="{PASSWORD}";'
    return _sasl("PLAIN", {"listener.name.client.plain.sasl.jaas.config": login}, tls)


def oauth(token: str) -> ServerSecurity:
    """OAuth bearer with Kafka's unsecured validator (for tests alone: it believes any unsigned token)."""
    module = "org.apache.kafka.common.security.oauthbearer"
    settings = {
        "listener.name.client.oauthbearer.sasl.jaas.config": f"{module}.OAuthBearerLoginModule required;",
        "listener.name.client.oauthbearer.sasl.server.callback.handler.class": (
            f"{module}.internals.unsecured.OAuthBearerUnsecuredValidatorCallbackHandler"
        ),
    }
    return _sasl("OAUTHBEARER", settings, None, environment={"RUNSTREAM_KAFKA_OAUTH_TOKEN": token})


def oauth_by_url(endpoint: TokenEndpoint) -> ServerSecurity:
    """OAuth bearer with Kafka's own validator of signed tokens, which the client gets from a token endpoint."""
    module = "org.apache.kafka.common.security.oauthbearer"
    settings = {
        "listener.name.client.oauthbearer.sasl.jaas.config": f"{module}.OAuthBearerLoginModule required;",
        "listener.name.client.oauthbearer.sasl.server.callback.handler.class": (
            f"{module}.OAuthBearerValidatorCallbackHandler"
        ),
        "sasl.oauthbearer.jwks.endpoint.url": endpoint.keys_url,
        "sasl.oauthbearer.expected.audience": endpoint.audience,
    }
    environment = {
        "RUNSTREAM_KAFKA_OAUTH_TOKEN_URL": endpoint.token_url,
        "RUNSTREAM_KAFKA_OAUTH_CLIENT_ID": USER,
        "RUNSTREAM_KAFKA_OAUTH_CLIENT_SECRET": PASSWORD,
        "RUNSTREAM_KAFKA_OAUTH_SCOPE": "log",
    }
    made = _sasl("OAUTHBEARER", settings, None, environment=environment)
    return replace(made, java_options=[f"-Dorg.apache.kafka.sasl.oauthbearer.allowed.urls={endpoint.keys_url}"])


def mutual_tls(tls: TestAuthority) -> ServerSecurity:
    """No SASL: who has a certificate of the authority may come in. The client's key is encrypted."""
    certificate, key = tls.client_certificate(PASSWORD)
    return ServerSecurity(
        "SSL",
        {"listener.name.client.ssl.client.auth": "required", **tls.broker_settings()},
        environment={
            "RUNSTREAM_KAFKA_SECURITY_PROTOCOL": "SSL",
            "RUNSTREAM_KAFKA_SSL_CAFILE": str(tls.authority),
            "RUNSTREAM_KAFKA_SSL_CERTFILE": str(certificate),
            "RUNSTREAM_KAFKA_SSL_KEYFILE": str(key),
            "RUNSTREAM_KAFKA_SSL_PASSWORD": PASSWORD,
        },
        inter_broker_port=free_ports(1)[0],
    )


def _sasl(
    mechanism: str,
    settings: dict[str, str],
    tls: TestAuthority | None,
    format_arguments: Sequence[str] = (),
    environment: dict[str, str] | None = None,
) -> ServerSecurity:
    protocol = "SASL_SSL" if tls else "SASL_PLAINTEXT"
    return ServerSecurity(
        protocol,
        {
            "sasl.enabled.mechanisms": mechanism,
            "listener.name.client.sasl.enabled.mechanisms": mechanism,
            **settings,
            **(tls.broker_settings() if tls else {}),
        },
        format_arguments,
        environment={
            "RUNSTREAM_KAFKA_SECURITY_PROTOCOL": protocol,
            "RUNSTREAM_KAFKA_SASL_MECHANISM": mechanism,
            **(environment or {"RUNSTREAM_KAFKA_USERNAME": USER, "RUNSTREAM_KAFKA_PASSWORD": PASSWORD}),
            **({"RUNSTREAM_KAFKA_SSL_CAFILE": str(tls.authority)} if tls else {}),
        },
        inter_broker_port=free_ports(1)[0],
    )


class TestAuthority:
    """A certificate authority of our own with one server certificate for 127.0.0.1, made by `openssl`."""

    __test__ = False

    def __init__(self, folder: Path) -> None:
        if shutil.which("openssl") is None:
            raise ServiceError("no openssl on the PATH to make test certificates with")
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.authority = folder / "ca.pem"
        self._bundle = folder / "server.pem"
        self._make()

    def broker_settings(self) -> dict[str, str]:
        """The broker's key and certificate, as one PEM file."""
        return {
            "listener.name.client.ssl.keystore.type": "PEM",
            "listener.name.client.ssl.keystore.location": str(self._bundle),
            "listener.name.client.ssl.truststore.type": "PEM",
            "listener.name.client.ssl.truststore.location": str(self.authority),
        }

    def client_certificate(self, password: str) -> tuple[Path, Path]:
        """A client's certificate and its encrypted key."""
        key, request, certificate = (self._folder / name for name in ("client.key", "client.csr", "client.crt"))
        openssl(
            "req", "-newkey", "rsa:2048", "-passout", f"pass:{password}", "-subj", f"/CN={USER}", "-keyout", key,
            "-out", request,
        )  # fmt: skip
        openssl(
            "x509", "-req", "-in", request, "-CA", self.authority, "-CAkey", self._folder / "ca.key",
            "-CAcreateserial", "-days", "2", "-out", certificate,
        )  # fmt: skip
        return certificate, key

    def _make(self) -> None:
        names = self._folder / "names.cnf"
        names.write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
        key, request, certificate = (self._folder / name for name in ("server.key", "server.csr", "server.crt"))
        ca_key = self._folder / "ca.key"
        new_key = ["-newkey", "rsa:2048", "-nodes"]
        openssl(
            "req", "-x509", *new_key, "-days", "2", "-subj", "/CN=test CA", "-keyout", ca_key, "-out", self.authority
        )
        openssl("req", *new_key, "-subj", "/CN=127.0.0.1", "-keyout", key, "-out", request)
        openssl(
            "x509", "-req", "-in", request, "-CA", self.authority, "-CAkey", ca_key, "-CAcreateserial", "-days", "2",
            "-extfile", names, "-out", certificate,
        )  # fmt: skip
        self._bundle.write_text(key.read_text() + certificate.read_text() + self.authority.read_text())


class TokenEndpoint:
    """An OAuth server on loopback: the client credentials grant for one client, RS256 tokens, and their public key."""

    def __init__(self, folder: Path, lifetime_seconds: int = 3_600) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.audience = "kafka"
        self.granted: list[str] = []
        """Every token that was given out."""
        self.refused = 0
        self._lifetime_seconds = lifetime_seconds
        self._key = folder / "token.key"
        openssl("genrsa", "-out", self._key, "2048")
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(200, endpoint._keys())

            def do_POST(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                self._answer(*endpoint._grant(dict(parse_qsl(self.rfile.read(size).decode()))))

            def _answer(self, status: int, value: dict[str, Any]) -> None:
                body = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        base = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.token_url, self.keys_url = f"{base}/token", f"{base}/keys"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _grant(self, form: dict[str, str]) -> tuple[int, dict[str, Any]]:
        expected = {"grant_type": "client_credentials", "client_id": USER, "client_secret": PASSWORD, "scope": "log"}
        if form != expected:
            self.refused += 1
            return 401, {"error": "invalid_client"}
        now = int(time.time())
        claims = {
            "sub": USER, "aud": self.audience, "iat": now, "exp": now + self._lifetime_seconds, "scope": "log",
            "jti": str(len(self.granted)),
        }  # fmt: skip
        signed = f"{_part({'alg': 'RS256', 'typ': 'JWT', 'kid': 'one'})}.{_part(claims)}"
        signature = openssl("dgst", "-sha256", "-sign", self._key, given=signed.encode())
        token = f"{signed}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"
        self.granted.append(token)
        return 200, {"access_token": token, "token_type": "Bearer", "expires_in": self._lifetime_seconds}

    def _keys(self) -> dict[str, Any]:
        said = openssl("rsa", "-in", self._key, "-noout", "-modulus").decode().strip()
        modulus = bytes.fromhex(said.removeprefix("Modulus="))
        number = base64.urlsafe_b64encode(modulus).rstrip(b"=").decode()
        return {"keys": [{"kty": "RSA", "kid": "one", "use": "sig", "alg": "RS256", "n": number, "e": "AQAB"}]}


def _part(value: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def openssl(*arguments: str | Path, given: bytes = b"") -> bytes:
    """What the command prints."""
    done = subprocess.run(["openssl", *map(str, arguments)], input=given, capture_output=True, check=False)
    if done.returncode != 0:
        raise ServiceError(f"openssl {arguments[0]} failed:\n{done.stderr.decode(errors='replace')[-1000:]}")
    return done.stdout
