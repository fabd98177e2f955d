"""The Kafka topics of one prefix: what they should be, created where missing, compared where they exist.

An existing topic is never changed: retention or replication may have been chosen by the people who run the brokers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

from runstream_schemas.kafka_address import KafkaAddress, KafkaSecurity
from runstream_schemas.limits import MAX_MESSAGE_BYTES
from runstream_schemas.names import CONTROL, DEAD_LETTERS, METRICS, topic

from ..errors import IngestError, SettingsError
from .kafka_dead_letters import MAX_LETTER_BYTES

__all__ = ["TopicDifference", "TopicPlan", "TopicReport", "TopicSettings", "TopicsError", "ensure_topics", "plan"]

_FOREVER: Final = "-1"


class TopicsError(IngestError):
    """The topics cannot be created or described; nothing that exists was changed."""


@dataclass(frozen=True, slots=True)
class TopicSettings:
    """What may be chosen about the topics; each is an environment variable RUNSTREAM_KAFKA_TOPIC_<FIELD>."""

    metrics_partitions: int = 12
    """Partitions of PREFIX.metrics: the most workers that can share it. Never lowered later."""
    control_partitions: int = 3
    """Partitions of PREFIX.control."""
    replication: int | None = None
    """Copies of each partition; None: 3, or as many as there are brokers."""
    metrics_retention_hours: float = 168.0
    """How long metric batches stay in the log; 0 keeps them for ever. Rebuilding a store needs them."""
    dead_letter_retention_hours: float = 0.0
    """How long dead letters stay; 0 keeps them for ever."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> TopicSettings:
        """The settings in `environment`.

        Raises:
            SettingsError: a value is no number, or not a possible one; names the variable.
        """
        values: dict[str, Any] = {}
        for one in fields(cls):
            variable = f"RUNSTREAM_KAFKA_TOPIC_{one.name.upper()}"
            text = environment.get(variable)
            if not text:
                continue
            hours = one.name.endswith("hours")
            try:
                values[one.name] = float(text) if hours else int(text)
            except ValueError:
                raise SettingsError(f"{variable} is {text!r}: give a number") from None
            if not (0 <= values[one.name] < 10_000_000 if hours else 1 <= values[one.name] <= 10_000):
                raise SettingsError(f"{variable} is {text!r}: out of range")
        return cls(**values)


@dataclass(frozen=True, slots=True)
class TopicPlan:
    """One topic as it should be."""

    name: str
    partitions: int
    replication: int
    configs: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class TopicDifference:
    """One field of an existing topic that is not as it should be."""

    topic: str
    field: str
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{self.topic}: {self.field} is {self.found}, expected {self.expected}"


@dataclass(frozen=True, slots=True)
class TopicReport:
    """What was found and done about one topic."""

    name: str
    created: bool
    """With a dry run: it would be created."""
    differences: Sequence[TopicDifference] = ()
    """Of an existing topic, which was not changed."""


def plan(prefix: str, settings: TopicSettings, brokers: int) -> tuple[TopicPlan, ...]:
    """The three topics of `prefix` on a cluster of so many brokers."""
    replication = settings.replication or min(3, brokers)
    common = {
        "max.message.bytes": str(MAX_MESSAGE_BYTES),
        # The producer's clock may be days off; CreateTime refuses what lies more than an hour ahead, which is fatal for
        # the whole idempotent producer.
        "message.timestamp.type": "LogAppendTime",
        "min.insync.replicas": "2" if replication >= 3 else "1",
        "cleanup.policy": "delete",
        "retention.bytes": _FOREVER,
        "unclean.leader.election.enable": "false",
    }

    def one(stream: Any, partitions: int, hours: float) -> TopicPlan:
        retention = str(int(hours * 3_600_000)) if hours > 0 else _FOREVER
        configs = {**common, "retention.ms": retention}
        if stream == DEAD_LETTERS:
            configs["max.message.bytes"] = str(MAX_LETTER_BYTES)
        return TopicPlan(topic(prefix, stream), partitions, replication, configs)

    return (
        one(CONTROL, settings.control_partitions, 0.0),
        one(METRICS, settings.metrics_partitions, settings.metrics_retention_hours),
        one(DEAD_LETTERS, 1, settings.dead_letter_retention_hours),
    )


