"""The demo as `make demo` runs it: real models, real processes, and numbers that must agree."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runstream_schemas.layout import DataDirectory, ServerAddress
from tests.services import used
from tests.services.kafka import require_local_kafka

pytestmark = [pytest.mark.chdb, pytest.mark.timeout(300)]


def _environment(**more: str) -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("RUNSTREAM_", "COLUMNS"))}
    return clean | more


def _stop_store(directory: Path) -> None:
    address = ServerAddress.read(DataDirectory(directory).server_file)
    if address is not None:
        os.kill(address.pid, signal.SIGTERM)


def test_demo_trains_logs_and_finds_everything_again(tmp_path: Path) -> None:
    """Ten runs in parallel; every point is in the store; both ways of reading agree; every hint works as printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "runstream", "demo"],
        cwd=tmp_path, env=_environment(COLUMNS="80"), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    try:
        assert done.returncode == 0, done.stdout + done.stderr
        logged, stored = re.search(r"([\d,]+) metric points logged, ([\d,]+) in the store", done.stdout).groups()  # type: ignore[union-attr]
        assert logged == stored and int(logged.replace(",", "")) > 40_000
        assert "Both answers are the same." in done.stdout
        assert "\x1b" not in done.stdout
        assert len(re.findall(r"^\s*\[.*\] +\d+/10 ", done.stdout, re.MULTILINE)) == 10
        hints = done.stdout.split("What to try next")[1].splitlines()
        commands = [line.strip() for line in hints if "runstream" in line and not line.strip().startswith("#")]
        assert len(commands) >= 6
        for command in commands:
            tried = subprocess.run(
                command,
                cwd=tmp_path,
                env=_environment(COLUMNS="80"),
                shell=True,
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert tried.returncode == 0, f"{command}: {tried.stderr}"
            assert tried.stdout, command
        assert (tmp_path / "confusion_matrix.png").read_bytes().startswith(b"\x89PNG")
        _check_runs(tmp_path)
    finally:
        _stop_store(tmp_path / "runstream-data")


def _check_runs(folder: Path) -> None:
    """Each run holds what a training script should log."""
    done = subprocess.run(
        [sys.executable, "-m", "runstream", "runs", "list", "--json"],
        cwd=folder, env=_environment(), capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    runs = json.loads(done.stdout)
    assert len(runs) == 10
    for run in runs:
        assert run["status"] == "FINISHED"
        assert {"train_loss", "val_loss", "val_accuracy", "final_accuracy", "final_f1"} <= set(run["metrics"])
        assert run["params"]["model"] and run["datasets"][0]["name"].startswith("sklearn-")
        assert run["metrics"]["final_accuracy"] > 0.85
        files = subprocess.run(
            [sys.executable, "-m", "runstream", "sql", "--json", "-p", f"run={run['run_id']}",
             "SELECT path, size_bytes FROM artifacts WHERE run_id = {run:String}"],
            cwd=folder, env=_environment(), capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        sizes = {row["path"]: row["size_bytes"] for row in json.loads(files.stdout)}
        assert set(sizes) == {"confusion_matrix.png", "report.txt", "model/model.joblib"}
        assert min(sizes.values()) > 100


def test_demo_in_json_with_few_processes(tmp_path: Path) -> None:
    """Scripts get one document; fewer processes than models take turns."""
    command = [
        sys.executable,
        "-m",
        "runstream",
        "demo",
        "--json",
        "--processes",
        "3",
        "--tracking-uri",
        str(tmp_path / "d"),
    ]
    done = subprocess.run(command, cwd=tmp_path, env=_environment(), capture_output=True, text=True, timeout=240)
    _stop_store(tmp_path / "d")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["points_logged"] == answer["points_stored"] and answer["python_and_sql_agree"]
    assert len(answer["runs"]) == 10 and len(answer["best"]) == 5


@pytest.mark.kafka
def test_demo_on_kafka(tmp_path: Path) -> None:
    """The same through a real broker and worker, and nothing is left running."""
    require_local_kafka()
    script = Path(__file__).resolve().parents[2] / "deploy" / "local" / "kafka_demo.py"
    done = subprocess.run(
        shlex.join([sys.executable, str(script)]),
        shell=True, cwd=tmp_path, env=_environment(), capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    broker = re.search(r"broker (\S+) at ", done.stdout)
    assert broker is not None
    used.record("kafka", f"Apache Kafka {broker[1]} local")
    assert "Both answers are the same." in done.stdout
