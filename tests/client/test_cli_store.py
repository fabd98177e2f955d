"""Commands of who runs the store: sync after a kill, dead letters, rebuild, migrate, close-lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runstream.cli.session import local_store_pid
from runstream.transport import Event
from runstream.transport.directory import DirectoryTransport
from runstream_schemas import codec
from runstream_schemas.layout import DataDirectory, ServerAddress

pytestmark = [pytest.mark.chdb, pytest.mark.timeout(180)]


class Place:
    """A data directory and the command on it."""

    def __init__(self, root: Path) -> None:
        self.directory = DataDirectory(root)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        env = {key: value for key, value in os.environ.items() if not key.startswith("RUNSTREAM_")}
        return subprocess.run(
            [sys.executable, "-W", "error", "-m", "runstream", "--tracking-uri", str(self.directory.root), *arguments],
            env=env, capture_output=True, text=True, timeout=90, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def json(self, *arguments: str, code: int = 0) -> Any:
        done = self.run("--json", *arguments)
        assert done.returncode == code, f"{arguments}: {done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr
        return json.loads(done.stdout)

    def log(self, *events: Event) -> None:
        transport = DirectoryTransport(self.directory.log)
        transport.send(events).result(10.0)
        transport.sync()
        transport.close(5.0)

    def log_run(self, name: str, points: int) -> str:
        """Log one run in a process of its own; its id."""
        script = f"""
import runstream, sys
runstream.set_tracking_uri(sys.argv[1])
with runstream.start_run(run_name={name!r}) as run:
    runstream.log_param("lr", 1)
    for step in range({points}):
        runstream.log_metric("loss", step / 7, step=step)
print(run.info.run_id)
"""
        done = subprocess.run(
            [sys.executable, "-c", script, str(self.directory.root)],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        return done.stdout.strip()

    def stop(self) -> None:
        """End the local store process and wait until it is gone."""
        address = ServerAddress.read(self.directory.server_file)
        if address is None:
            return
        os.kill(address.pid, signal.SIGTERM)
        deadline = time.monotonic() + 30
        while local_store_pid(self.directory) is not None:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def views(self) -> dict[str, Any]:
        """Every view's rows, in an order of their own."""
        names = ("experiments", "runs", "params", "tags", "metrics", "latest_metrics", "inputs", "artifacts")
        return {name: self.json("sql", f"SELECT * FROM {name} ORDER BY ALL") for name in names}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path / "data")
    yield made
    made.stop()


_ENDLESS = """
import os, runstream, sys
runstream.set_tracking_uri(sys.argv[1])
run = runstream.start_run(run_name="victim")
step = 0
while True:
    runstream.log_metric("loss", step, step=step)
    step += 1
    if step % 100 == 0:
        os.write(1, f"{step}\\n".encode())
"""


def test_sync_delivers_what_a_killed_process_left(place: Place) -> None:
    """After kill -9 every point that was logged is delivered once, and a second sync finds nothing."""
    with subprocess.Popen(
        [sys.executable, "-c", _ENDLESS, str(place.directory.root)], stdout=subprocess.PIPE, text=True
    ) as victim:
        assert victim.stdout is not None
        told = 0
        while told < 20_000:
            told = int(victim.stdout.readline())
        victim.kill()
        told = max([told, *(int(line) for line in victim.stdout.read().split("\n")[:-1])])
    first = place.json("sync")
    assert first["complete"] and first["journals"] == 1
    again = place.json("sync")
    assert (again["complete"], again["journals"], again["points"]) == (True, 0, 0)
    [row] = place.json("sql", "SELECT count() AS n, uniqExact(step) AS steps, max(step) AS last FROM metrics")
    assert row["n"] == row["steps"] == row["last"] + 1
    assert row["n"] >= told


def test_lost_runs_are_closed_and_a_late_end_wins(place: Place) -> None:
    """A run that has been silent for long becomes LOST and can be ended; a FINISHED that comes later still counts."""
    long_ago = time.time_ns() // 1_000_000 - 600_000
    run = {"run_id": "a" * 32, "experiment_id": "0", "name": "old", "started_at": long_ago, "artifact_uri": ""}
    event = {"user": "", "source_name": "", "source_type": "", "source_version": "", "parent_run_id": ""}
    start = run | event | {"time_ms": long_ago, "seq": 1, "writer": 7}
    schema = codec.current("run_started")
    place.log(Event("control", "a" * 32, schema.fingerprint, codec.encode("run_started", start)))
    [listed] = place.json("runs", "list")
    assert listed["lost"] is True
    assert "LOST" in place.run("runs", "list").stdout
    assert place.json("runs", "close-lost", "--dry-run")["runs"][0]["run_id"] == "a" * 32
    assert place.json("runs", "show", "a" * 32)["status"] == "RUNNING"
    closed = place.json("runs", "close-lost", "--status", "FAILED")
    assert [row["run_id"] for row in closed["runs"]] == ["a" * 32]
    shown = place.json("runs", "show", "a" * 32)
    assert (shown["status"], shown["lost"]) == ("FAILED", False)
    assert shown["ended_at"] == shown["heartbeat_at"]
    assert place.json("runs", "close-lost")["runs"] == []
    end = {"run_id": "a" * 32, "status": "FINISHED", "ended_at": long_ago + 5, "name": "", "lifecycle_stage": ""}
    update = codec.encode("run_updated", end | {"time_ms": long_ago + 5, "seq": 2, "writer": 7})
    place.log(Event("control", "a" * 32, codec.current("run_updated").fingerprint, update))
    assert place.json("runs", "show", "a" * 32)["status"] == "FINISHED"


