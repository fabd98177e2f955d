"""The demo on a real Kafka broker: starts broker, topics, store and worker, and stops them all after it.

`make demo KAFKA=1`. Needs Java and Maven (which fetches the broker once). Everything lies in a temporary folder.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from runstream_schemas.layout import DataDirectory, ServerAddress  # noqa: E402

START_SECONDS = 60.0
STOP_SECONDS = 20.0


def main() -> int:
    """Run everything; the demo's exit code."""
    missing = [name for name in ("java", "mvn") if shutil.which(name) is None]
    if missing:
        print(
            f"error: the Kafka demo needs {' and '.join(missing)}: apt-get install openjdk-17-jre-headless maven",
            file=sys.stderr,
        )
        return 1
    from tests.services.kafka_cluster import KafkaCluster

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="runstream-kafka-demo-")))
        _say("starting an Apache Kafka broker (the first time fetches it)")
        cluster = stack.enter_context(KafkaCluster(folder / "kafka"))
        _say(f"broker {cluster.version} at {cluster.bootstrap}")
        store = folder / "store"
        settings = {
            "RUNSTREAM_TRACKING_URI": f"kafka://{cluster.bootstrap}/demo",
            "RUNSTREAM_ARTIFACT_ROOT": (folder / "artifacts").as_uri(),
            "RUNSTREAM_JOURNAL_DIR": str(folder / "journal"),
        }
        address = stack.enter_context(_local_store(store, folder / "store.log"))
        uri = "clickhouse://{user}:{token}@{at.host}:{at.port}/runstream"
        worker = settings | {
            "RUNSTREAM_STORE_URI": uri.format(user="writer", token=address.writer_token, at=address),
            "RUNSTREAM_METRICS_PORT": "0",
        }
        _run("migrate", worker)
        stack.enter_context(_process("ingest", "worker", worker, folder / "worker.log"))
        reader = settings | {"RUNSTREAM_STORE_URI": str(store)}
        code = subprocess.run(
            [sys.executable, "-m", "runstream", "demo", "--no-hints"], env=os.environ | reader
        ).returncode
        _say("stopping worker, store and broker")
    return code


@contextmanager
def _local_store(directory: Path, log: Path) -> Iterator[ServerAddress]:
    """The store that the worker fills and the readers ask: the local store process on a folder of its own."""
    command = [sys.executable, "-m", "runstream", "ingest", str(directory)]
    with _started(command, "store", {}, log) as process:
        deadline = time.monotonic() + START_SECONDS
        while (address := ServerAddress.read(DataDirectory(directory).server_file)) is None:
            _must_live(process, "store", log, deadline)
            time.sleep(0.05)
        yield address


@contextmanager
def _process(command: str, what: str, settings: dict[str, str], log: Path) -> Iterator[None]:
    with _started([sys.executable, "-m", "runstream", command], what, settings, log) as process:
        yield
        if process.poll() is not None:
            sys.exit(f"error: the {what} ended by itself:\n{log.read_text('utf-8')}")


@contextmanager
def _started(command: list[str], what: str, settings: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A background process, out of reach of the terminal's Ctrl-C, stopped with SIGTERM at the end."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=os.environ | settings, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            print(f"the {what} did not stop in {STOP_SECONDS:.0f} s and is killed", file=sys.stderr)
            process.kill()
            process.wait()


def _must_live(process: subprocess.Popen[bytes], what: str, log: Path, deadline: float) -> None:
    if process.poll() is not None or time.monotonic() > deadline:
        sys.exit(f"error: the {what} did not start:\n{log.read_text('utf-8')}")


def _run(command: str, settings: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-m", "runstream", command], env=os.environ | settings)
    if done.returncode != 0:
        sys.exit(done.returncode)


def _say(text: str) -> None:
    print(f"\N{BULLET} {text}" if (sys.stdout.encoding or "").lower().startswith("utf") else f"- {text}", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
