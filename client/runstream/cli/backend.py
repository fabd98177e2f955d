"""The worker's side of a tracking address, for the commands of who runs the store: its store and its dead letters."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .failure import ExitCode, Failure, need

if TYPE_CHECKING:
    from runstream_ingest.config import IngestSettings
    from runstream_ingest.dead_letter import DeadLetters
    from runstream_ingest.store import ClickHouseStore, StoreAddress

    from .session import Session

__all__ = ["dead_letters_of", "ingest_settings", "store_address", "store_of"]


def ingest_settings(session: Session) -> IngestSettings:
    """The worker's settings for the session's address."""
    with need("server"):
        from runstream_ingest.config import load

    return load({**os.environ, "RUNSTREAM_TRACKING_URI": session.settings.tracking_uri})


def store_address(session: Session) -> StoreAddress:
    """Where the worker's store is, with the right to write; a data directory's local store process is started."""
    with need("server"):
        from runstream_ingest.store import StoreAddress

    from runstream_schemas.layout import WRITER, ServerAddress
    from runstream_schemas.names import DATABASE

    settings = session.settings
    directory = settings.data_directory
    if directory is None:
        _only_kafka(session)
        return ingest_settings(session).store_address()
    session.sql("SELECT 1")  # starts the local store process where none is there
    address = ServerAddress.read(directory.server_file)
    if address is None:
        raise Failure(f"the local store process of {directory.root} is gone; try again", ExitCode.UNAVAILABLE)
    return StoreAddress(address.host, address.port, WRITER, address.writer_token, DATABASE)


@contextmanager
def store_of(session: Session) -> Iterator[ClickHouseStore]:
    """The worker's store, open."""
    address = store_address(session)
    from runstream_ingest.store import connect

    store = connect(address)
    try:
        yield store
    finally:
        store.close()


@contextmanager
def dead_letters_of(session: Session) -> Iterator[DeadLetters]:
    """The dead letters of the session's log, open."""
    with need("server"):
        from runstream_ingest.dead_letter import DirectoryDeadLetters

    directory = session.settings.data_directory
    letters: DeadLetters
    if directory is not None:
        letters = DirectoryDeadLetters(directory.log)
    else:
        _only_kafka(session)
        from runstream_ingest.log.kafka_dead_letters import KafkaDeadLetters
        from runstream_schemas.kafka_address import KafkaSecurity

        security = KafkaSecurity.from_environment(os.environ)
        letters = KafkaDeadLetters(ingest_settings(session).kafka_address(), security)
    try:
        yield letters
    finally:
        letters.close()


def _only_kafka(session: Session) -> None:
    settings = session.settings
    if settings.scheme != "kafka":
        raise Failure(
            f"{settings.tracking_uri} is looked after by its server; run this where the worker runs", ExitCode.USAGE
        )
