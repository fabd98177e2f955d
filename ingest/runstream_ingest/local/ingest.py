"""Ingest inside the local store process: the worker over the directory log, its life and its state."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import Final

from runstream_schemas.layout import DataDirectory
from runstream_schemas.names import Stream

from ..commit import read_positions
from ..dead_letter import DirectoryDeadLetters
from ..errors import StoreError
from ..log.directory import DirectoryLog, end_positions, remove_old_segments
from ..migration import migrate
from ..worker import Worker
from .engine import Engine
from .store import ChdbStore

__all__ = ["LocalIngest"]

logger = logging.getLogger(__name__)

_ARTIFACT_ROOT: Final = "RUNSTREAM_ARTIFACT_ROOT"
_RETENTION_SECONDS: Final = 60.0
"""How often old segments are looked for."""
_FIRST_RESTART_SECONDS: Final = 1.0
_MAX_RESTART_SECONDS: Final = 60.0


class LocalIngest:
    """Keeps one worker running. `prepare`, `start` and `stop` by one thread, the rest by any."""

    def __init__(self, engine: Engine, directory: DataDirectory) -> None:
        self._engine = engine
        self._directory = directory
        self._stop = threading.Event()
        self._worker: Worker | None = None
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._main, name="ingest", daemon=True)
        self._ends: Mapping[tuple[Stream, int], int] = {}
        self._active_at = time.monotonic()
        self._stored: Mapping[tuple[Stream, int], int] = {}

    def prepare(self) -> None:
        """Bring the database up to date and tell it where artifacts are.

        Raises:
            MigrationError: it was changed, or written by a newer runstream.
            StoreError: the engine refuses.
        """
        store = ChdbStore(self._engine)
        applied = migrate(store)
        if applied:
            logger.info("applied migrations up to %d (%s)", applied[-1].version, applied[-1].name)
        root = os.environ.get(_ARTIFACT_ROOT, "").rstrip("/") or f"file://{self._directory.artifacts}"
        known = store.rows("SELECT value FROM settings FINAL WHERE name = 'artifact_root'")
        if known != [(root,)]:
            store.execute(
                "INSERT INTO settings (name, value, updated_at) SELECT 'artifact_root', {root:String}, now64(3, 'UTC')",
                {"root": root},
            )

    def start(self) -> None:
        """Start the worker's threads."""
        self._thread.start()

    def stop(self) -> None:
        """Insert what was polled, and end; what is left is read again at the next start. Blocks for seconds at most."""
        self._stop.set()
        self._thread.join()

    def active_at(self) -> float:
        """Monotonic time when there was last something to ingest, or something appended."""
        ends = end_positions(self._directory.log)
        if ends != self._ends or (self._failure is None and not self._caught_up(ends)):
            self._ends = ends
            self._active_at = time.monotonic()
        return self._active_at

    def status(self) -> Mapping[str, object]:
        """What `/runstream/status` answers: state, positions and ends by "stream/partition", and trouble if any."""
        ends = end_positions(self._directory.log)
        worker = self._worker
        positions = dict(worker.positions()) if worker is not None else {}
        state = "ready" if self._caught_up(ends) else "catching-up" if worker is not None else "starting"
        trouble = self._failure or (worker.trouble() if worker is not None else None)
        return {
            "state": state,
            "positions": {f"{stream}/{part}": positions.get((stream, part), 0) for stream, part in ends},
            "end": {f"{stream}/{part}": at for (stream, part), at in ends.items()},
            "trouble": trouble,
        }

    def _caught_up(self, ends: Mapping[tuple[Stream, int], int]) -> bool:
        worker = self._worker
        if worker is None:
            return False
        positions = worker.positions()
        return all(positions.get(place, 0) >= end for place, end in ends.items())

    def _main(self) -> None:
        delay = _FIRST_RESTART_SECONDS
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                self._work()
            except Exception as exc:
                # Nothing of the failing batch was committed: the next worker reads it again. Reading goes on meanwhile.
                logger.exception("ingest failed; it starts again in %.0f s", delay)
                self._failure = f"ingest failed, it starts again by itself: {exc}"
            if time.monotonic() - began > _MAX_RESTART_SECONDS:
                delay = _FIRST_RESTART_SECONDS
            if self._stop.wait(delay):
                return
            delay = min(_MAX_RESTART_SECONDS, delay * 2)

    def _work(self) -> None:
        log = DirectoryLog(self._directory.log)
        try:
            dead_letters = DirectoryDeadLetters(self._directory.log)
            store = ChdbStore(self._engine)
            self._worker = Worker(log, store, dead_letters)
            self._failure = None
            keeper = threading.Thread(target=self._keep, name="retention", daemon=True)
            keeper.start()
            try:
                self._worker.run(self._stop)
            finally:
                dead_letters.close()
                store.close()
        finally:
            log.close()

    def _keep(self) -> None:
        """Remove segments that are stored, synced and old, while this worker runs."""
        worker = self._worker
        while not self._stop.wait(_RETENTION_SECONDS) and self._worker is worker and self._failure is None:
            try:
                positions = read_positions(ChdbStore(self._engine))
                removed = remove_old_segments(self._directory.log, positions, sync=os.sync)
                if removed:
                    logger.info("removed %d stored segments of the log", removed)
            except (OSError, StoreError) as exc:
                logger.warning("old segments stay: %s", exc)
