"""Recognises who sends a request: tokens, passwords and browser sessions, against a file that is followed.

Reading the file at every change makes a revocation effective within half a second, in every server process.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from . import session
from .auth import MAX_PASSWORD_CHARS, AuthFile, AuthFileError, User, hash_password, hash_token, password_fits
from .principal import Principal
from .session import Revoked, Session
from .throttle import Throttle

logger = logging.getLogger("runstream.server")
_REMEMBERED_SECONDS: Final = 60.0
_MAX_REMEMBERED: Final = 1_000
_CHECK_FILE_SECONDS: Final = 0.5
MAX_WAITING_CHECKS: Final = 64
"""Password checks waiting or running at once; each takes about 40 ms of CPU."""


class TooManyTriesError(Exception):
    """The password was not looked at: wait first."""

    def __init__(self, retry_after_seconds: float) -> None:
        super().__init__("Too many failed log-ins: wait before the next one.")
        self.retry_after_seconds = max(1, int(retry_after_seconds + 0.999))


class Authenticator:
    """Recognises requests. `None` as file: authentication is off and everybody may do everything.

    Used on the event loop; password checks run in a thread of its own, and no more than `MAX_WAITING_CHECKS` wait.
    """

    def __init__(self, path: Path | None, on_change: Callable[[str], None] = lambda change: None) -> None:
        """
        Args:
            on_change: told of each change of the file that is noticed, in words without secrets.
        """
        self.path = path
        self._on_change = on_change
        self._content: AuthFile | None = None
        self._stamp: tuple[int, int, int] | None = None
        self._checked_at = 0.0
        self._users: Mapping[str, User] = {}
        self._tokens: Mapping[str, Principal] = {}
        self._session_key = b""
        self._remembered: OrderedDict[bytes, tuple[float, Principal]] = OrderedDict()
        self._refused: OrderedDict[bytes, float] = OrderedDict()
        """Credentials found wrong lately: sending the same again is no new guess, and costs no hashing."""
        self._key = secrets.token_bytes(32)
        self._waiting_checks = 0
        self._checks = ThreadPoolExecutor(1, thread_name_prefix="runstream-password")
        self.throttle = Throttle()
        if path is not None:
            self._reload(path)
            if not self._session_key:
                with contextlib.suppress(AuthFileError, OSError):
                    AuthFile.change(path, lambda content: None)  # saving adds the key
                self._reload(path)
        self._revoked = None if path is None else Revoked(path.with_name(f".{path.name}.signed-out"))

    @property
    def enabled(self) -> bool:
        """Whether requests must authenticate."""
        return self.path is not None

    def close(self) -> None:
        """End the checking thread."""
        self._checks.shutdown(wait=False, cancel_futures=True)

    def _reload(self, path: Path) -> None:
        stat = path.stat()
        content = AuthFile.load(path)
        changes = [] if self._content is None else content.changes_since(self._content)
        self._content = content
        self._users = content.users
        self._tokens = {token.sha256: token.principal() for token in content.tokens.values()}
        self._session_key = content.session_key.encode()
        self._remembered.clear()
        self._refused.clear()
        self._stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        for change in changes:
            self._on_change(change)

    def follow_file(self, *, now: bool = False) -> None:
        """Read the file again if it has changed; looks at most twice a second unless `now`."""
        at = time.monotonic()
        if self.path is None or (not now and at - self._checked_at < _CHECK_FILE_SECONDS):
            return
        self._checked_at = at
        try:
            stat = self.path.stat()
            if (stat.st_mtime_ns, stat.st_size, stat.st_ino) != self._stamp:
                self._reload(self.path)
                logger.info("%s has changed: users and tokens are read again", self.path)
        except (OSError, AuthFileError) as exc:
            # A file that has gone or is damaged lets nobody in.
            if self._stamp is not None or self._users or self._tokens:
                logger.error("nobody can authenticate: %s", exc)
            self._users, self._tokens, self._session_key, self._stamp = {}, {}, b"", None
            self._remembered.clear()
            self._refused.clear()

    # headers

    def known(self, header: str) -> Principal | None:
        """The principal of an Authorization header, without slow work: tokens, and passwords checked lately."""
        self.follow_file()
        scheme, _, value = header.partition(" ")
        if scheme.lower() == "bearer":
            return self._tokens.get(hash_token(value.strip()))
        if scheme.lower() != "basic":
            return None
        found = self._remembered.get(self._mark(value))
        return found[1] if found is not None and time.monotonic() - found[0] < _REMEMBERED_SECONDS else None

    async def check_basic(self, header: str, address: str) -> Principal | None:
        """The principal of a Basic header, by its password; a token may stand for it.

        Raises:
            TooManyTriesError: too many wrong passwords came for this name from this address.
        """
        scheme, _, value = header.partition(" ")
        if scheme.lower() != "basic":
            return None
        try:
            name, colon, password = base64.b64decode(value.strip(), validate=True).decode("utf-8").partition(":")
        except (ValueError, binascii.Error):
            return None
        if not colon:
            return None
        by_token = self._tokens.get(hash_token(password))
        if by_token is not None:
            return by_token
        mark = self._mark(value)
        refused_at = self._refused.get(mark)
        if refused_at is not None and time.monotonic() - refused_at < _REMEMBERED_SECONDS:
            return None
        principal = await self.check_password(name, password, address)
        if principal is None:
            self._refused[mark] = time.monotonic()
            if len(self._refused) > _MAX_REMEMBERED:
                self._refused.popitem(last=False)
        else:
            self._remembered[mark] = (time.monotonic(), principal)
            if len(self._remembered) > _MAX_REMEMBERED:
                self._remembered.popitem(last=False)
        return principal

    async def check_password(self, name: str, password: str, address: str) -> Principal | None:
        """The user `name`, if that is their password.

        Raises:
            TooManyTriesError: see `check_basic`; also where too many checks are waiting already.
        """
        self.follow_file()
        wait = self.throttle.wait_seconds(name, address)
        if wait > 0:
            raise TooManyTriesError(wait)
        if self._waiting_checks >= MAX_WAITING_CHECKS:
            raise TooManyTriesError(1.0)
        if len(password) > MAX_PASSWORD_CHARS:
            return None
        user = self._users.get(name)
        # An unknown name costs as much as a wrong password, so that names cannot be told apart by time.
        kept = user.password if user is not None else _NOBODY
        self._waiting_checks += 1
        self.throttle.failed(name, address)  # before the check: tries at the same moment count too
        try:
            fits = await asyncio.get_running_loop().run_in_executor(self._checks, password_fits, password, kept)
        finally:
            self._waiting_checks -= 1
        if user is None or not fits:
            return None
        self.throttle.succeeded(name, address)
        return user.principal(name)

    def _mark(self, value: str) -> bytes:
        return hmac.digest(self._key, value.strip().encode("latin-1", "replace"), "sha256")

    # sessions

    def _signing_key(self, user: User) -> bytes:
        # The password's hash is part of the key, so that another password ends the sessions.
        return hmac.digest(self._session_key, user.password.encode(), "sha256")

    def open_session(self, name: str) -> str:
        """The cookie of a new session of the user `name`, who has just given their password."""
        return session.sign(Session.new(name), self._signing_key(self._users[name]))

    def session_of(self, cookie: str) -> tuple[Principal, Session] | None:
        """Who owns the session in `cookie`; None if it is not ours, over, signed out, or the user has changed."""
        self.follow_file()
        name = session.name_in(cookie)
        user = None if name is None else self._users.get(name)
        if user is None or name is None or not self._session_key:
            return None
        found = session.verify(cookie, self._signing_key(user))
        if found is None or (self._revoked is not None and self._revoked.has(found)):
            return None
        return user.principal(name), found

    def renewed(self, found: Session) -> str | None:
        """The same session's next cookie, where it is time for one."""
        user = self._users.get(found.name)
        return None if user is None or not found.due() else session.sign(found.renewed(), self._signing_key(user))

    def close_session(self, found: Session) -> None:
        """Sign out: the cookie is refused from now on, in all processes within half a second."""
        if self._revoked is not None:
            self._revoked.add(found)

    def sign_form(self, nonce: str) -> str:
        """Binds the log-in form to the browser that was given `nonce`."""
        return hmac.new(self._session_key or self._key, b"form " + nonce.encode(), "sha256").hexdigest()


_NOBODY: Final = hash_password(secrets.token_hex(16))
