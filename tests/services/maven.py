"""Java programs of Maven Central with the jars they need: downloaded once into the cache, as a pom names them."""

from __future__ import annotations

import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .cache import REPOSITORY, cache_directory, locked
from .process import ServiceError

__all__ = ["JDBC", "KAFKA", "MLFLOW", "Program"]


@dataclass(frozen=True, slots=True)
class Program:
    """What a pom names first, and all that it depends on."""

    name: str
    """Of the folder in the cache."""
    pom: Path

    @property
    def version(self) -> str:
        """The version that the pom names."""
        found = ElementTree.parse(self.pom).find(
            ".//m:dependency/m:version", {"m": "http://maven.apache.org/POM/4.0.0"}
        )
        if found is None or not found.text:
            raise ServiceError(f"{self.pom} names no version")
        return found.text

    def missing(self, *, compiler: bool = False) -> str | None:
        """Why it cannot run here, or None.

        Args:
            compiler: whether a class of our own has to be compiled against it.
        """
        if shutil.which("java") is None or (compiler and shutil.which("javac") is None):
            return f"no {'JDK' if compiler else 'java'} on the PATH (17 or later)"
        if not (self._folder / "complete").exists() and shutil.which("mvn") is None:
            return f"no mvn on the PATH to download {self.name} with"
        return None

    def jars(self) -> Path:
        """The folder with the jars; downloads them at the first call.

        Raises:
            ServiceError: no mvn, or it failed.
        """
        folder = self._folder
        marker = folder / "complete"
        with locked(cache_directory() / f"{self.name}.lock"):
            if not marker.exists():
                shutil.rmtree(folder, ignore_errors=True)
                command = ["mvn", "-q", "-B", "-f", str(self.pom), "dependency:copy-dependencies"]
                options = [f"-DoutputDirectory={folder}", "-DincludeScope=runtime"]
                done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=600, check=False)
                if done.returncode != 0:
                    said = (done.stdout + done.stderr)[-2000:]
                    raise ServiceError(f"mvn could not download {self.name}:\n{said}")
                marker.touch()
        return folder

    @property
    def _folder(self) -> Path:
        return cache_directory() / f"{self.name}-{self.version}"


KAFKA: Final = Program("kafka", Path(__file__).with_name("pom.xml"))
"""Apache Kafka's broker: 45 files, 43 MB."""
MLFLOW: Final = Program("mlflow-java", REPOSITORY / "tests" / "e2e" / "java" / "pom.xml")
"""MLflow's client: 2 files, 8 MB."""
JDBC: Final = Program("clickhouse-jdbc", REPOSITORY / "tests" / "e2e" / "java-jdbc" / "pom.xml")
"""ClickHouse's driver."""
