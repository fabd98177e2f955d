"""Apache Kafka's jars from Maven Central, downloaded once into the cache."""

from __future__ import annotations

import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from .cache import cache_directory, locked
from .process import ServiceError

POM = Path(__file__).with_name("pom.xml")


def kafka_version() -> str:
    """The version that the pom names."""
    namespace = {"m": "http://maven.apache.org/POM/4.0.0"}
    found = ElementTree.parse(POM).find(".//m:dependency/m:version", namespace)
    if found is None or not found.text:
        raise ServiceError(f"{POM} names no version")
    return found.text


def local_kafka_missing() -> str | None:
    """Why a local broker cannot run here, or None."""
    if shutil.which("java") is None:
        return "no java on the PATH (Kafka 4 needs 17 or later)"
    if not _marker().exists() and shutil.which("mvn") is None:
        return "no mvn on the PATH to download Kafka with"
    return None


def kafka_jars() -> Path:
    """The folder with the broker's jars (45 files, 43 MB); downloads them at the first call.

    Raises:
        ServiceError: no mvn, or it failed.
    """
    marker = _marker()
    if marker.exists():
        return marker.parent
    with locked(cache_directory() / "kafka.lock"):
        if marker.exists():
            return marker.parent
        folder = marker.parent
        shutil.rmtree(folder, ignore_errors=True)
        done = subprocess.run(
            [
                "mvn", "-q", "-B", "-f", str(POM), "dependency:copy-dependencies",
                f"-DoutputDirectory={folder}", "-DincludeScope=runtime",
            ],
            capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise ServiceError(f"mvn could not download Kafka:\n{(done.stdout + done.stderr)[-2000:]}")
        marker.touch()
        return folder


def _marker() -> Path:
    return cache_directory() / f"kafka-{kafka_version()}" / "complete"
