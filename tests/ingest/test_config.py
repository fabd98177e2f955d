"""Settings, the command, logs, metrics and health of a worker process; what deploy/ingest.md says of them."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, get_args

import pytest

from runstream_ingest.config import IngestSettings, load
from runstream_ingest.dead_letter import DeadLetter, Source
from runstream_ingest.errors import SYSTEMIC_CODES, TRANSIENT_CODES, SettingsError, StoreBusy, store_error
from runstream_ingest.metrics import DESCRIPTIONS, MetricName, Metrics, serve
from runstream_ingest.service import configure_logging

DOCUMENT = (Path(__file__).parents[2] / "deploy" / "ingest.md").read_text(encoding="utf-8")
STORE = "clickhouse://u:top-secret@h:1/db"


def test_settings_come_from_the_environment() -> None:
    """Each with its type; empty variables count as unset, others are ignored."""
    settings = load(
        {
            "RUNSTREAM_TRACKING_URI": "kafka://h:1/team",
            "RUNSTREAM_STORE_URI": STORE,
            "RUNSTREAM_MAX_BATCH_BYTES": "4096",
            "RUNSTREAM_FLUSH_INTERVAL_SECONDS": "0.25",
            "RUNSTREAM_METRICS_PORT": "",
            "RUNSTREAM_SOMETHING_ELSE": "x",
        }
    )
    assert settings.worker().limits.max_batch_bytes == 4096
    assert settings.worker().flush_interval_seconds == 0.25
    assert settings.metrics_port == 9464
    assert settings.store_address().password == "top-secret"
    assert settings.kafka_address().prefix == "team"


def test_secrets_are_never_shown() -> None:
    """Not in repr, str, nor JSON of the settings."""
    settings = load({"RUNSTREAM_STORE_URI": STORE})
    for text in (repr(settings), str(settings), settings.model_dump_json(), str(settings.store_address())):
        assert "top-secret" not in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("STORE_URI", "http://u:top-secret@h"),
        ("MAX_BATCH_BYTES", "top-secret"),
        ("FLUSH_INTERVAL_SECONDS", "-1"),
        ("LOG_FORMAT", "top-secret"),
    ],
)
def test_wrong_settings_are_named_and_not_repeated(name: str, value: str) -> None:
    """The message has the variable, never its value."""
    with pytest.raises(SettingsError, match=f"RUNSTREAM_{name}") as caught:
        load({f"RUNSTREAM_{name}": value})
    assert "top-secret" not in str(caught.value)


def test_missing_addresses_say_which_variable() -> None:
    """With an example of what it should hold."""
    settings = load({})
    with pytest.raises(SettingsError, match=r"RUNSTREAM_STORE_URI is not set.*clickhouse://"):
        settings.store_address()
    with pytest.raises(SettingsError, match=r"RUNSTREAM_TRACKING_URI is not set.*kafka://"):
        settings.kafka_address()
    with pytest.raises(SettingsError, match="RUNSTREAM_TRACKING_URI: not a Kafka address"):
        load({"RUNSTREAM_TRACKING_URI": "/data"}).kafka_address()


def test_every_setting_and_metric_is_documented() -> None:
    """deploy/ingest.md names each; `settings` prints each."""
    for name, field in IngestSettings.model_fields.items():
        assert f"`RUNSTREAM_{name.upper()}`" in DOCUMENT
        assert field.description
    for metric in get_args(MetricName):
        assert f"`{metric}`" in DOCUMENT
    done = subprocess.run(
        [sys.executable, "-m", "runstream_ingest", "settings"], check=True, capture_output=True, text=True
    )
    for name in IngestSettings.model_fields:
        assert f"RUNSTREAM_{name.upper()}" in done.stdout


@pytest.mark.parametrize("command", ["kafka", "migrate"])
def test_commands_without_settings_exit_with_2(command: str) -> None:
    """One line on standard error, no stack trace."""
    done = subprocess.run(
        [sys.executable, "-m", "runstream_ingest", command], capture_output=True, text=True, env={"PATH": "/usr/bin"}
    )
    assert done.returncode == 2
    assert done.stderr.startswith("runstream: RUNSTREAM_")
    assert "Traceback" not in done.stderr


def test_a_server_that_is_away_exits_with_1() -> None:
    """And says so."""
    environment = {"PATH": "/usr/bin", "RUNSTREAM_STORE_URI": "clickhouse://u:top-secret@127.0.0.1:9/db"}
    done = subprocess.run(
        [sys.executable, "-m", "runstream_ingest", "migrate"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1
    assert "cannot open clickhouse://u@127.0.0.1:9/db" in done.stderr
    assert "top-secret" not in done.stderr
    assert "Traceback" not in done.stderr


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, exc.read().decode()


def test_metrics_and_health_answer() -> None:
    """Prometheus text with every metric; 503 with the reason while something is wrong."""
    metrics = Metrics()
    metrics.batch(10, 1_000, 0.5, 1)
    metrics.dead_letters([DeadLetter(Source("metrics", 0, 1, 1), 2, "x")])
    metrics.lag["metrics", 3] = 42
    trouble: list[str | None] = [None]
    server = serve(metrics, lambda: trouble[0], "127.0.0.1", 0)
    try:
        base = f"http://127.0.0.1:{server.server_address[1]}"
        status, text = get(f"{base}/metrics")
        assert status == 200
        for name in get_args(MetricName):
            assert f"# HELP {name} {DESCRIPTIONS[name]}" in text
        assert "runstream_ingest_records_total 10.0" in text
        assert "runstream_ingest_dead_letters_total 1.0" in text
        assert 'runstream_ingest_lag_records{partition="3",stream="metrics"} 42.0' in text
        assert get(f"{base}/health") == (200, "ok\n")
        trouble[0] = "the store has been away for 9 seconds"
        assert get(f"{base}/health") == (503, "the store has been away for 9 seconds\n")
        assert get(f"{base}/other")[0] == 404
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("kind", ["text", "json"])
def test_log_lines(kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """One line an event, for a person or for a machine, on standard error."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        configure_logging(kind)
        logging.getLogger("runstream_ingest.worker").warning("set aside %d records", 3)
    finally:
        root.handlers[:], root.level = before, level
    [line] = capsys.readouterr().err.splitlines()
    assert "set aside 3 records" in line
    if kind == "json":
        found = json.loads(line)
        assert (found["level"], found["logger"]) == ("warning", "runstream_ingest.worker")


def test_store_errors_are_sorted_by_what_to_do() -> None:
    """Transient codes and unreachable stores are busy; the others are not, and only some blame the database."""
    assert isinstance(store_error("x", None), StoreBusy)
    for code in (159, 202, 209, 210, 241, 242, 243, 252, 285, 319, 999):
        assert isinstance(store_error("x", code), StoreBusy), code
    for code in (60, 81, 497, 516):
        assert store_error("x", code).systemic
        assert not isinstance(store_error("x", code), StoreBusy)
    assert not store_error("x", 33).systemic
    assert not TRANSIENT_CODES & SYSTEMIC_CODES
