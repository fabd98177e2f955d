"""MLflow's Java client from Maven Central, downloaded once into the cache."""

from __future__ import annotations

import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from .cache import REPOSITORY, cache_directory, locked
from .process import ServiceError

POM = REPOSITORY / "tests" / "e2e" / "java" / "pom.xml"


def java_missing() -> str | None:
    """Why Java programs cannot be compiled and run here, or None."""
    if shutil.which("java") is None or shutil.which("javac") is None:
        return "no JDK (java and javac, 17 or later) on the PATH"
    if not (_folder() / "complete").exists() and shutil.which("mvn") is None:
        return "no mvn on the PATH to download MLflow's Java client with"
    return None


def mlflow_jars() -> Path:
    """The folder with the client's jars (2 files, 8 MB); downloads them at the first call.

    Raises:
        ServiceError: no mvn, or it failed.
    """
    folder = _folder()
    marker = folder / "complete"
    with locked(cache_directory() / "mlflow-java.lock"):
        if marker.exists():
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        done = subprocess.run(
            [
                "mvn", "-q", "-B", "-f", str(POM), "dependency:copy-dependencies",
                f"-DoutputDirectory={folder}", "-DincludeScope=runtime",
            ],
            capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise ServiceError(f"mvn could not download MLflow's Java client:\n{(done.stdout + done.stderr)[-2000:]}")
        marker.touch()
        return folder


def _folder() -> Path:
    namespace = {"m": "http://maven.apache.org/POM/4.0.0"}
    found = ElementTree.parse(POM).find(".//m:dependency/m:version", namespace)
    if found is None or not found.text:
        raise ServiceError(f"{POM} names no version")
    return cache_directory() / f"mlflow-java-{found.text}"
