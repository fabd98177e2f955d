"""The error tree of the ingest side.

IngestError (RuntimeError)
  StoreError               the store refused a statement; has `code`
    StoreBusy              transient: pause and retry the same batch
  MigrationError           the database is not what the migrations say
    NewerDatabase          a newer runstream wrote it
    DatabaseMissing        it was never migrated
  SystemicFailure          everything fails: stop loudly, dead-letter nothing
  RebuildError             a rebuild cannot be exact; nothing was swapped
  SettingsError (ValueError)  a setting is missing or wrong
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "DatabaseMissing",
    "IngestError",
    "MigrationError",
    "NewerDatabase",
    "RebuildError",
    "SettingsError",
    "StoreBusy",
    "StoreError",
    "SystemicFailure",
    "store_error",
]

TRANSIENT_CODES: Final = frozenset(
    {
        3,  # UNEXPECTED_END_OF_FILE of a connection
        159,  # TIMEOUT_EXCEEDED
        164,  # READONLY (a replica in recovery, a server shutting down)
        198,  # DNS_ERROR
        202,  # TOO_MANY_SIMULTANEOUS_QUERIES
        203,  # NO_FREE_CONNECTION
        209,  # SOCKET_TIMEOUT
        210,  # NETWORK_ERROR
        236,  # ABORTED
        241,  # MEMORY_LIMIT_EXCEEDED
        242,  # TABLE_IS_READ_ONLY
        243,  # NOT_ENOUGH_SPACE
        252,  # TOO_MANY_PARTS
        285,  # TOO_FEW_LIVE_REPLICAS
        286,  # UNSATISFIED_QUORUM_FOR_PREVIOUS_WRITE
        319,  # UNKNOWN_STATUS_OF_INSERT
        394,  # QUERY_WAS_CANCELLED
        425,  # SYSTEM_ERROR
        734,  # QUERY_WAS_CANCELLED_BY_CLIENT
        999,  # KEEPER_EXCEPTION
    }
)
"""ClickHouse error codes that say nothing about the data: the same insert may succeed later."""

SYSTEMIC_CODES: Final = frozenset(
    {
        16,  # NO_SUCH_COLUMN_IN_TABLE
        20,  # NUMBER_OF_COLUMNS_DOESNT_MATCH
        47,  # UNKNOWN_IDENTIFIER
        60,  # UNKNOWN_TABLE
        73,  # UNKNOWN_FORMAT
        81,  # UNKNOWN_DATABASE
        115,  # UNKNOWN_SETTING
        192,  # UNKNOWN_USER
        193,  # WRONG_PASSWORD
        194,  # REQUIRED_PASSWORD
        497,  # ACCESS_DENIED
        516,  # AUTHENTICATION_FAILED
        598,  # UNKNOWN_CODEC
    }
)
"""ClickHouse error codes that blame the database or the account, never one body."""


class IngestError(RuntimeError):
    """Root of everything this package raises on purpose."""


class StoreError(IngestError):
    """The store refused a statement or an insert; the same again would be refused again."""

    def __init__(self, message: str, *, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        """ClickHouse's error code where the store told one."""

    @property
    def systemic(self) -> bool:
        """True where the error blames the database or the account, so that no body may be blamed for it."""
        return self.code in SYSTEMIC_CODES


class StoreBusy(StoreError):
    """The store is away, overloaded or full: the same call may succeed later."""


class MigrationError(IngestError):
    """The database does not hold what its record of migrations says."""


class NewerDatabase(MigrationError):
    """The database was migrated by a newer runstream."""

    def __init__(self, found: int, known: int) -> None:
        super().__init__(
            f"the database is at migration {found}, this runstream knows {known}: "
            "a newer runstream wrote it; upgrade with `pip install -U runstream`"
        )
        self.found = found
        self.known = known


class DatabaseMissing(MigrationError):
    """The database has no tables of ours, or not all of them."""

    def __init__(self, database: str, found: int, known: int) -> None:
        super().__init__(f"database {database!r} is at migration {found} of {known}: run `runstream migrate` first")
        self.found = found
        self.known = known


class SystemicFailure(IngestError):
    """Everything fails for one reason. The worker stops; nothing of the failing batch is dead-lettered or committed."""


class RebuildError(IngestError):
    """A rebuild cannot be exact; the database in use is untouched."""


class SettingsError(IngestError, ValueError):
    """A setting is missing or wrong."""


def store_error(message: str, code: int | None) -> StoreError:
    """The right error for what a ClickHouse engine said; `code` None means that the engine was not reached."""
    if code is None or code in TRANSIENT_CODES:
        return StoreBusy(message, code=code)
    return StoreError(message, code=code)
