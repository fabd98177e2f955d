"""A running server keeps its local store process, which otherwise leaves when nobody asks."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the server: pip install 'runstream[server]'")

from fastapi import FastAPI

from runstream_query.server import app
from runstream_query.server.settings import ServerSettings
from tests.ingest.local_store import local_store
from tests.services.events import until

IDLE_EXIT_SECONDS = 2.0


@pytest.mark.chdb
def test_a_server_that_nobody_asks_keeps_its_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For three times as long as the process would stay; when the server has stopped, it leaves."""
    monkeypatch.setattr(app, "KEEP_STORE_SECONDS", IDLE_EXIT_SECONDS / 10)
    server = app.Server(ServerSettings(tracking_uri=str(tmp_path / "data"), access_log=False))

    with local_store(tmp_path / "data", idle_exit=IDLE_EXIT_SECONDS) as store:
        pid = store.address().pid

        async def serve() -> None:
            async with server.running(FastAPI()):
                idle = time.monotonic()
                while time.monotonic() - idle < 3 * IDLE_EXIT_SECONDS:
                    assert store.process.poll() is None
                    await asyncio.sleep(0.1)

        asyncio.run(serve())
        assert store.address().pid == pid
        until(lambda: store.process.poll() == 0, 20, "the store leaves")
