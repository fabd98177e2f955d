"""The built wheel, installed outside the repository in an environment of its own, as a user has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = {"runstream", "runstream_ingest", "runstream_query", "runstream_schemas"}
CLIENT_LIMIT_BYTES = 40_000_000
HEAVY = {
    "chdb", "click", "clickhouse_connect", "fastapi", "fastavro", "fsspec", "google_crc32c", "kafka", "lark", "numpy",
    "pandas", "psutil", "pyarrow", "pydantic", "pydantic_settings", "rich", "runstream_ingest", "runstream_query",
    "starlette", "structlog", "uvicorn", "yaml",
}  # fmt: skip
"""Modules that `import runstream` must leave alone; each loads when it is first used."""

pytestmark = pytest.mark.timeout(600)


def _run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of `command`, run with nothing of this repository on its path."""
    env = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV", "RUNSTREAM"))
    }
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env | environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    _run(
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, REPOSITORY,
        cwd=folder, RUNSTREAM_BUILD_UI="0",
    )  # fmt: skip
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The bin folder of a fresh virtual environment with the client alone."""
    root = tmp_path_factory.mktemp("client-only")
    _run(sys.executable, "-m", "venv", root / "venv", cwd=root)
    python = root / "venv" / "bin" / "python"
    _run(python, "-m", "pip", "install", "--quiet", wheel, cwd=root)
    yield root / "venv" / "bin"


def test_wheel_holds_the_four_packages_and_nothing_else(wheel: Path) -> None:
    """Four packages and the metadata lie at the top of the wheel, with their types, schemas and SQL."""
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == PACKAGES
    assert all(f"{package}/py.typed" in names for package in PACKAGES)
    assert any(name.startswith("runstream_schemas/avro/") and name.endswith(".avsc") for name in names)
    assert any(name.startswith("runstream_schemas/sql/") and name.endswith(".sql") for name in names)
    assert not [name for name in names if "/tests/" in name or name.endswith((".pyc", ".orig", ".log"))]


def test_wheel_carries_every_tracked_file_of_the_packages(wheel: Path) -> None:
    """A file that a package needs is never left out of the wheel."""
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = _run("git", "ls-files", "client/runstream", "ingest", "query", "schemas", cwd=REPOSITORY).splitlines()
    wanted = {path.split("/", 1)[1] for path in tracked if (REPOSITORY / path).exists()}
    assert wanted <= names, sorted(wanted - names)[:10]


def test_client_without_extras_imports_and_logs(environment: Path, tmp_path: Path) -> None:
    """The client alone logs a run; reading says which line installs what is missing."""
    script = """
import runstream, sys
runstream.set_tracking_uri(sys.argv[1])
with runstream.start_run(run_name="bare") as run:
    runstream.log_param("lr", 0.1)
    for step in range(100):
        runstream.log_metric("loss", 1 / (step + 1), step=step)
try:
    runstream.search_runs()
except ImportError as exc:
    print(exc)
"""
    answer = _run(environment / "python", "-c", script, tmp_path / "data", cwd=tmp_path)
    assert "pip install 'runstream[server]'" in answer
    assert list((tmp_path / "data" / "log" / "metrics").iterdir())


def test_import_is_light(environment: Path, tmp_path: Path) -> None:
    """`import runstream` loads none of the heavy modules, not even those of its own dependencies."""
    script = "import json, sys, runstream; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    loaded = set(json.loads(_run(environment / "python", "-c", script, cwd=tmp_path)))
    assert loaded & HEAVY == set()


def test_client_without_extras_is_small(environment: Path) -> None:
    """Everything the client installs stays under 40 MB (without pip itself)."""
    (site,) = (environment.parent / "lib").glob("python*/site-packages")
    own = [entry for entry in site.iterdir() if not entry.name.lower().startswith(("pip", "setuptools", "wheel"))]
    files = [file for entry in own for file in ([entry] if entry.is_file() else entry.rglob("*")) if file.is_file()]
    size = sum(file.stat().st_size for file in files if "__pycache__" not in file.parts)
    assert 1_000_000 < size < CLIENT_LIMIT_BYTES


def test_command_line_without_extras(environment: Path, tmp_path: Path) -> None:
    """The command works on the client alone as far as it needs nothing else, and says what it needs beyond that."""
    assert _run(environment / "runstream", "version", cwd=tmp_path).startswith("runstream ")
    assert "experiments" in _run(environment / "runstream", "--help", cwd=tmp_path)
    done = subprocess.run(
        [str(environment / "runstream"), "runs", "list", "--tracking-uri", str(tmp_path / "data")],
        capture_output=True, text=True, timeout=60, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (5, "")
    assert "pip install 'runstream[server]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_every_package_imports_without_extras(environment: Path, tmp_path: Path, package: str) -> None:
    """Each of the four packages can be imported on the client's dependencies alone."""
    _run(environment / "python", "-W", "error", "-c", f"import {package}", cwd=tmp_path)
