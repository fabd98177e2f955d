"""Who may do what: users and tokens with roles, kept hashed in one JSON file that is read again when it changes.

Passwords are hashed with scrypt, tokens (256 random bits) with SHA-256. Reading the file at every change makes a
revocation effective at the next request, in every server process.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final, Literal

Role = Literal["read", "write", "admin"]
ROLES: Final[tuple[Role, ...]] = ("read", "write", "admin")
"""Each may do what the ones before it may."""
TOKEN_PREFIX: Final = "rst_"
_SCRYPT: Final = {"n": 1 << 14, "r": 8, "p": 1}
_NAME = re.compile(r"[\w.@+-]{1,100}\Z")
MIN_PASSWORD_CHARS: Final = 12
_REMEMBERED_SECONDS: Final = 60.0
_MAX_REMEMBERED: Final = 1_000
_CHECK_FILE_SECONDS: Final = 0.5


class AuthFileError(ValueError):
    """The file of users and tokens is missing, damaged or would be wrong."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who sends a request."""

    name: str
    role: Role

    def may(self, role: Role) -> bool:
        """Whether this role includes `role`."""
        return ROLES.index(self.role) >= ROLES.index(role)


ANONYMOUS: Final = Principal("-", "admin")
"""Everybody, where authentication is off."""


@dataclass(slots=True)
class User:
    """A person with a password."""

    role: Role
    password: str = field(repr=False)
    """`scrypt$<salt>$<hash>`, both base64."""


@dataclass(slots=True)
class Token:
    """A program's credential."""

    name: str
    role: Role
    sha256: str = field(repr=False)
    created_at: int = 0
    """UTC milliseconds."""


