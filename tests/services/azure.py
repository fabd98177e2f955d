"""Azure's blob storage on loopback: Azurite (npm), from the PATH or from the cache; optional, for it has 190 MB."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import used
from .cache import cache_directory, free_ports
from .process import ServerProcess

__all__ = ["ACCOUNT", "KEY", "azurite", "serving"]

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The emulator's own, the same everywhere and documented as such: no secret."""


def azurite() -> str | None:
    """The emulator's command; None where there is none (`npm install --prefix .cache/azurite azurite`)."""
    cached = cache_directory() / "azurite" / "node_modules" / ".bin" / "azurite-blob"
    return str(cached) if cached.exists() else shutil.which("azurite-blob")


@contextmanager
def serving(folder: Path, command: str) -> Iterator[str]:
    """Serve blobs kept in `folder`; the connection string."""
    [port] = free_ports(1)
    arguments = ["--silent", "--skipApiVersionCheck", "--blobHost", "127.0.0.1", "--blobPort", str(port)]
    server = ServerProcess([command, *arguments, "--location", str(folder / "blobs")], folder / "azurite.log")
    server.start()
    try:
        server.wait_ready(lambda: _answers(port), 60)
        used.record("azure", "Azurite, local")
        yield (
            f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};"
            f"BlobEndpoint=http://127.0.0.1:{port}/{ACCOUNT};"
        )
    finally:
        server.stop()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
