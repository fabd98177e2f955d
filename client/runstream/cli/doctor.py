"""`runstream doctor`: looks at everything runstream needs here, and says what to do about what is wrong."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import click

from .command import Command, session_of
from .failure import ExitCode, Failure
from .text import size
from .version import version_of

if TYPE_CHECKING:
    from runstream_schemas.layout import DataDirectory

    from ..config import Settings
    from .output import Output
    from .session import Session

__all__ = ["Check", "doctor"]

Verdict = Literal["ok", "warning", "failed", "skipped"]
_SIGNS: Final = {"ok": ("✓", 32), "warning": ("!", 33), "failed": ("✗", 31), "skipped": ("-", 90)}
_FREE_BYTES: Final = 1 << 30
"""Less free space than this is worth a warning."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    detail: str
    remedy: str = ""


@click.command(cls=Command)
@click.option("--offline", is_flag=True, help="Only what can be seen without asking the store, brokers or storage.")
@click.pass_context
def doctor(context: click.Context, offline: bool) -> None:
    """Check Python, installed parts, data directory, journals, store, Kafka and storage.

    Exit code 1 if something is broken. A remedy stands below everything that is not in order.
    """
    session = session_of(context)
    checks: list[Check] = []
    for check in _checks(session, offline=offline):
        checks.append(check)
        if not session.output.json:
            _print(session.output, check)
    failed = [check for check in checks if check.verdict == "failed"]
    if session.output.json:
        session.output.value({"ok": not failed, "checks": [asdict(check) for check in checks]})
    if failed:
        count = "one check" if len(failed) == 1 else f"{len(failed)} checks"
        raise Failure(f"{count} failed: {', '.join(check.name for check in failed)}", ExitCode.FAILED)


def _print(out: Output, check: Check) -> None:
    sign, color = _SIGNS[check.verdict]
    if not (sys.stdout.encoding or "").lower().startswith("utf"):
        sign = {"ok": "ok", "warning": "!!", "failed": "XX", "skipped": "--"}[check.verdict]
    mark = f"\x1b[{color}m{sign}\x1b[0m" if out.colors else sign
    out.write(f"{mark} {check.name:<12} {check.detail}")
    if check.remedy and check.verdict != "ok":
        out.write(f"  {'':<12} {check.remedy}")


def _checks(session: Session, *, offline: bool) -> Iterator[Check]:
    from ..config import Settings

    yield _python()
    yield from _parts()
    settings = _guarded("settings", lambda: Settings.from_environment(tracking_uri=session.tracking_uri))
    if isinstance(settings, Check):
        yield settings
        return
    yield Check("address", "ok", settings.tracking_uri)
    directory = settings.data_directory
    if directory is not None:
        yield _writable(directory)
        yield _space(directory.root)
        yield from _file_system(directory.root)
        yield _local_store(directory)
    yield _journals(settings)
    if offline:
        return
    if settings.scheme == "kafka":
        yield _kafka(settings)
    if settings.scheme == "http":
        yield from _server(settings)
    yield _reading(session)
    yield _artifacts(settings)


def _guarded(name: str, look: Callable[[], Settings]) -> Settings | Check:
    try:
        return look()
    except Exception as exc:
        return Check(name, "failed", str(exc), "correct the environment variable or --tracking-uri")


def _python() -> Check:
    detail = f"{platform.python_implementation()} {platform.python_version()}, {platform.system()} {platform.machine()}"
    return Check("python", "ok", detail)


def _parts() -> Iterator[Check]:
    own = version_of("runstream")
    yield Check("runstream", "ok" if own else "warning", own or "not installed as a package")
    needed = {"server": ("chdb", "clickhouse-connect", "pandas", "pyarrow", "lark", "rich")}
    for extra, names in needed.items():
        missing = [name for name in names if version_of(name) is None]
        if missing:
            yield Check(
                "reading",
                "warning",
                f"not installed ({', '.join(missing)}); logging works without",
                f"pip install 'runstream[{extra}]'",
            )
    if version_of("google-crc32c") is None and version_of("crc32c") is None:
        yield Check(
            "crc32c",
            "warning",
            "not installed: reading Kafka is nine times slower",
            "pip install 'kafka-python[crc32c]'",
        )


def _writable(directory: DataDirectory) -> Check:
    root = directory.root
    place = root if root.exists() else next(parent for parent in root.parents if parent.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".runstream-doctor-"):
            pass
    except OSError as exc:
        return Check(
            "data",
            "failed",
            f"{place} cannot be written: {exc.strerror}",
            "change its owner, or set RUNSTREAM_TRACKING_URI",
        )
    if not root.exists():
        return Check("data", "ok", f"{root} does not exist yet; the first run makes it")
    used = sum(file.stat().st_size for part in (directory.log, directory.database) for file in _files(part))
    return Check("data", "ok", f"{root} is writable; log and store take {size(used)}")


def _files(folder: Path) -> Iterator[Path]:
    for place, _, names in os.walk(folder):
        for name in names:
            file = Path(place) / name
            if file.is_file():
                yield file