def _scrypt(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(password.encode("utf-8", "surrogatepass"), salt=salt, maxmem=64 << 20, **_SCRYPT)


def hash_password(password: str) -> str:
    """The form in which a password is kept."""
    salt = secrets.token_bytes(16)
    return f"scrypt${base64.b64encode(salt).decode()}${base64.b64encode(_scrypt(password, salt)).decode()}"


def password_fits(password: str, kept: str) -> bool:
    """Whether `password` is the one that was hashed. Takes about 40 ms."""
    try:
        kind, salt, digest = kept.split("$")
        if kind != "scrypt":
            return False
        return hmac.compare_digest(_scrypt(password, base64.b64decode(salt)), base64.b64decode(digest))
    except (ValueError, binascii.Error):
        return False


def _hash_token(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(slots=True)
class AuthFile:
    """The content of the file."""

    users: dict[str, User] = field(default_factory=dict)
    tokens: dict[str, Token] = field(default_factory=dict)
    """By id."""

    @classmethod
    def load(cls, path: Path) -> AuthFile:
        """Read the file.

        Raises:
            AuthFileError: it is missing, others may read it, or it is damaged.
        """
        try:
            with open(path, encoding="utf-8") as file:
                mode = os.fstat(file.fileno()).st_mode
                raw = json.load(file)
        except FileNotFoundError:
            raise AuthFileError(
                f"{path} does not exist: make it with `runstream server auth add-user NAME --file {path}`"
            ) from None
        except (OSError, ValueError) as exc:
            raise AuthFileError(f"{path} cannot be read: {exc}") from exc
        if mode & 0o077:
            raise AuthFileError(f"{path} can be read by others: chmod 600 {path}")
        try:
            users = {name: User(**entry) for name, entry in raw["users"].items()}
            tokens = {identity: Token(**entry) for identity, entry in raw["tokens"].items()}
        except (KeyError, TypeError, AttributeError) as exc:
            raise AuthFileError(f"{path} is damaged: {exc!r}") from exc
        for role in [user.role for user in users.values()] + [token.role for token in tokens.values()]:
            if role not in ROLES:
                raise AuthFileError(f"{path} has the unknown role {role!r}; roles are {', '.join(ROLES)}")
        return cls(users, tokens)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all, readable by the owner only."""
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        content = {
            "users": {name: asdict(user) for name, user in self.users.items()},
            "tokens": {identity: asdict(token) for identity, token in self.tokens.items()},
        }
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)

    def add_user(self, name: str, password: str, role: Role) -> None:
        """Add a user or give one another password and role."""
        if _NAME.match(name) is None:
            raise AuthFileError(f"user name {name!r} may have 1 to 100 letters, digits and _.@+-")
        if len(password) < MIN_PASSWORD_CHARS:
            raise AuthFileError(f"the password must have at least {MIN_PASSWORD_CHARS} characters")
        self.users[name] = User(role, hash_password(password))

    def add_token(self, name: str, role: Role) -> tuple[str, str]:
        """Make a token; its id and the token itself, which is not kept."""
        if _NAME.match(name) is None:
            raise AuthFileError(f"token name {name!r} may have 1 to 100 letters, digits and _.@+-")
        token = TOKEN_PREFIX + secrets.token_urlsafe(32)
        identity = secrets.token_hex(4)
        self.tokens[identity] = Token(name, role, _hash_token(token), time.time_ns() // 1_000_000)
        return identity, token

    def revoke(self, name: str) -> bool:
        """Remove the token with this id, or all tokens and the user of this name; whether there was one."""
        gone = [identity for identity, token in self.tokens.items() if name in (identity, token.name)]
        for identity in gone:
            del self.tokens[identity]
        return self.users.pop(name, None) is not None or bool(gone)


class Authenticator:
    """Recognises requests. `None` as file: authentication is off and everybody may do everything."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._checked_at = 0.0
        self._users: Mapping[str, User] = {}
        self._tokens: Mapping[str, Principal] = {}
        self._remembered: OrderedDict[bytes, tuple[float, Principal]] = OrderedDict()
        self._key = secrets.token_bytes(32)
        if path is not None:
            self._reload(path)

    @property
    def enabled(self) -> bool:
        """Whether requests must authenticate."""
        return self._path is not None

    def _reload(self, path: Path) -> None:
        stat = path.stat()
        content = AuthFile.load(path)
        self._users = content.users
        self._tokens = {token.sha256: Principal(token.name, token.role) for token in content.tokens.values()}
        self._remembered.clear()
        self._stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)

    def _follow_file(self) -> None:
        now = time.monotonic()
        if self._path is None or now - self._checked_at < _CHECK_FILE_SECONDS:
            return
        self._checked_at = now
        try:
            stat = self._path.stat()
            if (stat.st_mtime_ns, stat.st_size, stat.st_ino) != self._stamp:
                self._reload(self._path)
        except (OSError, AuthFileError):
            # A file that has gone or is damaged lets nobody in.
            self._users, self._tokens, self._stamp = {}, {}, None
            self._remembered.clear()

    def known(self, header: str) -> Principal | None:
        """The principal of an Authorization header, without slow work: tokens, and passwords checked lately."""
        self._follow_file()
        scheme, _, value = header.partition(" ")
        if scheme.lower() == "bearer":
            return self._tokens.get(_hash_token(value.strip()))
        if scheme.lower() != "basic":
            return None
        found = self._remembered.get(self._mark(value))
        return found[1] if found is not None and time.monotonic() - found[0] < _REMEMBERED_SECONDS else None

    def check_password(self, header: str) -> Principal | None:
        """The principal of a Basic header, by its password (a token may stand for it). Slow: not on the event loop."""
        scheme, _, value = header.partition(" ")
        if scheme.lower() != "basic":
            return None
        try:
            name, colon, password = base64.b64decode(value.strip(), validate=True).decode("utf-8").partition(":")
        except (ValueError, binascii.Error):
            return None
        if not colon:
            return None
        by_token = self._tokens.get(_hash_token(password))
        if by_token is not None:
            return by_token
        user = self._users.get(name)
        # An unknown name costs as much as a wrong password, so that names cannot be told apart by time.
        fits = password_fits(password, user.password if user is not None else _NOBODY)
        if user is None or not fits:
            return None
        principal = Principal(name, user.role)
        self._remembered[self._mark(value)] = (time.monotonic(), principal)
        while len(self._remembered) > _MAX_REMEMBERED:
            self._remembered.popitem(last=False)
        return principal

    def _mark(self, value: str) -> bytes:
        return hmac.digest(self._key, value.strip().encode("latin-1", "replace"), "sha256")


_NOBODY: Final = hash_password(secrets.token_hex(16))
