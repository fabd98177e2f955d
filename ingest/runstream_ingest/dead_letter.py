"""Dead letters: bodies that can never be stored, kept with the reason and where they came from.

`DeadLetters` is the seam; the directory version lies beside the log it serves, the Kafka version is
`log/kafka_dead_letters.py`. Which bodies are dead is decided in `commit.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from runstream_schemas.names import Stream

__all__ = ["DeadLetter", "DeadLetters", "Source"]


@dataclass(frozen=True, slots=True, order=True)
class Source:
    """Where a refused record lay in the log. Identifies its dead letter: a replayed worker may write it twice."""

    stream: Stream
    partition: int
    offset: int
    time_ms: int
    """The record's own log time, UTC milliseconds."""

    def __str__(self) -> str:
        return f"{self.stream}/{self.partition}/{self.offset}/{self.time_ms}"

    @classmethod
    def parse(cls, text: str) -> Source:
        """The inverse of `str`.

        Raises:
            ValueError: not such a text.
        """
        stream, partition, offset, time_ms = text.split("/")
        if stream not in ("control", "metrics"):
            raise ValueError(f"unknown stream {stream!r}")
        return cls("control" if stream == "control" else "metrics", int(partition), int(offset), int(time_ms))


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One refused record, whole."""

    source: Source
    next_offset: int
    """Behind the record, or behind the unreadable range."""
    reason: str
    key: bytes | None = None
    fingerprint: bytes | None = None
    body: bytes | None = None
    """None: the record had no value, or the range could not be read."""
    replayed: bool = False
    """Set on reading: its data reached the store later."""


class DeadLetters(Protocol):
    """Keeps dead letters. Called by one thread."""

    def put(self, letters: Sequence[DeadLetter]) -> None:
        """Keep `letters`; returns once they are as durable as the log itself. The same letter again is no error.

        Raises:
            OSError or an IngestError: none or some were kept; put all of them again.
        """
        ...

    def letters(self) -> Iterator[DeadLetter]:
        """Every letter once (per source), oldest first, with `replayed` as marked."""
        ...

    def mark_replayed(self, sources: Sequence[Source]) -> None:
        """Remember that these letters' data reached the store."""
        ...

    def close(self) -> None: ...
