"""Ingest from a real Kafka broker, measured beside its peers. `python bench/kafka_ingest.py [--points N] [--repeat N]`

Per message size, alternating in one run, each in a process of its own with a new database, the same tables and views:

    kafka   the worker: kafka-python, framing, insert, positions; until everything is queryable
    files   the same engine; the same framed Avro bytes inserted from files that lie ready
    engine  ClickHouse's own Kafka engine, reading the same bodies as AvroConfluent from the same broker

CPU is user + system time of that process with all its threads; the broker and the schema registry run elsewhere.
Needs Java and Maven (`tests/services`). Last comes freshness: from hand-over to the transport to visible in SQL.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import ingest  # noqa: E402  bench/ingest.py: bodies, files, and what a child measures
from runstream_schemas import codec  # noqa: E402
from runstream_schemas.kafka_address import KafkaAddress, KafkaSecurity  # noqa: E402
from runstream_schemas.names import SCHEMA_HEADER, topic  # noqa: E402

PARTITIONS = 4
MARK = 1_381_192_526


def produce(address: KafkaAddress, name: str, bodies: list[bytes], head: bytes = b"") -> None:
    """All bodies, taking turns over the partitions."""
    from kafka import KafkaProducer

    producer = KafkaProducer(
        bootstrap_servers=list(address.brokers), compression_type="lz4", batch_size=262_144, linger_ms=20
    )
    headers = [(SCHEMA_HEADER, ingest.FINGERPRINT)]
    for number, body in enumerate(bodies):
        key = b"%08x0123456789abcdef01234567" % (number % 32)  # the run's id, as clients send it
        producer.send(name, value=head + body, key=key, headers=headers, partition=number % PARTITIONS)
        if number % 20_000 == 19_999:
            producer.flush()
    producer.flush()
    producer.close()


def _worker(root: Path, address: KafkaAddress, engine: Any) -> Any:
    from runstream_ingest.dead_letter import DirectoryDeadLetters
    from runstream_ingest.local.store import ChdbStore
    from runstream_ingest.log.kafka import KafkaLog
    from runstream_ingest.worker import Worker

    log = KafkaLog(address, f"bench.{root.name}")
    return Worker(log, ChdbStore(engine), DirectoryDeadLetters(root / "log")), log


def measure_kafka(root: Path, uri: str, messages: int, points: int) -> dict[str, Any]:
    import kafka  # noqa: F401  its import is no part of ingesting

    from runstream_ingest.local.store import ChdbStore

    engine = ingest.open_engine(root)
    worker, log = _worker(root, KafkaAddress.parse(uri), engine)
    stop = threading.Event()
    cpu, began = ingest.cpu_seconds(), time.perf_counter()
    thread = threading.Thread(target=worker.run, args=(stop,), daemon=True)
    thread.start()
    while sum(offset for (stream, _), offset in worker.positions().items() if stream == "metrics") < messages:
        if not thread.is_alive():
            raise SystemExit("the worker failed")
        time.sleep(0.01)
    cpu, wall = ingest.cpu_seconds() - cpu, time.perf_counter() - began
    stop.set()
    thread.join()
    log.close()
    return ingest._result(ChdbStore(engine), points, cpu, wall)


def measure_engine(root: Path, uri: str, registry: str, points: int) -> dict[str, Any]:
    from runstream_ingest.errors import StoreError
    from runstream_ingest.local.store import ChdbStore

    address = KafkaAddress.parse(uri)
    engine = ingest.open_engine(root)
    store = ChdbStore(engine)
    fields = [field["name"] for field in codec.current("metric_batch").definition["fields"]]
    types = dict(
        store.rows(
            "SELECT name, type FROM system.columns "
            "WHERE table = 'landing_metric_batch' AND database = {database:String}",
            {"database": store.database},
        )
    )
    columns = ", ".join(f"`{name}` {types[name]}" for name in fields)
    cpu, began = ingest.cpu_seconds(), time.perf_counter()
    try:
        store.execute(
            f"CREATE TABLE kafka_source ({columns}) ENGINE = Kafka SETTINGS "
            f"kafka_broker_list = '{','.join(address.brokers)}', kafka_topic_list = '{address.prefix}.confluent', "
            f"kafka_group_name = 'bench.{root.name}', kafka_format = 'AvroConfluent', kafka_num_consumers = 1, "
            f"format_avro_schema_registry_url = '{registry}', input_format_avro_allow_missing_fields = 1"
        )
    except StoreError as exc:  # chDB says so, and the table works all the same
        if "Shutdown was called" not in str(exc):
            raise
    names = ", ".join(f"`{name}`" for name in fields)
    store.execute(
        f"CREATE MATERIALIZED VIEW kafka_pump TO landing_metric_batch AS SELECT {names}, toInt32(_partition) AS "
        "log_partition, toInt64(_offset) AS log_offset, "
        f"toUnixTimestamp64Milli(assumeNotNull(_timestamp_ms)) AS log_time, {MARK} AS log_mark FROM kafka_source"
    )
    deadline = time.monotonic() + 240
    while store.rows("SELECT count() FROM points") < [(points,)]:
        if time.monotonic() > deadline:
            raise SystemExit(f"the Kafka engine brought {store.rows('SELECT count() FROM points')} of {points}")
        time.sleep(0.1)
    cpu, wall = ingest.cpu_seconds() - cpu, time.perf_counter() - began
    store.execute("DROP TABLE kafka_pump")
    return ingest._result(store, points, cpu, wall)


def measure_freshness(root: Path, uri: str, seconds: float, points_per_second: float) -> dict[str, Any]:
    """A sender in a process of its own, at a steady rate; how old each of its marks is when SQL first shows it."""
    from runstream_ingest.local.store import ChdbStore

    engine = ingest.open_engine(root)
    worker, log = _worker(root, KafkaAddress.parse(uri), engine)
    stop = threading.Event()
    thread = threading.Thread(target=worker.run, args=(stop,), daemon=True)
    thread.start()
    while not worker.ends():
        time.sleep(0.01)
    reader = ChdbStore(engine)
    command = [sys.executable, __file__, "--child", "send", str(root), uri, str(seconds), str(points_per_second)]
    sender = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert sender.stdout is not None
    assert sender.stdout.readline() == "sending\n"
    cpu, began = ingest.cpu_seconds(), time.perf_counter()
    delays: list[float] = []
    sent: dict[str, Any] | None = None
    while sent is None or len(delays) < sent["marks"]:
        rows = reader.rows(
            "SELECT toUnixTimestamp64Milli(timestamp) FROM points "
            "WHERE run_id = 'mark' AND step >= {step:Int64} ORDER BY step",
            {"step": len(delays)},
        )
        now = time.time()
        delays += [now - time_ms / 1_000 for (time_ms,) in rows]
        time.sleep(float(__import__("os").environ.get("POLL", "0.02")))
        if sent is None and sender.poll() is not None:
            sent = json.loads(sender.stdout.read())
    cpu, wall = ingest.cpu_seconds() - cpu, time.perf_counter() - began
    stop.set()
    thread.join()
    log.close()
    steady = sorted(delays[len(delays) // 10 :])  # the first ones find a cold engine
    return {
        "median": statistics.median(steady),
        "p99": steady[int(len(steady) * 0.99)],
        "marks": len(steady),
        "points_per_second": sent["points"] / sent["seconds"],
        "cpu_seconds_per_million": cpu / sent["points"] * 1e6,
        "wall_seconds": wall,
    }


def send(uri: str, seconds: float, points_per_second: float) -> dict[str, Any]:
    """Messages of 1,000 points through the client's transport; a mark's step is its number, its time when it left."""
    from runstream.transport import Event
    from runstream.transport.kafka import KafkaTransport

    bodies = ingest.make_bodies(200_000, 1_000)
    transport = KafkaTransport(KafkaAddress.parse(uri))
    step_seconds = 0.02
    print("sending", flush=True)
    began = time.perf_counter()
    marks = number = 0
    receipts = []
    for step in range(int(seconds / step_seconds)):
        time.sleep(max(0.0, began + step * step_seconds - time.perf_counter()))
        due = int((step + 1) * step_seconds * points_per_second / 1_000) - number
        events = [
            Event("metrics", f"run{at % 32}", ingest.FINGERPRINT, bodies[at % len(bodies)])
            for at in range(number, number + due)
        ]
        number += due
        if step % 5 == 0:
            now = int(time.time() * 1000)
            mark = {"run_id": "mark", "writer": 1, "first_seq": marks, "sent_at": now, "keys": ["mark"]}
            one = {"steps": [marks], "times": [now], "ki": [0], "ci": [0], "values": [1.0]}
            events.append(Event("metrics", "mark", ingest.FINGERPRINT, codec.encode("metric_batch", {**mark, **one})))
            marks += 1
        receipts.append(transport.send(events))
    for receipt in receipts:
        receipt.result(30)
    wall = time.perf_counter() - began
    transport.close(1)
    return {"marks": marks, "points": number * 1_000 + marks, "seconds": wall}


@contextmanager
def schema_registry() -> Iterator[str]:
    """Answers every question with today's schema."""
    answer = json.dumps({"schema": json.dumps(codec.current("metric_batch").definition)}).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def child(kind: str, root: Path, *arguments: object) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--child", kind, str(root), *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=120)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _child(kind: str, root: Path, arguments: list[str]) -> None:
    import os

    if kind == "kafka":
        found = measure_kafka(root, arguments[0], int(arguments[1]), int(arguments[2]))
    elif kind == "engine":
        found = measure_engine(root, arguments[0], arguments[1], int(arguments[2]))
    elif kind == "files":
        found = ingest.measure_files(root, int(arguments[0]))
    elif kind == "send":
        found = send(arguments[0], float(arguments[1]), float(arguments[2]))
    else:
        found = measure_freshness(root, arguments[0], float(arguments[1]), float(arguments[2]))
    print(json.dumps(found), flush=True)
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--points", type=int, default=2_000_000, help="a run; a tenth of it at 1 point a message")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1_000, 100, 1], help="points a message")
    parser.add_argument("--freshness-seconds", type=float, default=10.0)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        _child(given.child[0], Path(given.child[1]), given.child[2:])
    from tests.services.kafka_cluster import KafkaCluster

    folder = Path(tempfile.mkdtemp(prefix="bench-kafka-"))
    try:
        with KafkaCluster(folder / "kafka", vm="server") as cluster, schema_registry() as registry:
            _measure(given, cluster.bootstrap, registry, folder)
    finally:
        shutil.rmtree(folder)


