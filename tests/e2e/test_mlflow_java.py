"""MLflow's own Java client, unmodified, against the server: `java/MlflowJava.java` checks what it reads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mlflow", reason="needs MLflow: pip install -e '.[dev]'")
pytest.importorskip("fastapi", reason="needs the server: pip install 'runstream[server]'")

from tests.e2e.mlflow_server import served
from tests.services.maven import MLFLOW

PROGRAM = Path(__file__).with_name("java") / "MlflowJava.java"


@pytest.mark.timeout(700)
def test_java_client(tmp_path):
    """Experiments, runs, metrics, params, tags, batches, searches, pages, long histories, artifacts, MlflowContext."""
    missing = MLFLOW.missing(compiler=True)
    if missing is not None:
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    jars = MLFLOW.jars()
    files = tmp_path / "files"
    files.mkdir()
    with served(tmp_path / "data") as server:
        # The Java client moves artifacts with the `mlflow` command of the path.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["java", "-cp", f"{jars}/*", str(PROGRAM), server.url, "from Java", str(files)],
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "checks 79"
