"""Identities that any process computes alone: experiment ids, run ids, writers and versions (DESIGN 3.3)."""

from __future__ import annotations

import hashlib
import secrets
import time
from typing import Final, NamedTuple

DEFAULT_EXPERIMENT_ID: Final = "0"
DEFAULT_EXPERIMENT_NAME: Final = "Default"


class Version(NamedTuple):
    """Order of competing facts: the larger tuple wins for tags and state, the smaller for params and starts.

    The store packs it as `time_ms << 64 | seq << 32 | (writer & 0xFFFFFFFF)` in a UInt128.
    """

    time_ms: int
    seq: int
    writer: int

    def packed(self) -> int:
        """The UInt128 that the store compares; `seq` and `writer` contribute their low 32 bits."""
        return self.time_ms << 64 | (self.seq & 0xFFFFFFFF) << 32 | (self.writer & 0xFFFFFFFF)

    @classmethod
    def unpacked(cls, packed: int) -> Version:
        """The inverse of `packed` (the writer's high bits are gone)."""
        return cls(packed >> 64, packed >> 32 & 0xFFFFFFFF, packed & 0xFFFFFFFF)


def experiment_id(name: str) -> str:
    """The id of the experiment called `name`: the decimal of a 60-bit hash, or "0" for Default."""
    if name == DEFAULT_EXPERIMENT_NAME:
        return DEFAULT_EXPERIMENT_ID
    digest = hashlib.blake2b(name.encode("utf-8"), digest_size=8, person=b"experiment").digest()
    return str((int.from_bytes(digest, "big") >> 4) or 1)


def new_run_id(experiment_id: str) -> str:
    """A new run id: 8 hex digits from the experiment id, so that its runs lie together, and 24 random ones."""
    prefix = hashlib.blake2b(experiment_id.encode("utf-8"), digest_size=4).hexdigest()
    return prefix + secrets.token_hex(12)


def new_writer() -> int:
    """A random positive 63-bit number that names one journal."""
    return secrets.randbits(62) | 1 << 62


def now_ms() -> int:
    """Wall-clock UTC milliseconds."""
    return time.time_ns() // 1_000_000


def version_after(previous: Version | None, seq: int, writer: int) -> Version:
    """A version for a fact whose writer has read `previous`: now, or just after `previous` if clocks disagree."""
    now = Version(now_ms(), seq, writer)
    if previous is None or now.packed() > previous.packed():
        return now
    return Version(previous.time_ms, previous.seq + 1, writer)
