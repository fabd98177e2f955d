"""What a git checkout says about the code that runs, read from its files; only `is_dirty` starts a process."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["Checkout", "find_checkout", "is_dirty", "without_credentials"]

_COMMIT: Final = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?\Z")
_SECTION: Final = re.compile(r'\s*\[(?:remote "(?P<remote>[^"]*)"|.*)\]')
_MAX_FILE_BYTES: Final = 8 << 20
"""packed-refs of very large repositories; larger files are not searched."""


@dataclass(frozen=True, slots=True)
class Checkout:
    """One git work tree. Fields are empty where git has nothing to say."""

    folder: Path
    commit: str
    branch: str
    """Empty on a detached HEAD."""
    repository: str
    """URL of the remote `origin` (or the only one), without credentials."""


def find_checkout(start: Path) -> Checkout | None:
    """The work tree around the folder `start`, or None. Reads a few small files; never raises."""
    try:
        for folder in (start, *start.parents):
            mark = folder / ".git"
            if mark.exists():
                return _read(folder, mark)
    except (OSError, ValueError):
        return None
    return None


def is_dirty(folder: Path, timeout_seconds: float = 20.0) -> bool | None:
    """Whether tracked files of the work tree differ from its commit. Blocks; None where git cannot tell in time."""
    import subprocess

    # The repository's own configuration must not get to run programs, nor our look-up take the index lock.
    command = ["git", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null"]
    command += ["status", "--porcelain", "--untracked-files=no", "--ignore-submodules=all"]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=timeout_seconds,
            check=True,
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return bool(done.stdout.strip())


def without_credentials(url: str) -> str:
    """`url` without user, password, query and fragment; the user of an ssh address stays, for it is no secret."""
    if "://" not in url:
        return url  # git@host:path, or a local path
    from urllib.parse import urlsplit, urlunsplit

    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        if ":" in host:
            host = f"[{host}]"
        if parts.port is not None:
            host = f"{host}:{parts.port}"
        if parts.scheme in ("ssh", "git+ssh") and parts.username and not parts.password:
            host = f"{parts.username}@{host}"
        return urlunsplit((parts.scheme, host, parts.path, "", ""))
    except ValueError:
        return ""


def _read(folder: Path, mark: Path) -> Checkout:
    private = mark
    if mark.is_file():  # a linked work tree or a submodule
        private = folder / _text(mark).partition("gitdir:")[2].strip()
    shared = private
    pointer = private / "commondir"
    if pointer.is_file():
        shared = private / _text(pointer).strip()
    head = _text(private / "HEAD").strip()
    if not head.startswith("ref:"):
        return Checkout(folder, head if _COMMIT.match(head) else "", "", _remote(shared))
    reference = head.removeprefix("ref:").strip()
    commit = _commit_of(reference, private, shared)
    return Checkout(folder, commit, reference.removeprefix("refs/heads/"), _remote(shared))


def _commit_of(reference: str, private: Path, shared: Path) -> str:
    if ".." in reference.split("/") or reference.startswith("/"):
        return ""
    for place in (private, shared):
        loose = place / reference
        if loose.is_file():
            commit = _text(loose).strip()
            return commit if _COMMIT.match(commit) else ""
    packed = shared / "packed-refs"
    if packed.is_file():
        for line in _text(packed).splitlines():
            commit, _, name = line.partition(" ")
            if name == reference and _COMMIT.match(commit):
                return commit
    return ""


def _remote(shared: Path) -> str:
    """The URL in git's configuration file; configparser is not used, for it takes longer to import than all of this."""
    urls: dict[str, str] = {}
    remote = ""
    try:
        lines = _text(shared / "config").splitlines()
    except OSError:
        return ""
    for line in lines:
        section = _SECTION.match(line)
        if section:
            remote = section["remote"] or ""
            continue
        key, mark, value = line.partition("=")
        if remote and mark and key.strip().lower() == "url":
            urls[remote] = value.strip().strip('"')
    return without_credentials(urls.get("origin") or (next(iter(urls.values())) if len(urls) == 1 else ""))


def _text(path: Path) -> str:
    with open(path, "rb") as file:
        return file.read(_MAX_FILE_BYTES).decode("utf-8", "replace")