def test_dead_letters_are_listed_shown_and_replayed(place: Place) -> None:
    """A refused body is listed with its reason and bytes; a replay of what is still wrong fails and says so."""
    place.log_run("good", 10)
    schema = codec.current("metric_batch")
    place.log(
        Event("metrics", "x", schema.fingerprint, b"\x00garbage"),
        Event("metrics", "y", bytes.fromhex("0123456789abcdef"), b"from the future"),
    )
    place.json("sql", "SELECT count() FROM metrics")  # waits until both were read
    letters = place.json("dead-letters", "list")
    assert len(letters) == 2
    assert {letter["size_bytes"] for letter in letters} == {8, 15}
    assert len(place.json("dead-letters", "list", "--reason", "fingerprint")) == 1
    for letter in letters:
        shown = place.json("dead-letters", "show", letter["source"])
        assert shown["reason"] == letter["reason"] and shown["body"]
        assert place.run("dead-letters", "show", letter["source"]).stdout
    assert "SOURCE" in place.run("dead-letters", "list").stdout
    done = place.run("dead-letters", "replay", "--all")
    assert done.returncode == 1 and "2 still refused" in done.stdout
    assert len(place.json("dead-letters", "list")) == 2
    assert place.run("dead-letters", "replay").returncode == 2
    assert place.run("dead-letters", "show", "metrics/0/999999/0").returncode == 3
    assert place.json("sql", "SELECT count() AS n FROM metrics") == [{"n": 10}]


def test_a_mended_dead_letter_is_replayed_into_the_store(place: Place) -> None:
    """A letter whose body is sound, refused for a reason that is gone, is stored and marked; again is harmless."""
    from runstream_ingest.dead_letter import DeadLetter, DirectoryDeadLetters, Source

    run_id = place.log_run("good", 3)
    schema = codec.current("params")
    fields = {
        "run_id": run_id,
        "keys": ["late"],
        "values": ["yes"],
        "time_ms": 1_700_000_000_000,
        "seq": 9,
        "writer": 9,
    }
    body = codec.encode("params", fields)
    source = Source("control", 0, 77, 1_700_000_000_000)
    letter = DeadLetter(source, 177, "refused by a bug that was mended", run_id.encode(), schema.fingerprint, body)
    DirectoryDeadLetters(place.directory.log).put([letter])
    assert place.json("dead-letters", "show", str(source))["fields"]["keys"] == ["late"]
    assert place.json("dead-letters", "replay", str(source)) == {"replayed": 1, "still_refused": 0, "skipped": 0}
    assert place.json("runs", "show", run_id)["params"]["late"] == "yes"
    assert place.json("dead-letters", "list") == []
    assert place.json("dead-letters", "list", "--all")[0]["replayed"] is True
    assert place.run("dead-letters", "replay", str(source)).returncode == 3


def test_rebuild_gives_the_same_answers(place: Place) -> None:
    """Without --yes nothing changes; with it every view answers as before, and purged runs stay away."""
    keep = place.log_run("keep", 500)
    gone = place.log_run("gone", 5)
    place.json("runs", "delete", gone)
    place.json("gc", "--yes")
    before = place.views()
    plan = place.json("rebuild")
    assert (plan["swapped"], plan["differences"]) == (False, [])
    assert place.views() == before
    done = place.json("rebuild", "--yes")
    assert (done["swapped"], done["differences"]) == (True, [])
    assert place.views() == before
    assert [row["run_id"] for row in place.json("runs", "list", "--stage", "all")] == [keep]
    place.json("rebuild", "--drop-old")
    place.log_run("later", 7)
    assert place.json("sql", "SELECT count() AS n FROM metrics") == [{"n": 507}]


def test_rebuild_of_a_store_that_cannot_be_opened(place: Place) -> None:
    """A store that no longer opens is set aside, only when told to, and built anew from a log that has everything."""
    from runstream_ingest.store import StoreAddress, connect

    place.log_run("one", 50)
    before = place.views()
    address = ServerAddress.read(place.directory.server_file)
    assert address is not None
    store = connect(StoreAddress(address.host, address.port, "writer", address.writer_token, "runstream"))
    store.execute("INSERT INTO schema_migrations SELECT 1, 'tables', 'edited', now64(3, 'UTC') + INTERVAL 1 DAY")
    store.close()
    place.stop()
    assert place.run("runs", "list").returncode == 4
    told = place.run("rebuild")
    assert told.returncode == 1 and "runstream rebuild --yes" in told.stderr
    done = place.json("rebuild", "--yes")
    assert Path(done["aside"]).is_dir()
    assert place.views() == before


def test_migrate_of_a_data_directory_says_that_it_is_up_to_date(place: Place) -> None:
    """A data directory needs no migration by hand, and asking for one is no error."""
    assert place.json("migrate")["applied"] == []
