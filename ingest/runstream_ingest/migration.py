"""Numbered SQL migrations: which there are, which a database has had, and bringing it up to date.

A migration is a file `NNNN_name.sql` in `runstream_schemas/sql`. Each is applied once; a released one is never edited.
Every statement must be repeatable (IF NOT EXISTS, OR REPLACE, or a row that merges away): two migrators at once, or one
killed halfway, then do no harm, which a lock in a database without transactions could not promise.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Final, Literal

from .errors import DatabaseMissing, MigrationError, NewerDatabase, StoreError
from .store import Store

__all__ = ["Engine", "Migration", "applied", "check", "migrate", "migrations", "statements"]

Engine = Literal["MergeTree", "Replicated"]

_FILE: Final = re.compile(r"(?P<version>\d{4})_(?P<name>\w+)\.sql")
_ENGINE: Final = re.compile(r"ENGINE = (?P<kind>\w*)MergeTree(?:\((?P<arguments>[^()]*)\))?")
_ON_CLUSTER: Final = re.compile(
    r"^(?P<head>CREATE (?:OR REPLACE )?(?:TABLE|VIEW|MATERIALIZED VIEW) (?:IF NOT EXISTS )?\w+|ALTER TABLE \w+)",
    re.MULTILINE,
)
_RECORD: Final = """CREATE TABLE IF NOT EXISTS schema_migrations
(
    version UInt32,
    name String,
    checksum String,
    applied_at DateTime64(3, 'UTC')
)
ENGINE = ReplacingMergeTree
ORDER BY version"""


@dataclass(frozen=True, slots=True)
class Migration:
    """One numbered file."""

    version: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        """SHA-256 of the text, hex."""
        return hashlib.sha256(self.sql.encode("utf-8")).hexdigest()


def migrations() -> Sequence[Migration]:
    """All migrations this runstream knows, in order.

    Raises:
        MigrationError: a number is missing or taken twice.
    """
    found: list[Migration] = []
    for file in files("runstream_schemas").joinpath("sql").iterdir():
        match = _FILE.fullmatch(file.name)
        if match is not None:
            found.append(Migration(int(match["version"]), match["name"], file.read_text(encoding="utf-8")))
    found.sort(key=lambda migration: migration.version)
    if [migration.version for migration in found] != list(range(1, len(found) + 1)):
        raise MigrationError(f"migrations are not numbered 1, 2, 3 ...: {[m.version for m in found]}")
    return found


def statements(sql: str, engine: Engine = "MergeTree", cluster: str | None = None) -> Iterator[str]:
    """The statements of one migration.

    Args:
        sql: text of a migration; statements end with `;` at the end of a line.
        engine: "Replicated" turns every MergeTree engine into its Replicated form, with the path
            `/clickhouse/tables/{uuid}/{shard}` and the replica `{replica}` (the server's own macros).
        cluster: name of the cluster on which every CREATE and ALTER runs (ON CLUSTER); None for one server.
    """
    for part in re.split(r";[ \t]*(?:\n|\Z)", sql):
        statement = "\n".join(line for line in part.splitlines() if not line.lstrip().startswith("--")).strip()
        if not statement:
            continue
        if engine == "Replicated":
            statement = _ENGINE.sub(_replicated, statement)
        if cluster is not None:
            statement = _ON_CLUSTER.sub(partial(_on_cluster, cluster), statement, count=1)
        yield statement


def _on_cluster(cluster: str, match: re.Match[str]) -> str:
    quoted = cluster.replace("\\", "\\\\").replace("'", "\\'")
    return f"{match['head']} ON CLUSTER '{quoted}'"


def _replicated(match: re.Match[str]) -> str:
    arguments = ["'/clickhouse/tables/{uuid}/{shard}'", "'{replica}'"]
    if match["arguments"]:
        arguments.append(match["arguments"])
    return f"ENGINE = Replicated{match['kind']}MergeTree({', '.join(arguments)})"


def applied(store: Store) -> dict[int, str]:
    """Checksum of every applied migration by version; empty for a database without ours."""
    if not store.rows(
        "SELECT name FROM system.tables WHERE database = {database:String} AND name = 'schema_migrations'",
        {"database": store.database},
    ):
        return {}
    return {
        int(version): str(checksum)
        for version, checksum in store.rows("SELECT version, checksum FROM schema_migrations FINAL ORDER BY version")
    }


def check(store: Store) -> None:
    """Make sure that the database is exactly at this runstream's migrations; changes nothing.

    Raises:
        NewerDatabase, DatabaseMissing, MigrationError: it is newer, older or was changed.
    """
    known = migrations()
    pending = _pending(store, known)
    if pending:
        raise DatabaseMissing(store.database, pending[0].version - 1, known[-1].version)


def migrate(store: Store, engine: Engine = "MergeTree", cluster: str | None = None) -> Sequence[Migration]:
    """Apply what is missing, in order; safe beside other migrators, and repeatable after a crash. The database exists.

    Returns:
        The migrations that this call applied; empty where the database was up to date.

    Raises:
        NewerDatabase: a newer runstream wrote the database; nothing was changed.
        MigrationError: an applied migration was edited, or a statement failed (named in the message).
    """
    known = migrations()
    pending = _pending(store, known)
    if not pending:
        return []
    for statement in statements(_RECORD, engine, cluster):
        store.execute(statement)
    for migration in pending:
        for statement in statements(migration.sql, engine, cluster):
            try:
                store.execute(statement)
            except StoreError as exc:
                head = statement.splitlines()[0][:120]
                raise MigrationError(
                    f"migration {migration.version} ({migration.name}) failed at `{head}`: {exc}"
                ) from exc
        store.execute(
            "INSERT INTO schema_migrations (version, name, checksum, applied_at) "
            "SELECT {version:UInt32}, {name:String}, {checksum:String}, now64(3, 'UTC')",
            {"version": migration.version, "name": migration.name, "checksum": migration.checksum},
        )
    return pending


def _pending(store: Store, known: Sequence[Migration]) -> Sequence[Migration]:
    found = applied(store)
    newest = max(found, default=0)
    if newest > known[-1].version:
        raise NewerDatabase(newest, known[-1].version)
    for migration in known:
        checksum = found.get(migration.version)
        if checksum is not None and checksum != migration.checksum:
            raise MigrationError(
                f"migration {migration.version} ({migration.name}) was applied with another text "
                f"(checksum {checksum[:12]}, now {migration.checksum[:12]}): an applied migration is never edited; "
                "`runstream rebuild` makes a new database"
            )
    return [migration for migration in known if migration.version not in found]
