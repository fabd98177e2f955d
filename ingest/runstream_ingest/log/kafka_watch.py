"""Watches that the topics are the ones that were read before: a topic that is deleted or made anew is noticed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from runstream_schemas.kafka_address import KafkaAddress, open_client

from . import LogError

__all__ = ["TopicWatch"]

_log = logging.getLogger(__name__)

CHECK_SECONDS: Final = 5.0
MISSING_SECONDS: Final = 12.0
"""A broker that has just started may not know a topic for a moment."""


class TopicWatch:
    """Asks the brokers for the topics' identities, in a thread of its own, so that no poll waits for it."""

    def __init__(self, address: KafkaAddress, options: Mapping[str, Any], topics: Sequence[str]) -> None:
        self._address = address
        self._options = options
        self._topics = list(topics)
        self._identities: dict[str, str] = {}
        self._missing_since: dict[str, float] = {}
        self.looked = False
        """Whether the brokers have been asked successfully."""
        self._failure: LogError | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def check(self) -> None:
        """Raise what was noticed; starts the watch at the first call.

        Raises:
            LogError: a topic is gone, or is another one of the same name.
        """
        if self._thread is None and not self._stop.is_set():
            self._thread = threading.Thread(target=self._run, name="runstream-topics", daemon=True)
            self._thread.start()
        if self._failure is not None:
            raise self._failure

    def identity(self, topic: str) -> str:
        """The topic's id as text; empty while unknown."""
        return self._identities.get(topic, "")

    def same_topic(self, topic: str, remembered: str) -> None:
        """Compare with what a commit remembered.

        Raises:
            LogError: another topic of the same name.
        """
        now = self.identity(topic)
        if remembered and now and remembered != now:
            raise self._recreated(topic)

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(10.0)

    def _run(self) -> None:
        admin = None
        while not self._stop.is_set():
            try:
                if admin is None:
                    from kafka import KafkaAdminClient

                    admin = open_client(
                        KafkaAdminClient,
                        bootstrap_servers=list(self._address.brokers),
                        client_id="runstream-topics",
                        bootstrap_timeout_ms=3_000,
                        request_timeout_ms=5_000,
                        reconnect_backoff_max_ms=1_000,
                        **self._options,
                    )
                self._look(admin.describe_topics(self._topics))
            except LogError as exc:
                self._failure = exc
                break
            except Exception as exc:  # away: the consumer says so
                _log.debug("topics cannot be described: %s", type(exc).__name__)
                self._missing_since.clear()
                if admin is not None:
                    admin.close()
                    admin = None
            self._stop.wait(CHECK_SECONDS if admin is not None else 0.5)
        if admin is not None:
            admin.close()

    def _look(self, described: Sequence[Mapping[str, Any]]) -> None:
        from kafka import errors

        now = time.monotonic()
        for found in described:
            name = found["name"]
            error = errors.for_code(found["error_code"])
            if error is errors.UnknownTopicOrPartitionError:
                since = self._missing_since.setdefault(name, now)
                if now - since >= MISSING_SECONDS:
                    what = "was deleted" if name in self._identities else "does not exist: run `runstream migrate`"
                    raise LogError(f"topic {name} at {self._address} {what}")
                continue
            self._missing_since.pop(name, None)
            if error is not errors.NoError:
                continue
            identity = str(found.get("topic_id") or "")
            known = self._identities.setdefault(name, identity)
            if known != identity:
                raise self._recreated(name)
        self.looked = True

    def _recreated(self, topic: str) -> LogError:
        return LogError(
            f"topic {topic} was deleted and made anew: its offsets are not those that this store was filled from. Use "
            "`runstream rebuild`, or another database and so another consumer group"
        )
