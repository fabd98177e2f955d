"""Released Avro schemas never change: their fingerprints, their defaults and their logical types are frozen here."""

from __future__ import annotations

import hashlib
import itertools
import json
from typing import Any

import pytest

from runstream_ingest.store import Store
from runstream_schemas import codec
from runstream_schemas.names import STREAM_OF

# A fingerprint covers names and types; the digest covers defaults too, which the fingerprint ignores.
FROZEN = {
    "artifact_logged.v1": ("ab9c649599f261e3", "a724171543f62b5f"),
    "experiment_created.v1": ("0e86d9188035e686", "de82dc6936160d93"),
    "experiment_tags.v1": ("30dc2407697239d0", "3c5f4dc7100261f3"),
    "experiment_updated.v1": ("6ed43041c5508b81", "fb7a4733cdcac36f"),
    "input_logged.v1": ("80090ca82ec0c471", "c1ea5066b705918d"),
    "logged_model.v1": ("067245f7d1b906b2", "690ec0383b4dbf93"),
    "metric_batch.v1": ("f6711e878b0061f5", "a5304782a6ed3f5c"),
    "models_linked.v1": ("92ca2fe9c1a52801", "91e6cf4c182bc09b"),
    "params.v1": ("0ab7f74f617d7a76", "0139f23a92b209fc"),
    "purged.v1": ("197bbbb45489f0e3", "94cdd14fe1411d7f"),
    "run_started.v1": ("f1745e01c0fda47c", "619d6677145075a1"),
    "run_tags.v1": ("4d99b3f235269a69", "b9013ec5400add88"),
    "run_updated.v1": ("cb166d5d8454da01", "82b00fcb56583b1d"),
}


def digest(definition: Any) -> str:
    """Of everything but the documentation."""

    def bare(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: bare(value) for name, value in part.items() if name != "doc"}
        return [bare(one) for one in part] if isinstance(part, list) else part

    return hashlib.sha256(json.dumps(bare(definition), sort_keys=True).encode()).hexdigest()[:16]


def test_schemas_are_frozen() -> None:
    """A change of a released file fails here: write the next version beside it instead."""
    found = {
        f"{schema.event}.v{schema.version}": (mark.hex(), digest(schema.definition))
        for mark, schema in codec.schemas().items()
    }
    assert {name: found.get(name) for name in FROZEN} == FROZEN


def test_every_event_has_a_schema_and_a_stream() -> None:
    """And no schema lacks an event."""
    assert {schema.event for schema in codec.schemas().values()} == set(STREAM_OF)


def test_fingerprints_differ() -> None:
    """Also between versions of one event, where only a default differs it would not."""
    marks = list(codec.schemas())
    assert len(set(marks)) == len(marks)
    assert all(len(mark) == 8 for mark in marks)


def test_later_versions_only_add_fields_with_defaults() -> None:
    """So that an older worker's bodies and a newer reader fit together."""
    by_event: dict[str, list[codec.Schema]] = {}
    for schema in codec.schemas().values():
        by_event.setdefault(schema.event, []).append(schema)
    for versions in by_event.values():
        versions.sort(key=lambda schema: schema.version)
        assert [schema.version for schema in versions] == list(range(1, len(versions) + 1))
        for older, newer in itertools.pairwise(versions):
            before = {field["name"]: field for field in older.definition["fields"]}
            after = {field["name"]: field for field in newer.definition["fields"]}
            for name, field in before.items():
                assert after[name]["type"] == field["type"]
                assert after[name].get("default") == field.get("default")
            assert all("default" in after[name] for name in after.keys() - before.keys())


@pytest.mark.parametrize("event", sorted(STREAM_OF))
def test_avro_and_column_defaults_are_equal(store: Store, event: str) -> None:
    """A field that a body leaves out reads the same in Python and in the landing table."""
    types = dict(
        store.rows(
            "SELECT name, type FROM system.columns WHERE database = {d:String} AND table = {t:String}",
            {"d": store.database, "t": f"landing_{event}"},
        )
    )
    defaults = dict(
        store.rows(
            "SELECT name, default_expression FROM system.columns WHERE database = {d:String} AND table = {t:String}",
            {"d": store.database, "t": f"landing_{event}"},
        )
    )
    for field in codec.current(event).definition["fields"]:  # type: ignore[arg-type]
        name = field["name"]
        assert name in types, f"landing_{event} lacks {name}"
        if "default" not in field:
            continue
        expression = defaults[name] or f"defaultValueOfTypeName('{types[name]}')"
        [(value,)] = store.rows(f"SELECT toString({expression})".replace("'", "'"))
        expected = {"false": "0", "{}": "{}", "[]": "[]"}.get(json.dumps(field["default"]), str(field["default"]))
        assert value in (expected, json.dumps(field["default"])), (name, value, expected)
