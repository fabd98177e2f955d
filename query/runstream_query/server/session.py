"""Browser sessions: a signed cookie that any server process can check, with an idle and an absolute end.

The cookie holds the user's name, a random id, and when the session began and was last renewed; the signature's key
comes from the caller. Nothing is kept on the server but the ids of sessions that were signed out before their end.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import hmac
import json
import logging
import os
import secrets
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

logger = logging.getLogger("runstream.server")
IDLE_SECONDS: Final = 12 * 3600
"""A session that sends nothing for so long is over."""
ABSOLUTE_SECONDS: Final = 7 * 24 * 3600
"""A session is over so long after the password was given, whatever it sends."""
RENEW_SECONDS: Final = 300
_CHECK_FILE_SECONDS: Final = 0.5
_MAX_COOKIE_CHARS: Final = 1_000


@dataclass(frozen=True, slots=True)
class Session:
    """One browser's session."""

    name: str
    id: str
    began_at: int
    """UTC seconds, like the other times here."""
    seen_at: int

    @classmethod
    def new(cls, name: str) -> Session:
        """A session that begins now."""
        now = int(time.time())
        return cls(name, secrets.token_hex(16), now, now)

    def due(self) -> bool:
        """Whether the cookie should be renewed."""
        return time.time() - self.seen_at > RENEW_SECONDS

    def renewed(self) -> Session:
        """This session, seen now."""
        return replace(self, seen_at=int(time.time()))

    @property
    def ends_at(self) -> int:
        """When no cookie of this session can be taken any more."""
        return self.began_at + ABSOLUTE_SECONDS

    def over(self) -> bool:
        """Whether its time has passed (or it comes from the future)."""
        now = time.time()
        return not (self.began_at - 60 <= now < self.ends_at and self.seen_at - 60 <= now < self.seen_at + IDLE_SECONDS)


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode("ascii").rstrip("=")


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def sign(session: Session, key: bytes) -> str:
    """The cookie of `session`."""
    body = _encode(json.dumps([session.name, session.id, session.began_at, session.seen_at]).encode())
    return f"{body}.{_encode(hmac.digest(key, body.encode(), 'sha256'))}"


def _content(cookie: str) -> Session | None:
    try:
        if len(cookie) > _MAX_COOKIE_CHARS or not cookie.isascii():
            return None
        name, identity, began, seen = json.loads(_decode(cookie.partition(".")[0]))
    except (ValueError, TypeError, RecursionError, binascii.Error):
        return None
    if type(name) is str and type(identity) is str and type(began) is int and type(seen) is int:
        return Session(name, identity, began, seen)
    return None


def name_in(cookie: str) -> str | None:
    """The name that a cookie claims; believe it only after `verify`."""
    found = _content(cookie)
    return None if found is None else found.name


def verify(cookie: str, key: bytes) -> Session | None:
    """The session of a cookie that was signed with `key` and is not over."""
    body, _, signature = cookie.partition(".")
    expected = _encode(hmac.digest(key, body.encode("utf-8", "replace"), "sha256"))
    if not hmac.compare_digest(signature.encode("utf-8", "replace"), expected.encode()):
        return None
    found = _content(cookie)
    return None if found is None or found.over() else found


class Revoked:
    """Ids of sessions that were signed out, in a small file beside the users: all processes read it as it grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ends: dict[str, int] = {}
        self._stamp: tuple[int, int] | None = None
        self._checked_at = 0.0

    def has(self, session: Session) -> bool:
        """Whether this session was signed out; by another process: noticed within half a second."""
        now = time.monotonic()
        if now - self._checked_at >= _CHECK_FILE_SECONDS:
            self._checked_at = now
            self._read()
        return session.id in self._ends

    def _read(self) -> None:
        try:
            stat = self._path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size)
            if stamp == self._stamp:
                return
            lines = self._path.read_text(encoding="ascii", errors="replace").splitlines()
        except FileNotFoundError:
            return
        now = time.time()
        for line in lines:
            identity, _, ends = line.partition(" ")
            if ends.isdecimal() and int(ends) > now:
                self._ends[identity] = int(ends)
        self._ends = {identity: ends for identity, ends in self._ends.items() if ends > now}
        self._stamp = stamp

    def add(self, session: Session) -> None:
        """Refuse this session until its end. Where the file cannot be written, in this process only; that is logged."""
        self._ends[session.id] = session.ends_at
        try:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                self._read()
                kept = "".join(f"{identity} {ends}\n" for identity, ends in self._ends.items()).encode("ascii")
                os.ftruncate(handle, 0)
                os.write(handle, kept)
            finally:
                os.close(handle)
        except OSError as exc:
            logger.warning("a session is signed out in this process only: %s", exc)
