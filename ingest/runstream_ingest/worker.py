"""The worker: poll, frame, insert, remember positions, commit; it knows nothing of events.

log thread (the caller of `run`)                       insert thread
poll -> classify -> open batch -> closed batches ->   insert, dead letters, ingest_positions -> commit queue
"""

from __future__ import annotations

import threading
from typing import Protocol

__all__ = ["Worker"]


class Worker(Protocol):
    """Interface note, replaced by the class of the same name.

        Worker(log: EventLog, store: Store, dead_letters: DeadLetters, settings: WorkerSettings = WorkerSettings())

    The store given is used by the worker's insert thread alone once `run` is called.
    """

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set, then drain what was polled, commit and return. Blocks.

        Raises:
            SystemicFailure: everything fails; nothing of the failing batch was committed.
            LogError: the log is not what it was.
        """
        ...

    def positions(self) -> dict[tuple[str, int], int]:
        """Next offsets whose rows are in the store, as this worker knows them; any thread may call."""
        ...

    def caught_up(self) -> bool:
        """Whether everything that was in the log at the last look is in the store; any thread may call."""
        ...
