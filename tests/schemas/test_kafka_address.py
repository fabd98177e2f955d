"""Kafka addresses and login settings: what is taken, what is refused, and that secrets stay secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from runstream_schemas import kafka_address
from runstream_schemas.kafka_address import ENVIRONMENT_VARIABLES, KafkaAddress, KafkaSecurity


def test_addresses() -> None:
    """Several brokers, the default port, IPv6."""
    address = KafkaAddress.parse("kafka://a:1,b,[::1]:9/team.x")
    assert address.brokers == ("a:1", "b:9092", "[::1]:9")
    assert address.prefix == "team.x"
    assert KafkaAddress.parse(str(address)) == address


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("http://a/b", "not a Kafka address"),
        ("kafka://a:9092", "topic prefix"),
        ("kafka://a:9092/", "topic prefix"),
        ("kafka://a:9092/two words", "topic prefix"),
        ("kafka://a:9092/" + "x" * 231, "topic prefix"),
        ("kafka://:9092/p", "host:port"),
        ("kafka://a:0/p", "host:port"),
        ("kafka://a:99999/p", "host:port"),
        ("kafka://a:٣/p", "host:port"),
        ("kafka://a,,b/p", "host:port"),
        ("kafka:///p", "host:port"),
    ],
)
def test_wrong_addresses_say_what_is_wrong(uri: str, says: str) -> None:
    """And show the right form."""
    with pytest.raises(ValueError, match=says):
        KafkaAddress.parse(uri)


def test_an_address_with_a_password_is_refused_without_repeating_it() -> None:
    """Addresses end up in logs."""
    for uri in ("kafka://me:geheim@a:1/p", "other://me:geheim@a:1/p"):
        with pytest.raises(ValueError) as caught:
            KafkaAddress.parse(uri)
        assert "geheim" not in str(caught.value)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"SECURITY_PROTOCOL": "TLS"}, "RUNSTREAM_KAFKA_SECURITY_PROTOCOL"),
        ({"SASL_MECHANISM": "GSSAPI"}, "RUNSTREAM_KAFKA_SASL_MECHANISM"),
        ({"SECURITY_PROTOCOL": "SSL", "USERNAME": "a", "PASSWORD": "b"}, "do not fit"),
        ({"SECURITY_PROTOCOL": "SASL_SSL"}, "do not fit"),
        ({"USERNAME": "a"}, "RUNSTREAM_KAFKA_PASSWORD"),
        ({"SASL_MECHANISM": "OAUTHBEARER"}, "RUNSTREAM_KAFKA_OAUTH_TOKEN"),
    ],
)
def test_settings_that_do_not_fit_name_the_variable(environment: dict[str, str], says: str) -> None:
    """Before any broker is asked."""
    with pytest.raises(ValueError, match=says):
        KafkaSecurity.from_environment({f"RUNSTREAM_KAFKA_{name}": value for name, value in environment.items()})


def test_a_user_name_alone_means_scram_over_tls(tmp_path: Path) -> None:
    """The safe defaults; the password may come from a file."""
    file = tmp_path / "password"
    file.write_text("geheim\n")
    security = KafkaSecurity.from_environment(
        {"RUNSTREAM_KAFKA_USERNAME": "ada", "RUNSTREAM_KAFKA_PASSWORD_FILE": str(file)}
    )
    options = security.options()
    assert options["security_protocol"] == "SASL_SSL"
    assert options["sasl_mechanism"] == "SCRAM-SHA-512"
    assert options["sasl_plain_password"] == "geheim"
    assert "geheim" not in repr(options)
    assert "geheim" not in repr(security)
    file.unlink()
    with pytest.raises(ValueError, match="RUNSTREAM_KAFKA_PASSWORD_FILE"):
        security.options()


def test_every_variable_is_documented() -> None:
    """In the table where they are defined."""
    for name in ENVIRONMENT_VARIABLES:
        assert f"| {name} |" in (kafka_address.__doc__ or "")
