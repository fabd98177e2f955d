"""Fixtures: stores for tests of ingest. Import them into a conftest; one chDB process serves a whole test session."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from runstream_ingest.migration import migrate
from runstream_ingest.store import Store, StoreAddress, connect
from tests.services.chdb_process import ChdbProcess

REAL = os.environ.get("RUNSTREAM_TEST_CLICKHOUSE", "")


@pytest.fixture(scope="session")
def chdb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChdbProcess]:
    """One engine for the session."""
    process = ChdbProcess(Path(tmp_path_factory.mktemp("chdb")))
    yield process
    process.close()


@pytest.fixture
def empty_store(chdb: ChdbProcess) -> Iterator[Store]:
    """A new database without tables."""
    store = chdb.store()
    yield store
    store.execute(f"DROP DATABASE IF EXISTS {store.database}")
    store.close()


@pytest.fixture
def store(empty_store: Store) -> Store:
    """A new database, migrated."""
    migrate(empty_store)
    return empty_store


def real_store(database: str | None = None) -> Store:
    """A database on the server of RUNSTREAM_TEST_CLICKHOUSE (clickhouse://user:password@host:port)."""
    address = StoreAddress.parse(REAL)
    name = database or f"test_{uuid.uuid4().hex[:12]}"
    return connect(
        StoreAddress(address.host, address.port, address.user, address.password, name, address.secure),
        create_database=True,
    )
