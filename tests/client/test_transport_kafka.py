"""The Kafka transport against brokers that refuse, die, are absent, or ask for a login."""

from __future__ import annotations

import base64
import json
import logging
import os
import time
from pathlib import Path

import pytest

from runstream.transport import Event, TransportError
from runstream.transport.kafka import MAX_BYTES_IN_FLIGHT, KafkaTransport, open_kafka
from runstream_ingest.log.kafka_topics import TopicSettings, ensure_topics
from runstream_schemas.kafka_address import KafkaAddress, KafkaSecurity
from runstream_schemas.names import METRICS, topic
from tests.services import kafka_security
from tests.services.cache import free_ports
from tests.services.kafka import admin, collect_refused_sockets, local_cluster, read_all, shared_broker

__all__ = ["collect_refused_sockets"]

pytestmark = [
    pytest.mark.kafka,
    pytest.mark.usefixtures("collect_refused_sockets"),
    # kafka-python leaves sockets of refused connections to the collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]


def events(count: int, size: int = 10, key: str = "run") -> list[Event]:
    return [Event(METRICS, key, bytes(8), b"%d " % number + b"x" * size) for number in range(count)]


def numbers(address: KafkaAddress) -> list[int]:
    return [int(record.value.split()[0]) for record in read_all(address, topic(address.prefix, METRICS))]


def send(transport: KafkaTransport, batch: list[Event], seconds: float = 60.0) -> None:
    """As the delivery thread does: again, until it is acknowledged."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            transport.send(batch).result(5.0)
            return
        except (TransportError, TimeoutError) as exc:
            assert getattr(exc, "retryable", True), exc
            assert time.monotonic() < deadline, exc
            time.sleep(0.1)


def test_a_missing_topic_is_told_within_five_seconds_and_found_once_it_is_there() -> None:
    """The message says what to do; nothing is created by the way."""
    address = KafkaAddress(tuple(shared_broker().bootstrap.split(",")), f"none{time.time_ns()}")
    transport = KafkaTransport(address)
    began = time.monotonic()
    with pytest.raises(TransportError, match="runstream migrate") as caught:
        transport.send(events(1))
    assert time.monotonic() - began < 5
    assert caught.value.retryable
    ensure_topics(address, KafkaSecurity(), TopicSettings(metrics_partitions=1, control_partitions=1))
    send(transport, events(1))
    assert numbers(address) == [0]
    transport.close(1)


def test_an_event_above_the_limit_is_refused_alone() -> None:
    """Before anything of its hand-over is sent; the next one goes."""
    address = shared_broker().prefix()
    transport = KafkaTransport(address)
    with pytest.raises(TransportError) as caught:
        transport.send([*events(1), *events(1, size=2_000_000)])
    assert not caught.value.retryable
    send(transport, events(1))
    assert numbers(address) == [0]
    transport.close(1)


def test_a_record_that_the_broker_refuses_does_not_take_the_others_with_it() -> None:
    """A topic with a smaller limit: kafka-python turns fatal, the transport finds the one record."""
    from kafka.admin import ConfigResource, ConfigResourceType

    address = shared_broker().prefix()
    name = topic(address.prefix, METRICS)
    with admin(address) as client:
        client.alter_configs([ConfigResource(ConfigResourceType.TOPIC, name, {"max.message.bytes": "2000"})])
    transport = KafkaTransport(address)
    # Incompressible, or lz4 would make it small.
    large = Event(METRICS, "run", bytes(8), b"999 " + os.urandom(100_000))
    delivered = 0
    refused = 0
    waiting = [*events(5), large, *events(5)]
    deadline = time.monotonic() + 60
    while waiting:
        assert time.monotonic() < deadline
        try:
            transport.send(waiting[:1]).result(10)
            delivered += 1
        except TransportError as exc:
            if exc.retryable:
                continue
            assert waiting[0] is large
            refused += 1
        waiting.pop(0)
    assert (delivered, refused) == (10, 1)
    assert numbers(address) == [*range(5), *range(5)]
    transport.close(1)


def test_a_broker_that_is_absent_dies_and_comes_back() -> None:
    """Sending blocks 5 seconds at most, memory is bounded, and what is sent again arrives in order, nothing missing."""
    with local_cluster() as cluster:
        address = KafkaAddress.parse(f"kafka://{cluster.bootstrap}/p")
        ensure_topics(address, KafkaSecurity(), TopicSettings(metrics_partitions=1, control_partitions=1))
        cluster.brokers[0].kill()
        transport = open_kafka(str(address), {})
        began = time.monotonic()
        with pytest.raises(TransportError, match="away") as caught:
            transport.send(events(1))
        assert time.monotonic() - began < 5
        assert caught.value.retryable
        cluster.start_broker(0)
        send(transport, events(1))
        cluster.brokers[0].kill()
        handed = 0
        slowest = 0.0
        with pytest.raises(TransportError, match="wait for acknowledgement"):
            while handed < 3 * MAX_BYTES_IN_FLIGHT:
                began = time.monotonic()
                try:
                    transport.send(events(100, size=10_000))
                finally:
                    slowest = max(slowest, time.monotonic() - began)
                handed += 1_000_000
        assert slowest < 5
        assert handed <= MAX_BYTES_IN_FLIGHT
        cluster.start_broker(0)
        for number in range(1000, 1005):
            send(transport, [Event(METRICS, "run", bytes(8), b"%d " % number)])
        found = numbers(address)
        assert [number for number in found if number >= 1000] == list(range(1000, 1005))
        transport.close(1)


def test_a_forked_child_sends_with_a_producer_of_its_own() -> None:
    """The parent's connection goes on; the child neither hangs nor writes into the parent's socket."""
    address = shared_broker().prefix()
    transport = KafkaTransport(address)
    send(transport, events(1))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            send(transport, [Event(METRICS, "run", bytes(8), b"1 child")], 20)
            transport.close(1)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert status == 0
    send(transport, [Event(METRICS, "run", bytes(8), b"2 parent")])
    assert numbers(address) == [0, 1, 2]
    transport.close(1)


def _unsigned_token() -> str:
    def part(value: dict[str, object]) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    now = int(time.time())
    return f"{part({'alg': 'none'})}.{part({'sub': 'trainer', 'iat': now, 'exp': now + 3600})}."


@pytest.mark.parametrize("login", ["scram and tls", "plain and tls", "oauth"])
def test_logins(login: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each is given by RUNSTREAM_KAFKA_* alone; no secret gets into a repr or a log line, at DEBUG either."""
    authority = kafka_security.TestAuthority(tmp_path / "tls") if "tls" in login else None
    if login == "oauth":
        security = kafka_security.oauth(_unsigned_token())
    elif login.startswith("plain"):
        security = kafka_security.plain(authority)
    else:
        security = kafka_security.scram("SCRAM-SHA-512", authority)
    with local_cluster(security=security) as cluster, caplog.at_level(logging.DEBUG):
        address = KafkaAddress.parse(f"kafka://{cluster.bootstrap}/p")
        known = KafkaSecurity.from_environment(security.environment)
        ensure_topics(address, known, TopicSettings(metrics_partitions=1, control_partitions=1))
        transport = open_kafka(str(address), security.environment)
        send(transport, events(3), 20)
        assert transport.end_positions(10)[METRICS, 0] == 3
        said = repr(transport) + repr(known) + repr(known.options()) + caplog.text
        for name in ("RUNSTREAM_KAFKA_PASSWORD", "RUNSTREAM_KAFKA_OAUTH_TOKEN"):
            if name in security.environment:
                assert security.environment[name] not in said
        transport.close(1)
        if "RUNSTREAM_KAFKA_PASSWORD" in security.environment:
            wrong = open_kafka(str(address), security.environment | {"RUNSTREAM_KAFKA_PASSWORD": "wrong"})
            with pytest.raises(TransportError, match="login") as caught:
                wrong.send(events(1))
            assert caught.value.retryable
            wrong.close(1)


def test_a_clients_certificate_lets_it_in(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Mutual TLS with an encrypted key; without a certificate, or with one of a stranger, nothing gets through."""
    authority = kafka_security.TestAuthority(tmp_path / "tls")
    stranger = kafka_security.mutual_tls(kafka_security.TestAuthority(tmp_path / "stranger")).environment
    security = kafka_security.mutual_tls(authority)
    with local_cluster(security=security) as cluster, caplog.at_level(logging.DEBUG):
        address = KafkaAddress.parse(f"kafka://{cluster.bootstrap}/p")
        known = KafkaSecurity.from_environment(security.environment)
        ensure_topics(address, known, TopicSettings(metrics_partitions=1, control_partitions=1))
        transport = open_kafka(str(address), security.environment)
        send(transport, events(3), 20)
        assert transport.end_positions(10)[METRICS, 0] == 3
        said = repr(transport) + repr(known) + repr(known.options()) + caplog.text
        assert security.environment["RUNSTREAM_KAFKA_SSL_PASSWORD"] not in said
        transport.close(1)
        without = {name: value for name, value in security.environment.items() if "CERT" not in name}
        without = {name: value for name, value in without.items() if "KEY" not in name and "PASSWORD" not in name}
        trusting = stranger | {"RUNSTREAM_KAFKA_SSL_CAFILE": str(authority.authority)}
        for environment in (without, trusting, stranger):
            refused = open_kafka(str(address), environment)
            with pytest.raises(TransportError, match="refuse the login") as caught:
                refused.send(events(1))
            assert caught.value.retryable
            refused.close(1)
        again = open_kafka(str(address), security.environment)
        assert again.end_positions(10)[METRICS, 0] == 3
        again.close(1)


def test_a_token_from_an_oauth_endpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The client credentials grant; the broker checks the signature. Kept while it lives, fetched again afterwards."""
    endpoint = kafka_security.TokenEndpoint(tmp_path, lifetime_seconds=62)
    security = kafka_security.oauth_by_url(endpoint)
    try:
        with local_cluster(security=security) as cluster, caplog.at_level(logging.DEBUG):
            address = KafkaAddress.parse(f"kafka://{cluster.bootstrap}/p")
            known = KafkaSecurity.from_environment(security.environment)
            ensure_topics(address, known, TopicSettings(metrics_partitions=1, control_partitions=1))
            transport = open_kafka(str(address), security.environment)
            send(transport, events(3), 20)
            assert transport.end_positions(10)[METRICS, 0] == 3
            transport.close(1)
            provider = known.options()["sasl_oauth_token_provider"]
            token = provider.token()
            assert provider.token() == token
            deadline = time.monotonic() + 20
            while provider.token() == token:  # it has 62 s to live, and is renewed a minute before its end
                assert time.monotonic() < deadline
                time.sleep(0.05)
            said = repr(transport) + repr(known) + repr(known.options()) + caplog.text
            assert kafka_security.PASSWORD not in said
            assert not any(granted in said for granted in endpoint.granted)
            wrong = open_kafka(str(address), security.environment | {"RUNSTREAM_KAFKA_OAUTH_CLIENT_SECRET": "no"})
            with pytest.raises(TransportError, match="login") as caught:
                wrong.send(events(1))
            assert caught.value.retryable and endpoint.refused
            wrong.close(1)
    finally:
        endpoint.close()


def test_nothing_listens_there() -> None:
    """The log's end is asked for within the given time, no longer."""
    [port] = free_ports(1)
    transport = open_kafka(f"kafka://127.0.0.1:{port}/p", {})
    began = time.monotonic()
    with pytest.raises(TransportError, match=f"127.0.0.1:{port}"):
        transport.end_positions(1.0)
    assert time.monotonic() - began < 5
    transport.close(1)
