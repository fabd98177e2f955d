"""Stores for tests of the SQL schema."""

from tests.services.stores import chdb, empty_store, store

__all__ = ["chdb", "empty_store", "store"]
