"""Stores for every test of ingest."""

from tests.services.stores import chdb, empty_store, store

__all__ = ["chdb", "empty_store", "store"]
