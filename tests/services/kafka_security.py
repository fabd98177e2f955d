"""What a test broker asks of its clients: nothing, SASL PLAIN, SCRAM or OAuth bearer, each with or without TLS."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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

    def _make(self) -> None:
        names = self._folder / "names.cnf"
        names.write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
        key, request, certificate = (self._folder / name for name in ("server.key", "server.csr", "server.crt"))
        ca_key = self._folder / "ca.key"
        new_key = ["-newkey", "rsa:2048", "-nodes"]
        self._openssl(
            "req", "-x509", *new_key, "-days", "2", "-subj", "/CN=test CA", "-keyout", ca_key, "-out", self.authority
        )
        self._openssl("req", *new_key, "-subj", "/CN=127.0.0.1", "-keyout", key, "-out", request)
        self._openssl(
            "x509", "-req", "-in", request, "-CA", self.authority, "-CAkey", ca_key, "-CAcreateserial", "-days", "2",
            "-extfile", names, "-out", certificate,
        )  # fmt: skip
        self._bundle.write_text(key.read_text() + certificate.read_text() + self.authority.read_text())

    @staticmethod
    def _openssl(*arguments: str | Path) -> None:
        done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ServiceError(f"openssl {arguments[0]} failed:\n{done.stderr[-1000:]}")
