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
from .process import ServiceError

GO_SOURCE = REPOSITORY / "tests" / "e2e" / "go"
JDBC_SOURCE = REPOSITORY / "tests" / "e2e" / "java-jdbc"
BUILD_SECONDS = 1_500
"""The Go driver and its modules take two minutes of a processor."""


def go() -> str | None:
    """The Go command: on the PATH, or where Go's own archive puts it."""
    return shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")


def go_missing() -> str | None:
    """Why the Go program cannot be built here, or None."""
    return None if go() else "no go on the PATH (1.26 or later)"


def jdbc_missing() -> str | None:
    """Why the Java program cannot be built here, or None."""
    return next((f"no {name} on the PATH" for name in ("java", "javac", "mvn") if shutil.which(name) is None), None)


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
    folder = cache_directory() / f"jdbc-{_digest(JDBC_SOURCE)}"
    with locked(cache_directory() / "jdbc.lock"):
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            _run(
                [
                    "mvn", "-q", "-B", "-f", str(JDBC_SOURCE / "pom.xml"), "dependency:copy-dependencies",
                    f"-DoutputDirectory={folder / 'jars'}", "-DincludeScope=runtime",
                ],
                JDBC_SOURCE,
            )  # fmt: skip
            source = JDBC_SOURCE / "src" / "SqlClient.java"
            _run(["javac", "-d", str(folder / "classes"), "-cp", f"{folder / 'jars'}/*", str(source)], JDBC_SOURCE)
            (folder / "complete").touch()
    jar = next((folder / "jars").glob("clickhouse-jdbc-*.jar"))
    used.record("jdbc", jar.stem)
    classes = f"{folder / 'classes'}{os.pathsep}{folder / 'jars'}/*"
    return ["java", "-Xmx400m", "-Duser.timezone=UTC", "-Dstdout.encoding=UTF-8", "-cp", classes, "SqlClient"]


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
