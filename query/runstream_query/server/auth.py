"""The file of users and tokens: their roles, their permissions for experiments, and the key that signs sessions.

Passwords are hashed with scrypt, tokens (256 random bits) with SHA-256. Changes are made under a lock beside the file,
so that the command line and servers (which note who made an experiment) do not undo each other's.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from .principal import PERMISSIONS, ROLES, Permission, Principal, Role

T = TypeVar("T")
TOKEN_PREFIX: Final = "rst_"
_SCRYPT: Final = {"n": 1 << 14, "r": 8, "p": 1}
_NAME = re.compile(r"[\w.@+-]{1,100}\Z")
_EXPERIMENT_ID = re.compile(r"\d{1,20}\Z")
MIN_PASSWORD_CHARS: Final = 12
MAX_PASSWORD_CHARS: Final = 1_000


class AuthFileError(ValueError):
    """The file of users and tokens is missing, damaged or would be wrong."""


@dataclass(slots=True)
class User:
    """A person with a password."""

    role: Role
    password: str = field(repr=False)
    """`scrypt$<salt>$<hash>`, both base64."""
    default: Permission | None = None
    """For experiments that `experiments` does not name; None: what the role allows."""
    experiments: dict[str, Permission] = field(default_factory=dict)
    """By experiment id."""

    def principal(self, name: str) -> Principal:
        """This user as the sender of a request."""
        return Principal(name, self.role, self.default, self.experiments)


@dataclass(slots=True)
class Token:
    """A program's credential."""

    name: str
    role: Role
    sha256: str = field(repr=False)
    created_at: int = 0
    """UTC milliseconds."""
    default: Permission | None = None
    experiments: dict[str, Permission] = field(default_factory=dict)

    def principal(self) -> Principal:
        """This token as the sender of a request."""
        return Principal(self.name, self.role, self.default, self.experiments)


def _titled(content: AuthFile) -> dict[str, User | Token]:
    titled: dict[str, User | Token] = {f"user {name}": user for name, user in content.users.items()}
    return titled | {f"token {identity} ({token.name})": token for identity, token in content.tokens.items()}


def permissions_of(entry: User | Token) -> list[str]:
    """`experiment id:permission` for each permission of their own, for people to read; `others:` is the default."""
    held = [f"{experiment}:{permission}" for experiment, permission in sorted(entry.experiments.items())]
    return held if entry.default is None else [*held, f"others:{entry.default}"]


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


def hash_token(token: str) -> str:
    """The form in which a token is kept."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(slots=True)
class AuthFile:
    """The content of the file."""

    users: dict[str, User] = field(default_factory=dict)
    tokens: dict[str, Token] = field(default_factory=dict)
    """By id."""
    session_key: str = field(default_factory=lambda: secrets.token_hex(32), repr=False)
    """Signs the cookies of browser sessions, in every server process that reads this file."""

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
        entries: list[User | Token] = [*users.values(), *tokens.values()]
        for entry in entries:
            if entry.role not in ROLES:
                raise AuthFileError(f"{path} has the unknown role {entry.role!r}; roles are {', '.join(ROLES)}")
            held = [entry.default, *entry.experiments.values()]
            for permission in held:
                if permission is not None and permission not in PERMISSIONS:
                    known = ", ".join(PERMISSIONS)
                    raise AuthFileError(f"{path} has the unknown permission {permission!r}; they are {known}")
        return cls(users, tokens, str(raw.get("session_key", "")))

    @classmethod
    def change(cls, path: Path, change: Callable[[AuthFile], T]) -> T:
        """Load the file (or begin an empty one), apply `change` and save, all under the file's lock. Blocks.

        Raises:
            AuthFileError: the file is damaged, cannot be written, or `change` refuses.
        """
        try:
            handle = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise AuthFileError(f"{path} cannot be changed: {exc.strerror or exc}") from exc
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            content = cls.load(path) if path.exists() else cls()
            result = change(content)
            try:
                content.save(path)
            except OSError as exc:
                raise AuthFileError(f"{path} cannot be changed: {exc.strerror or exc}") from exc
            return result
        finally:
            os.close(handle)

    def changes_since(self, earlier: AuthFile) -> list[str]:
        """What is different from `earlier`, a line each, without secrets: for the audit."""
        before = _titled(earlier)
        after = _titled(self)
        lines = [f"{title} removed" for title in before if title not in after]
        for title, entry in after.items():
            known = before.get(title)
            if known is None:
                lines.append(f"{title} added: {' '.join([entry.role, *permissions_of(entry)])}")
                continue
            if known.role != entry.role:
                lines.append(f"{title}: {entry.role} instead of {known.role}")
            if isinstance(entry, User) and isinstance(known, User) and known.password != entry.password:
                lines.append(f"{title}: another password")
            if (known.default, known.experiments) != (entry.default, entry.experiments):
                lines.append(f"{title}: permissions are now {' '.join(permissions_of(entry)) or 'those of the role'}")
        return lines

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all, readable by the owner only."""
        self.session_key = self.session_key or secrets.token_hex(32)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        content = {
            "users": {name: asdict(user) for name, user in self.users.items()},
            "tokens": {identity: asdict(token) for identity, token in self.tokens.items()},
            "session_key": self.session_key,
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
        if len(password) > MAX_PASSWORD_CHARS:
            raise AuthFileError(f"the password may have at most {MAX_PASSWORD_CHARS} characters")
        known = self.users.get(name)
        kept = (None, {}) if known is None else (known.default, known.experiments)
        self.users[name] = User(role, hash_password(password), *kept)

    def add_token(self, name: str, role: Role) -> tuple[str, str]:
        """Make a token; its id and the token itself, which is not kept."""
        if _NAME.match(name) is None:
            raise AuthFileError(f"token name {name!r} may have 1 to 100 letters, digits and _.@+-")
        token = TOKEN_PREFIX + secrets.token_urlsafe(32)
        identity = secrets.token_hex(4)
        self.tokens[identity] = Token(name, role, hash_token(token), time.time_ns() // 1_000_000)
        return identity, token

    def revoke(self, name: str) -> bool:
        """Remove the token with this id, or all tokens and the user of this name; whether there was one."""
        gone = [identity for identity, token in self.tokens.items() if name in (identity, token.name)]
        for identity in gone:
            del self.tokens[identity]
        return self.users.pop(name, None) is not None or bool(gone)

    def named(self, name: str) -> list[User | Token]:
        """The user and the tokens called `name`, or the token with that id.

        Raises:
            AuthFileError: there is none.
        """
        found: list[User | Token] = [token for identity, token in self.tokens.items() if name in (identity, token.name)]
        if name in self.users:
            found.append(self.users[name])
        if not found:
            raise AuthFileError(f"there is no user or token {name!r}; see `runstream server auth list`")
        return found

    def grant(self, name: str, permission: Permission, experiment_id: str | None) -> None:
        """Give `name` a permission for one experiment; None: for all that have none of their own."""
        if experiment_id is not None and _EXPERIMENT_ID.match(experiment_id) is None:
            raise AuthFileError(f"experiment id {experiment_id!r} is not a number")
        for entry in self.named(name):
            if experiment_id is None:
                entry.default = permission
            else:
                entry.experiments[experiment_id] = permission

    def revoke_grant(self, name: str, experiment_id: str | None) -> bool:
        """Take a permission back, so that the default (or, without one, the role) holds; whether there was one."""
        found = False
        for entry in self.named(name):
            if experiment_id is None:
                found = found or entry.default is not None
                entry.default = None
            else:
                found = entry.experiments.pop(experiment_id, None) is not None or found
        return found
