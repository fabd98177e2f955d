"""The calls of `Client` that move files. Every upload blocks until it is complete and then is recorded."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from .entities import FileInfo
from .run_artifacts import RunArtifacts
from .storage.transfer import ProgressCallback

__all__ = ["ArtifactCalls"]

LocalPath = str | os.PathLike[str]


class ArtifactCalls(ABC):
    """Artifacts by run id.

    Raises:
        ArtifactError: storage refused or failed for good; what was complete before stays and is recorded.
        InvalidInputError: a path, name or object does not fit.
    """

    @abstractmethod
    def artifacts_of(self, run_id: str) -> RunArtifacts:
        """The artifacts of one run."""

    def log_artifact(
        self,
        run_id: str,
        local_path: LocalPath,
        artifact_path: str | None = None,
        *,
        progress: ProgressCallback | None = None,
    ) -> None:
        """Upload a file, or a folder under its own name, into the artifact folder `artifact_path`."""
        self.artifacts_of(run_id).log(local_path, artifact_path, progress)

    def log_artifacts(
        self,
        run_id: str,
        local_dir: LocalPath,
        artifact_path: str | None = None,
        *,
        progress: ProgressCallback | None = None,
        recorded: Mapping[str, tuple[int, str]] | None = None,
    ) -> None:
        """Upload what a folder holds, several files at once; a second call sends only what is missing or has changed.

        Args:
            progress: called with a `Progress` as bytes move.
            recorded: artifact path -> (size in bytes, digest) of files that another process has logged.
        """
        self.artifacts_of(run_id).log_tree(local_dir, artifact_path, progress, recorded)

    def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
        """Write a text in UTF-8."""
        self.artifacts_of(run_id).log_text(text, artifact_file)

    def log_dict(self, run_id: str, dictionary: Any, artifact_file: str) -> None:
        """Write a dict or list as JSON, or as YAML where the name ends in .yaml or .yml."""
        self.artifacts_of(run_id).log_dict(dictionary, artifact_file)

    def log_figure(
        self, run_id: str, figure: Any, artifact_file: str, *, save_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Write a matplotlib or plotly figure."""
        self.artifacts_of(run_id).log_figure(figure, artifact_file, save_kwargs)

    def log_image(
        self,
        run_id: str,
        image: Any,
        artifact_file: str | None = None,
        key: str | None = None,
        step: int | None = None,
        timestamp: int | None = None,
        synchronous: bool | None = None,
    ) -> None:
        """Write a picture as a file, or as one step of the series `key`."""
        self.artifacts_of(run_id).log_image(image, artifact_file, key, step, timestamp)

    def log_table(self, run_id: str, data: Any, artifact_file: str) -> None:
        """Write a dict of columns or a DataFrame as JSON; later rows come behind earlier ones."""
        self.artifacts_of(run_id).log_table(data, artifact_file)

    def list_artifacts(self, run_id: str, path: str | None = None) -> list[FileInfo]:
        """What lies directly below the folder `path`."""
        return self.artifacts_of(run_id).list(path)

    def download_artifacts(
        self,
        run_id: str,
        path: str = "",
        dst_path: LocalPath | None = None,
        *,
        progress: ProgressCallback | None = None,
    ) -> str:
        """Download a file or tree ("" for everything); its local path, below `dst_path` or a new temporary folder."""
        return self.artifacts_of(run_id).download(path, dst_path, progress)
