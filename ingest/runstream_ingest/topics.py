"""The Kafka topics of one prefix: what they should be, created where missing, compared where they exist.

An existing topic is never changed: retention or replication may have been chosen by the people who run the brokers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from runstream_schemas.kafka_address import KafkaAddress, KafkaSecurity
from runstream_schemas.limits import MAX_MESSAGE_BYTES
from runstream_schemas.names import CONTROL, DEAD_LETTERS, METRICS, topic

from .errors import IngestError

__all__ = ["TopicDifference", "TopicPlan", "TopicReport", "TopicSettings", "TopicsError", "create_topics", "plan"]

_FOREVER: Final = "-1"


class TopicsError(IngestError):
    """The topics cannot be created or described; nothing that exists was changed."""


@dataclass(frozen=True, slots=True)
class TopicSettings:
    """What may be chosen about the topics; the environment names are RUNSTREAM_KAFKA_TOPIC_<FIELD>."""

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
    """What `create_topics` found and did."""

    created: Sequence[str]
    """With a dry run: what would be created."""
    existing: Sequence[str]
    differences: Sequence[TopicDifference] = field(default_factory=tuple)
    """Of existing topics; none of them was changed."""


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
        return TopicPlan(topic(prefix, stream), partitions, replication, {**common, "retention.ms": retention})

    return (
        one(CONTROL, settings.control_partitions, 0.0),
        one(METRICS, settings.metrics_partitions, settings.metrics_retention_hours),
        one(DEAD_LETTERS, 1, settings.dead_letter_retention_hours),
    )


def create_topics(
    address: KafkaAddress,
    security: KafkaSecurity | None = None,
    settings: TopicSettings | None = None,
    *,
    dry_run: bool = False,
    timeout_seconds: float = 30.0,
) -> TopicReport:
    """Create what is missing and wait until it can be written; compare what exists. Blocks.

    Raises:
        TopicsError: the brokers are away, refuse, or have too few members for the replication; says which.
    """
    from kafka import KafkaAdminClient
    from kafka.errors import KafkaError

    try:
        admin = KafkaAdminClient(
            bootstrap_servers=list(address.brokers),
            client_id="runstream-migrate",
            bootstrap_timeout_ms=int(timeout_seconds * 1000),
            **(security or KafkaSecurity()).options(),
        )
    except (KafkaError, OSError) as exc:
        raise TopicsError(
            f"Kafka at {','.join(address.brokers)} does not answer or refuses the login (RUNSTREAM_KAFKA_*): "
            f"{type(exc).__name__}: {exc}"
        ) from exc
    try:
        return _create(admin, address.prefix, settings or TopicSettings(), dry_run, timeout_seconds)
    except (KafkaError, OSError) as exc:
        raise TopicsError(f"topics of {address} cannot be made: {type(exc).__name__}: {str(exc)[:500]}") from exc
    finally:
        admin.close()


def _create(admin: Any, prefix: str, settings: TopicSettings, dry_run: bool, timeout_seconds: float) -> TopicReport:
    from kafka.admin import NewTopic
    from kafka.errors import TopicAlreadyExistsError

    brokers = sum(not broker.get("is_fenced", False) for broker in admin.describe_cluster()["brokers"])
    plans = {one.name: one for one in plan(prefix, settings, brokers)}
    existing = [name for name in plans if name in set(admin.list_topics())]
    missing = [one for name, one in plans.items() if name not in existing]
    if missing and not dry_run:
        if missing[0].replication > brokers:
            raise TopicsError(
                f"replication {missing[0].replication} needs as many brokers, and {brokers} are there: start more or set "
                "RUNSTREAM_KAFKA_TOPIC_REPLICATION"
            )
        try:
            admin.create_topics(
                [NewTopic(one.name, one.partitions, one.replication, topic_configs=dict(one.configs)) for one in missing],
                timeout_ms=int(timeout_seconds * 1000),
            )
        except TopicAlreadyExistsError:
            # Somebody else migrates at the same time: what counts is that all exist; compare them below.
            existing = list(plans)
        admin.wait_for_topics(list(plans), timeout_ms=int(timeout_seconds * 1000))
    differences = _differences(admin, [plans[name] for name in existing])
    created = [one.name for one in missing if one.name not in existing]
    return TopicReport(tuple(created), tuple(existing), tuple(differences))


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
