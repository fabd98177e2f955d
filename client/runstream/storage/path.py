"""Safe artifact paths: relative, with / between parts, and the same file whoever reads them.

Uploading and downloading both pass through here, so a path can leave neither the run's artifact URI nor the folder
that a download goes to.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from runstream_schemas.limits import MAX_ARTIFACT_PATH_CHARS

from ..errors import InvalidInputError

__all__ = ["artifact_path", "is_temporary", "local_target", "temporary_name"]

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_DRIVE: Final = re.compile(r"[A-Za-z]:")
_DECODE_ROUNDS: Final = 4
"""`%252e` and deeper encodings are undone this many times before the check."""
_PART: Final = ".runstream-part"


def artifact_path(path: object, what: str = "artifact path", *, root_is_legal: bool = False) -> str:
    """`path` in its one legal spelling: `a/b/c`, without a leading or doubled slash.

    Args:
        path: a str or a path object.
        what: how error messages call it.
        root_is_legal: whether "" (the run's whole artifact tree) is accepted.

    Raises:
        InvalidInputError: absolute, with `..`, a drive letter, a backslash or a control character (also when
            percent-encoded), not valid Unicode, empty or too long.
    """
    if isinstance(path, os.PathLike):
        path = os.fspath(path)
    if not isinstance(path, str):
        raise InvalidInputError(f"{what} must be a str or a path, not {type(path).__name__}")
    if len(path) > MAX_ARTIFACT_PATH_CHARS:
        raise InvalidInputError(
            f"{what} {path[:60]!r}... has {len(path)} characters; the limit is {MAX_ARTIFACT_PATH_CHARS}: shorten it"
        )
    decoded = path
    for _ in range(_DECODE_ROUNDS):
        _refuse_unsafe(decoded, path, what)
        following = unquote(decoded, errors="replace")
        if following == decoded:
            break
        decoded = following
    clean = "/".join(part for part in path.split("/") if part not in ("", "."))
    if not clean and not root_is_legal:
        raise InvalidInputError(f"{what} {path!r} names no file: give a relative path such as 'plots/loss.png'")
    if any(is_temporary(part) for part in clean.split("/")):
        raise InvalidInputError(f"{what} {path!r} has the name of an unfinished upload: choose another name")
    return clean


def _refuse_unsafe(decoded: str, path: str, what: str) -> None:
    reason = ""
    if decoded.startswith("/"):
        reason = "is absolute"
    elif "\\" in decoded:
        reason = "has a backslash"
    elif _CONTROL.search(decoded):
        reason = "has a control character or half of a surrogate pair"
    elif _DRIVE.match(decoded):
        reason = "starts with a drive letter"
    elif ".." in decoded.split("/"):
        reason = "has '..'"
    elif "://" in decoded:
        reason = "is a URL"
    if reason:
        raise InvalidInputError(
            f"{what} {path!r} {reason}: give a path below the run's artifacts, with / between parts"
        )


def local_target(folder: Path, path: str) -> Path:
    """Where the artifact `path` goes below `folder`; the folders between are not made.

    Raises:
        InvalidInputError: it would leave `folder`, also through a symbolic link that lies there.
    """
    target = folder.joinpath(*artifact_path(path).split("/"))
    root = folder.resolve()
    if not target.resolve().is_relative_to(root):
        raise InvalidInputError(
            f"artifact {path!r} would be written outside {str(folder)!r} through a symbolic link: remove the link"
        )
    return target


def temporary_name(name: str) -> str:
    """The name under which a file called `name` is written until it is whole."""
    return f".{name[:100]}.{os.urandom(4).hex()}{_PART}"


def is_temporary(name: str) -> bool:
    """Whether `name` is that of a file that was never finished; listings leave those out."""
    return name.startswith(".") and name.endswith(_PART)
