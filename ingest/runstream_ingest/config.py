"""Settings of `runstream ingest`, `migrate`, `rebuild` and `dead-letters` against Kafka and a ClickHouse server.

Every field is an environment variable `RUNSTREAM_<NAME>`; how to log in to Kafka stands in
`runstream_schemas.kafka_address`. The local store process needs none of these.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from runstream_schemas.kafka_address import KafkaAddress

from .batch import BatchLimits
from .commit import DeadLetterLimits, Retry
from .errors import SettingsError
from .store import StoreAddress
from .worker import WorkerSettings

__all__ = ["IngestSettings", "load"]


class IngestSettings(BaseSettings):
    """One worker process. Secrets never appear in `repr`, logs or help."""

    model_config = SettingsConfigDict(env_prefix="RUNSTREAM_", extra="ignore", frozen=True, hide_input_in_errors=True)

    tracking_uri: str = Field(
        default="", description="Where the log is: kafka://host:9092[,host:9092]/PREFIX, or a data directory."
    )
    store_uri: SecretStr = Field(
        default=SecretStr(""),
        description="The store: clickhouse://user:password@host:8443/database?secure=true. Secret.",
    )
    store_cluster: str = Field(
        default="",
        description="ClickHouse cluster on which `migrate` creates Replicated tables (ON CLUSTER); empty: one server.",
    )
    store_timeout_seconds: float = Field(default=300.0, gt=0, description="Longest wait for one answer of the store.")
    max_batch_bytes: int = Field(default=8 * 1024 * 1024, ge=1024, description="Bytes of bodies in one insert.")
    max_batch_points: int = Field(default=1_000_000, ge=1_000, description="Metric points in one insert, from above.")
    max_batch_records: int = Field(default=100_000, ge=1, description="Records in one insert.")
    flush_interval_seconds: float = Field(
        default=0.5, ge=0.01, le=60, description="Longest pause between two inserts while there is something to insert."
    )
    retry_max_seconds: float = Field(
        default=15.0, gt=0, description="Longest pause between two attempts while the store is away."
    )
    dead_letter_max_ratio: float = Field(
        default=0.95,
        gt=0,
        le=1,
        description="Share of refused records among the last 50,000 at which the worker stops.",
    )
    dead_letter_max_consecutive: int = Field(
        default=20_000, ge=1, description="Refused records in a row at which the worker stops."
    )
    metrics_host: str = Field(default="127.0.0.1", description="Address for /metrics and /health.")
    metrics_port: int = Field(default=9464, ge=0, le=65_535, description="Port for them; 0 takes a free one.")
    log_format: Literal["text", "json"] = Field(default="text", description="Log lines for a person, or JSON.")

    @field_validator("store_uri")
    @classmethod
    def _store(cls, value: SecretStr) -> SecretStr:
        if value.get_secret_value():
            StoreAddress.parse(value.get_secret_value())
        return value

    def store_address(self) -> StoreAddress:
        """Where the store is.

        Raises:
            SettingsError: RUNSTREAM_STORE_URI is not set.
        """
        uri = self.store_uri.get_secret_value()
        if not uri:
            raise SettingsError(
                "RUNSTREAM_STORE_URI is not set: the store's address, clickhouse://user:password@host:8123/database"
            )
        return StoreAddress.parse(uri)

    def kafka_address(self) -> KafkaAddress:
        """Where Kafka is.

        Raises:
            SettingsError: RUNSTREAM_TRACKING_URI is not set or no Kafka address.
        """
        if not self.tracking_uri:
            raise SettingsError("RUNSTREAM_TRACKING_URI is not set: the log's address, kafka://broker:9092/PREFIX")
        try:
            return KafkaAddress.parse(self.tracking_uri)
        except ValueError as exc:
            raise SettingsError(f"RUNSTREAM_TRACKING_URI: {exc}") from None

    def worker(self) -> WorkerSettings:
        """The worker's share of the settings."""
        return WorkerSettings(
            limits=BatchLimits(self.max_batch_bytes, self.max_batch_points, self.max_batch_records),
            flush_interval_seconds=self.flush_interval_seconds,
            retry=Retry(max_seconds=self.retry_max_seconds),
            dead_letters=DeadLetterLimits(self.dead_letter_max_consecutive, self.dead_letter_max_ratio),
        )


def load(environment: Mapping[str, str] | None = None) -> IngestSettings:
    """The settings in the environment.

    Raises:
        SettingsError: names each variable that is wrong, and never its value.
    """
    values = os.environ if environment is None else environment
    names = {f"RUNSTREAM_{name.upper()}": name for name in IngestSettings.model_fields}
    given = {names[name]: text for name, text in values.items() if name in names and text != ""}
    try:
        return IngestSettings.model_validate(given)
    except ValidationError as exc:
        problems = "; ".join(
            f"RUNSTREAM_{'_'.join(str(part) for part in error['loc']).upper()}: {error['msg']}"
            for error in exc.errors()
        )
        raise SettingsError(problems) from None