def ensure_topics(
    address: KafkaAddress,
    security: KafkaSecurity | None = None,
    settings: TopicSettings | None = None,
    *,
    dry_run: bool = False,
    timeout_seconds: float = 30.0,
) -> Sequence[TopicReport]:
    """Create what is missing and wait until it can be written; compare what exists. Blocks.

    Args:
        security, settings: from the process's environment if None.

    Raises:
        SettingsError: one of the settings is wrong.
        TopicsError: the brokers are away, refuse, or have too few members for the replication; says which.
    """
    from kafka import KafkaAdminClient
    from kafka.errors import KafkaError

    try:
        options = (security or KafkaSecurity.from_environment(os.environ)).options()
    except ValueError as exc:
        raise SettingsError(str(exc)) from exc
    settings = settings or TopicSettings.from_environment(os.environ)
    try:
        admin = KafkaAdminClient(
            bootstrap_servers=list(address.brokers),
            client_id="runstream-migrate",
            bootstrap_timeout_ms=int(timeout_seconds * 1000),
            **options,
        )
    except (KafkaError, OSError) as exc:
        raise TopicsError(
            f"Kafka at {','.join(address.brokers)} does not answer or refuses the login (RUNSTREAM_KAFKA_*): "
            f"{type(exc).__name__}: {exc}"
        ) from exc
    try:
        return _ensure(admin, address.prefix, settings, dry_run, timeout_seconds)
    except (KafkaError, OSError) as exc:
        raise TopicsError(f"topics of {address} cannot be made: {type(exc).__name__}: {str(exc)[:500]}") from exc
    finally:
        admin.close()


def _ensure(
    admin: Any, prefix: str, settings: TopicSettings, dry_run: bool, timeout_seconds: float
) -> Sequence[TopicReport]:
    from kafka.admin import NewTopic
    from kafka.errors import TopicAlreadyExistsError

    brokers = sum(not broker.get("is_fenced", False) for broker in admin.describe_cluster()["brokers"])
    plans = {one.name: one for one in plan(prefix, settings, brokers)}
    known = set(admin.list_topics())
    missing = [one for one in plans.values() if one.name not in known]
    if missing and not dry_run:
        if missing[0].replication > brokers:
            raise TopicsError(
                f"replication {missing[0].replication} needs as many brokers, and {brokers} are there: start more or "
                "set RUNSTREAM_KAFKA_TOPIC_REPLICATION"
            )
        try:
            admin.create_topics(
                [
                    NewTopic(one.name, one.partitions, one.replication, topic_configs=dict(one.configs))
                    for one in missing
                ],
                timeout_ms=int(timeout_seconds * 1000),
            )
        except TopicAlreadyExistsError:
            # Somebody else migrates at the same time: all exist then, and are compared below.
            missing = []
        admin.wait_for_topics(list(plans), timeout_ms=int(timeout_seconds * 1000))
    created = {one.name for one in missing}
    differences = _differences(admin, [one for name, one in plans.items() if name not in created])
    return [
        TopicReport(name, name in created, tuple(each for each in differences if each.topic == name)) for name in plans
    ]


def _differences(admin: Any, plans: Sequence[TopicPlan]) -> list[TopicDifference]:
    if not plans:
        return []
    from kafka.admin import ConfigResource, ConfigResourceType

    found: list[TopicDifference] = []
    described = {item["name"]: item for item in admin.describe_topics([one.name for one in plans])}
    resources = [ConfigResource(ConfigResourceType.TOPIC, one.name) for one in plans]
    configs = admin.describe_configs(resources, config_filter="all")
    for one in plans:
        partitions = described[one.name]["partitions"]
        replicas = min((len(item["replica_nodes"]) for item in partitions), default=0)
        # More partitions than planned are somebody's wish for more workers; fewer limit them.
        if len(partitions) != one.partitions:
            found.append(TopicDifference(one.name, "partitions", str(len(partitions)), str(one.partitions)))
        if replicas != one.replication:
            found.append(TopicDifference(one.name, "replication", str(replicas), str(one.replication)))
        values = _values(configs, one.name)
        found += [
            TopicDifference(one.name, name, values.get(name, "(unknown)"), expected)
            for name, expected in one.configs.items()
            if values.get(name) != expected
        ]
    return found


def _values(configs: Any, name: str) -> dict[str, str]:
    """The settings of topic `name` in what `describe_configs` gave: {type: {name: {key: {"value": ...}}}}."""
    for by_name in configs.values():
        if name in by_name:
            return {key: str(entry["value"]) for key, entry in by_name[name].items()}
    return {}
