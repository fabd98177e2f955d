"""The same program through MLflow 3 of this environment and MLflow 2 in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("mlflow", reason="needs MLflow: pip install -e '.[dev]'")
pytest.importorskip("fastapi", reason="needs the server: pip install 'runstream[server]'")

from tests.e2e.mlflow_server import Served, served
from tests.services.cache import cache_directory, locked

PROGRAM = Path(__file__).with_name("mlflow_client_script.py")
MLFLOW_2 = "2.22.5"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("releases") / "data") as running:
        yield running


def run_program(python: Path | str, server: Served, name: str) -> str:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "PYTHONPATH"))}
    done = subprocess.run(
        [str(python), str(PROGRAM), server.url, name], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.timeout(400)
def test_mlflow_3(server):
    """The release that this environment has."""
    assert run_program(sys.executable, server, "three").endswith("checks 34")


@pytest.mark.timeout(700)
def test_mlflow_2(server):
    """The last MLflow 2, installed from the package index into the cache at the first run."""
    folder = cache_directory() / f"mlflow-{MLFLOW_2}"
    python = folder / "bin" / "python"
    with locked(cache_directory() / "mlflow-2.lock"):
        if not (folder / "complete").exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True, timeout=120)
            subprocess.run(
                [str(python), "-m", "pip", "install", "-q", f"mlflow-skinny=={MLFLOW_2}"], check=True, timeout=400
            )
            (folder / "complete").touch()
    assert run_program(python, server, "two") == f"mlflow {MLFLOW_2} checks 34"