def _space(root: Path) -> Check:
    place = root if root.exists() else next(parent for parent in root.parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < _FREE_BYTES:
        return Check("space", "warning", f"{size(free)} free", "free some space: a full disk stops the store")
    return Check("space", "ok", f"{size(free)} free")


def _file_system(root: Path) -> Iterator[Check]:
    from ..journal.place import is_network_file_system

    if is_network_file_system(root):
        yield Check(
            "disk",
            "warning",
            f"{root} lies on a network file system, where locks and shared mappings cannot be trusted",
            "keep the data directory on a local disk, or log to kafka://",
        )


def _local_store(directory: DataDirectory) -> Check:
    from runstream_schemas.layout import ServerAddress

    from .session import local_store_pid

    pid = local_store_pid(directory)
    if pid is not None:
        address = ServerAddress.read(directory.server_file)
        where = f" at {address.host}:{address.port}" if address is not None else ""
        return Check("store", "ok", f"local store process {pid}{where}")
    return Check("store", "ok", "no local store process now; the next read starts one")


def _journals(settings: Settings) -> Check:
    from .sync import leftover_journals

    try:
        left = leftover_journals(settings)
    except Exception as exc:
        return Check("journals", "failed", f"cannot be looked at: {exc}", "set RUNSTREAM_JOURNAL_DIR to a local folder")
    if left:
        total = sum(journal.size_bytes for journal in left)
        return Check(
            "journals",
            "warning",
            f"{len(left)} left behind by processes that are gone ({size(total)})",
            "`runstream sync` delivers them; the next run does, too",
        )
    return Check("journals", "ok", "nothing left behind")


def _kafka(settings: Settings) -> Check:
    from ..delivery import open_transport

    started = time.monotonic()
    try:
        transport = open_transport(settings)
        try:
            ends = transport.end_positions(timeout_seconds=10.0)
        finally:
            transport.close(timeout_seconds=1.0)
    except Exception as exc:
        return Check(
            "kafka",
            "failed",
            " ".join(str(exc).split()),
            "start the broker or correct RUNSTREAM_KAFKA_*; topics come from `runstream migrate`",
        )
    took = (time.monotonic() - started) * 1000
    return Check("kafka", "ok", f"{len(ends)} partitions, {sum(ends.values())} records; answered in {took:.0f} ms")


def _server(settings: Settings) -> Iterator[Check]:
    """Whether the server answers and lets this client in, and which way events and artifacts go."""
    from ..remote.artifacts import artifacts_way
    from ..remote.server import server_of
    from ..transport.server import direct_transport

    started = time.monotonic()
    try:
        server = server_of(settings)
        info = server.info(max_age_seconds=0.0)
    except Exception as exc:
        yield Check("server", "failed", " ".join(str(exc).split()), "start the server, or correct RUNSTREAM_TRACKING_*")
        return
    took = (time.monotonic() - started) * 1000
    asks = "asks for a login" if info.authentication else "asks nobody for a login"
    yield Check("server", "ok", f"runstream {info.version}, {asks}; answered in {took:.0f} ms")
    if server.login.given and settings.tracking_uri.startswith("http:") and not server.is_loopback:
        yield Check("login", "warning", "goes over the network in clear text", "use https")
    if settings.delivery == "server":
        way = "through the server (RUNSTREAM_DELIVERY=server)"
    else:
        direct, why = direct_transport(info)
        if direct is not None:
            direct.close(1.0)
        way = why if direct is not None else f"through the server: {why}"
    yield Check("events", "ok", way)
    root, why = artifacts_way(settings, info)
    yield Check("storage", "ok", f"straight to {root}" if root is not None else f"through the server: {why}")


def _reading(session: Session) -> Check:
    if version_of("clickhouse-connect") is None:
        return Check("sql", "skipped", "reading is not installed")
    started = time.monotonic()
    try:
        row = session.sql("SELECT count() AS runs, countIf(lost) AS lost FROM runs")[0]
    except Exception as exc:
        return Check(
            "sql", "failed", " ".join(str(exc).split()), "see db/server.log, or RUNSTREAM_STORE_URI for a server"
        )
    took = (time.monotonic() - started) * 1000
    lost = f", {row['lost']} of them lost" if row["lost"] else ""
    detail = f"{row['runs']} runs{lost}; first answer in {took:.0f} ms"
    if row["lost"]:
        return Check("sql", "warning", detail, "`runstream runs close-lost` closes runs whose process is gone")
    return Check("sql", "ok", detail)


def _artifacts(settings: Settings) -> Check:
    from ..addresses import artifact_root
    from ..remote.artifacts import open_artifacts

    try:
        root = artifact_root(settings)
        started = time.monotonic()
        probe = open_artifacts(settings, f"{root}/.runstream-doctor")
        try:
            probe.put_bytes(b"runstream doctor", "probe")
            if probe.read("probe") != b"runstream doctor":
                return Check(
                    "artifacts", "failed", f"{root} gave back something else than was written", "check the storage"
                )
        finally:
            probe.delete("")
    except Exception as exc:
        return Check(
            "artifacts", "failed", " ".join(str(exc).split()), "check RUNSTREAM_ARTIFACT_ROOT and the credentials"
        )
    return Check(
        "artifacts", "ok", f"{root}: written, read and removed in {(time.monotonic() - started) * 1000:.0f} ms"
    )
