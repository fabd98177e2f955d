"""Migrations: applied once, repeatable, safe side by side, clear about what does not fit; the Replicated form."""

from __future__ import annotations

import re
import threading

import pytest

from runstream_ingest import migration as module
from runstream_ingest.errors import DatabaseMissing, MigrationError, NewerDatabase
from runstream_ingest.migration import Migration, applied, check, migrate, migrations, statements
from runstream_ingest.store import Store, StoreAddress, StoreError
from tests.services.chdb_process import ChdbProcess


def test_each_is_applied_once(empty_store: Store) -> None:
    """The first call applies all, in order, and records them; later calls do nothing."""
    known = migrations()
    assert migrate(empty_store) == known
    assert applied(empty_store) == {one.version: one.checksum for one in known}
    assert migrate(empty_store) == []
    check(empty_store)


def test_migrators_at_once_and_again_do_no_harm(chdb: ChdbProcess, empty_store: Store) -> None:
    """Several at the same time, and one that was killed before it recorded anything."""
    others = [chdb.store(empty_store.database) for _ in range(3)]
    failures: list[BaseException] = []

    def run(store: Store) -> None:
        try:
            migrate(store)
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=run, args=(store,)) for store in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    empty_store.execute("TRUNCATE TABLE schema_migrations")
    assert migrate(empty_store) == migrations()
    assert empty_store.rows("SELECT experiment_id, name FROM experiments") == [("0", "Default")]
    for store in others:
        store.close()


def test_a_database_of_a_newer_runstream_is_refused(store: Store) -> None:
    """With both numbers and the remedy; nothing is changed."""
    newest = migrations()[-1].version
    store.execute(
        f"INSERT INTO schema_migrations (version, name, checksum, applied_at) SELECT {newest + 3}, 'x', 'y', now64(3)"
    )
    for call in (migrate, check):
        with pytest.raises(
            NewerDatabase, match=rf"is at migration {newest + 3}, this runstream knows {newest}.*upgrade"
        ):
            call(store)


def test_an_edited_migration_is_found_out(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checksum of what was applied must be that of the file."""
    known = list(migrations())
    known[1] = Migration(known[1].version, known[1].name, known[1].sql + "\n-- edited")
    monkeypatch.setattr(module, "migrations", lambda: known)
    with pytest.raises(MigrationError, match=r"migration 2 \(landing\) was applied with another text"):
        migrate(store)


def test_a_missing_database_says_what_to_run(empty_store: Store) -> None:
    """A worker that starts before `migrate` tells so."""
    with pytest.raises(
        DatabaseMissing, match=f"is at migration 0 of {migrations()[-1].version}: run `runstream migrate`"
    ):
        check(empty_store)


def test_a_failing_statement_is_named(empty_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """With number, name and first line; what came before it stays applied."""
    good = Migration(1, "good", "CREATE TABLE IF NOT EXISTS a (x Int8) ENGINE = MergeTree ORDER BY x;")
    monkeypatch.setattr(module, "migrations", lambda: [good, Migration(2, "bad", "CREATE TABEL b;\n")])
    with pytest.raises(MigrationError, match=r"migration 2 \(bad\) failed at `CREATE TABEL b`"):
        migrate(empty_store)
    assert set(applied(empty_store)) == {1}


REPEATABLE = re.compile(
    r"CREATE TABLE IF NOT EXISTS |CREATE MATERIALIZED VIEW IF NOT EXISTS |CREATE OR REPLACE VIEW |"
    r"INSERT INTO (experiment_facts|settings|rollup_by_key) |"
    r"ALTER TABLE \w+\s+(ADD COLUMN IF NOT EXISTS|MODIFY COLUMN)|DROP \w+ IF EXISTS "
)


def test_every_statement_may_be_repeated() -> None:
    """The rule that makes migrators at once safe."""
    for migration in migrations():
        found = list(statements(migration.sql))
        assert found
        for statement in found:
            assert REPEATABLE.match(statement), statement.splitlines()[0]


def test_the_replicated_form_is_complete_and_parses(empty_store: Store) -> None:
    """Every MergeTree becomes its Replicated kind with a path and a replica; the engine parses all of it."""
    plain = [one for migration in migrations() for one in statements(migration.sql)]
    replicated = [one for migration in migrations() for one in statements(migration.sql, "Replicated", "main")]
    assert len(plain) == len(replicated)
    tables = [one for one in plain if re.search(r"ENGINE = \w*MergeTree", one)]
    assert len(tables) > 10
    for statement in replicated:
        engine = re.search(r"ENGINE = (\w*MergeTree)(\(.*?\))?\s", statement + "\n")
        if engine is not None:
            assert engine[1].startswith("Replicated")
            assert (engine[2] or "").startswith("('/clickhouse/tables/{uuid}/{shard}', '{replica}'")
        if statement.startswith("CREATE"):
            assert "ON CLUSTER 'main'" in statement.splitlines()[0]
        if not statement.startswith("INSERT"):
            assert empty_store.rows(f"EXPLAIN AST {statement}")
    settings = next(one for one in replicated if "TABLE IF NOT EXISTS settings" in one)
    assert "ReplicatedReplacingMergeTree('/clickhouse/tables/{uuid}/{shard}', '{replica}', updated_at)" in settings


def test_the_replicated_form_creates_what_the_plain_one_does(empty_store: Store) -> None:
    """The engine's own formatter agrees that only engine and cluster differ."""
    for migration in migrations():
        for plain, replicated in zip(
            statements(migration.sql), statements(migration.sql, "Replicated", "main"), strict=True
        ):
            if plain.startswith("INSERT"):
                continue
            [(left,)] = empty_store.rows("SELECT formatQuerySingleLine({q:String})", {"q": plain})
            [(right,)] = empty_store.rows("SELECT formatQuerySingleLine({q:String})", {"q": replicated})
            right = right.replace(" ON CLUSTER main", "").replace(" ON CLUSTER 'main'", "")
            right = re.sub(r"Replicated(\w*MergeTree)\('[^']*', '[^']*'(, )?(.*?)\)", _without_path, right)
            assert right == left


def _without_path(match: re.Match[str]) -> str:
    return f"{match[1]}({match[3]})" if match[3] else match[1]


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("clickhouse://h", StoreAddress("h", 8123)),
        ("clickhouse://u:p%40ss@h:9/db", StoreAddress("h", 9, "u", "p@ss", "db")),
        ("clickhouse://u@h/db?secure=true", StoreAddress("h", 8443, "u", "", "db", True)),
        (
            "clickhouse://h/?secure=1&verify=no&ca_cert=/x.pem",
            StoreAddress("h", 8443, secure=True, ca_cert="/x.pem", verify=False),
        ),
    ],
)
def test_store_addresses(uri: str, expected: StoreAddress) -> None:
    """Host, port, user, password, database and options."""
    assert StoreAddress.parse(uri) == expected


@pytest.mark.parametrize(
    "uri",
    [
        "http://u:secret@h",
        "clickhouse://",
        "clickhouse://u:secret@h:x/db",
        "clickhouse://u:secret@h?what=1",
        "clickhouse://u:secret@h?secure=maybe",
    ],
)
def test_wrong_store_addresses_tell_no_secret(uri: str) -> None:
    """The message says what is wrong and how it should look."""
    with pytest.raises(ValueError) as caught:
        StoreAddress.parse(uri)
    assert "secret" not in str(caught.value)
    assert isinstance(caught.value, (ValueError, StoreError))
