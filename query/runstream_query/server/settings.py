"""The server's settings: from the command line or from RUNSTREAM_SERVER_* variables; addresses are the client's own."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Final

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

DEFAULT_PORT: Final = 5000


class ServerSettings(BaseSettings):
    """What `runstream server` can be told. RUNSTREAM_TRACKING_URI, _STORE_URI and _ARTIFACT_ROOT name the data."""

    model_config = SettingsConfigDict(env_prefix="RUNSTREAM_SERVER_", extra="ignore", frozen=True)

    tracking_uri: str | None = Field(
        default=None, description="Data directory or kafka:// address; default: RUNSTREAM_TRACKING_URI."
    )
    host: str = Field(
        default="127.0.0.1", description="Address to listen on. Others than loopback need authentication."
    )
    port: int = Field(default=DEFAULT_PORT, ge=0, le=65535, description="Port; 0 takes a free one.")
    workers: int = Field(default=1, ge=1, le=64, description="Server processes.")
    root_path: str = Field(default="", description="Path prefix behind a proxy, for example /runstream.")
    auth_file: Path | None = Field(
        default=None, description="Users and tokens (`runstream server auth`); none: no authentication."
    )
    open_to_network: bool = Field(
        default=False, description="Serve other machines without authentication. Only behind something that does it."
    )
    allowed_hosts: tuple[str, ...] = Field(
        default=(), description="Further Host headers to accept, with port if not the default; `*` takes all."
    )
    allowed_origins: tuple[str, ...] = Field(
        default=(), description="Web origins (https://host) besides our own that may send writing requests."
    )
    sql_uri: str | None = Field(
        default=None,
        repr=False,
        description="ClickHouse user for SQL over HTTP, clickhouse://reader:password@host:8443/db (secret); it must"
        " only have reading rights. A data directory needs none.",
    )
    behind_proxy: bool = Field(
        default=False,
        description="A proxy in front sets X-Forwarded-For and X-Forwarded-Proto itself: take the client's address and"
        " https from them.",
    )
    audit_file: Path | None = Field(
        default=None, description="File for audit lines (JSON, appended to); none: standard error."
    )
    serve_artifacts: bool = Field(default=True, description="Serve artifacts below the root through this server.")
    max_body_bytes: int = Field(default=32 << 20, ge=1 << 20, description="Largest request body, uploads aside.")
    max_artifact_bytes: int = Field(default=50 << 30, ge=1, description="Largest uploaded artifact.")
    max_requests: int = Field(
        default=1_024, ge=1, description="Requests in work at once; beyond it 503 with Retry-After."
    )
    max_connections: int = Field(
        default=4_096, ge=8, description="Connections at once of one process; beyond it 503 with Retry-After."
    )
    max_buffered_bytes: int = Field(
        default=256 << 20,
        ge=1 << 20,
        description="Request bodies in memory at once, uploads aside; beyond it 503 with Retry-After.",
    )
    max_waiting_reads: int = Field(
        default=256, ge=1, description="Reads waiting or running at once; beyond it 429 with Retry-After."
    )
    max_sql_queries: int = Field(
        default=4, ge=1, description="Statements of the SQL port running at once, in all server processes together."
    )
    read_threads: int = Field(default=8, ge=1, le=256, description="Reads running at once.")
    request_timeout_seconds: float = Field(
        default=120.0, gt=0, description="Time until the answer begins, uploads aside."
    )
    idle_upload_seconds: float = Field(default=60.0, gt=0, description="Longest silence within one upload.")
    shutdown_seconds: int = Field(default=15, ge=1, description="Time for requests in work when the server stops.")
    access_log: bool = Field(default=True, description="One line per request on standard error.")

    @field_validator("root_path")
    @classmethod
    def _root_path(cls, value: str) -> str:
        clean = value.strip().strip("/")
        return f"/{clean}" if clean else ""

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def problem(self) -> str | None:
        """Why the server must not start like this; None if it may."""
        if self.loopback or self.auth_file is not None or self.open_to_network:
            return None
        return (
            f"Listening on {self.host} would let anyone on the network read and change everything. Make a user first"
            " (runstream server auth add-user NAME --role admin --file auth.json) and start with --auth-file auth.json,"
            " or say --open-to-network if something in front of this server authenticates."
        )