def _measure(given: Any, bootstrap: str, registry: str, folder: Path) -> None:
    limit = 0.0
    print("points/message  what    CPU-s/million  points/s  resident MB   (medians)")
    for size in given.sizes:
        points = given.points if size > 1 else given.points // 10
        points -= points % (math.lcm(size, 20) * 32)
        bodies = ingest.make_bodies(points, size)
        address = _topics(bootstrap, f"bench{size}")
        produce(address, topic(address.prefix, "metrics"), bodies)
        produce(address, f"{address.prefix}.confluent", bodies, b"\x00\x00\x00\x00\x01")
        ingest.write_files(folder / "files", bodies)
        found: dict[str, list[dict[str, Any]]] = {"kafka": [], "files": [], "engine": []}
        for turn in range(given.repeat):
            for kind in found:
                root = folder / f"{kind}{size}-{turn}"
                root.mkdir()
                if kind == "files":
                    (root / "files").symlink_to(folder / "files")
                arguments = {
                    "kafka": (address, len(bodies), points),
                    "files": (points,),
                    "engine": (address, registry, points),
                }
                found[kind].append(child(kind, root, *arguments[kind]))
                shutil.rmtree(root)
        shutil.rmtree(folder / "files")
        middle = {
            kind: {name: statistics.median(run[name] for run in runs) for name in runs[0]}
            for kind, runs in found.items()
        }
        for kind, one in middle.items():
            print(
                f"{size:14d}  {kind:6s}  {one['cpu_seconds_per_million']:13.3f}  {one['points_per_second']:8,.0f}  "
                f"{one['resident_mb']:11.0f}",
                flush=True,
            )
        worker = middle["kafka"]["cpu_seconds_per_million"]
        ratios = ", ".join(
            f"{worker / middle[kind]['cpu_seconds_per_million']:.2f} of {kind}" for kind in list(middle)[1:]
        )
        print(f"                kafka is {ratios}", flush=True)
        limit = max(limit, middle["kafka"]["points_per_second"])
    if given.freshness_seconds > 0 and limit:
        address = _topics(bootstrap, "fresh")
        root = folder / "fresh"
        root.mkdir()
        fresh = child("freshness", root, address, given.freshness_seconds, limit / 2)
        print(
            f"freshness at {fresh['points_per_second']:,.0f} points/s (half the limit), {fresh['marks']} marks: "
            f"median {fresh['median']:.3f} s, 99 % {fresh['p99']:.3f} s, "
            f"{fresh['cpu_seconds_per_million']:.3f} CPU-s/million with merges and the reader"
        )


def _topics(bootstrap: str, prefix: str) -> KafkaAddress:
    from kafka import KafkaAdminClient
    from kafka.admin import NewTopic

    from runstream_ingest.log.kafka_topics import TopicSettings, ensure_topics

    address = KafkaAddress.parse(f"kafka://{bootstrap}/{prefix}")
    ensure_topics(address, KafkaSecurity(), TopicSettings(metrics_partitions=PARTITIONS, control_partitions=1))
    admin = KafkaAdminClient(bootstrap_servers=bootstrap)
    admin.create_topics([NewTopic(f"{prefix}.confluent", PARTITIONS, 1)])
    admin.wait_for_topics([f"{prefix}.confluent"])
    admin.close()
    return address


if __name__ == "__main__":
    main()
