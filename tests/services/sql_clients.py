"""The Go and Java programs that talk SQL to a server with the vendor's own drivers: built once, kept in the cache."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

from . import used
from .cache import REPOSITORY, cache_directory, locked
from .maven import JDBC
from .process import ServiceError

GO_SOURCE = REPOSITORY / "tests" / "e2e" / "go"
JDBC_SOURCE = JDBC.pom.parent / "src" / "SqlClient.java"
BUILD_SECONDS = 1_500
"""The Go driver and its modules take two minutes of a processor."""


def go() -> str | None:
    """The Go command: on the PATH, or where Go's own archive puts it."""
    return shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")


def go_missing() -> str | None:
    """Why the Go program cannot be built here, or None."""
    return None if go() else "no go on the PATH (1.26 or later)"


def go_client() -> Path:
    """The built Go program.

    Raises:
        ServiceError: it does not build; says why.
    """
    command = go()
    if command is None:
        raise ServiceError("no go on the PATH")
    binary = cache_directory() / f"sqlclient-{_digest(GO_SOURCE)}"
    with locked(cache_directory() / "sqlclient.lock"):
        if not binary.exists():
            draft = binary.with_suffix(".draft")
            _run([command, "build", "-mod=readonly", "-trimpath", "-o", str(draft), "."], GO_SOURCE)
            draft.rename(binary)
    version = re.search(r"clickhouse-go/v2 (v\S+)", (GO_SOURCE / "go.mod").read_text())
    used.record("go", f"clickhouse-go {version[1] if version else '?'}")
    return binary


def jdbc_command() -> list[str]:
    """The command that runs the Java program, without its arguments.

    Raises:
        ServiceError: it does not build; says why.
    """
    jars = JDBC.jars()
    classes = cache_directory() / f"jdbc-classes-{_digest(JDBC.pom.parent)}"
    with locked(cache_directory() / "jdbc-classes.lock"):
        if not (classes / "complete").exists():
            _run(["javac", "-d", str(classes), "-cp", f"{jars}/*", str(JDBC_SOURCE)], JDBC_SOURCE.parent)
            (classes / "complete").touch()
    used.record("jdbc", next(jars.glob("clickhouse-jdbc-*.jar")).stem)
    path = f"{classes}{os.pathsep}{jars}/*"
    return ["java", "-Xmx400m", "-Duser.timezone=UTC", "-Dstdout.encoding=UTF-8", "-cp", path, "SqlClient"]


def _digest(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
    if done.returncode != 0:
        raise ServiceError(f"{' '.join(command[:3])} failed:\n{(done.stdout + done.stderr)[-3000:]}")
